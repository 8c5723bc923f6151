"""Suite `train`: a training step (forward, backward and AdamW), in bfloat16 autocast on a GPU, the peers in turns."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from benchmarks import timing, training
from benchmarks.cases import Job
from benchmarks.suites import common
from benchmarks.worker import Reporter

REPLAYED = 3  # checked steps after the first: compilers capture CUDA graphs in the second or third


def measure(job: Job, out: Reporter) -> None:
    """Of a step `wall_ms` and its `ratio` to the best other peer. On a GPU also `device_ms`, which `ratio` is of then,
    `host_ms` until it is queued, `peak_bytes` and `allocated_peak_bytes` (see `peak`), with `host_ratio` and
    `peak_ratio` to the best other peer.

    `first_s` is the time from `torch.compile` to the end of the first backward. Caches are empty at the start of a
    workload, but Inductor's modes find what an earlier one of them has compiled; suite `first_step` has no such order.
    `settle_s` is how long the peer then works in the background.
    """
    out.begin(None, "model")
    with training.set_up(job) as lesson:
        out.begin(None, "reference")
        lesson.expected()
        steps: dict[str, timing.Call] = {}
        metrics: dict[str, dict[str, Any]] = {}
        for name in job.peers:
            with out.attempt(name, "prepare"):
                held = reserved(job.device)
                step, seconds = prepare(name, lesson)
                timing.warm_up(step, job.device)
                metrics[name] = {**seconds, **peak(step, held, job.device)}
                steps[name] = step
        times = timing.interleaved(steps, job.device, job.rounds, lambda name: out.begin(name, "measure"))
        clock = "device_ms" if job.device == "cuda" else "wall_ms"
        ratios = common.compare({name: found[clock] for name, found in times.items()})
        for name, found in times.items():
            metrics[name] |= {clock: common.flat(rounds) for clock, rounds in found.items()}
        hosts = common.of_best({name: row["host_ms"]["median"] for name, row in metrics.items() if "host_ms" in row})
        peaks = common.of_best({name: row["peak_bytes"] for name, row in metrics.items() if "peak_bytes" in row})
        for name, row in metrics.items():
            own = {"ratio": ratios.get(name), "host_ratio": hosts.get(name), "peak_ratio": peaks.get(name)}
            out.ok(name, {**row, **own})


def prepare(name: str, lesson: training.Lesson) -> tuple[timing.Call, dict[str, float]]:
    """A peer's training step, with `first_s` and `settle_s`.

    Raises:
        WrongResult: its gradients are wrong, in the first step or at its full speed.
    """
    begin = time.perf_counter()
    prepared, own = lesson.pupil(name)
    found = lesson.gradients(prepared, own)
    timing.synchronize(lesson.device)
    first_s = time.perf_counter() - begin
    lesson.check(found)
    del found  # results that are alive may keep it from replaying a CUDA graph
    begin = time.perf_counter()
    common.settle(name)
    settle_s = time.perf_counter() - begin
    for _ in range(REPLAYED):
        lesson.check(lesson.gradients(prepared, own))
    return lesson.step(prepared, own), {"first_s": first_s, "settle_s": settle_s}


def reserved(device: str) -> dict[str, int]:
    """What PyTorch's allocator holds of a device, nothing of it unused, and how much of it tensors have."""
    if device != "cuda":
        return {}
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {"peak_bytes": torch.cuda.memory_reserved(), "allocated_peak_bytes": torch.cuda.memory_allocated()}


def peak(step: timing.Call, held: dict[str, int], device: str) -> dict[str, int]:
    """What a peer needs of a GPU for a step: weights, optimizer, activations and what it keeps of its own.

    `peak_bytes` is what PyTorch's allocator takes from the device, if it keeps nothing from earlier steps. The memory
    pools of CUDA graphs are in it as a whole, because nobody else can use what is free in them. It is not in
    `allocated_peak_bytes`, PyTorch's `max_memory_allocated`, where a replay seems to need no activations.

    Args:
        held: what `reserved` said before the peer was prepared.
    """
    if device != "cuda":
        return {}
    reserved(device)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    most = {"peak_bytes": torch.cuda.max_memory_reserved(), "allocated_peak_bytes": torch.cuda.max_memory_allocated()}
    return {name: value - held[name] for name, value in most.items()}
