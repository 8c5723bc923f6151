"""One background thread per process, which compiles and measures while the program makes calls.

It runs jobs in order. Further phases of a job (`later`) run only when no job is waiting, so that no model waits for its
first kernels while those of another are measured. Jobs are cooperative: between steps they ask whether the process
ends. At its end `stop` closes whatever a job may be waiting for, so that nothing hangs. A job keeps its `Work` up to
date, which says what is left of it; `wait` and the log tell the sum.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

log = logging.getLogger(__name__)
Job = Callable[[], object]
SWITCH_S = 1e-4  # the longest time that another thread waits for a job to release the interpreter lock
STOP_TIMEOUT_S = 5.0  # the longest time that the end of the process waits for a running step
TOLD_S = 0.5  # between two calls of a callback
LOGGED_S = 5.0  # between two lines of the log
# Seconds of a kernel and of a tactic, as long as none was compiled or measured in this process.
KERNEL_S, TACTIC_S = 0.3, 0.05


class Stopped(Exception):
    """The process is about to end: the job must give up."""


@dataclass
class Work:
    """What is left of a job, which its thread keeps up to date.

    Attributes:
        kernels, tactics: to compile, and to measure (about).
        limit_s: seconds after which measuring ends.
        begun: when the step in progress began, by `time.monotonic`; None: no step did.
    """

    kernels: int = 0
    tactics: int = 0
    limit_s: float = inf
    begun: float | None = None

    def begin(self, kernels: int, tactics: int, limit_s: float = inf) -> None:
        """A step begins, with so much left."""
        self.kernels, self.tactics, self.limit_s, self.begun = kernels, tactics, limit_s, time.monotonic()


@dataclass(frozen=True)
class Progress:
    """What the background has left to do.

    Attributes:
        kernels: to compile before calls are fast.
        tactics: to measure, about; compiling them is included.
        seconds: how long that may take, by what the process has compiled and measured so far.
    """

    kernels: int
    tactics: int
    seconds: float

    def __str__(self) -> str:
        if not self.kernels and not self.tactics:
            return "nothing is left to compile or to measure"
        return f"left: {self.kernels} kernels to compile, {self.tactics} tactics to measure, about {self.seconds:.0f} s"


NOTHING = Progress(0, 0, 0.0)


@dataclass
class Pace:
    """Seconds of an item, by the mean of all so far; `guess` before the first."""

    guess: float
    seconds: float = 0.0
    count: int = 0

    def add(self, count: int, seconds: float) -> None:
        """So many items took so long."""
        self.seconds, self.count = self.seconds + seconds, self.count + count

    @property
    def each(self) -> float:
        """Seconds of the next one."""
        return self.seconds / self.count if self.count else self.guess


@dataclass(order=True)
class _Entry:
    """An entry of the queue, in the order of execution; without a job it ends the thread."""

    rank: int
    number: int
    job: Job | None = field(default=None, compare=False)
    done: threading.Event = field(default_factory=threading.Event, compare=False)
    later: tuple[Job, ...] = field(default=(), compare=False)


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
    """A thread that runs jobs in the order of their submission, then all their second phases, and so on."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[_Entry] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process = 0
        self._closing: list[Callable[[], None]] = []
        self._waiting: list[tuple[threading.Event, Work]] = []  # of unfinished jobs, in order
        self._told = -inf  # when the log told what is left
        self.compiling, self.measuring = Pace(KERNEL_S), Pace(TACTIC_S)
        self._resumed = threading.Condition()
        self._pauses = 0  # contexts in `paused`
        self.stopping = False

    def submit(self, job: Job, done: threading.Event, *later: Job, work: Work | None = None) -> None:
        """Queue `job`, and what is to follow `later`, each once no other job waits. A failure is logged, and ends it.

        Args:
            done: set when all have run, or one has failed, or they will never run.
            work: what they have to do, which they keep up to date.
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
            self._waiting = [one for one in self._waiting if not one[0].is_set()] + [(done, work or Work())]
            self._jobs.put(_Entry(FIRST, next(self._numbers), job, done, later))

    def wait(self, timeout: float | None = None, progress: Callable[[Progress], object] | None = None) -> bool:
        """Wait for all submitted jobs; False after `timeout` seconds. See `wait` for `progress`."""
        end = inf if timeout is None else time.monotonic() + timeout
        with self._lock:
            waiting = list(self._waiting)
        for event, _ in waiting:
            while not event.is_set():
                left = end - time.monotonic()
                if progress is not None:
                    progress(self._left(waiting))
                    left = min(left, TOLD_S)
                if not event.wait(None if left == inf else max(0.0, left)) and time.monotonic() >= end:
                    return False
        if progress is not None:
            progress(NOTHING)
        return True

    def left(self) -> Progress:
        """What all jobs have left to do."""
        with self._lock:
            return self._left(self._waiting)

    def _left(self, jobs: Iterable[tuple[threading.Event, Work]]) -> Progress:
        works = [work for done, work in jobs if not done.is_set()]
        now, seconds, each = time.monotonic(), 0.0, self.compiling.each
        for work in works:
            expected = work.kernels * each + min(work.tactics * (each + self.measuring.each), work.limit_s)
            seconds += max(0.0, expected - (0.0 if work.begun is None else now - work.begun))
        return Progress(sum(work.kernels for work in works), sum(work.tactics for work in works), seconds)

    def _tell(self) -> None:
        """Log what is left, if that was not done just now."""
        if log.isEnabledFor(logging.INFO) and time.monotonic() - self._told >= LOGGED_S:
            self._told = time.monotonic()
            log.info("%s", self.left())

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
                with _SWITCHING:
                    ran = not self.stopping and attempt(entry.job)
            except BaseException as error:  # this thread has no caller to pass it on to
                log.warning("specialization was ended by %r", error)
            finally:
                if ran and entry.later:
                    job, *later = entry.later
                    jobs.put(_Entry(LATER, next(self._numbers), job, entry.done, tuple(later)))
                else:
                    if jobs.empty():
                        log.info("%s", NOTHING)
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
        self._tell()

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


class _Switching:
    """Shortens the interpreter's switch interval while jobs run, of any `Background`. The program's threads release the
    lock in every call of PyTorch, and would wait 5 ms to get it back, many times the duration of a call."""

    def __init__(self) -> None:
        self._lock, self._jobs, self._before = threading.Lock(), 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._jobs += 1
            if self._jobs == 1:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, SWITCH_S))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._jobs -= 1
            if self._jobs == 0:
                sys.setswitchinterval(self._before)


_SWITCHING = _Switching()
BACKGROUND = Background()


def wait(timeout: float | None = None, progress: Callable[[Progress], object] | None = None) -> bool:
    """Wait until background compiling and measuring in this process have ended; False after `timeout` seconds. Jobs
    that calls start meanwhile are not waited for.

    Args:
        progress: called in this thread with what is left, at once, then twice a second, and once more when nothing is.
            What it raises ends the waiting.
    """
    return BACKGROUND.wait(timeout, progress)
