"""Suite `host`: how long a call keeps the host, the device idle before it."""

from __future__ import annotations

from typing import Any

from benchmarks import timing
from benchmarks.cases import Job
from benchmarks.suites import common
from benchmarks.worker import Reporter

CALLS = 15  # per turn


def measure(job: Job, out: Reporter) -> None:
    """`host_us` of a call, its `ratio` to the best other peer; `bare_replay_us` of the same CUDA graph by itself, and
    `over_replay_us`: by how much the median of a turn of calls exceeds that of a turn of replays beside it."""
    out.begin(None, "model")
    with common.set_up(job) as setup:
        prepared = common.prepare(job, setup, out)
        calls = {name: setup.rotating(call) for name, call in prepared.items()}
        for name, call in calls.items():
            out.begin(name, "warm up")
            timing.warm_up(call, job.device)
        replays = {name: replay for name, call in prepared.items() if (replay := _bare_replay(call)) is not None}
        times: dict[str, list[list[float]]] = {name: [] for name in calls}
        bare: dict[str, list[list[float]]] = {name: [] for name in replays}
        with timing.undisturbed(job.device):
            for _, name in timing.turns(list(calls), job.rounds):
                out.begin(name, "measure")
                times[name].append(timing.host_us(calls[name], CALLS, job.device))
                if name in replays:
                    bare[name].append(timing.host_us(replays[name], CALLS, job.device))
        ratios = common.compare(times)
        for name in prepared:
            metrics: dict[str, Any] = {"host_us": common.flat(times[name]), "ratio": ratios.get(name)}
            if name in replays:
                metrics["bare_replay_us"] = common.flat(bare[name])
                metrics["over_replay_us"] = timing.excess(times[name], bare[name])
            out.ok(name, metrics)


def _bare_replay(prepared: Any) -> timing.Call | None:
    """The replay of the CUDA graph of an engine, without anything around it; None where there is none."""
    pool = getattr(getattr(prepared, "session", None), "pool", None)
    captured = list(pool.captured.values()) if pool is not None else []
    return captured[0].graph.replay if captured else None
