"""Plans of weight streaming: right whenever copies happen, within the budget, and close to the best time."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from tests.doubles.streams import FakeCuda, FakeStream, Recorded
from torch_rtx.errors import SettingsError
from torch_rtx.runtime.streamplan import ALIGNMENT, Plan, WeightUse, budget_bytes, durations, make_plan, makespan

POSITIONS = 24
LEAST = re.compile(r"the least that works for this engine is (\d+) bytes")


@st.composite
def programs(draw: st.DrawFn) -> list[WeightUse]:
    """Weights of many sizes, used once or several times, for a while or at once; some have to stay."""
    weights = []
    for index in range(draw(st.integers(1, 20))):
        positions = sorted(draw(st.sets(st.integers(0, POSITIONS - 1), min_size=2, max_size=6)))
        pairs = list(zip(positions[::2], positions[1::2], strict=False))
        spans = tuple((first, first if draw(st.booleans()) else last) for first, last in pairs)
        size = draw(st.sampled_from([100, 4000, 64 << 10, 70_000, 1 << 20]) | st.integers(1, 3 << 20))
        weights.append(WeightUse(f"w{index}", size, spans, draw(st.integers(0, 5)) == 0))
    return weights


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def least(weights: list[WeightUse]) -> int:
    """The smallest budget that works, as the error says."""
    try:
        make_plan(weights, 0)
    except SettingsError as error:
        found = LEAST.search(str(error))
        assert found is not None
        return int(found[1])
    return 0


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[WeightUse], int, Plan]:
    weights = draw(programs())
    low, high = least(weights), sum(aligned(weight.size) for weight in weights)
    budget = draw(st.just(low) | st.integers(low, max(low, high)))
    return weights, budget, make_plan(weights, budget)


@given(plans())
def test_within_the_budget(drawn: tuple[list[WeightUse], int, Plan]) -> None:
    weights, budget, plan = drawn
    assert plan.resident + plan.staging <= budget
    streamed = {load.weight for load in plan.loads}
    assert plan.resident == sum(aligned(w.size) for i, w in enumerate(weights) if i not in streamed)
    assert plan.streamed == sum(aligned(weights[load.weight].size) for load in plan.loads)
    assert not any(weights[index].fixed for index in streamed)
    for load in plan.loads:
        assert load.offset % ALIGNMENT == 0
        assert 0 <= load.offset <= plan.staging - weights[load.weight].size


@given(plans())
def test_every_use_has_its_load(drawn: tuple[list[WeightUse], int, Plan]) -> None:
    weights, _, plan = drawn
    for index in {load.weight for load in plan.loads}:
        loads = [(load.first, load.last) for load in plan.loads if load.weight == index]
        for first, last in weights[index].spans:
            assert sum(a <= first and last <= b for a, b in loads) == 1
        assert all(before[1] < after[0] for before, after in zip(loads, loads[1:], strict=False))


@given(plans())
def test_order(drawn: tuple[list[WeightUse], int, Plan]) -> None:
    """Copies are in the order of first uses, each after releases that come before its use, and none overtakes."""
    _, _, plan = drawn
    assert [load.first for load in plan.loads] == sorted(load.first for load in plan.loads)
    releases = [(-1, -1) if load.after is None else (plan.loads[load.after].last, load.after) for load in plan.loads]
    assert releases == sorted(releases)
    assert all(last < load.first for (last, _), load in zip(releases, plan.loads, strict=True))


@pytest.mark.parametrize("eager", [True, False], ids=["as early as it may", "as late as it may"])
@given(drawn=plans())
def test_right_whenever_copies_happen(eager: bool, drawn: tuple[list[WeightUse], int, Plan]) -> None:
    """Whatever is used is what was copied: the staging as a list of who was written there last."""
    weights, _, plan = drawn
    staging: list[int | None] = [None] * (plan.staging // ALIGNMENT)
    waiting: list[int] = []
    issued: list[int] = []

    def place(index: int) -> slice:
        start = plan.loads[index].offset // ALIGNMENT
        return slice(start, start + aligned(weights[plan.loads[index].weight].size) // ALIGNMENT)

    def copy(until: int) -> None:
        while waiting and waiting[0] <= until:
            here = place(waiting[0])
            staging[here] = [waiting.pop(0)] * (here.stop - here.start)

    def issue(after: int | None) -> None:
        found = [index for index, load in enumerate(plan.loads) if load.after == after]
        waiting.extend(found)
        issued.extend(found)
        copy(len(plan.loads) if eager else -1)

    issue(None)
    for position in range(POSITIONS):
        for index, load in enumerate(plan.loads):
            if load.first == position:
                copy(index)
        for index, load in enumerate(plan.loads):
            if load.first <= position <= load.last:
                assert set(staging[place(index)]) == {index}
        for index, load in enumerate(plan.loads):
            if load.last == position:
                issue(index)
    assert issued == list(range(len(plan.loads)))


@given(plans())
def test_streams_are_in_order(drawn: tuple[list[WeightUse], int, Plan]) -> None:
    """Two calls on two streams: each use after its copy, each copy after all uses of what it overwrites, and nothing of
    the copy stream left behind (a capture would not end)."""
    weights, _, plan = drawn
    cuda, copies = FakeCuda(), FakeStream("copies")
    streams = Recorded(cuda, copies, plan, [weight.size for weight in weights])
    for name in ("a", "b"):
        cuda.current = FakeStream(name)
        streams.call(range(POSITIONS))
        assert cuda.current.clock.get("copies", 0) == copies.clock.get("copies", 0)
    streams.check()


@given(programs(), st.floats(0, 1), st.floats(0, 1))
def test_more_budget_is_no_worse(weights: list[WeightUse], a: float, b: float) -> None:
    low, high = least(weights), sum(aligned(weight.size) for weight in weights)
    small, large = sorted(low + int(share * (high - low)) for share in (a, b)) if high > low else (low, low)
    largest = max(aligned(weight.size) for weight in weights)
    # What fits in a larger budget is found by trying: a little more may be streamed than with a smaller one.
    assert make_plan(weights, large).streamed <= make_plan(weights, small).streamed + 2 * largest
    assert make_plan(weights, high).loads == ()


@given(programs())
def test_too_small(weights: list[WeightUse]) -> None:
    needed = least(weights)
    make_plan(weights, needed)
    fixed = sum(aligned(weight.size) for weight in weights if weight.fixed)
    assert fixed <= needed
    if needed:
        with pytest.raises(SettingsError, match=f"is {needed - 1} bytes, which is too small") as error:
            make_plan(weights, needed - 1)
        named = re.search(r"(w\d+) alone has (\d+)", str(error.value))
        if named is None:
            assert all(weight.fixed for weight in weights)
        else:
            weight = next(weight for weight in weights if weight.name == named[1])
            assert not weight.fixed
            assert weight.size == int(named[2])


def test_least_names_the_largest_weight() -> None:
    weights = [WeightUse("small", 1 << 20, ((0, 0),)), WeightUse("large", 8 << 20, ((1, 1),))]
    with pytest.raises(SettingsError) as error:
        make_plan(weights, 5 << 20)
    assert str(error.value) == (
        "weight_streaming_budget is 5242880 bytes, which is too small: large alone has 8388608, and 0 always stay on "
        "the device\n  the least that works for this engine is 8388608 bytes"
    )
    assert make_plan(weights, 8 << 20).staging == 8 << 20


def test_shares() -> None:
    weights = [WeightUse("fixed", 512, ((0, 0),), True), *(WeightUse(f"{i}", 51200, ((i, i),)) for i in range(10))]
    assert budget_bytes(weights, 0.5) == 512 + 5 * 51200
    assert budget_bytes(weights, 1.0) == 512 + 10 * 51200
    assert budget_bytes(weights, 77) == 77


def test_used_at_both_ends() -> None:
    """An embedding that is the head as well: it stays if it can, else it is copied twice, not kept in between."""
    embedding, mib = WeightUse("embedding", 4 << 20, ((0, 0), (21, 21))), 1 << 20
    weights = [embedding, *(WeightUse(f"{i}", mib, ((i, i),)) for i in range(1, 21))]
    assert all(load.weight != 0 for load in make_plan(weights, 12 * mib).loads)
    tight = make_plan(weights, 4 * mib)
    assert [(load.first, load.last) for load in tight.loads if load.weight == 0] == [(0, 0), (21, 21)]
    near = [embedding, WeightUse("other", mib, ((10, 10),))]  # little is used in between: one copy is for both ends
    with pytest.raises(SettingsError, match=f"the least that works for this engine is {5 * mib} bytes"):
        make_plan(near, 4 * mib)


@dataclass(frozen=True)
class Llama:
    """The shapes of a decoder, in half precision."""

    layers: int = 16
    width: int = 2048
    inner: int = 8192
    heads: int = 512
    words: int = 32000

    def weights(self) -> list[WeightUse]:
        d = self.width
        layer = [2 * d, 2 * d * (d + 2 * self.heads), 2 * d * d, 2 * d, 4 * self.inner * d, 2 * self.inner * d]
        sizes = [2 * self.words * d, *layer * self.layers, 2 * d, 2 * self.words * d]
        return [WeightUse(f"w{i}", size, ((i, i),), size < 64 << 10) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.6, 1.7, 5.0])
def test_time_is_that_of_the_slower_part(share: float, ratio: float) -> None:
    """A Llama of 1B parameters, with computations that take `ratio` times as long as the copies."""
    weights = Llama().weights()
    plan = make_plan(weights, budget_bytes(weights, share))
    time = makespan(plan, weights, durations(weights, ratio * plan.streamed))
    assert time <= 1.1 * plan.streamed * max(1.0, ratio)


def test_serial_without_room_to_overlap() -> None:
    """With a budget of one weight, copies and computations take turns: the clock of the plan says so."""
    weights = [WeightUse(f"{i}", 1 << 20, ((i, i),)) for i in range(8)]
    plan = make_plan(weights, 1 << 20)
    assert makespan(plan, weights, durations(weights, plan.streamed)) == pytest.approx(2 * plan.streamed)
    plan = make_plan(weights, 2 << 20)
    assert makespan(plan, weights, durations(weights, plan.streamed)) <= 9 / 8 * plan.streamed + (1 << 20)
