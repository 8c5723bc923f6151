"""Runs cases in worker processes, with a time limit for each, and keeps every result as soon as it is there."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from benchmarks import forked, results
from benchmarks.cases import Job, Size, UsageError, key, workloads
from benchmarks.peers import PEERS
from benchmarks.suites import SUITES, Suite
from benchmarks.suites.cold import CACHES
from benchmarks.turns import Turns

ROOT = Path(__file__).parent.parent
POLL_S = 0.05
START_S = 120  # more time for what comes before the first peer: imports, weights, reference results
MAX_WORDS = 300


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        names: models or workloads; empty: the suite's own, or the first workload of every model.
        peers: empty: those that are measured by default.
        rounds: None: as the suite has it.
        device: "auto", "cpu" or "cuda".
        settle_s: that a peer has to reach its full speed, where the suite has not less.
        limit_s: of one case; model_limit_s: of all cases of a process together; budget_s: of the whole run.
        again: measure "failed" cases or "all" again; otherwise whatever has a row in `out` is skipped.
        gpus: as CUDA_VISIBLE_DEVICES names them; each works on a case of its own. Empty: one case at a time.
        per_gpu: so many cases at a time on each of them; while one of these measures, the others are stopped.
        preload: modules that workers begin with, see `forked`; empty: each worker is a new process.
        warm: see `Job`.
    """

    suites: tuple[str, ...]
    out: Path
    names: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    size: Size = "full"
    device: str = "auto"
    rounds: int | None = None
    settle_s: float = math.inf
    limit_s: float = 150
    model_limit_s: float = math.inf
    budget_s: float = float("inf")
    again: Literal["", "failed", "all"] = ""
    plugins: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    per_gpu: int = 1
    preload: tuple[str, ...] = ()
    warm: bool = True


@dataclass(frozen=True)
class Seat:
    """Where a worker runs.

    Attributes:
        gpu: the only one that it sees, as CUDA_VISIBLE_DEVICES names it; None: all.
        cores: that it is bound to; empty: to none.
        turns: of those that share the GPU; None: it has the GPU alone.
    """

    gpu: str | None = None
    cores: tuple[int, ...] = ()
    turns: Turns | None = None


class Stopped(Exception):
    """The run ends here and can be resumed."""


class NoEnvironment(Exception):
    """There is no saying where this runs, so that nothing can be measured."""


class Worker:
    """A worker process and what it says.

    Args:
        data: its job, as JSON.
        folder: for its files.
        caches: the folder of its compilers' caches, within `folder`.
        gpu: the only one that it sees; None: all.
        server: starts the process; None: it is a new one.
    """

    process: subprocess.Popen[bytes] | forked.Forked

    def __init__(
        self,
        data: dict[str, Any],
        folder: Path,
        caches: str = "",
        gpu: str | None = None,
        server: forked.Server | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        job, self._events = self._folder / "job.json", self._folder / "events.jsonl"
        job.write_text(json.dumps(data))
        self._events.touch()
        self._read = 0
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        kept = {variable: str(folder / "caches" / caches / variable.lower()) for variable in CACHES}
        changed = {**kept, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        if gpu is not None:
            changed["CUDA_VISIBLE_DEVICES"] = gpu
        if server is not None:
            self.process = server.worker(job, self._events, self._folder / "log", changed)
            return
        command = [sys.executable, "-m", "benchmarks.worker", str(job), str(self._events)]
        with open(self._folder / "log", "wb") as log:
            # A session of its own: with it, all that the worker has started can be killed.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **changed},
                start_new_session=True,
            )

    def events(self) -> Iterator[dict[str, Any]]:
        """The events since the last call."""
        with open(self._events, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield json.loads(line)

    def grant(self) -> None:
        """Tell the worker that it has its GPU alone."""
        self._events.with_name(f"{self._events.name}.alone").touch()

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            if self.process.poll() is None:  # it has just been forked
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End the process and its children."""
        if hasattr(os, "killpg"):
            self.signal(signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """The end of what it printed."""
        lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1][-MAX_WORDS:] if lines else "it printed nothing"


class Progress:
    """A bar on a terminal, and a line for every row."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._bar = stream, stream.isatty()
        self.done = self.total = 0

    def stage(self, text: str) -> None:
        """What happens now."""
        if self._bar:
            filled = 20 * self.done // max(self.total, 1)
            bar = "#" * filled + "-" * (20 - filled)
            self._stream.write(f"\r\x1b[K[{bar}] {self.done}/{self.total} {text[:80]}")
            self._stream.flush()

    def line(self, text: str) -> None:
        """Something that stays."""
        self._stream.write(("\r\x1b[K" if self._bar else "") + text + "\n")
        self._stream.flush()


class Watch:
    """The seconds that peers of a model take; those in which a worker waits for another one do not count.

    Attributes:
        peer, stage: at work now; no peer: what all of them need.
        spent: by peer, in this process.

    Args:
        limit_s: of all peers together, in all processes.
    """

    def __init__(self, limit_s: float) -> None:
        self._left_s = self._limit_s = limit_s
        self.begin()

    def begin(self) -> None:
        """A process starts."""
        self.spent: Counter[str | None] = Counter()
        self.peer: str | None = None
        self.stage = "start"
        self._since = time.time()

    def see(self, event: dict[str, Any]) -> None:
        """A worker says what it does, or has done."""
        self._count(event["time"])
        if event["event"] == "begin":
            self.peer, self.stage = event["peer"], event["stage"]

    def wait(self, idle: bool) -> None:
        """Time has passed; `idle`: without work."""
        if idle:
            self._since = time.time()
        else:
            self._count(time.time())

    def over(self, limit_s: float) -> str | None:
        """Why the worker has to end, None if it may go on.

        Args:
            limit_s: of a peer.
        """
        if self.is_over:
            return f"stopped after {self._limit_s:g} s of all peers together, during {self.stage}"
        limit = limit_s + (START_S if self.peer is None else 0)
        return f"stopped after {limit:g} s, during {self.stage}" if self.spent[self.peer] > limit else None

    @property
    def is_over(self) -> bool:
        """The time of all together is up."""
        return self._left_s < 0

    def _count(self, now: float) -> None:
        passed = max(now - self._since, 0.0)
        self.spent[self.peer] += passed
        self._left_s -= passed
        self._since += passed


class Runner:
    """One run of a plan."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.deadline = time.monotonic() + plan.budget_s
        self.results = results.load(plan.out) if plan.out.exists() else results.Results()
        self.environment = self.device = self.device_name = ""
        self.failed = 0
        self._keeping = threading.Lock()
        self._server: forked.Server | None = None
        self._last_words = ""
        self.ended: dict[str, str] = {}  # peers that have ended a process of this run, and at which workload

    def run(self) -> None:
        """Do the plan.

        Raises:
            Stopped: the budget is spent.
            NoEnvironment: not even the device can be described.
            UsageError: it names what does not exist.
            ResultsError: `out` exists and is no result file.
        """
        for suite in self.plan.suites:
            if suite not in SUITES:
                raise UsageError(f"unknown suite {suite!r}; known suites: {', '.join(SUITES)}")
        known = dict.fromkeys(peer for suite in SUITES.values() for peer in (*PEERS, *suite.peers))
        for peer in self.plan.peers:
            if peer not in known:
                raise UsageError(f"unknown peer {peer!r}; known peers: {', '.join(known)}")
        for suite in self.plan.suites:
            workloads(self.plan.names, self.plan.size, "cpu", SUITES[suite].workloads)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.folder = Path(folder)
            present = self._look_around()
            jobs = [job for name in self.plan.suites for job in self._jobs(SUITES[name], present)]
            self.progress.total = self.progress.done + sum(len(job.peers) for job in jobs)
            seats = self._seats()
            if len(seats) < 2:
                for job in jobs:
                    self._do(job, *seats)
            else:
                self._do_all(jobs, seats)

    def _look_around(self) -> bool:
        """Record where this is; whether the device is there."""
        self.progress.stage("environment")
        if self.plan.preload:
            self._server = forked.Server(*self.plan.preload)
        found = self._described()
        if not found and self._server is not None:
            why = self._last_words
            self.progress.line(f"workers are new processes, as a fork can't describe the environment: {why}")
            self._server = None
            found = self._described()
        if not found:
            raise NoEnvironment(f"the environment can't be described: {self._last_words}")
        (record,) = found
        present = not record.pop("absent", False)
        self.device, self.device_name = record["kind"], record["device"]
        self.environment = self.results.add_environment(record)
        return present

    def _described(self) -> list[dict[str, Any]]:
        """What a worker says of the environment, if it does."""
        worker = Worker({"environment": self.plan.device}, self.folder, server=self._server)
        try:
            worker.process.wait(timeout=self.plan.limit_s + START_S)
        except subprocess.TimeoutExpired:
            raise NoEnvironment("the environment can't be described: it takes too long") from None
        finally:
            worker.kill()
        self._last_words = worker.last_words()
        return [event["record"] for event in worker.events()]

    def _seats(self) -> list[Seat]:
        """Where workers run at the same time; each of several has its share of the cores."""
        count = max(len(self.plan.gpus), 1) * self.plan.per_gpu
        if count == 1:
            return [Seat(*self.plan.gpus)]
        here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        each = len(here) // count
        turns = {gpu: Turns() if self.plan.per_gpu > 1 else None for gpu in self.plan.gpus or (None,)}
        return [
            Seat(gpu, tuple(here[index * each : (index + 1) * each]), turns[gpu])
            for index, gpu in enumerate([*turns] * self.plan.per_gpu)
        ]

    def _peers(self, suite: Suite) -> list[str]:
        known = suite.known_peers()
        return [name for name in self.plan.peers if name in known] if self.plan.peers else suite.measured_peers()

    def _jobs(self, suite: Suite, present: bool) -> Iterator[Job]:
        """What is left to do of a suite; what can't be done gets its row here."""
        rounds = suite.rounds if self.plan.rounds is None else self.plan.rounds
        for workload in workloads(self.plan.names, self.plan.size, self.device, suite.workloads):
            workload = replace(workload, dtype=suite.dtype or workload.dtype)
            wanted = self._peers(suite)
            plan = self.plan
            job = Job(
                suite.name, workload, tuple(wanted), self.device, rounds, plan.plugins, plan.settle_s, warm=plan.warm
            )
            left = [peer for peer in wanted if not self._is_done(job, peer)]
            possible = []
            for peer in wanted:
                absent = None if present or suite.without_device else "needs a CUDA device"
                reason = absent or suite.reason(peer, workload, self.device)
                if reason is None:
                    possible.append(peer)
                elif reason and peer in left:
                    self._keep(job, peer, "unavailable", reason, {}, 0.0)
            if suite.together:  # peers are only compared with those of the same process: again with what is left
                again = [p for p in possible if p in left or (suite.compared and self._row(job, p)["status"] == "ok")]
                if set(again) & set(left):
                    yield replace(job, peers=tuple(again))
            else:
                yield from (replace(job, peers=(peer,)) for peer in possible if peer in left)

    def _row(self, job: Job, peer: str) -> results.Row | None:
        row_key = results.key_of(key(job.suite, job.workload, self.device_name, peer))
        return self.results.rows.get(row_key)

    def _is_done(self, job: Job, peer: str) -> bool:
        row = self._row(job, peer)
        if row is None or self.plan.again == "all":
            return False
        return not (self.plan.again == "failed" and row["status"] == "failed")

    def _do_all(self, jobs: Sequence[Job], seats: Sequence[Seat]) -> None:
        """Work at all seats, each on the next job that is left."""
        left = deque(jobs)

        def work(seat: Seat) -> None:
            while True:
                try:
                    job = left.popleft()
                except IndexError:
                    return
                self._do(job, seat)

        with ThreadPoolExecutor(len(seats)) as pool:
            working = [pool.submit(work, seat) for seat in seats]
            try:
                for one in as_completed(working):
                    one.result()
            finally:  # after an error or Ctrl-C the other threads end within POLL_S, and their workers with them
                self.deadline = -math.inf if any(not one.done() for one in working) else self.deadline

    def _do(self, job: Job, seat: Seat) -> None:
        """Work on a job until every peer has a row: after a hang or a crash, go on without the one to blame.

        Who has ended a process is not tried at further workloads of the run: to compile it, only to die again, can
        take most of the time of all peers.
        """
        for peer in set(job.peers) & self.ended.keys():
            why = f"not tried: it ended its process at {self.ended[peer]} of this run (--again failed tries)"
            self._keep(job, peer, "failed", why, {}, 0.0)
        peers = [peer for peer in job.peers if peer not in self.ended]
        shared = str(self.folder / f"gpu-{seat.gpu}") if seat.turns else ""
        watch = Watch(self.plan.model_limit_s)
        while peers:
            if time.monotonic() > self.deadline:
                raise Stopped("the budget is spent")
            # Workers of a workload share caches; the next one begins with empty ones, as its first calls are timed.
            data = replace(job, peers=tuple(peers), cores=seat.cores, shared=shared).to_json()
            worker = Worker(data, self.folder, job.workload.name, seat.gpu, self._server)
            turns = seat.turns or Turns()
            turns.join(worker)
            try:
                self._follow(worker, job, peers, turns, watch)
            finally:
                worker.kill()
                turns.leave(worker)

    def _follow(self, worker: Worker, job: Job, peers: list[str], turns: Turns, watch: Watch) -> None:
        """Keep the rows of a worker as they come, and give one to whoever is to blame for its end; takes their peers
        off the list, at least one."""
        watch.begin()
        asked, asks = len(peers), False
        partial: dict[str, dict[str, Any]] = {}
        while True:
            running = worker.process.poll() is None
            for event in worker.events():
                watch.see(event)
                if event["event"] == "begin":
                    self.progress.stage(f"{job.suite} {job.workload.name} {watch.peer or ''} {watch.stage}")
                elif event["event"] == "alone":
                    asks = True
                elif event["event"] == "together":
                    turns.release(worker)
                elif event["event"] == "partial":
                    peer, metrics = event["peer"], event["metrics"]
                    if told := _news(partial.get(peer, {}), metrics):
                        self.progress.line(f"  {peer}: {told}")
                    partial[peer] = metrics
                else:
                    peer = event["peer"]
                    peers.remove(peer)
                    self._keep(job, peer, event["status"], event["reason"], event["metrics"], watch.spent[peer])
            if asks and turns.ask(worker):
                asks = False
                worker.grant()
            watch.wait(asks or turns.is_stopped(worker))
            reason = None
            if not running:
                status = worker.process.returncode
                reason = f"the process ended with status {status} during {watch.stage}: {worker.last_words()}"
            else:
                reason = watch.over(self.plan.limit_s)
            if reason is not None:
                if watch.peer in peers and not running and not SUITES[job.suite].independent:
                    self.ended[watch.peer] = job.workload.name
                # One whose row has come may have spoilt the process for the others: they get another one.
                others = [] if len(peers) < asked else list(peers)
                blamed = [watch.peer] if watch.peer in peers else others
                for peer in list(peers) if watch.is_over else blamed:
                    self._keep(job, peer, "failed", reason, partial.get(peer, {}), watch.spent[watch.peer])
                    peers.remove(peer)
                return
            if time.monotonic() > self.deadline:
                if watch.peer in partial:
                    why = f"the budget was spent during {watch.stage} (--again failed tries)"
                    self._keep(job, watch.peer, "failed", why, partial[watch.peer], watch.spent[watch.peer])
                raise Stopped("the budget is spent")
            time.sleep(POLL_S)

    def _keep(self, job: Job, peer: str, status: str, reason: str | None, metrics: dict[str, Any], s: float) -> None:
        row = {
            **key(job.suite, job.workload, self.device_name, peer),
            "environment": self.environment,
            "time": results.now(),
            "seconds": round(s, 3),
            "status": status,
            "reason": reason,
            "metrics": {name: value for name, value in metrics.items() if value is not None},
        }
        with self._keeping:
            self.results.add(row)
            self.results.save(self.plan.out)
            self.progress.done += 1
            self.failed += status == "failed"
        found = results.headline(row, SUITES[job.suite].headline)
        told = reason or (f"{found[0]} {found[1]:.4g}" if found else "done")
        self.progress.line(f"{job.suite} {job.workload.name} {peer}: {'' if status == 'ok' else status + ': '}{told}")


def _news(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The metrics that are new or others, with their medians where they are summaries of many values."""
    found = []
    for name, value in now.items():
        known = before.get(name)
        if isinstance(value, dict) and "median" not in value:
            inner = _news(known if isinstance(known, dict) else {}, value)
            found += [f"{name}.{one}" for one in inner.split(", ") if inner]
        elif value is not None and value != known:
            shown = value["median"] if isinstance(value, dict) else value
            found.append(f"{name} {shown:.4g}" if isinstance(shown, float) else f"{name} {shown}")
    return ", ".join(found)


def main(plan: Plan, stream: TextIO) -> int:
    """Run, say how it went, and return the exit status: failed cases are rows, not a failed run."""
    progress = Progress(stream)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    runner = Runner(plan, progress)
    try:
        runner.run()
    except (Stopped, KeyboardInterrupt) as error:
        why = str(error) or "interrupted"
        progress.line(f"stopped: {why}; the same command resumes. {runner.failed} failed. Results: {plan.out}")
        return 130 if isinstance(error, KeyboardInterrupt) else 0
    finally:
        signal.signal(signal.SIGTERM, previous)
    progress.line(f"done: {progress.done} rows, {runner.failed} failed. Results: {plan.out}")
    return 0
