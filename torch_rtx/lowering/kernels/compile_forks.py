"""Forks of the compile worker, each of which compiles one kernel at a time.

Triton holds the interpreter lock for about a tenth of a compilation, so that more than a few threads wait for each
other. Forks start at once, since Triton is imported before them, and end with the process that they belong to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NoReturn

from torch_rtx.lowering.kernels.toolchain import KEPT, Code, Job, lower

THREADS = 4  # so many are as fast as processes
MOST = 16  # forks: each takes some 30 MB of its own


class Forks:
    """Forks that run `toolchain.lower`. Calls from many threads share them; results are cached as those of `lower`.

    Args:
        count: how many. Threads must not have begun.
        inherited: file descriptors that a fork has to close, so that those at their other end see this process end.
        ended: called where a fork has ended in the middle of a job, as a crash of the compiler ends it.
    """

    def __init__(self, count: int, inherited: Sequence[int], ended: Callable[[], NoReturn]) -> None:
        assert hasattr(os, "fork")
        self._ended = ended
        self._free: SimpleQueue[Connection[Any, Any]] = SimpleQueue()
        ours: list[Connection[Any, Any]] = []
        for _ in range(count):
            end, other = Pipe()
            ours.append(end)
            if os.fork() == 0:
                _serve(other, [*inherited, *(one.fileno() for one in ours)])
            other.close()
            self._free.put(end)
        self.lower = lru_cache(maxsize=KEPT)(self._lower)

    def _lower(self, job: Job) -> Code:
        end = self._free.get()
        try:
            end.send(job)
            answer = end.recv()
        except (OSError, EOFError):
            self._ended()
        finally:
            self._free.put(end)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Code)
        return answer


def _serve(end: Connection[Any, Any], inherited: Sequence[int]) -> NoReturn:
    """Answer jobs until the process that sends them ends: with their code, or the error of `lower`."""
    answer: Code | Exception
    try:
        for descriptor in inherited:
            os.close(descriptor)
        while True:
            job = end.recv()
            try:
                answer = lower.__wrapped__(job)  # the other process caches
            except Exception as error:
                answer = error.with_traceback(None)
            end.send(answer)
    finally:
        os._exit(0)
