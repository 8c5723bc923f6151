"""Rules for collectives in graphs: when their results may be read, and what stays in memory until then."""

from __future__ import annotations

import pytest

from torch_rtx.collectives import bound, check, groups_of
from torch_rtx.errors import InvalidIR
from torch_rtx.irparse import parse
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.cse import cse
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.passes.hoist_weights import hoist_weights
from torch_rtx.runtime.plan import Plan

HEAD = "graph fused {\n  input x: f32[64, 64]\n"


def graph(*lines: str) -> str:
    return HEAD + "".join(f"  {line}\n" for line in lines) + "}\n"


def gathered(held: str) -> str:
    """A gathered product `p`, and another product, `q`, before the wait."""
    gather = "_c10d_functional.all_gather_into_tensor.default(input=p, group_size=2, group_name='tp')"
    return graph(
        "p: f32[64, 64] = extern aten.mm.default(self=x, mat2=x)",
        f"g: f32[128, 64] = extern {gather}",
        "q: f32[64, 64] = extern aten.mm.default(self=x, mat2=x)",
        "r: f32[64, 64] = extern aten.mm.default(self=q, mat2=x)",
        f"w: f32[128, 64] = extern torch_rtx.wait.default(tensor=g{held})",
        "y: f32[128, 64] = extern aten.relu.default(self=w)",
        "return [y, r]",
    )


@pytest.mark.quick
def test_memory_is_in_use_until_the_wait() -> None:
    """Without what the wait holds, `q` would get the memory of `p` while other ranks still read this."""
    plan = Plan(parse(gathered(", held=[p]")), frozenset(), frozenset())
    last = {buffer.name: buffer.last for buffer in plan.buffers}
    assert last == {"p": 4, "q": 3}
    assert len(set(plan.offsets()[1:])) == 2
    assert "w" not in last


@pytest.mark.quick
def test_what_a_wait_must_hold() -> None:
    check(parse(gathered(", held=[p]")))
    with pytest.raises(InvalidIR, match="the wait for g does not hold what .*all_gather_into_tensor.default reads"):
        check(parse(gathered("")))


READ = "a: f32[64, 64] = extern _c10d_functional.all_reduce.default(input=x, reduce_op='sum', group_name='tp')"
WAIT = "w: f32[64, 64] = extern torch_rtx.wait.default(tensor=a)"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ((READ, WAIT, "return [w]"), None),
        ((READ, "return [x]"), "nothing waits for a"),
        ((READ, WAIT, "return [a, w]"), "nothing waits for a"),
        ((READ, "y: f32[64, 64] = extern aten.relu.default(self=a)", WAIT, "return [y]"), "relu.* reads a, which has"),
    ],
)
def test_only_a_wait_reads_the_result(lines: tuple[str, ...], problem: str | None) -> None:
    if problem is None:
        check(parse(graph(*lines)))
        return
    with pytest.raises(InvalidIR, match=problem):
        check(parse(graph(*lines)))


@pytest.mark.quick
def test_passes_leave_collectives_alone() -> None:
    """Equal ones, unused ones and those of weights stay: the other ranks make these calls, too."""
    text = (
        "graph import {\n"
        "  parameter 'p': f32[4]\n"
        "  weight w: f32[4] = 'p'\n"
        "  a: f32[4] = op _c10d_functional.all_reduce.default(input=w, reduce_op='sum', group_name='tp')\n"
        "  b: f32[4] = op torch_rtx.wait.default(tensor=a)\n"
        "  c: f32[4] = op _c10d_functional.all_reduce.default(input=w, reduce_op='sum', group_name='tp')\n"
        "  d: f32[4] = op torch_rtx.wait.default(tensor=c)\n"
        "  return [b]\n"
        "}\n"
    )
    for run in (cse, dce, hoist_weights):
        assert str(run(parse(text), Inference())) == text


@pytest.mark.quick
def test_groups_get_other_names() -> None:
    before = parse(gathered(", held=[p]"))
    after = bound(before, {"tp": "7"})
    assert list(groups_of(before)) == ["tp"]
    assert list(groups_of(after)) == ["7"]
    assert bound(after, {"7": "tp"}) == before
