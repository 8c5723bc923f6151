"""Clocks that measure the time between marks, on the host or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

# Events around single calls would also measure the GPU's idle time between launches, so spans are queued behind a delay
# that outlasts the queueing. A GPU's queue holds about 1000 entries; a span is an event and rarely more than 3 kernels.
SPANS_AT_ONCE = 100
DELAY_CYCLES = 10_000_000  # about 5 ms: 50 us of host time per span


class Clock:
    """The clock of the host. Calling it sets a mark."""

    def __init__(self) -> None:
        self._marks: list[int] = []

    def __call__(self) -> None:
        self._marks.append(time.perf_counter_ns())

    def read(self) -> list[float]:
        """The microseconds between neighbouring marks; clears the marks."""
        marks, self._marks = self._marks, []
        return [(end - start) / 1000 for start, end in pairwise(marks)]


class DeviceClock(Clock):
    """The clock of a GPU: marks are events on the current stream, and only `read` waits for the device.

    Args:
        record: records an event with the methods of `torch.cuda.Event`.
        delay: occupies the device for longer than the host needs to queue SPANS_AT_ONCE spans.
    """

    def __init__(self, record: Callable[[], Any], delay: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._record, self._delay = record, delay
        self._spans: list[tuple[Any, Any]] = []
        self._last: Any = None

    def __call__(self) -> None:
        mark = self._record()
        if self._last is not None:
            self._spans.append((self._last, mark))
        if self._delay is not None and len(self._spans) % SPANS_AT_ONCE == 0:
            self._delay()
            mark = self._record()  # the delay is in no span
        self._last = mark

    def read(self) -> list[float]:
        """As `Clock.read`; waits for the last mark."""
        if self._last is not None:
            self._last.synchronize()
        spans, self._spans, self._last = self._spans, [], None
        return [1000 * start.elapsed_time(end) for start, end in spans]


def clock_of(device: torch.device, queued: bool) -> Clock:
    """The clock of a device.

    Args:
        queued: measure without the device's idle time between launches.
    """
    if device.type != "cuda":
        return Clock()

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def delay() -> None:
        with torch.cuda.device(device):
            torch.cuda._sleep(DELAY_CYCLES)

    return DeviceClock(record, delay if queued else None)


def overhead(clock: Clock, marks: int = 64) -> float:
    """The median microseconds between two marks with no work in between."""
    for _ in range(marks):
        clock()
    return median(clock.read())
