"""Clocks: calls in a row by device events, single calls by the wall clock, and peers that take turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from torch_rtx.runtime import benchmark
from torch_rtx.runtime.call_times import Call, alone, in_a_row, percentile, undisturbed

BLOCK_S = 0.03  # what one peer's turn should last
CALLS = (3, 20)  # fewest and most calls of a turn
WARM_CALLS, WARM_S = 30, 6.0  # calls and seconds after which a call counts as warm, settled or not
SETTLED = 1.1  # two calls this near to each other are at full speed


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_ms(call: Call, count: int) -> list[float]:
    """Milliseconds per call in a row of calls: see `call_times.in_a_row`."""
    torch.cuda.synchronize()
    return [1e3 * seconds for seconds in in_a_row(call, count)]


def alone_ms(call: Call, count: int, device: str) -> tuple[list[float], list[float]]:
    """Milliseconds of single calls until they return, and until their results are there: see `call_times.alone`."""
    times = [alone(call, lambda: synchronize(device)) for _ in range(count)]
    return [1e3 * host for host, _ in times], [1e3 * wall for _, wall in times]


def wall_ms(call: Call, count: int, device: str) -> list[float]:
    """Milliseconds of single calls until their results are there, by the wall clock, the device idle before each."""
    return alone_ms(call, count, device)[1]


def host_us(call: Call, count: int, device: str) -> list[float]:
    """Microseconds until a call returns to the host, the device idle before it."""
    return [1e3 * ms for ms in alone_ms(call, count, device)[0]]


def warm_up(call: Call, device: str) -> float:
    """Call until two calls in a row take about the same time, five times at least; the seconds of the last."""
    start, last = time.perf_counter(), math.inf
    for count in range(WARM_CALLS):
        (now,) = wall_ms(call, 1, device)
        settled = max(now, last) <= SETTLED * min(now, last)
        last = now
        if count >= 4 and (settled or time.perf_counter() - start > WARM_S):
            break
    return last / 1e3


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile."""
    return {"median": statistics.median(values), "p5": percentile(values, 5), "p95": percentile(values, 95)}


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """`(round, name)`: in each round every peer once, and the one that begins changes."""
    for index in range(rounds):
        first = index % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            yield index, name


def calls_per_turn(seconds: float) -> int:
    """How many calls of this length make a turn."""
    return max(CALLS[0], min(CALLS[1], math.ceil(BLOCK_S / max(seconds, 1e-9))))


def interleaved(
    calls: Mapping[str, Call], device: str, rounds: int, begin: Callable[[str], object]
) -> dict[str, dict[str, list[list[float]]]]:
    """Times of calls that take turns: per name, `device_ms` and `host_ms` (on a GPU) and `wall_ms`, one list per round.

    Args:
        begin: called with the name before each turn.
    """
    counts = {}
    for name, call in calls.items():
        begin(name)
        counts[name] = calls_per_turn(warm_up(call, device))
    clocks = ("device_ms", "host_ms", "wall_ms") if device == "cuda" else ("wall_ms",)
    times: dict[str, dict[str, list[list[float]]]] = {name: {clock: [] for clock in clocks} for name in calls}
    with undisturbed(device):
        for _, name in turns(list(calls), rounds):
            begin(name)
            call, count = calls[name], counts[name]
            call()  # what another peer's turn has left in the caches is not this one's cost
            if device == "cuda":
                times[name]["device_ms"].append(device_ms(call, count))
            host, wall = alone_ms(call, min(count, 5), device)
            if device == "cuda":
                times[name]["host_ms"].append(host)
            times[name]["wall_ms"].append(wall)
    return times


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """The ratio of the medians of each round, summed up over the rounds."""
    pairs = zip(ours, theirs, strict=True)
    return summary([statistics.median(a) / statistics.median(b) for a, b in pairs])


def excess(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """The difference of the medians of each round, summed up over the rounds."""
    pairs = zip(ours, theirs, strict=True)
    return summary([statistics.median(a) - statistics.median(b) for a, b in pairs])


def tune_one_at_a_time(file: Path) -> None:
    """Let tuners of the processes that call this with the same file time kernels one at a time."""
    import fcntl

    own = benchmark.device_us

    def timed(runs: Sequence[benchmark.Run]) -> float:
        with open(file, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return own(runs)

    benchmark.device_us = timed
