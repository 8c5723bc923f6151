"""Suite `tiers`: an exported engine at one shape, by what its kernels were compiled for, taking turns in one process.

Its own peers: `generic`, kernels for any size of the dimensions that change; `specialized`, the same engine after it
has been called at this shape; `static`, an engine for this shape alone; and `no graphs`, `specialized` launch by
launch. All but `generic` had their kernels measured against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch_rtx
from benchmarks import timing
from benchmarks.cases import Job
from benchmarks.suites import common
from benchmarks.suites.shapes import dynamic_shapes
from benchmarks.worker import Reporter
from torch_rtx import CompilationSettings, RuntimeSettings

if TYPE_CHECKING:
    from benchmarks.peers import Prepared

AGAINST = "specialized"
SETTLE_S = 90.0


def measure(job: Job, out: Reporter) -> None:
    """`device_ms` (on a GPU), `wall_ms` and the `ratio` to `specialized`."""
    out.begin(None, "model")
    with common.set_up(job) as setup:
        varying = [setup.inputs(*shape, seed) for seed, shape in enumerate(job.workload.trace)]
        dynamic = dynamic_shapes(setup.subject.model, varying)
        prepared: dict[str, Prepared] = {}
        for name in job.peers:
            with out.attempt(name, "prepare"):
                prepared[name] = tier(name, setup, dynamic)
                setup.check(prepared[name])
        calls = {name: setup.rotating(call) for name, call in prepared.items()}
        times = timing.interleaved(calls, job.device, job.rounds, lambda name: out.begin(name, "measure"))
        clock = "device_ms" if job.device == "cuda" else "wall_ms"
        for name in prepared:
            metrics: dict[str, Any] = {clock: common.flat(rounds) for clock, rounds in times[name].items()}
            if AGAINST in times:
                ratio = timing.ratio(times[name][clock], times[AGAINST][clock])
                metrics["ratio"] = {"against": AGAINST, **ratio}
            out.ok(name, metrics)


def tier(name: str, setup: common.Setup, dynamic: object) -> Prepared:
    """An engine in the state that a peer's name means."""
    subject = setup.subject
    module = torch_rtx.compile(
        subject.model,
        subject.args,
        subject.kwargs,
        dynamic_shapes=None if name == "static" else dynamic,
        settings=CompilationSettings(targets="current" if name == "generic" else "later"),
        runtime=RuntimeSettings(
            specialization_strategy="none" if name == "generic" else "lazy",
            cuda_graph_strategy="disabled" if name == "no graphs" else "whole_graph_capture",
        ),
    )
    for _ in range(2):  # sizes have to recur
        module(*subject.args, **subject.kwargs)
        if not module.session.wait(SETTLE_S):
            raise TimeoutError(f"still not at its full speed after {SETTLE_S:g} s")
    return module
