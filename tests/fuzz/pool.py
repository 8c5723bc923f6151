"""Runs trials in forked processes, each with limits and for many trials, and finds what did not survive them."""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import select
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.trial import Bug

CPU_SECONDS, WALL_SECONDS = 2.0, 60.0  # limits of each step of a trial
ADDRESS_BYTES = 1 << 30  # what a process may add to the address space that it begins with
BATCH = 3000  # trials of one process
STATE = struct.Struct("=q120s3000s")  # of a process: number of the trial, what it is doing, JSON of how trials ended
PHASE = struct.Struct("=q120s")  # the first two of these

Make = Callable[[Random, bool], tuple[str, bytes]]  # a label and a file; False: without calling operators to make it
Run = Callable[[str, Random, Callable[[str], None]], str]


@dataclass
class Found:
    """What came of trials: how they ended, the faults with their numbers, and what shows them."""

    ends: Counter[str] = field(default_factory=Counter)
    bugs: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def trials(self) -> int:
        """Their number."""
        return self.ends.total() + self.bugs.total()


class Pool:
    """Trials of one kind.

    Args:
        name: of the kind.
        make: makes the file of a trial.
        run: loads and calls it, see `trial`.
        seed: with the number of a trial, what it does.
        out: the folder that gets files that show a fault, the smallest of each.
        first: the number of the first trial.
    """

    def __init__(self, name: str, make: Make, run: Run, seed: int, out: Path, first: int = 0) -> None:
        self.name, self.make, self.run, self.seed, self.out = name, make, run, seed, out
        self.first = self.end = first
        self.found = Found()

    def __call__(self, count: int, seconds: float, workers: int = 1) -> Found:
        """Run trials until there were `count` of them, or the time is over."""
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        self.end = self.first + count
        alive = [_Worker(self, self.first + number, workers) for number in range(workers)]
        while alive:
            over = time.monotonic() - start > seconds
            ready = select.select([worker.pipe for worker in alive], [], [], 1.0)[0]
            for worker in list(alive):
                worker.watch(worker.pipe in ready)
                if worker.ended and (over or worker.next >= self.end):
                    alive.remove(worker)
                elif worker.ended:
                    worker.start()
                elif over and not worker.stopping:
                    worker.stop()
        self.found.seconds = time.monotonic() - start
        self.found.cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        return self.found

    def report(self, bug: str, detail: str, number: int, content: bytes) -> None:
        """Count a fault, and keep the smallest file that shows it."""
        self.found.bugs[bug] += 1
        name = "".join(char if char.isalnum() else "_" for char in f"{self.name}_{bug}")[:120]
        path = self.out / f"{name}.rtx"
        if not path.exists() or path.stat().st_size > len(content):
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            again = f"--only {self.name} --seed {self.seed} --first {number} --trials 1"
            self.found.examples[bug] = f"{path}\n{again}\n{detail}".strip()


class _Worker:
    """A process that runs every `step`th trial."""

    def __init__(self, pool: Pool, first: int, step: int) -> None:
        self.pool, self.next, self.step = pool, first, step
        self.state = mmap.mmap(-1, STATE.size)
        self.path = Path("/dev/shm" if os.path.isdir("/dev/shm") else pool.out, f"torch_rtx_fuzz_{os.getpid()}_{first}")
        self.careful: set[int] = set()  # trials whose making ended a process
        self.stopping = False
        self.start()

    def start(self) -> None:
        self.ended, self.seen = False, (-1, time.monotonic())
        STATE.pack_into(self.state, 0, self.next, b"", b"{}")
        self.pipe, other = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                os.close(self.pipe)
                self._child(other)
            finally:
                os._exit(1)
        os.close(other)
        os.set_blocking(self.pipe, False)
        self.text = b""

    def stop(self) -> None:
        self.stopping = True
        os.kill(self.process, signal.SIGTERM)

    # ---- parent ----

    def watch(self, ready: bool) -> None:
        """Take what the process reports; see whether it has ended, or hangs."""
        if ready:
            try:
                said = os.read(self.pipe, 1 << 20)
            except BlockingIOError:
                return
            self.text += said
            *lines, self.text = self.text.split(b"\n")
            for line in lines:
                report = json.loads(line)
                self.pool.report(report["bug"], report["detail"], report["number"], bytes.fromhex(report["content"]))
            if not said:
                self._reap()
                return
        number = STATE.unpack(self.state[:])[0]
        if number != self.seen[0]:
            self.seen = number, time.monotonic()
        elif time.monotonic() - self.seen[1] > WALL_SECONDS:
            os.kill(self.process, signal.SIGKILL)

    def _reap(self) -> None:
        os.close(self.pipe)
        status = os.waitpid(self.process, 0)[1]
        number, said, ends = STATE.unpack(self.state[:])
        self.ended, self.next = True, number + self.step
        self.pool.found.ends.update(json.loads(ends.rstrip(b"\0")))
        if self.stopping or status == 0:
            return
        label, _, phase = said.rstrip(b"\0").decode().partition(" ")
        if phase == "make" and number not in self.careful:
            self.careful.add(number)
            self.next = number
            return
        how = f"status {os.WEXITSTATUS(status)}" if os.WIFEXITED(status) else _signal(os.WTERMSIG(status))
        content = self.path.read_bytes() if self.path.exists() and phase != "make" else b""
        self.pool.report(f"{phase}: {how} in {label}", "", number, content)

    # ---- child ----

    def _child(self, pipe: int) -> None:
        faulthandler.disable()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        ends: Counter[str] = Counter()
        for number in range(self.next, min(self.next + BATCH * self.step, self.pool.end), self.step):
            rng = Random(f"{self.pool.seed} {self.pool.name} {number}")
            try:
                ends[self._trial(number, rng)] += 1
            except Bug as bug:
                label = PHASE.unpack_from(self.state)[1].partition(b" ")[0].decode()
                report = {"bug": f"{bug} in {label}", "detail": bug.detail, "number": number}
                os.write(pipe, json.dumps({**report, "content": self.path.read_bytes().hex()}).encode() + b"\n")
            except Exception as error:  # of the fuzzer itself
                lines = "".join(traceback.format_exception(error))
                report = {"bug": f"fuzzer: {type(error).__name__}", "detail": lines[-600:], "number": number}
                os.write(pipe, json.dumps({**report, "content": ""}).encode() + b"\n")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            STATE.pack_into(self.state, 0, number, b"", json.dumps(ends).encode())
        self.path.unlink(missing_ok=True)
        os._exit(0)

    def _trial(self, number: int, rng: Random) -> str:
        label = "?"

        def say(phase: str) -> None:
            PHASE.pack_into(self.state, 0, number, f"{label} {phase}".encode()[:119])
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, also in the middle of C code

        say("make")
        label, content = self.pool.make(rng, number not in self.careful)
        self.path.write_bytes(content)
        return self.pool.run(str(self.path), rng, say)


def _signal(number: int) -> str:
    return "no end" if number in (signal.SIGPROF, signal.SIGKILL) else signal.Signals(number).name
