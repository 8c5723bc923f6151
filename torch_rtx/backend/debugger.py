"""`Debugger`: a context in which every compilation is logged and dumped."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import ExitStack
from typing import Any

from torch_rtx.errors import SettingsError
from torch_rtx.settings import dumping

LEVELS = ("debug", "info", "warning", "error")


class Debugger:
    """Logs what torch_rtx does, and dumps the graph after each pass and every stage of every kernel:

        with torch_rtx.Debugger() as debugger:
            module = torch_rtx.compile(model, inputs)
        print(debugger.logging_dir)

    It holds for what this thread compiles inside, by torch.compile as well, unless settings name a `dump_dir` of their
    own. What was compiled before is not compiled again, and caches are not used. docs/debugging.md says what the files
    are. The log is `torch_rtx.log` in the same folder, and goes to stderr as well unless the program's own
    handlers show it.

    Args:
        log_level: "debug", "info", "warning" or "error".
        logging_dir: the folder; None: a new one for temporary files.

    Raises:
        SettingsError: there is no such level.
    """

    def __init__(self, log_level: str = "debug", logging_dir: str | os.PathLike[str] | None = None) -> None:
        if log_level not in LEVELS:
            raise SettingsError(f"unknown log_level {log_level!r}", hint=f"levels are {', '.join(LEVELS)}")
        self.log_level = log_level
        self.logging_dir = None if logging_dir is None else os.path.abspath(logging_dir)
        self._undo = ExitStack()

    def __enter__(self) -> Debugger:
        if self.logging_dir is None:
            self.logging_dir = tempfile.mkdtemp(prefix="torch_rtx_debug_")
        os.makedirs(self.logging_dir, exist_ok=True)
        logger = logging.getLogger("torch_rtx")
        with ExitStack() as undo:
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(self.log_level.upper())
            file = logging.FileHandler(os.path.join(self.logging_dir, "torch_rtx.log"), encoding="utf-8")
            handlers: list[logging.Handler] = [file] if logger.hasHandlers() else [file, logging.StreamHandler()]
            for handler in handlers:
                handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
                logger.addHandler(handler)
                undo.callback(handler.close)
                undo.callback(logger.removeHandler, handler)
            undo.enter_context(dumping(self.logging_dir))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()
