"""Suite `host`: how long a call keeps the host, the device idle before it."""

from __future__ import annotations

from typing import Any

from benchmarks import timing
from benchmarks.cases import Job
from benchmarks.suites import common
from benchmarks.worker import Reporter

CALLS = 15  # per turn


def measure(job: Job, out: Reporter) -> None:
    """`host_us` of a call, its `ratio` to the best other peer; `bare_replay_us` of the same CUDA graph by itself."""
    out.begin(None, "model")
    with common.set_up(job) as setup:
        prepared = common.prepare(job, setup, out)
        calls = {name: setup.rotating(call) for name, call in prepared.items()}
        for name, call in calls.items():
            out.begin(name, "warm up")
            timing.warm_up(call, job.device)
        times: dict[str, list[list[float]]] = {name: [] for name in calls}
        with timing.undisturbed():
            for _, name in timing.turns(list(calls), job.rounds):
                out.begin(name, "measure")
                times[name].append(timing.host_us(calls[name], CALLS, job.device))
        ratios = common.compare(times)
        for name, call in prepared.items():
            with out.attempt(name, "bare replay"):
                metrics: dict[str, Any] = {"host_us": common.flat(times[name]), "ratio": ratios.get(name)}
                replay = _bare_replay(call)
                if replay is not None:
                    metrics["bare_replay_us"] = timing.summary(timing.host_us(replay, CALLS * job.rounds, job.device))
                out.ok(name, metrics)


def _bare_replay(prepared: Any) -> timing.Call | None:
    """The replay of the CUDA graph of an engine, without anything around it; None where there is none."""
    pool = getattr(getattr(prepared, "session", None), "pool", None)
    captured = list(pool.captured.values()) if pool is not None else []
    return captured[0].graph.replay if captured else None
