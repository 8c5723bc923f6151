"""A worker process: does one job and writes what happens, as JSON lines, to a file that its parent reads.

    python -m benchmarks.worker JOB.json EVENTS.jsonl

Events, each with its `time`, are `{"event": "begin", "peer", "stage"}`, by which the parent knows whom to blame for a
hang or a crash, `{"event": "row", "peer", "status", "reason", "metrics"}`, and `{"event": "partial", "peer",
"metrics"}`, the metrics of a failed row unless more come. A worker that shares its GPU asks for it by `{"event":
"alone"}`, waits for the file EVENTS.jsonl.alone, and says `{"event": "together"}` afterwards. The job
`{"environment": device}` is answered with one event, `{"event": "environment", "record"}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.cases import Job

MAX_REASON = 400
POLL_S = 0.02
DRAIN_S = 0.3  # until a GPU has done what the others had queued
DAMAGED = 3  # exit status: the device can't be used any more in this process


class Reporter:
    """Tells the parent what a worker does and finds.

    Args:
        write: takes each event.
        device: "cpu" or "cuda".
        granted: a file that is there as soon as the worker has its GPU alone; None: it always has.
    """

    def __init__(
        self, write: Callable[[dict[str, Any]], None], peers: Sequence[str], device: str, granted: Path | None = None
    ) -> None:
        self._write, self._device, self._granted = write, device, granted
        self.left = list(peers)  # without a row yet
        self._partial: dict[str, dict[str, Any]] = {}
        self.current: str | None = None

    def begin(self, peer: str | None, stage: str) -> None:
        """The next thing to happen is a stage of `peer`, or of all of them."""
        self.current = peer
        self._write({"event": "begin", "peer": peer, "stage": stage})

    def ok(self, peer: str, metrics: dict[str, Any]) -> None:
        """A peer is measured."""
        self._row(peer, "ok", None, metrics)

    def partial(self, peer: str, metrics: dict[str, Any]) -> None:
        """So far a peer has these metrics. They are those of its row if it fails, or is stopped."""
        self._partial[peer] = metrics
        self._write({"event": "partial", "peer": peer, "metrics": metrics})

    def failed(self, peer: str, error: BaseException) -> None:
        """A peer is not: an error."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__
        self._row(peer, "failed", reason[:MAX_REASON], self._partial.get(peer, {}))

    def _row(self, peer: str, status: str, reason: str | None, metrics: dict[str, Any]) -> None:
        self.left.remove(peer)
        self._write({"event": "row", "peer": peer, "status": status, "reason": reason, "metrics": metrics})

    @contextmanager
    def attempt(self, peer: str, stage: str) -> Iterator[None]:
        """An error within is a failed row of `peer`, and the job goes on."""
        self.begin(peer, stage)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed(peer, error)
            self._check_device()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other worker of the run uses the GPU within."""
        if self._granted is None:
            yield
            return
        self._write({"event": "alone"})
        while not self._granted.exists():
            time.sleep(POLL_S)
        time.sleep(DRAIN_S)
        try:
            yield
        finally:
            self._granted.unlink()
            self._write({"event": "together"})

    def _check_device(self) -> None:
        """End the process where an error has left the device unusable: the other peers get another one."""
        if self._device != "cuda":
            return
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:
            sys.exit(DAMAGED)


def perform(job: Job, write: Callable[[dict[str, Any]], None], granted: Path | None = None) -> None:
    """Do a job. An error outside any attempt is a failed row of the peer at work, or of all that are left.

    Args:
        granted: see `Reporter`.
    """
    from benchmarks.suites import SUITES

    for plugin in job.plugins:
        import_module(plugin)
    out = Reporter(write, job.peers, job.device, granted if job.shared else None)
    _take_share(job)
    try:
        SUITES[job.suite].measure(job, out)
    except Exception as error:
        traceback.print_exc()
        for peer in [out.current] if out.current in out.left else list(out.left):
            out.failed(peer, error)


def _take_share(job: Job) -> None:
    """Use no more of the machine than the job says, where several of them run."""
    if job.cores or job.shared:
        import torch
        from torch._inductor import config as inductor

        from benchmarks import timing

        if job.cores:
            os.sched_setaffinity(0, job.cores)
            torch.set_num_threads(len(job.cores))
            inductor.compile_threads = len(job.cores)
        if job.shared:
            timing.tune_one_at_a_time(Path(job.shared))


def describe(asked: str) -> dict[str, Any]:
    """The environment with the measured rates of the device; `asked` is "auto", "cpu" or "cuda"."""
    import torch

    from benchmarks import floors

    device = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():  # engines can still be built for it
        return {**environment.record("cpu"), "kind": "cuda", "device": "cuda (not present)", "absent": True}
    rates = floors.device_rates(device)
    return {**environment.record(device), "rates": rates}  # clocks as they are under load


def main(job_path: str, events_path: str) -> None:
    """Do the job in the first file, and write events to the second."""
    data = json.loads(Path(job_path).read_text())
    with open(events_path, "a") as events:

        def write(event: dict[str, Any]) -> None:
            events.write(json.dumps({**event, "time": time.time()}) + "\n")
            events.flush()

        if "environment" in data:
            write({"event": "environment", "record": describe(data["environment"])})
        else:
            perform(Job.from_json(data), write, Path(f"{events_path}.alone"))


if __name__ == "__main__":
    main(*sys.argv[1:])
