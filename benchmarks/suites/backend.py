"""Suite `backend`: seconds inside a torch.compile backend, against `aot_eager`, taking turns in one process.

What is timed is the call of the backend by Dynamo: AOTAutograd's capture, and for torch_rtx all of lowering. Dynamo's
own tracing is the same for both and is left out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from benchmarks import models
from benchmarks.cases import Job, Workload
from benchmarks.suites import common
from benchmarks.worker import Reporter
from torch_rtx.backend.entry import rtx

WARM = Workload("bert_base", size="small")


def measure(job: Job, out: Reporter) -> None:
    """`backend_s` of a cold compilation, and its `ratio` to that of `aot_eager`."""
    out.begin(None, "imports")
    for name in job.peers:
        seconds_inside(name, WARM, job.device)  # imports and first-use costs
    times: dict[str, list[list[float]]] = {name: [] for name in job.peers}
    for _ in range(job.rounds):
        for name in job.peers:
            out.begin(name, "measure")
            times[name].append([seconds_inside(name, job.workload, job.device)])
    ratios = common.compare(times)
    for name in job.peers:
        out.ok(name, {"backend_s": common.flat(times[name]), "ratio": ratios.get(name)})


def seconds_inside(backend: str, w: Workload, device: str) -> float:
    """Seconds of one cold compilation of the model with `backend`, inside the backend."""
    inner, spent = rtx if backend == "rtx" else lookup_backend(backend), 0.0

    def timed(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal spent
        gc.collect()
        start = time.perf_counter()
        compiled = inner(gm, example_inputs)
        spent += time.perf_counter() - start
        return compiled

    torch._dynamo.reset()
    dtype = getattr(torch, w.dtype)
    model, args, kwargs = models.build(w.model, w.size, batch=w.batch, length=w.length, dtype=dtype, device=device)
    with torch.no_grad():
        torch.compile(model, backend=timed)(*args, **kwargs)
    return spent
