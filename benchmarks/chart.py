"""The plot of the performance page as SVG, written without a library: the same results give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import ceil

from benchmarks.report import WAYS, Speedup

WIDTH, LETTER, ROW, TOP = 510, 7, 19, 58  # of the axis, in pixels; of a letter, at most; of a row; before the first one
COLOURS = ("#1f6fb4", "#d1660a")  # told apart by most who see few colours, and by shape
TICK, MOST_TICKS = 0.25, 16


def speedup_chart(found: Sequence[Speedup]) -> str:
    """Workloads below each other, with a mark for each way of using torch_rtx at the times that it is faster."""
    most = max(max(one.times.values(), default=1.0) for one in found)
    least = min(min(one.times.values(), default=1.0) for one in found)
    step = TICK * ceil((most - min(least, 1.0)) / TICK / MOST_TICKS)
    first, last = int(min(least, 1.0) / step) * step, (int(most / step) + 1) * step
    left = LETTER * max(len(one.workload) for one in found) + 20
    right, height = left + WIDTH, TOP + ROW * len(found) + 34

    def at(times: float) -> str:
        return f"{left + WIDTH * (times - first) / (last - first):.1f}"

    def lines() -> Iterator[str]:
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 30} {height}" '
            'font-family="system-ui, sans-serif" font-size="12">'
        )
        yield "<title>Times faster than the fastest other compiler, by workload</title>"
        yield f'<rect width="{right + 30}" height="{height}" rx="6" fill="#fff"/>'
        for way, place in zip(WAYS, (left, left + 150), strict=True):
            yield _mark(way, str(place), 20)
            yield f'<text x="{place + 10}" y="24" fill="#222">{escape(way.strip("`"))}</text>'
        bottom = TOP + ROW * len(found) - 8
        for tick in range(round((last - first) / step) + 1):
            x = at(value := first + step * tick)
            colour = "#555" if value == 1 else "#ddd"
            yield f'<line x1="{x}" y1="{TOP - 16}" x2="{x}" y2="{bottom}" stroke="{colour}"/>'
            yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle" fill="#555">{value:g}x</text>'
        for row, one in enumerate(found):
            y = TOP + ROW * row
            yield f'<text x="{left - 10}" y="{y + 4}" text-anchor="end" fill="#222">{escape(one.workload)}</text>'
            yield from (_mark(way, at(times), y) for way, times in one.times.items())
        yield "</svg>"

    return "".join(f"{line}\n" for line in lines())


def _mark(way: str, x: str, y: int) -> str:
    """A square that stands on its corner where the engine was built ahead of time, else a dot."""
    if not WAYS[way]:
        return f'<circle cx="{x}" cy="{y}" r="4.5" fill="{COLOURS[0]}"/>'
    return f'<path d="M{x} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z" fill="{COLOURS[1]}"/>'
