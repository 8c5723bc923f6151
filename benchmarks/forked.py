"""Worker processes that begin with all that they need imported: forks of a server process, which imported it once."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path


class Forked:
    """A process as `subprocess.Popen` shows it."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative after a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("a worker", timeout or 0)
        return status

    def kill(self) -> None:
        """End it."""
        self._process.kill()


class Server:
    """Starts processes; on systems that can fork.

    Args:
        modules: are imported once, before the first process starts. Errors of imports are left to the processes.
    """

    def __init__(self, *modules: str) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        self._starting = threading.Lock()

    def worker(self, job: Path, events: Path, log: Path, environment: Mapping[str, str]) -> Forked:
        """A process that does what `python -m benchmarks.worker` does, in a session of its own.

        Args:
            log: the file for what it prints.
            environment: the variables that differ from those of this process.
        """
        process = self._context.Process(target=_work, args=(str(job), str(events), str(log), dict(environment)))
        with self._starting:
            process.start()
        return Forked(process)


def is_spoilt_by(module: str, spoilt: Callable[[], bool]) -> bool:
    """Whether `spoilt` holds after an import, or the import ends the process: a fork tries it."""
    child = os.fork()
    if not child:
        with suppress(BaseException):
            import_module(module)
        os._exit(spoilt())
    return os.waitpid(child, 0)[1] != 0


def is_cuda_in_use() -> bool:
    """The process has begun to use CUDA, which its forks can't do then."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0
    except OSError:  # there is no driver
        return False


def _work(job: str, events: str, log: str, environment: dict[str, str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    from benchmarks import worker

    worker.main(job, events)
