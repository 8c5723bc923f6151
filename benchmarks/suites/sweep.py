"""Suite `sweep`: many models from outside, as `latency` measures, and how each peer gets there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor.async_compile import maybe_warm_pool

from benchmarks import timing
from benchmarks.cases import Job
from benchmarks.peers import Prepared
from benchmarks.suites import common, counts, latency
from benchmarks.worker import Reporter
from torch_rtx.runtime.module import CompiledModule


def measure(job: Job, out: Reporter) -> None:
    """What `latency` measures of a peer, `settle_s`, `prepare_peak_bytes` beside the model's `weight_bytes`, and what
    an engine consists of, see `counts`."""
    out.begin(None, "model")
    if job.device == "cuda" and not {"inductor", "reduce-overhead", "max-autotune"}.isdisjoint(job.peers):
        maybe_warm_pool()  # Inductor's processes import PyTorch while the model is built
    with common.set_up(job) as setup:
        model = setup.subject.model
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        meter = Meter(job.device)
        prepared = common.prepare(job, setup, out, meter.around)

        def more(name: str, call: Prepared) -> dict[str, Any]:
            inside = counts.counted(call.engine.graph) if isinstance(call, CompiledModule) else {}
            return {**meter.found[name], "weight_bytes": weights, **inside}

        latency.take_turns(job, setup, prepared, out, more)


class Meter:
    """Seconds and memory that peers take until they are at full speed.

    Attributes:
        found: by peer, `settle_s` and, on a GPU, `prepare_peak_bytes`: beside what was allocated before.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Measure what happens within, as that of a peer."""
        on_gpu = self._device == "cuda"
        timing.synchronize(self._device)
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        timing.synchronize(self._device)
        self.found[name] = {"settle_s": time.perf_counter() - start}
        if on_gpu:
            self.found[name]["prepare_peak_bytes"] = torch.cuda.max_memory_allocated() - before
