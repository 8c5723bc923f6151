"""Plans weight streaming: which weights stay on the device, and where and when the others are copied. Needs no torch.

Streamed weights share a buffer on the device, the *staging*. A *load* is one copy of a weight into it, valid from the
first to the last use in a span of the program. Copies run in the order of first uses. Each starts as soon as its memory
in the staging is free: when the load that had it is *released*, after its last use.

A call takes as long as its copies or its computations, whichever is longer, if neither waits for the other. `make_plan`
tries several sizes of the staging (a larger one lets copies run further ahead, but leaves less for resident weights),
simulates a call with each, and keeps the fastest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch_rtx.errors import SettingsError

ALIGNMENT = 512  # bytes; of addresses in the staging, as in PyTorch's allocator
DEPTHS = (1.0, 1.5, 2.0, 3.0, 4.0)  # sizes of the staging to try, as multiples of the peak of live bytes
MAX_CEILINGS = 8  # how many limits to try above which no weight is streamed


@dataclass(frozen=True)
class WeightUse:
    """The uses of a weight in the program.

    Attributes:
        name: its name in messages.
        size: bytes on the device.
        spans: disjoint, sorted ranges (first, last) of positions in the program that use it or a view of it.
        fixed: it must stay on the device.
    """

    name: str
    size: int
    spans: tuple[tuple[int, int], ...]
    fixed: bool = False


@dataclass(frozen=True)
class Load:
    """One copy of a weight into the staging.

    Attributes:
        weight: index of the weight.
        offset: in the staging, in bytes.
        first, last: positions of the first and last use.
        after: the load whose release starts the copy; None: the copy starts with the program.
    """

    weight: int
    offset: int
    first: int
    last: int
    after: int | None


@dataclass(frozen=True)
class Plan:
    """The resident and the streamed weights.

    Attributes:
        loads: in the order of their copies, which is that of their first uses.
        resident: bytes of weights that stay on the device.
        staging: bytes of the staging; `resident + staging` is within the budget.
        streamed: bytes that each call copies to the device.
    """

    loads: tuple[Load, ...]
    resident: int
    staging: int
    streamed: int


class _Span(NamedTuple):
    first: int
    weight: int
    last: int
    size: int


class _Place(NamedTuple):
    """Offset of a load in the staging, and how many releases must precede its copy."""

    offset: int
    releases: int


def budget_bytes(weights: Sequence[WeightUse], budget: int | float) -> int:
    """A budget in bytes. A float is the share of the streamable weights that may stay, besides the fixed ones."""
    if isinstance(budget, int):
        return budget
    sizes = {fixed: sum(_aligned(w.size) for w in weights if w.fixed is fixed) for fixed in (False, True)}
    return sizes[True] + int(budget * sizes[False])


def make_plan(weights: Sequence[WeightUse], budget: int) -> Plan:
    """The plan for `budget` bytes on the device, staging included.

    Raises:
        SettingsError: the budget is too small; the message names the largest weight at the peak and the least budget.
    """
    total = sum(_aligned(weight.size) for weight in weights)
    if total <= budget:
        return Plan((), total, 0, 0)
    spans = _spans(weights)
    fixed = total - sum({span.weight: span.size for span in spans}.values())
    least, tight = _tightest(spans)
    room = budget - fixed
    if room < least:
        raise _too_small(weights, spans, budget, fixed, min(fixed + least, total))
    # With computations as slow as the copies, every wait of one for the other shows.
    work = durations(weights, total - budget)
    plans = [_plan(*tried, total) for tried in _layouts(spans, room, least, tight)]
    return min(plans, key=lambda plan: makespan(plan, weights, work))


def makespan(plan: Plan, weights: Sequence[WeightUse], work: Mapping[int, float]) -> float:
    """The simulated duration of a call, in units of the time to copy one byte.

    Args:
        work: duration of the computation at each position, in the same unit.
    """
    waits: dict[int, list[Load]] = {}
    for load in plan.loads:
        waits.setdefault(load.first, []).append(load)
    now = copied = 0.0
    ends: dict[int, float] = {}
    for position in sorted({*work, *waits, *(load.last for load in plan.loads)}):
        for load in waits.get(position, ()):
            free = 0.0 if load.after is None else ends[plan.loads[load.after].last]
            copied = max(copied, free) + weights[load.weight].size
            now = max(now, copied)
        now += work.get(position, 0.0)
        ends[position] = now
    return now


def durations(weights: Sequence[WeightUse], total: float) -> dict[int, float]:
    """Distributes `total` over the positions, in proportion to the bytes of the weights that each uses."""
    sizes = Counter[int]()
    for weight in weights:
        for first, _ in weight.spans:
            sizes[first] += weight.size
    scale = total / max(1, sizes.total())
    return {position: scale * size for position, size in sizes.items()}


def _aligned(size: float) -> int:
    return -(-int(size) // ALIGNMENT) * ALIGNMENT


def _spans(weights: Sequence[WeightUse]) -> list[_Span]:
    """The loads if all weights were streamed, in the order of their first uses.

    Between two uses a weight stays in the staging, unless the weights used in between are larger than it: then a second
    copy costs less than the memory that it would take from them.
    """
    starts = sorted((first, _aligned(weight.size)) for weight in weights for first, _ in weight.spans)
    positions, before = [first for first, _ in starts], [0, *accumulate(size for _, size in starts)]

    def used(low: int, high: int) -> int:
        """Bytes of the weights with uses that begin after `low` and before `high`."""
        return before[bisect_left(positions, high)] - before[bisect_left(positions, low + 1)]

    found: list[_Span] = []
    for index, weight in enumerate(weights):
        size, kept = _aligned(weight.size), list(weight.spans[:1])
        for first, last in weight.spans[1:]:
            if used(kept[-1][1], first) > size:
                kept.append((first, last))
            else:
                kept[-1] = kept[-1][0], last
        if not weight.fixed:
            found.extend(_Span(first, index, last, size) for first, last in kept)
    return sorted(found)


def _peak(spans: Iterable[_Span]) -> tuple[int, int]:
    """The peak of live bytes, and a position where it is reached."""
    changes = sorted(change for s in spans for change in ((s.first, 1, s.size), (s.last, 2, -s.size)))
    most = at = level = 0
    for position, _, change in changes:
        level += change
        if level > most:
            most, at = level, position
    return most, at


def _tightest(spans: Sequence[_Span]) -> tuple[int, dict[_Span, int]]:
    """The smallest staging found that holds all `spans`, and their offsets in it."""
    peak, _ = _peak(spans)
    size, enough = peak, sum(span.size for span in spans)
    while (places := _places(spans, size)) is None:
        size = min(size + _aligned(peak / 64), enough)
    return size, {span: place.offset for span, place in zip(spans, places, strict=True)}


def _too_small(
    weights: Sequence[WeightUse], spans: Sequence[_Span], budget: int, fixed: int, least: int
) -> SettingsError:
    _, at = _peak(spans)
    largest = max((s for s in spans if s.first <= at <= s.last), key=lambda s: s.size, default=None)
    weight = None if largest is None else weights[largest.weight]
    needs = "" if weight is None else f"{weight.name} alone has {weight.size}, and "
    return SettingsError(
        f"weight_streaming_budget is {budget} bytes, which is too small: {needs}{fixed} always stay on the device",
        hint=f"the least that works for this engine is {least} bytes",
    )


# ---- layouts ---------------------------------------------------------------------------------------------------------


_Layout = tuple[Sequence[_Span], Sequence[_Place], int]


def _layouts(spans: Sequence[_Span], room: int, least: int, tight: Mapping[_Span, int]) -> Iterator[_Layout]:
    """Candidate layouts: the streamed spans, their places and the size of the staging."""
    for ceiling in _ceilings(spans):
        peak, _ = _peak(span for span in spans if span.size <= ceiling)
        for depth in DEPTHS:
            staging = _aligned(depth * peak)
            kept = _resident(spans, ceiling, room - staging, staging)
            if kept is not None:
                streamed = [span for span in spans if span.weight not in kept]
                staging = min(room - sum(kept.values()), sum(span.size for span in streamed))
                places = _places(streamed, staging)
                if places is not None:
                    yield streamed, places, staging
    kept = _resident(spans, _ceilings(spans)[0], room - least, least)
    streamed = [span for span in spans if span.weight not in (kept or {})]
    places = _places(streamed, least, tight)  # the layout of all spans also works for some
    assert places is not None
    yield streamed, places, least


def _ceilings(spans: Sequence[_Span]) -> list[int]:
    sizes: list[int] = []
    for size in sorted({span.size for span in spans}, reverse=True):
        if not sizes or size <= 0.8 * sizes[-1]:
            sizes.append(size)
    return sizes[:MAX_CEILINGS]


def _resident(spans: Sequence[_Span], ceiling: int, room: int, ahead: int) -> dict[int, int] | None:
    """The resident weights with their sizes: first those larger than `ceiling`, then those that need several copies per
    call, then so many others that the streamed ones are spread evenly over the program.

    Args:
        ahead: bytes of weights to keep at the start of the program, whose use hides the first copies.

    Returns:
        None if the weights larger than `ceiling` exceed `room` bytes.
    """
    copies = Counter(span.weight for span in spans)
    sizes = {span.weight: span.size for span in spans}  # in the order of first uses
    kept = {weight: size for weight, size in sizes.items() if size > ceiling}
    room -= sum(kept.values())
    if room < 0:
        return None

    def keep(weight: int) -> None:
        nonlocal room
        if weight not in kept and sizes[weight] <= room:
            kept[weight] = sizes[weight]
            room -= sizes[weight]

    for weight, count in copies.most_common():
        if count > 1:
            keep(weight)
    rest = {weight: size for weight, size in sizes.items() if weight not in kept}
    credit = float(min(ahead, room))
    rate = (room - credit) / max(1, sum(rest.values()))
    for weight, size in rest.items():
        credit += rate * size
        if credit >= size:
            credit -= size
            keep(weight)
    for weight in rest:
        keep(weight)
    return kept


def _places(spans: Sequence[_Span], staging: int, given: Mapping[_Span, int] | None = None) -> list[_Place] | None:
    """A place for each span in `staging` bytes: the one that is free earliest.

    Args:
        given: the offsets; None: choose them.

    Returns:
        None if a span has no place.
    """
    releases = sorted((span.last, index) for index, span in enumerate(spans))
    count = {index: number for number, (_, index) in enumerate(releases, 1)}
    memory = [(0, staging, 0)]  # sorted: start, end, how many releases must precede overwriting it
    places = []
    for index, span in enumerate(spans):
        released = bisect_left(releases, (span.first, 0))
        starts = [start for start, _, _ in memory] if given is None else [given[span]]
        free = [
            _Place(start, max(number for low, high, number in memory if low < start + span.size and high > start))
            for start in starts
            if start + span.size <= staging
        ]
        place = min(free, key=lambda place: (place.releases, place.offset), default=None)
        if place is None or place.releases > released:
            return None
        places.append(place)
        start, end = place.offset, place.offset + span.size
        left = [(low, min(high, start), number) for low, high, number in memory if low < start]
        right = [(max(low, end), high, number) for low, high, number in memory if high > end]
        memory = [*left, (start, end, count[index]), *right]
    return places


def _plan(spans: Sequence[_Span], places: Sequence[_Place], staging: int, total: int) -> Plan:
    releases = sorted((span.last, index) for index, span in enumerate(spans))
    # Copies run in order: none starts before its predecessor may.
    needed = accumulate((place.releases for place in places), max)
    loads = tuple(
        Load(span.weight, place.offset, span.first, span.last, releases[number - 1][1] if number else None)
        for span, place, number in zip(spans, places, needed, strict=True)
    )
    streamed = {span.weight: span.size for span in spans}
    return Plan(loads, total - sum(streamed.values()), staging, sum(span.size for span in spans))
