"""Suite `shapes`: a trace of calls over changing shapes, for each peer in a process of its own."""

from __future__ import annotations

import inspect
import random
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models, timing
from benchmarks.cases import Job
from benchmarks.peers import PEERS
from benchmarks.suites import common
from benchmarks.worker import Reporter

PASSES = 4  # times that the trace visits each shape; the first in the order given, the others shuffled


def measure(job: Job, out: Reporter) -> None:
    """`calls_ms`, the wall time of each call with its shape; `first_s` with all that comes before it; `worst_ms` of the
    later calls; `settled_ms`, the median of the last pass; `total_s`."""
    (name,) = job.peers
    out.begin(None, "model")
    trace = job.workload.trace
    with common.set_up(job, trace) as setup, out.attempt(name, "measure"):
        subject = setup.subject
        subject.dynamic = dynamic_shapes(subject.model, setup.sets)
        prepared: list[common.Prepared] = []

        def first() -> None:
            prepared.append(PEERS[name].prepare(subject))
            prepared[0](*subject.args, **subject.kwargs)

        times = timing.wall_ms(first, 1, job.device)
        order = visits(len(trace))
        for index in order[1:]:
            args, kwargs = setup.sets[index]
            times += timing.wall_ms(lambda args=args, kwargs=kwargs: prepared[0](*args, **kwargs), 1, job.device)
        setup.check(prepared[0], checks=1, sets=range(len(trace)))
        last = times[-len(trace) :]
        metrics: dict[str, Any] = {"first_s": times[0] / 1e3, "worst_ms": max(times[1:])}
        metrics |= {"settled_ms": statistics.median(last), "total_s": sum(times) / 1e3}
        metrics["calls_ms"] = [[*trace[index], ms] for index, ms in zip(order, times, strict=True)]
        out.ok(name, metrics)


def visits(count: int) -> list[int]:
    """Which shape each call has."""
    generator, order = random.Random(0), list(range(count))
    for _ in range(PASSES - 1):
        order += generator.sample(range(count), count)
    return order


def dynamic_shapes(model: nn.Module, sets: list[models.Inputs]) -> dict[str, Any]:
    """What torch.export calls `dynamic_shapes`: the dimensions that differ among the sets."""
    names = list(inspect.signature(model.forward).parameters)
    named = [{**dict(zip(names, args, strict=False)), **kwargs} for args, kwargs in sets]

    def differing(name: str) -> dict[int, Any] | None:
        shapes = [inputs[name].shape for inputs in named]
        dims = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
        return dict.fromkeys(dims, torch.export.Dim.AUTO) or None

    return {name: differing(name) if isinstance(value, Tensor) else None for name, value in named[0].items()}
