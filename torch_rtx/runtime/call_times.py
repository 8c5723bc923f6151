"""Times of calls as a program makes them: alone, until the results are there, and in a row.

`torch-rtx bench` and the benchmarks of a clone measure by these functions, so that their figures mean the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

Call = Callable[[], Any]

STREAMS = 20  # more than the 15 after which kernels are slower
SETS = 4  # sets of inputs that calls rotate among: of none is more in the caches than an application would find there


@contextmanager
def undisturbed(device: Any) -> Iterator[None]:
    """No garbage collection in between, if there was any before; on a GPU, the process is as after a longer run.

    Args:
        device: that of the calls, as PyTorch names it.
    """
    _launch_on_streams(str(device))
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _launch_on_streams(device: str) -> None:
    """Launch a kernel on many streams, once per process and GPU.

    When kernels have run on 16 streams, the driver makes each kernel of a CUDA graph 0.18 us slower until the process
    ends (H200, CUDA 13.0): 9 % of a small model. Which figure a process would see depends on what ran before, be it
    another peer or a tuner, so measurements begin beyond this point.
    """
    import torch

    if torch.device(device).type == "cuda" and torch.cuda.is_initialized():
        for _ in range(STREAMS):
            with torch.cuda.stream(torch.cuda.Stream(device)):
                torch.ones(1, device=device)
        torch.cuda.synchronize(device)


def alone(call: Call, synchronize: Call) -> tuple[float, float]:
    """Seconds of a single call by the host's clock, the device idle before it: until it returns, and until its results
    are there.

    Args:
        synchronize: waits for the device.
    """
    synchronize()
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    synchronize()
    return returned - start, time.perf_counter() - start


def in_a_row(call: Call, count: int) -> list[float]:
    """Seconds from one call's end to the next one's, by events on the current stream, in a row of calls without a wait
    between them; returns when the last one is done.

    This is what a steady stream of calls costs: the device's time, or the host's where that is longer. One more call is
    made first, which is not counted: it waits for nothing.
    """
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events:
        call()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all are at most, interpolated between neighbours. There is one at least."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
