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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from benchmarks import results
from benchmarks.cases import Job, Size, UsageError, key, workloads
from benchmarks.peers import PEERS
from benchmarks.suites import SUITES, Suite
from benchmarks.suites.cold import CACHES

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
        limit_s: of one case; budget_s: of the whole run.
        again: measure "failed" cases or "all" again; otherwise whatever has a row in `out` is skipped.
        gpus: as CUDA_VISIBLE_DEVICES names them; each works on a case of its own. Empty: one case at a time.
        warm: see `Job`.
    """

    suites: tuple[str, ...]
    out: Path
    names: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    size: Size = "full"
    device: str = "auto"
    rounds: int | None = None
    limit_s: float = 150
    budget_s: float = float("inf")
    again: Literal["", "failed", "all"] = ""
    plugins: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    warm: bool = True


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
    """

    def __init__(self, data: dict[str, Any], folder: Path, caches: str = "", gpu: str | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        job, self._events = self._folder / "job.json", self._folder / "events.jsonl"
        job.write_text(json.dumps(data))
        self._events.touch()
        self._read = 0
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        kept = {variable: str(folder / "caches" / caches / variable.lower()) for variable in CACHES}
        environment = {**os.environ, **kept, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "benchmarks.worker", str(job), str(self._events)]
        with open(self._folder / "log", "wb") as log:
            # A session of its own: with it, all that the worker has started can be killed.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
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

    def kill(self) -> None:
        """End the process and its children."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
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


class Runner:
    """One run of a plan."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.deadline = time.monotonic() + plan.budget_s
        self.results = results.load(plan.out) if plan.out.exists() else results.Results()
        self.environment = self.device = self.device_name = ""
        self.failed = 0
        self._keeping = threading.Lock()
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
            if len(self.plan.gpus) < 2:
                for job in jobs:
                    self._do(job, *self.plan.gpus)
            else:
                self._do_all(jobs)

    def _look_around(self) -> bool:
        """Record where this is; whether the device is there."""
        self.progress.stage("environment")
        worker = Worker({"environment": self.plan.device}, self.folder)
        try:
            worker.process.wait(timeout=self.plan.limit_s + START_S)
        except subprocess.TimeoutExpired:
            raise NoEnvironment("the environment can't be described: it takes too long") from None
        finally:
            worker.kill()
        found = [event["record"] for event in worker.events()]
        if not found:
            raise NoEnvironment(f"the environment can't be described: {worker.last_words()}")
        (record,) = found
        present = not record.pop("absent", False)
        self.device, self.device_name = record["kind"], record["device"]
        self.environment = self.results.add_environment(record)
        return present

    def _peers(self, suite: Suite) -> list[str]:
        known = suite.known_peers()
        return [name for name in self.plan.peers if name in known] if self.plan.peers else suite.measured_peers()

    def _jobs(self, suite: Suite, present: bool) -> Iterator[Job]:
        """What is left to do of a suite; what can't be done gets its row here."""
        rounds = suite.rounds if self.plan.rounds is None else self.plan.rounds
        for workload in workloads(self.plan.names, self.plan.size, self.device, suite.workloads):
            workload = replace(workload, dtype=suite.dtype or workload.dtype)
            wanted = self._peers(suite)
            job = Job(suite.name, workload, tuple(wanted), self.device, rounds, self.plan.plugins, self.plan.warm)
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

    def _do_all(self, jobs: Sequence[Job]) -> None:
        """Work on all GPUs, each on the next job that is left."""
        left = deque(jobs)

        def work(gpu: str) -> None:
            while True:
                try:
                    job = left.popleft()
                except IndexError:
                    return
                self._do(job, gpu)

        with ThreadPoolExecutor(len(self.plan.gpus)) as pool:
            working = [pool.submit(work, gpu) for gpu in self.plan.gpus]
            try:
                for one in as_completed(working):
                    one.result()
            finally:  # after an error or Ctrl-C the other threads end within POLL_S, and their workers with them
                self.deadline = -math.inf if any(not one.done() for one in working) else self.deadline

    def _do(self, job: Job, gpu: str | None = None) -> None:
        """Work on a job until every peer has a row: after a hang or a crash, go on without the one to blame.

        Who has ended a process is not tried at further workloads of the run: to compile it, only to die again, can
        take most of the time of all peers.
        """
        for peer in set(job.peers) & self.ended.keys():
            why = f"not tried: it ended its process at {self.ended[peer]} of this run (--again failed tries)"
            self._keep(job, peer, "failed", why, {}, 0.0)
        peers = [peer for peer in job.peers if peer not in self.ended]
        while peers:
            if time.monotonic() > self.deadline:
                raise Stopped("the budget is spent")
            # Workers of a workload share caches; the next one begins with empty ones, as its first calls are timed.
            worker = Worker(replace(job, peers=tuple(peers)).to_json(), self.folder, job.workload.name, gpu)
            try:
                self._follow(worker, job, peers)
            finally:
                worker.kill()

    def _follow(self, worker: Worker, job: Job, peers: list[str]) -> None:
        """Keep the rows of a worker as they come, and give one to whoever is to blame for its end; takes their peers
        off the list, at least one."""
        spent: Counter[str | None] = Counter()
        partial: dict[str | None, dict[str, Any]] = {}
        current, stage, since, asked = None, "start", time.time(), len(peers)
        while True:
            running = worker.process.poll() is None
            for event in worker.events():
                spent[current] += event["time"] - since
                since = event["time"]
                if event["event"] == "begin":
                    current, stage = event["peer"], event["stage"]
                    self.progress.stage(f"{job.suite} {job.workload.name} {current or ''} {stage}")
                elif event["event"] == "partial":
                    partial[event["peer"]] = event["metrics"]
                else:
                    peer = event["peer"]
                    peers.remove(peer)
                    self._keep(job, peer, event["status"], event["reason"], event["metrics"], spent[peer])
            limit = self.plan.limit_s + (START_S if current is None else 0)
            reason = None
            if not running:
                status = worker.process.returncode
                reason = f"the process ended with status {status} during {stage}: {worker.last_words()}"
            elif spent[current] + time.time() - since > limit:
                reason = f"stopped after {limit:g} s, during {stage}"
            if reason is not None:
                spent[current] += time.time() - since
                if current in peers and not running and not SUITES[job.suite].independent:
                    self.ended[current] = job.workload.name
                # One whose row has come may have spoilt the process for the others: they get another one.
                others = [] if len(peers) < asked else list(peers)
                for peer in [current] if current in peers else others:
                    self._keep(job, peer, "failed", reason, partial.get(peer, {}), spent[current])
                    peers.remove(peer)
                return
            if time.monotonic() > self.deadline:
                if partial.get(current):
                    why = f"the budget was spent during {stage} (--again failed tries)"
                    self._keep(job, current, "failed", why, partial[current], spent[current])
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
