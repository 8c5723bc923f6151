"""Types of views that are written by hand, against those that ATen's own calls have on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Sym, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels import view_types

infer = Inference()
S = Sym("s", 2, 64)


def inferred(op: str, type_: TensorType, **args: Any) -> TensorType | None:
    """The type of the first result; None where the call takes no such arguments."""
    try:
        found = infer(f"aten.{op}", (("self", Value("x", type_)), *args.items()))[0]
    except Unsupported:
        return None
    assert isinstance(found, TensorType)
    return found


@st.composite
def types(draw: Any, symbols: bool = False) -> TensorType:
    """Dense tensors in any order of dimensions, some with gaps in memory, some of them repeated."""
    sizes = st.sampled_from([1, 2, 3, 4, 6, *([S, dim_expr("*", S, 2)] if symbols else [])])
    shape: tuple[Dim, ...] = tuple(draw(st.lists(sizes, max_size=4)))
    strides: list[Dim] = [0] * len(shape)
    last: Dim = 1
    for axis in draw(st.permutations(range(len(shape)))):
        strides[axis] = 0 if draw(st.integers(0, 9)) == 0 else last
        last = dim_expr("*", last, shape[axis], draw(st.sampled_from([1, 1, 1, 2])))
    if draw(st.booleans()):
        strides = list(contiguous(shape))
    return TensorType("f32", shape, tuple(strides))


@st.composite
def reshaped(draw: Any, symbols: bool) -> tuple[TensorType, tuple[Dim, ...]]:
    """A type, and its shape with some dimensions as two, and neighbours as one."""
    type_ = draw(types(symbols))
    shape = list(type_.shape)
    for _ in range(draw(st.integers(0, 3))):
        axis = draw(st.integers(0, len(shape)))
        if axis == len(shape):
            shape.insert(draw(st.integers(0, len(shape))), 1)
        elif draw(st.booleans()) and axis + 1 < len(shape):
            shape[axis : axis + 2] = [dim_expr("*", *shape[axis : axis + 2])]
        else:
            size = shape[axis]
            part = draw(st.sampled_from([d for d in (1, 2, 3) if not isinstance(size, int) or size % d == 0]))
            if isinstance(size, int):
                shape[axis : axis + 1] = [part, size // part]
    return type_, tuple(shape)


@settings(max_examples=200, deadline=None)
@given(reshaped(symbols=False))
def test_view(case: tuple[TensorType, tuple[Dim, ...]]) -> None:
    type_, shape = case
    assert view_types.view(type_, shape) == inferred("view.default", type_, size=shape)


@settings(max_examples=100, deadline=None)
@given(reshaped(symbols=True))
def test_view_of_open_sizes(case: tuple[TensorType, tuple[Dim, ...]]) -> None:
    """Where symbols leave it open whether there is such a view, there is none. The stride of a size of 1 means nothing,
    and PyTorch has other code for it where a size is open."""
    type_, shape = case
    found, expected = view_types.view(type_, shape), inferred("view.default", type_, size=shape)
    assert found is None or (expected is not None and known_strides(found) == known_strides(expected))


def known_strides(type_: TensorType) -> list[Dim]:
    return [stride for size, stride in zip(type_.shape, type_.strides, strict=True) if size != 1]


def test_ranges_of_an_open_dimension() -> None:
    """What split attention does to keys: [2, s, 8] as [2, 4, s // 4, 8], padded to a multiple of 4 before."""
    size = dim_expr("//", dim_expr("+", S, 3), 4)
    shape: tuple[Dim, ...] = (2, dim_expr("*", size, 4), 8)
    found = view_types.view(TensorType("f32", shape, contiguous(shape)), (2, 4, size, 8))
    assert found == TensorType("f32", (2, 4, size, 8), contiguous((2, 4, size, 8)))


@pytest.mark.parametrize("symbols", [False, True])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_permute_unsqueeze_and_unbind(data: Any, symbols: bool) -> None:
    type_ = data.draw(types(symbols))
    rank = len(type_.shape)
    order = tuple(data.draw(st.permutations(range(rank))))
    assert view_types.permute(type_, order) == inferred("permute.default", type_, dims=order)
    axis = data.draw(st.integers(0, rank))
    assert view_types.unsqueeze(type_, axis) == inferred("unsqueeze.default", type_, dim=axis)
    fixed = [axis for axis in range(rank) if isinstance(type_.shape[axis], int)]
    if fixed:
        axis = data.draw(st.sampled_from(fixed))
        assert view_types.unbind(type_, axis) == inferred("unbind.int", type_, dim=axis)
