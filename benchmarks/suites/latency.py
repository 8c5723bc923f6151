"""Suite `latency`: calls in a steady state, the peers taking turns."""

from __future__ import annotations

from benchmarks import floors, timing
from benchmarks.cases import Job
from benchmarks.suites import common
from benchmarks.worker import Reporter


def measure(job: Job, out: Reporter) -> None:
    """`device_ms` (on a GPU) and `wall_ms` of a call, the `ratio` to the best other peer, the model's `work`."""
    out.begin(None, "model")
    with common.set_up(job) as setup:
        subject = setup.subject
        work = floors.work(subject.model, subject.args, subject.kwargs)
        prepared = common.prepare(job, setup, out)
        calls = {name: setup.rotating(call) for name, call in prepared.items()}
        times = timing.interleaved(calls, job.device, job.rounds, lambda name: out.begin(name, "measure"))
        clock = "device_ms" if job.device == "cuda" else "wall_ms"
        ratios = common.compare({name: found[clock] for name, found in times.items()})
        for name, call in prepared.items():
            with out.attempt(name, "check again"):
                setup.check(call, checks=1)
                metrics = {clock: common.flat(rounds) for clock, rounds in times[name].items()}
                out.ok(name, {**metrics, "ratio": ratios.get(name), "work": work})
