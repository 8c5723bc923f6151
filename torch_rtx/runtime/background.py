"""One background thread per process, which compiles and measures while the program makes calls.

It runs jobs in order. A second phase of a job (`later`) runs only when no job is waiting, so that no model waits for
its first kernels while those of another are measured. Jobs are cooperative: between steps they ask whether the process
ends. At its end `stop` closes whatever a job may be waiting for, so that nothing hangs.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

log = logging.getLogger(__name__)
Job = Callable[[], object]
SWITCH_S = 1e-4  # the longest time that another thread waits for a job to release the interpreter lock
STOP_TIMEOUT_S = 5.0  # the longest time that the end of the process waits for a running step


class Stopped(Exception):
    """The process is about to end: the job must give up."""


@dataclass(order=True)
class _Entry:
    """An entry of the queue, in the order of execution; without a job it ends the thread."""

    rank: int
    number: int
    job: Job | None = field(default=None, compare=False)
    done: threading.Event = field(default_factory=threading.Event, compare=False)
    later: Job | None = field(default=None, compare=False)


FIRST, LATER, LAST = range(3)  # ranks


def attempt(job: Job) -> bool:
    """Run a job and log a failure; True if it ran to its end."""
    try:
        job()
        return True
    except Stopped:
        pass
    except Exception as error:
        log.warning("specialization failed, the code stays as it is: %s", error)
        log.debug("the failure in full", exc_info=True)
    return False


class Background:
    """A thread that runs jobs in the order of their submission, and then their second phases."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[_Entry] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process = 0
        self._closing: list[Callable[[], None]] = []
        self._waiting: list[threading.Event] = []  # `done` of unfinished jobs, in order
        self._resumed = threading.Condition()
        self._pauses = 0  # contexts in `paused`
        self.stopping = False

    def submit(self, job: Job, done: threading.Event, later: Job | None = None) -> None:
        """Queue `job`, and `later` to follow once no other job waits. Failures are logged.

        Args:
            done: set when both have run or failed, or will never run.
        """
        with self._lock:
            if self.stopping:
                done.set()
                return
            if self._thread is None or not self._thread.is_alive() or self._process != os.getpid():
                try:
                    self._start()  # the first job of the process, which may be a fork
                except RuntimeError as error:  # the process ends or has too many threads: calls must not fail
                    log.warning("nothing is specialized: %s", error)
                    done.set()
                    return
            self._waiting = [event for event in self._waiting if not event.is_set()] + [done]
            self._jobs.put(_Entry(FIRST, next(self._numbers), job, done, later))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for all submitted jobs; False after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            waiting = list(self._waiting)
        return all(event.wait(None if end is None else max(0.0, end - time.monotonic())) for event in waiting)

    def _start(self) -> None:
        if self._process not in (0, os.getpid()):  # threads in `paused` are those of the parent
            self._jobs, self._pauses = queue.PriorityQueue(), 0
        self._process = os.getpid()
        thread = threading.Thread(target=self._work, args=(self._jobs,), name="torch_rtx", daemon=True)
        thread.start()
        if self._thread is None:
            atexit.register(self.stop)
        self._thread = thread

    def _work(self, jobs: queue.PriorityQueue[_Entry]) -> None:
        while (entry := jobs.get()).job is not None:
            ran = False
            try:
                with _switching():
                    ran = not self.stopping and attempt(entry.job)
            except BaseException as error:  # this thread has no caller to pass it on to
                log.warning("specialization was ended by %r", error)
            finally:
                if ran and entry.later is not None:
                    jobs.put(_Entry(LATER, next(self._numbers), entry.later, entry.done))
                else:
                    entry.done.set()
            del entry  # a job may hold much memory

    def step(self) -> None:
        """A job calls this between its steps.

        Raises:
            Stopped: the process is about to end.
        """
        if self._pauses and threading.current_thread() is self._thread:
            with self._resumed:
                self._resumed.wait_for(lambda: self._pauses <= 0 or self.stopping)
        if self.stopping:
            raise Stopped

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the thread wait at its next step, until the end of the context: the program waits for what it does here,
        such as the capture of a backward, which would share the interpreter lock with the checks of the forward."""
        with self._resumed:
            self._pauses += 1
        try:
            yield
        finally:
            with self._resumed:
                self._pauses -= 1
                self._resumed.notify_all()

    def on_stop(self, close: Callable[[], None]) -> None:
        """Register `close`, which ends what a job may wait for, to be called once when the process ends."""
        with self._lock:
            if close not in self._closing:
                self._closing.append(close)

    def stop(self) -> None:
        """Start no more jobs, and wait for the running step."""
        with self._lock:
            self.stopping = True
            closing = list(self._closing)
        with self._resumed:
            self._resumed.notify_all()
        for close in closing:
            close()
        self._jobs.put(_Entry(LAST, next(self._numbers)))
        if self._thread is not None and self._process == os.getpid():
            self._thread.join(STOP_TIMEOUT_S)


@contextmanager
def _switching() -> Iterator[None]:
    """Shorten the interpreter's switch interval while a job runs. The program's threads release the lock in every call
    of PyTorch, and would wait 5 ms to get it back, many times the duration of a call."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


BACKGROUND = Background()


def wait(timeout: float | None = None) -> bool:
    """Wait until background compiling and measuring in this process have ended; False after `timeout` seconds. Jobs
    that calls start meanwhile are not waited for."""
    return BACKGROUND.wait(timeout)
