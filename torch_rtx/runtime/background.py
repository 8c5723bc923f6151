"""What happens beside the calls of a program: one thread per process that runs jobs, one after the other. What a job
leaves for later waits until all others have run: no model waits for its first kernels while another's are measured.

A job is cooperative: between its steps it asks whether to go on. At the end of the process the thread is told to stop,
what may keep a job waiting is closed, and nothing hangs.
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
SWITCH_S = 1e-4  # a thread that wants Python's interpreter waits that long at most for a job to give it up
PATIENCE = 5.0  # seconds that the end of a process waits for the step that runs


class Stopped(Exception):
    """The process is about to end: a job gives up between two steps."""


@dataclass(order=True)
class _Entry:
    """What the thread is to do, in order; without a job, to end."""

    rank: int
    number: int
    job: Job | None = field(default=None, compare=False)
    done: threading.Event = field(default_factory=threading.Event, compare=False)
    later: Job | None = field(default=None, compare=False)


FIRST, LATER, LAST = range(3)  # ranks


def attempt(job: Job) -> bool:
    """Run a job; a failure is logged. Whether it ran to its end."""
    try:
        job()
        return True
    except Stopped:
        pass
    except Exception as error:
        log.warning("making it faster failed, it stays as it is: %s", error)
        log.debug("the failure in full", exc_info=True)
    return False


class Background:
    """A thread that runs jobs in the order in which they came, and then what they left for later."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[_Entry] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process = 0
        self._closing: list[Callable[[], None]] = []
        self._waiting: list[threading.Event] = []  # of the jobs that have not run yet, in order
        self.stopping = False

    def submit(self, job: Job, done: threading.Event, later: Job | None = None) -> None:
        """Run `job` some time, and when it has run and nothing else is left to do, `later`.

        Args:
            done: set when both have run, failed, or never will. A failure is logged.
        """
        with self._lock:
            if self.stopping:
                done.set()
                return
            if self._thread is None or not self._thread.is_alive() or self._process != os.getpid():
                try:
                    self._start()  # the first job, or the first in a process that was forked
                except RuntimeError as error:  # the process ends, or has too many threads: no reason to fail a call
                    log.warning("nothing is made faster: %s", error)
                    done.set()
                    return
            self._waiting = [event for event in self._waiting if not event.is_set()] + [done]
            self._jobs.put(_Entry(FIRST, next(self._numbers), job, done, later))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for all jobs that were submitted; False if that takes longer than `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            waiting = list(self._waiting)
        return all(event.wait(None if end is None else max(0.0, end - time.monotonic())) for event in waiting)

    def _start(self) -> None:
        if self._process not in (0, os.getpid()):
            self._jobs = queue.PriorityQueue()
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
            except BaseException as error:  # there is nobody here whom it could end or interrupt
                log.warning("making it faster was ended by %r", error)
            finally:
                if ran and entry.later is not None:
                    jobs.put(_Entry(LATER, next(self._numbers), entry.later, entry.done))
                else:
                    entry.done.set()
            del entry  # what a job holds may be large

    def step(self) -> None:
        """What a job calls between its steps.

        Raises:
            Stopped: the process is about to end.
        """
        if self.stopping:
            raise Stopped

    def on_stop(self, close: Callable[[], None]) -> None:
        """Call `close`, which ends what a job may be waiting for, when the process ends; once, if it comes again."""
        with self._lock:
            if close not in self._closing:
                self._closing.append(close)

    def stop(self) -> None:
        """Run no more jobs; wait for the step that runs."""
        with self._lock:
            self.stopping = True
            closing = list(self._closing)
        for close in closing:
            close()
        self._jobs.put(_Entry(LAST, next(self._numbers)))
        if self._thread is not None and self._process == os.getpid():
            self._thread.join(PATIENCE)


@contextmanager
def _switching() -> Iterator[None]:
    """While a job runs, the program's threads get the interpreter back soon. They give it up in every call of PyTorch,
    and would wait 5 ms each time, many times as long as a call takes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


BACKGROUND = Background()


def wait(timeout: float | None = None) -> bool:
    """Wait until nothing more is being compiled or measured in the background of this process; False if that takes
    longer than `timeout` seconds. What calls at new sizes start meanwhile is not waited for."""
    return BACKGROUND.wait(timeout)
