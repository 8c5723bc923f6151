"""What long work says of itself: messages for its stages, and bars on terminals. Imports neither torch nor rich."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

STAGES = "torch_rtx.stages"
log = logging.getLogger(STAGES)
EVERY_S = 10.0  # between two messages of one stage


def stage(text: str) -> None:
    """Say that a stage begins: a message of level INFO, which the command line shows."""
    log.info("%s", text)


@contextmanager
def progress(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], object]]:
    """A function of the numbers of finished and of all parts of a stage. It draws a bar if the console (None: stderr)
    is a terminal and rich is installed; elsewhere it says now and then how far the work is."""
    stage(what)
    if console is None and sys.stderr.isatty() and find_spec("rich") is not None:
        from rich.console import Console  # slow imports, which only terminals need

        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        yield _messages(what)
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _messages(what: str) -> Callable[[int, int], object]:
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY_S:
            last = time.monotonic()
            stage(f"{what}: {done} of {total}")

    return update
