"""Times equal runs of a candidate, on the host or on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]
RUNS = 32  # in a row
# Fewer, where the device is busy for long with each: so many milliseconds of a row show as much.
FEWEST_RUNS, ROW_MS = 8, 8.0
CYCLES_PER_S = 2e9  # of a device, roughly
MAX_DELAY_S = 0.05  # by which a stream is held back


def host_us(runs: Sequence[Run]) -> float:
    """Microseconds of the fastest of RUNS runs on the CPU."""
    best = float("inf")
    for index in range(RUNS):
        start = time.perf_counter_ns()
        runs[index % len(runs)]()
        best = min(best, (time.perf_counter_ns() - start) / 1000)
    return best


def device_us(runs: Sequence[Run]) -> float:
    """Microseconds of one run on the current stream of the current device, without the host's time to launch it: a
    delay on the stream outlasts the queueing of all runs."""
    alone = [_timed(runs[:1]) for _ in range(3)]  # the first one warms up
    row = row_of(*map(min, zip(*alone, strict=True)))
    order = [runs[index % len(runs)] for index in range(row)]
    _, host_s = _timed(order)
    delay_s = min(2 * host_s, MAX_DELAY_S)
    return 1000 * min(_timed(order, delay_s)[0] for _ in range(3)) / row


def row_of(ms: float, host_s: float) -> int:
    """How many runs a row has, if one alone takes so long on the device, and the host so long to queue it."""
    if ms < 2e3 * host_s:  # the device may have waited for the host
        return RUNS
    return min(max(math.ceil(ROW_MS / ms), FEWEST_RUNS), RUNS)


def _timed(runs: Sequence[Run], delay_s: float = 0.0) -> tuple[float, float]:
    """Milliseconds of a row of runs on the device, and seconds of the host, after a delay of the stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if delay_s:
        torch.cuda._sleep(int(delay_s * CYCLES_PER_S))
    start.record()
    begin = time.perf_counter()
    for run in runs:
        run()
    host_s = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host_s


def timer(device: torch.device) -> Callable[[Sequence[Run]], float]:
    """The function that times runs on `device`."""
    return device_us if device.type == "cuda" else host_us
