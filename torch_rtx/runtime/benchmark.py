"""Times equal runs of a candidate, on the host or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]
RUNS = 32  # in a row, or as many as take ROUND_US, but LEAST: of long ones, fewer are as exact
ROUND_US, LEAST = 2e3, 3  # about the time slice of a process that has the GPU beside others
# A GPU is shared: rounds go on until the two fastest agree, so that nothing ran between their runs.
ROUNDS, MOST_ROUNDS, AGREE = 3, 8, 1.02
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
    delay on the stream outlasts the queueing of all runs. The fastest round counts."""
    runs[0]()
    count = min(RUNS, max(LEAST, int(ROUND_US / max(_us(runs[:1]), 1.0))))
    order = [runs[index % len(runs)] for index in range(count)]
    begin = time.perf_counter()
    for run in order:
        run()
    delay_s = min(2 * (time.perf_counter() - begin), MAX_DELAY_S)
    times: list[float] = []
    while len(times) < ROUNDS or (len(times) < MOST_ROUNDS and times[1] > AGREE * times[0]):
        times = sorted((*times, _us(order, delay_s)))
    return times[0] / count


def _us(runs: Sequence[Run], delay_s: float = 0.0) -> float:
    """Microseconds on the current stream from the first to the last of `runs`, which begin after a delay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(delay_s * CYCLES_PER_S))
    start.record()
    for run in runs:
        run()
    end.record()
    end.synchronize()
    return 1000 * float(start.elapsed_time(end))


def timer(device: torch.device) -> Callable[[Sequence[Run]], float]:
    """The function that times runs on `device`."""
    return device_us if device.type == "cuda" else host_us
