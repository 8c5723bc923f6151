"""Workers that share a GPU: one at a time measures, and the others are stopped meanwhile."""

from __future__ import annotations

import signal
import threading
from typing import Protocol


class Stoppable(Protocol):
    """A worker process and its children."""

    def signal(self, number: int) -> None:
        """Send a signal to all of them."""


class Turns:
    """Who has a GPU alone; may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[Stoppable] = []
        self._alone: Stoppable | None = None

    def join(self, worker: Stoppable) -> None:
        """A worker uses the GPU from now on."""
        with self._lock:
            self._workers.append(worker)
            if self._alone is not None:
                worker.signal(signal.SIGSTOP)

    def leave(self, worker: Stoppable) -> None:
        """A worker has ended."""
        with self._lock:
            self._workers.remove(worker)
        self.release(worker)

    def ask(self, worker: Stoppable) -> bool:
        """Let a worker have the GPU alone, unless another one has it: whether it has it now."""
        with self._lock:
            if self._alone is None:
                self._alone = worker
                self._signal(signal.SIGSTOP)
            return self._alone is worker

    def release(self, worker: Stoppable) -> None:
        """A worker that had the GPU alone shares it again; one that had not may say so too."""
        with self._lock:
            if self._alone is worker:
                self._signal(signal.SIGCONT)
                self._alone = None

    def is_stopped(self, worker: Stoppable) -> bool:
        """Whether a worker waits for another one."""
        return self._alone not in (None, worker)

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            if worker is not self._alone:
                worker.signal(number)
