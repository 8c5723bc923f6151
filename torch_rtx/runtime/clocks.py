"""Clocks for measuring: what passes between marks, on the host or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

# A GPU that gets its work one call at a time waits for the host between them, and events around a call would measure
# that. The work of this many spans is therefore queued behind a delay that outlasts the queueing. The queue itself
# holds about a thousand entries; a span is an event and, seldom, more than two or three kernels.
SPANS_AT_ONCE = 100
DELAY_CYCLES = 10_000_000  # some 5 ms: 50 us of the host's time per span


class Clock:
    """The host's. Calling it makes a mark."""

    def __init__(self) -> None:
        self._marks: list[int] = []

    def __call__(self) -> None:
        self._marks.append(time.perf_counter_ns())

    def read(self) -> list[float]:
        """The microseconds between neighbouring marks, which are forgotten."""
        marks, self._marks = self._marks, []
        return [(end - start) / 1000 for start, end in pairwise(marks)]


class DeviceClock(Clock):
    """A GPU's: marks are events on the current stream, and nothing waits for the device before `read`.

    Args:
        record: records an event with `synchronize` and `elapsed_time` (milliseconds), as those of `torch.cuda`.
        delay: occupies the device for a while, before the first of every SPANS_AT_ONCE spans.
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
            mark = self._record()  # the delay belongs to no span
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
        queued: measure what the device spends on its work alone; else its waiting for the host counts as well.
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
    """The microseconds that `clock` sees between two marks with nothing in between."""
    for _ in range(marks):
        clock()
    return median(clock.read())
