"""The memory plan: nothing that is alive at once overlaps, at any size, and little is wasted."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_rtx.errors import InputError
from torch_rtx.ir import Dim, Sym, TensorType, contiguous, dim_expr, evaluate, typical_size
from torch_rtx.irparse import parse
from torch_rtx.runtime import plan as planning
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.plan import (
    PIECE,
    Buffer,
    Plan,
    Room,
    best_packing,
    most_alive,
    neighbours,
    pairs_alive,
    size_of,
)
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings

CPU = torch.device("cpu")
S, T = Sym("s", 1, 4096), Sym("t", 1, 64)
SIZES = st.sampled_from([PIECE, 3 * PIECE, 0, dim_expr("*", PIECE, S), dim_expr("*", 3 * PIECE, S, T), T])


def typical(dim: Dim) -> int:
    return typical_size(dim, planning.TYPICAL)


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    count = draw(st.integers(0, 12))
    found = []
    for index in range(count):
        first = draw(st.integers(0, 10))
        found.append(Buffer(f"b{index}", draw(SIZES), first, first + draw(st.integers(0, 4))))
    return found


def placed(found: list[Buffer], room: Room | None = None, **others: Any) -> Plan:
    """A plan of these buffers, which no graph is needed for."""
    lifetimes = SimpleNamespace(**{"buffers": found, "owners": {}, "kept": set(), "returned": set(), **others})
    with patch.object(planning, "_Lifetimes", lambda *_: lifetimes):
        return Plan(parse("graph fused {\n  return []\n}\n"), frozenset(), frozenset({"s", "t"}), room=room)


@given(buffers(), st.integers(1, 4096), st.integers(1, 64), st.sampled_from([planning.PAIRS, 3]))
def test_nothing_overlaps_at_any_size(found: list[Buffer], s: int, t: int, pairs: int) -> None:
    with patch.object(planning, "PAIRS", pairs):  # more pairs are not packed
        plan = placed(found)
    sizes = {"s": s, "t": t}
    total, *offsets = plan.offsets(*(sizes[name] for name in plan.symbols))
    ranges = [
        (offset, offset + (evaluate(buffer.size, sizes) or 0), buffer)
        for offset, buffer in zip(offsets, plan.buffers, strict=True)
    ]
    assert all(0 <= start <= end <= total for start, end, _ in ranges)
    for (a, b, one), (c, d, other) in itertools.combinations(ranges, 2):
        if one.first <= other.last and other.first <= one.last:
            assert b <= c or d <= a or a == b or c == d
    assert plan.memory(sizes).arena == total >= most_alive((buffer, end - start) for start, end, buffer in ranges)


@given(buffers(), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(-2, 12)), max_size=6))
def test_a_room_is_free_after_the_last_use_of_its_parts(found: list[Buffer], drawn: list[tuple[int, int, int]]) -> None:
    """Parts that no input reads (here: -2) are never free."""
    size = 12 * PIECE
    names = [frozenset({str(index)} if last > -2 else ()) for index, (_, _, last) in enumerate(drawn)]
    parts = [
        (start * PIECE, (start + length) * PIECE - 7, name)
        for (start, length, _), name in zip(drawn, names, strict=True)
    ]
    last = {str(index): last for index, (_, _, last) in enumerate(drawn)}
    returned = {buffer.name for buffer in found if buffer.last == 12}
    plan = placed(found, Room(size, parts), returned=returned, last=last, end=20)
    inside = [buffer for buffer in found if buffer.name in plan.placed]
    ranges = [(plan.placed[buffer.name], plan.placed[buffer.name] + buffer.size, buffer) for buffer in inside]  # type: ignore[operator]
    assert all(start % PIECE == 0 and start >= 0 and end <= size for start, end, _ in ranges)
    for (start, end, buffer), (first, stop, name) in itertools.product(ranges, parts):
        free_after = max((last[one] for one in name), default=20)
        assert buffer.first > free_after or end <= first or stop <= start or start == end
    for (a, b, one), (c, d, other) in itertools.combinations(ranges, 2):
        apart = b <= c or d <= a or a == b or c == d
        assert apart or one.last < other.first or other.last < one.first
    assert not plan.placed.keys() & plan.index.keys()
    if not parts:
        fitting = [buffer for buffer in found if isinstance(buffer.size, int)]
        assert plan.placed or not fitting


@given(buffers())
def test_the_most_that_is_alive(found: list[Buffer]) -> None:
    sized = [(buffer, typical(buffer.size)) for buffer in found]
    expected = max((sum(n for b, n in sized if b.first <= at <= b.last) for at in range(20)), default=0)
    assert most_alive(sized) == expected


@given(buffers())
def test_neighbours(found: list[Buffer]) -> None:
    together = neighbours(found)
    for one in found:
        expected = {b.name for b in found if b is not one and one.first <= b.last and b.first <= one.last}
        assert {b.name for b in together[one.name]} == expected
    assert pairs_alive(found) == sum(map(len, together.values())) / 2


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(0, 3)), max_size=6))
def test_near_the_best_packing(drawn: list[tuple[int, int, int]]) -> None:
    """Against every order of placing the buffers, of which one gives the best packing there is."""
    found = [Buffer(f"b{i}", size * PIECE, first, first + more) for i, (size, first, more) in enumerate(drawn)]
    sizes, together = {b.name: typical(b.size) for b in found}, neighbours(found)

    def height(places: dict[str, int]) -> int:
        return max((places[b.name] + sizes[b.name] for b in found), default=0)

    best = min(height(planning._packing(order, sizes, together)) for order in itertools.permutations(found))
    assert height(best_packing(found, sizes, together)) <= 1.05 * best


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3), None, 24),
        ((), None, 4),
        ((0, 3), None, 0),
        ((2, 3), (1, 2), 24),
        ((2, 3), (8, 1), 44),
        ((0, 3), (8, 1), 0),
        ((2, 3), (0, 1), 12),
    ],
)
def test_sizes(shape: tuple[int, ...], strides: tuple[int, ...] | None, expected: int) -> None:
    found = size_of(TensorType("f32", shape, contiguous(shape) if strides is None else strides))
    assert found == math.ceil(expected / PIECE) * PIECE


GRAPH = parse("""\
graph fused {
  dim s = 2, 64, 1
  input x: f32[s, 64]
  input w: f32[64, 64]
  a: f32[s, 64] = extern aten.mm.default(self=x, mat2=w)
  b: f32[64, s](1, 64) = view aten.permute.default(self=a, dims=[1, 0])
  c: f32[64, s] = extern aten.exp.default(self=b)
  d: f32[64, s] = extern aten.mm.default(self=w, mat2=c)
  e: f32[64, s] = extern aten.mm.default(self=w, mat2=d)
  f: f32[s, 64](1, s) = view aten.permute.default(self=e, dims=[1, 0])
  return [f, c]
}
""")


@pytest.mark.quick
def test_what_lies_in_the_arena() -> None:
    plan = Plan(GRAPH, frozenset(), frozenset({"s"}))
    found = {buffer.name: (buffer.first, buffer.last) for buffer in plan.buffers}
    assert found == {"a": (0, 2), "d": (3, 4)}  # `a` is read through a view; `e` is returned through one
    assert [plan.owners[name] for name in ("x", "b", "f")] == ["x", "a", "e"]
    for s in (2, 7, 64):
        memory = plan.memory({"s": s})
        piece = 256 * s
        assert (memory.arena, memory.others, memory.peak) == (piece, 2 * piece, 3 * piece)


def test_outputs_that_stay_lie_in_the_arena() -> None:
    """`f` is a view of `e`; `c` is the result of a call that takes no place."""
    graph = bind(GRAPH, {"s": 4})
    for stay in ({"f"}, {"f", "c"}):
        code = compile_graph(graph, CPU, stay=frozenset(stay))
        assert set(code.plan.index) == {"a", "d", "e"}
        x, w = torch.randn(4, 64), torch.randn(64, 64) / 8
        f, c = code([x, w], [])
        assert torch.equal(c, (x @ w).t().exp())
        torch.testing.assert_close(f, (w @ (w @ c)).t())


def test_values_lie_in_a_room() -> None:
    """What is read there for the last time gives its place to others, and outputs stay there."""
    graph = bind(GRAPH, {"s": 4})
    plain = compile_graph(graph, CPU)
    memory = torch.randn(4 * 1024 + 64 * 64 * 4, dtype=torch.float32).view(torch.uint8)
    x, w = (memory.view(torch.float32)[a:b].view(-1, 64) for a, b in ((0, 256), (256, 256 + 64 * 64)))
    w.div_(8)
    room = Room(memory.nbytes, [(0, 1024, frozenset("x")), (1024, 1024 + w.nbytes, frozenset("w"))])
    expected = plain([x.clone(), w.clone()], [])
    code = compile_graph(graph, CPU, room=room)
    assert set(code.plan.placed) == {"a", "d", "e"}
    f, c = code.run([x, w], [], torch.empty_strided, memory)
    assert f.untyped_storage().data_ptr() == memory.data_ptr() != c.untyped_storage().data_ptr()
    assert torch.equal(f, expected[0])
    assert torch.equal(c, expected[1])


def test_calls_that_return_what_they_were_given() -> None:
    """Their schemas say that the results are new; they are parts of `a`, whose place nobody else may get."""
    graph = parse("""\
graph fused {
  input x: f32[4, 64]
  input w: f32[64, 64]
  input v: f32[64, 64]
  a: f32[4, 64] = extern aten.mm.default(self=x, mat2=w)
  p: f32[2, 64], q: f32[2, 64] = extern aten.unsafe_split.Tensor(self=a, split_size=2)
  b: f32[4, 64] = extern aten.mm.default(self=x, mat2=v)
  c: f32[4, 64] = extern aten.mm.default(self=b, mat2=w)
  d: f32[2, 64] = extern aten.mm.default(self=q, mat2=w)
  r: f32[4, 64] = extern aten.lift.default(self=c)
  d2: f32[4, 64] = extern aten.mm.default(self=x, mat2=v)
  e: f32[4, 64] = extern aten.mm.default(self=d2, mat2=w)
  f: f32[4, 64] = extern aten.mm.default(self=e, mat2=v)
  return [p, d, r, f]
}
""")
    x, w, v = torch.randn(4, 64), *(torch.randn(2, 64, 64) / 8)
    p, d, r, f = compile_graph(graph, CPU)([x, w, v], [])
    a, c = x @ w, x @ v @ w
    for mine, other in zip((p, d, r, f), (a[:2], a[2:] @ w, c, c @ v), strict=True):
        assert torch.equal(mine, other)


def test_library_calls_write_to_the_arena() -> None:
    code = compile_graph(GRAPH, CPU)
    assert code.source.count("out=") == 2
    w = torch.randn(64, 64) / 8
    for s in (2, 7, 64, 7):
        x = torch.randn(s, 64)
        f, c = code([x, w], [])
        assert torch.equal(c, (x @ w).t().exp().contiguous())
        torch.testing.assert_close(f, (w @ (w @ c)).t())


FLOAT32 = """graph fused {{
  input x: bf16{shape}
  p: f32{shape} = extern aten.{op}.dtype(self=x, mat2=x, out_dtype='f32')
  r: f32{shape} = extern aten.neg.default(self=p)
  return [r]
}}
"""


@pytest.mark.parametrize(("op", "shape"), [("mm", [8, 8]), ("bmm", [2, 8, 8])])
def test_products_in_float32_write_to_the_arena(op: str, shape: list[int]) -> None:
    """PyTorch has them for CUDA alone."""
    x = torch.randn(shape).bfloat16()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(f"{op}.dtype_out", lambda a, b, dtype, out: out.copy_(a.to(dtype) @ b.to(dtype)), "CPU")
        code = compile_graph(parse(FLOAT32.format(op=op, shape=shape)), CPU)
        (result,) = code([x], [])
    assert code.source.count("out=") == 1
    torch.testing.assert_close(result, -(x.float() @ x.float()))


@pytest.mark.quick
def test_a_session_tells_its_memory() -> None:
    store = WeightStore(GRAPH, CPU, {})
    session = Session(GRAPH, store, RuntimeSettings())
    assert session.memory(s=8).peak == 3 * 8 * 256
    with pytest.raises(InputError, match="the size of s is missing"):
        session.memory()
    with pytest.raises(InputError, match="the size of t does not exist\n  the sizes are s"):
        session.memory(s=8, t=1)
    named = Session(GRAPH, store, RuntimeSettings(), names={"s": "batch"})
    assert named.memory(batch=8) == named.memory(s=8) == session.memory(s=8)
    with pytest.raises(InputError, match="the size of batch is missing"):
        named.memory()


def test_fallbacks_get_memory_of_their_own() -> None:
    """A fallback may keep what it gets."""
    text = str(GRAPH).replace("extern aten.exp", "fallback aten.exp")
    assert {b.name for b in Plan(parse(text), frozenset(), frozenset({"s"})).buffers} == {"d"}


def test_sizes_that_depend_on_data_are_not_planned() -> None:
    plan = Plan(GRAPH, frozenset(), frozenset())
    assert (plan.buffers, plan.symbols, plan.memory({}).peak) == ([], (), 0)


def test_what_an_update_writes_is_in_the_arena_and_what_it_returns_is_not() -> None:
    graph = parse("""\
graph fused {
  input x: f32[64, 64]
  input k: f32[2, 64]
  input at: i64[2]
  a: f32[2, 64] = extern aten.mm.default(self=k, mat2=x)
  b: f32[64, 64] = extern aten.index_copy_.default(self=x, dim=0, index=at, source=a)
  c: f32[64, 64] = extern aten.mm.default(self=b, mat2=b)
  d: f32[64, 64] = extern aten.exp.default(self=c)
  return [d]
}
""")
    plan = Plan(graph, frozenset(), frozenset())
    assert set(plan.index) == {"a", "c"}
    assert plan.memory({}).arena == 64 * 64 * 4  # not at once
