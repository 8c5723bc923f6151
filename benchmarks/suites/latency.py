"""Suite `latency`: calls in a steady state, the peers taking turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import floors, timing
from benchmarks.cases import Job
from benchmarks.peers import Prepared
from benchmarks.suites import common
from benchmarks.worker import Reporter


def measure(job: Job, out: Reporter) -> None:
    """`device_ms` (on a GPU) and `wall_ms` of a call, the `ratio` to the best other peer, the model's `work`."""
    out.begin(None, "model")
    with common.set_up(job) as setup:
        subject = setup.subject
        work = floors.work(subject.model, subject.args, subject.kwargs)
        take_turns(job, setup, common.prepare(job, setup, out), out, lambda name, call: {"work": work})


def take_turns(
    job: Job,
    setup: common.Setup,
    prepared: dict[str, Prepared],
    out: Reporter,
    more: Callable[[str, Prepared], dict[str, Any]],
) -> None:
    """Time peers that are prepared, check them once more, and write their rows.

    Args:
        more: further metrics of a peer.
    """
    calls = {name: setup.rotating(call) for name, call in prepared.items()}
    with out.alone():
        times = timing.interleaved(calls, job.device, job.rounds, lambda name: out.begin(name, "measure"))
    clock = "device_ms" if job.device == "cuda" else "wall_ms"
    ratios = common.compare({name: found[clock] for name, found in times.items()})
    for name, call in prepared.items():
        with out.attempt(name, "check again"):
            setup.check(call, checks=1)
            metrics = {clock: common.flat(rounds) for clock, rounds in times[name].items()}
            out.ok(name, {**metrics, "ratio": ratios.get(name), **more(name, call)})
