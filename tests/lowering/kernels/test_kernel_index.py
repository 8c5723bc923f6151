"""Index arithmetic: every rewriting is checked against plain integers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.doubles.interpreter import Interpreted
from tests.strategies import dims
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Sym, dim_expr, evaluate
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.index import (
    Index,
    bounds,
    constant,
    from_dim,
    linear,
    product,
    ravel,
    substitute,
    to_dim,
    unravel,
    variable,
)
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.source import needs_int64
from torch_rtx.targets import arch_of

N = constant
SIGNED, SIZE = Sym("n", -6, 6), Sym("s", 2, 9)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def value(index: Index, **numbers: int) -> int:
    """What the text is worth; the text is what the kernel gets."""
    return int(eval(str(index), {}, numbers))


class Int32(int):
    """A number as kernels compute with it: division rounds towards 0."""

    def __add__(self, other: int) -> Int32:
        return Int32(int(self) + other)

    def __mul__(self, other: int) -> Int32:
        return Int32(int(self) * other)

    def __floordiv__(self, by: int) -> Int32:
        return Int32(math.trunc(int(self) / by))

    def __mod__(self, by: int) -> Int32:
        return Int32(math.fmod(self, by))

    def __rfloordiv__(self, other: int) -> Int32:
        return Int32(other) // self

    def __rmod__(self, other: int) -> Int32:
        return Int32(other) % self

    __radd__, __rmul__ = __add__, __mul__


def indices(shape: list[int]) -> tuple[Index, ...]:
    return tuple(map(constant, shape))


@given(shapes)
def test_unravel_and_ravel_are_inverse(shape: list[int]) -> None:
    flat = variable("X", N(math.prod(shape)))
    position = unravel(flat, indices(shape))
    assert ravel(position, indices(shape)) == (flat if math.prod(shape) > 1 else N(0))
    for at, expected in enumerate(itertools.product(*map(range, shape))):
        assert tuple(value(p, X=at) for p in position) == expected


@given(shapes, st.data())
def test_reshapes_are_the_identity_and_permutes_are_right(shape: list[int], data: st.DataObject) -> None:
    """A position in one shape, taken to another of the same size, permuted there and read with strides."""
    order = data.draw(st.permutations(range(len(shape))))
    permuted = [shape[axis] for axis in order]
    flat = variable("X", N(math.prod(shape)))
    position = unravel(flat, indices(permuted))
    back = tuple(position[order.index(axis)] for axis in range(len(shape)))
    address = ravel(back, indices(shape))
    again = unravel(address, indices(shape))
    for at, where in enumerate(itertools.product(*map(range, permuted))):
        source = [where[order.index(axis)] for axis in range(len(shape))]
        expected = 0
        for axis, size in enumerate(shape):
            expected = expected * size + source[axis]
        assert value(address, X=at) == expected
        assert [value(p, X=at) for p in again] == source


@given(shapes, shapes, st.data())
def test_any_division_is_right(shape: list[int], strides: list[int], data: st.DataObject) -> None:
    size = min(len(shape), len(strides))
    variables = [variable(f"X{axis}", N(extent)) for axis, extent in enumerate(shape[:size])]
    index = linear(variables, map(constant, strides[:size])) + N(data.draw(st.integers(0, 5)))
    by, again = N(data.draw(st.integers(1, 12))), N(data.draw(st.integers(1, 12)))
    for numbers in itertools.product(*map(range, shape[:size])):
        given = {f"X{axis}": number for axis, number in enumerate(numbers)}
        plain = value(index, **given)
        assert value(index // by, **given) == plain // by.number
        assert value(index % by, **given) == plain % by.number
        assert value(index // by // again, **given) == plain // by.number // again.number
        assert value(index % by % again, **given) == plain % by.number % again.number
        assert value(index // by % again, **given) == plain // by.number % again.number
        assert value(index // by * by + index % by, **given) == plain
        assert value(index % (by * again) // by, **given) == plain % (by.number * again.number) // by.number
        assert substitute(index, {f"X{a}": N(n) for a, n in enumerate(numbers)}) == N(plain)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-6, 6)), min_size=1, max_size=3), st.integers(0, 9), st.data())
def test_a_part_of_an_index_may_be_negative(axes: list[tuple[int, int]], least: int, data: st.DataObject) -> None:
    """7 - x is not, for x below 8, but the 3 - x that is left of it after a division by 4 is."""
    variables = [variable(f"X{axis}", N(extent)) for axis, (extent, _) in enumerate(axes)]
    lowest = sum((extent - 1) * min(stride, 0) for extent, stride in axes)
    index = linear(variables, [N(stride) for _, stride in axes]) + N(least - lowest)
    by, again = (data.draw(st.integers(1, 12)) for _ in range(2))
    for numbers in itertools.product(*(range(extent) for extent, _ in axes)):
        given = {f"X{axis}": Int32(number) for axis, number in enumerate(numbers)}
        plain = least - lowest + sum(number * stride for number, (_, stride) in zip(numbers, axes, strict=True))
        assert value(index // N(by), **given) == plain // by
        assert value(index % N(by), **given) == plain % by
        assert value(index // N(by) % N(again), **given) == plain // by % again
        assert value(index % N(by * again) // N(by), **given) == plain % (by * again) // by


@pytest.mark.parametrize("op", ["//", "%"])
@pytest.mark.parametrize(("count", "shift"), [(1, -1), (1, 1), (1, -11), (-2, 1)])
def test_sizes_that_are_subtracted_from(op: str, count: int, shift: int) -> None:
    """As in rolls. The remainder of a dim is Python's, also where what is divided is less than 0."""
    dim = dim_expr(op, dim_expr("+", dim_expr("*", count, SIZE), shift), SIZE)
    for size in range(2, 10):
        if op == "%" or count * size + shift >= 0:
            assert value(from_dim(dim), s=Int32(size)) == evaluate(dim, {"s": size})


def test_contiguous_addresses_have_no_divisions() -> None:
    heads = indices([2, 12, 384, 64])
    flat = variable("X", product(heads))
    position = unravel(flat, heads)
    assert str(linear(position, indices([12 * 384 * 64, 384 * 64, 64, 1]))) == "X"
    # what is broadcast over the outer dims, and over the inner ones
    assert str(linear(position, indices([0, 0, 64, 1]))) == "(X % 24576)"
    assert str(linear(position, indices([12, 1, 0, 0]))) == "(X // 24576)"


def test_rows_of_a_norm_that_are_viewed_as_heads() -> None:
    row, column = variable("X", N(8 * 384)), variable("R", N(768))
    b, s, h, d = unravel(row * N(768) + column, indices([8, 384, 12, 64]))
    assert [str(i) for i in (b, s, h, d)] == ["(X // 384)", "(X % 384)", "(R // 64)", "(R % 64)"]


def test_symbolic_sizes() -> None:
    batch, width = Sym("b", 1), Sym("w", 2)
    sizes = (from_dim(batch), N(7), from_dim(width))
    flat = variable("X", product(sizes))
    position = unravel(flat, sizes)
    assert str(ravel(position, sizes)) == "X"
    row, column = variable("X", sizes[0] * N(7)), variable("R", sizes[2])
    found = unravel(row * sizes[2] + column, sizes)
    assert [str(i) for i in found] == ["(X // 7)", "(X % 7)", "R"]
    assert str(from_dim(dim_expr("//", dim_expr("*", 2, batch), 2))) == "b"
    assert unravel(N(0), sizes) == (N(0), N(0), N(0))


def test_dims_and_indices_are_the_same() -> None:
    batch, width = Sym("b", 1), Sym("w", 2)
    half, least = dim_expr("//", width, 2), dim_expr("min", width, 5)
    for dim in (7, batch, dim_expr("*", 3, batch, half), dim_expr("+", dim_expr("%", width, 3), least)):
        assert to_dim(from_dim(dim), [dim]) == dim
    assert to_dim(from_dim(batch) * from_dim(half), [dim_expr("+", batch, half)]) == dim_expr("*", batch, half)


def test_an_empty_dimension_has_no_positions() -> None:
    assert variable("i") // constant(0) == variable("i") % constant(0) == constant(0)


def test_products_read_as_written() -> None:
    a, b = variable("A", N(3)), variable("B", N(4))
    assert value((a + b) * (a + N(1)) % N(5) // N(2), A=2, B=3) == 15 % 5 // 2
    assert str((a * N(2)) // variable("s")) == "((2 * A) // s)"
    assert str(N(3) // (variable("s") + N(1))) == "(3 // (s + 1))"


@given(dims((SIGNED, SIZE)), st.integers(-6, 6), st.integers(2, 9))
def test_bounds_hold(dim, n, s):
    low, high = bounds(dim)
    try:
        found = evaluate(dim, {"n": n, "s": s})
    except ZeroDivisionError:
        return
    assert found is not None
    assert low <= found <= high


TAKEN = """
graph import {{
  dim n = {range}, 1
  input x: f32[9]
  y: f32[()] = op aten.select.int(self=x, dim=0, index=n)
  z: f32[()] = op aten.add.Tensor(self=y, other=n)
  return [z]
}}
"""
ADDED = """
graph import {
  dim n = -9, 9, 1
  input x: f32[9]
  y: f32[9] = op aten.add.Tensor(self=x, other=(n + (2 * n)))
  z: f32[9] = op aten.mul.Tensor(self=y, other=OTHER)
  return [z]
}
"""


def test_numbers_that_may_be_negative_are_added_but_neither_divided_nor_taken_as_positions():
    """Triton's division is C's, and a position counts from the end if it is negative."""
    assert needs_int64(region(parse(TAKEN.format(range="0, None").strip())))
    assert not needs_int64(region(parse(TAKEN.format(range="0, 8").strip())))
    with pytest.raises(Unsupported, match="from the end"):
        region(parse(TAKEN.format(range="-9, -1").strip()))
    kernel = Interpreted(generate(parse(ADDED.strip().replace("OTHER", "n")), "k", arch_of(89), 0))
    x, z = (torch.arange(16.0).clone() for _ in range(2))
    for n in (-9, -1, 0, 4):
        kernel((x.data_ptr(), z.data_ptr()), (n,), (1, 1, 1))
        assert torch.equal(z[:9], ((x + 3 * n) * n)[:9])
    for other in ("(n // 2)", "(1 + (n % 3))", "max(0, (n // 2))"):
        with pytest.raises(Unsupported, match="negative"):
            region(parse(ADDED.strip().replace("OTHER", other)))
    with pytest.raises(Unsupported, match="negative"):
        region(parse(ADDED.strip().replace("-9, 9", "2, 9").replace("OTHER", "((-9 + n) // 2)")))


LARGE = """
graph import {
  dim s = 2, MOST, 1
  dim t = 2, MOST, 1
  input x: f32[SHAPE]
  y: f32[4] = op aten.sum.dim_IntList(self=x, dim=[0])
  return [y]
}
"""


@pytest.mark.parametrize("shape", ["s, 4](0, 1", "(s + (-1 * t)), 4](4, 1", "(s * t), 4](4, 1"])
def test_offsets_of_sizes_without_a_bound_have_64_bits(shape: str) -> None:
    """Also of differences of two such sizes, and where a stride is 0."""
    text = LARGE.strip().replace("SHAPE]", f"{shape})")
    assert needs_int64(region(parse(text.replace("MOST", "None"))))
    assert not needs_int64(region(parse(text.replace("MOST", "999"))))


FLIPPED = """
graph import {
  input x: f32[2, 4]
  input y: f32[4]
  a: f32[2, 4] = op aten.add.Tensor(self=x, other=y)
  b: f32[8] = op aten.view.default(self=a, size=[8])
  c: f32[8] = op aten.flip.default(self=b, dims=[0])
  return [c]
}
"""


def test_a_flipped_sum_of_rows() -> None:
    kernel = Interpreted(generate(parse(FLIPPED.strip()), "k", arch_of(89), 0))
    x, y, z = torch.randn(2, 4), torch.randn(4), torch.zeros(8)
    kernel((x.data_ptr(), y.data_ptr(), z.data_ptr()), (), (1, 1, 1))
    assert torch.equal(z, (x + y).view(8).flip(0))
