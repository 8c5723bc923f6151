"""Processes that start with PyTorch and the models loaded, which takes longer than what tests do in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import NamedTemporaryFile
from typing import IO, Any

PRELOADED = ["pytest", "torch._dynamo", "torch._inductor.debug", "torch._functorch.aot_autograd", "benchmarks.models"]
PRELOADED += ["torch_rtx.backend.entry", "torch_rtx.backend.compiler", "torch_rtx.runtime.session"]


def forked(target: Callable[..., object], *args: Any) -> ForkServerProcess:
    """A process that runs `target(*args)`, started."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=args)
    process.start()
    return process


def say_to(file: Path) -> None:
    """From here on, what this process prints goes to `file`."""
    said = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)


class ForkedModule:
    """Stands for `subprocess.Popen` of `python -m MODULE ARGUMENTS`, whose `main` takes the arguments."""

    def __init__(self, command: Sequence[str], stdout: IO[bytes], env: Mapping[str, str], **_: object) -> None:
        python, option, module, *arguments = command
        assert (python, option) == (sys.executable, "-m")
        self._process = forked(_main, module, arguments, Path(stdout.name), dict(env))
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The status that it ended with, -N for signal N; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """The same, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired("a forked process", timeout or 0)
        return self.returncode


def forked_run(command: Sequence[str], env: Mapping[str, str], **_: object) -> CompletedProcess[str]:
    """Stands for `subprocess.run` of the same, which captures what is printed."""
    with NamedTemporaryFile() as file:
        process = ForkedModule(command, file, env)  # type: ignore[arg-type]
        process.wait(120)
        said = Path(file.name).read_text()
    return CompletedProcess(command, process.returncode or 0, said, said)


def _main(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    from importlib import import_module

    os.setsid()
    os.environ.update(environment)
    say_to(log)
    import_module(module).main(*arguments)
