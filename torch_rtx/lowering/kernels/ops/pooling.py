"""Pooling: the window around each position, unrolled into one load per element."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from itertools import product as combinations
from math import prod

from torch_rtx.dtypes import FLOATS, register
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import A, B, C, eq, idiv, irem, maximum, ne, where
from torch_rtx.lowering.kernels.index import Index, constant, ravel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Gather,
    Iota,
    Position,
    Scalar,
    Select,
    Shape,
    Tensor,
    cast,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.ops.reductions import mean
from torch_rtx.lowering.kernels.ops.registry import Types, op
from torch_rtx.lowering.kernels.ops.views import move, shape_of

LARGEST = 64  # elements of a window: each is a load


def _each(sizes: Scalar | Sequence[int], rank: int) -> list[int]:
    """One number per dimension; a single one stands for all."""
    found = [sizes] if isinstance(sizes, int | float | Index) else list(sizes)
    if not all(isinstance(size, int) for size in found):
        raise Unsupported("a window whose size is a dim")
    return [int(size) for size in (found * rank if len(found) == 1 else found)]  # type: ignore[arg-type]


def _windows(
    self: Tensor,
    shape: Shape,
    sizes: list[int],
    strides: list[int],
    padding: list[int],
    dilation: list[int],
    edge: Tensor,
) -> list[Tensor]:
    """For each element of the window a tensor of `shape`; `edge` where it is out of bounds."""
    rank = len(sizes)
    kept = len(self.shape) - rank
    # The padding as part of the tensor; windows may reach beyond it by less than a stride (ceil_mode).
    grown = tuple(
        size + constant(2 * p + s * 2) for size, p, s in zip(self.shape[kept:], padding, strides, strict=True)
    )
    starts = (*[ZERO] * kept, *map(constant, padding))
    padded = Select((*self.shape[:kept], *grown), self.dtype, self, edge, starts)
    found = []
    for place in combinations(*map(range, sizes)):
        offsets = [constant(p * d) for p, d in zip(place, dilation, strict=True)]

        def at(position: Position, offsets: list[Index] = offsets) -> Position:
            inner = zip(position[kept:], strides, offsets, strict=True)
            return (*position[:kept], *(p * constant(s) + o for p, s, o in inner))

        found.append(move(padded, shape, at))
    return found


def _check(sizes: list[int]) -> None:
    count = 1
    for size in sizes:
        count *= size
    if count > LARGEST:
        raise Unsupported(f"windows of {count} elements")


def _max_pool(
    rank: int,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Scalar | Sequence[int] = 0,
    dilation: Scalar | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    out: Types,
) -> Tensor:
    sizes = _each(kernel_size, rank)
    _check(sizes)
    strides = _each(stride, rank) if stride else sizes
    if self.dtype not in FLOATS:
        raise Unsupported(f"the largest {self.dtype} of a window")
    edge = number(float("-inf"), self.dtype)
    windows = _windows(self, shape_of(out), sizes, strides, _each(padding, rank), _each(dilation, rank), edge)
    return reduce(lambda one, two: pointwise(maximum(A, B), self.dtype, one, two), windows)


def _places(self: Tensor) -> Tensor:
    """At each position the number of the element in its image."""
    height, width = self.shape[-2:]
    dtype = "i32" if ((height * width).number or 1 << 31) < 1 << 31 else "i64"
    return Iota(self.shape, dtype, lambda position: position[-2] * width + position[-1])


@op("max_pool2d_with_indices.default")
def max_pool_with_indices(
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Scalar | Sequence[int] = 0,
    dilation: Scalar | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    out: Types,
) -> tuple[Tensor, Tensor]:
    """The largest element of each window and its place in the image: the first of equal ones, the last NaN."""
    sizes = _each(kernel_size, 2)
    _check(sizes)
    if self.dtype not in FLOATS:
        raise Unsupported(f"the largest {self.dtype} of a window")
    strides = _each(stride, 2) if stride else sizes
    shape = max(shape_of(out, 0), shape_of(out, 1), key=len)  # that of a result that nobody reads is ()
    form = shape, sizes, strides, _each(padding, 2), _each(dilation, 2)
    places = _places(self)
    values = _windows(self, *form, number(float("-inf"), self.dtype))
    numbers = _windows(places, *form, number(-1, places.dtype))
    best, at = values[0], numbers[0]
    for value, place in zip(values[1:], numbers[1:], strict=True):
        larger = pointwise((B > A) | ne(B, B), "bool", best, value)
        taken = pointwise((A >= 0) & ((B < 0) | C), "bool", place, at, larger)  # the first one in the image at least
        best, at = (pointwise(where(A, B, C), one.dtype, taken, one, old) for one, old in ((value, best), (place, at)))
    return best, cast(at, "i64")


@op("max_pool2d_with_indices_backward.default")
def max_pool_gradient(
    grad_output: Tensor,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Scalar | Sequence[int],
    dilation: Scalar | Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
    *,
    out: Types,
) -> Tensor:
    """The gradients of all windows that chose an element."""
    sizes = _each(kernel_size, 2)
    strides, borders = _each(stride, 2) if stride else sizes, _each(padding, 2)
    reach = [(size - 1) * spread + 1 for size, spread in zip(sizes, _each(dilation, 2), strict=True)]
    counts = [-(-length // step) for length, step in zip(reach, strides, strict=True)]  # windows along an axis
    _check(counts)
    kept = len(self.shape) - 2
    # The windows over an element are the last that may begin before it and some before; there may be less.
    axes = list(zip(self.shape[kept:], borders, strides, counts, strict=True))
    grown = (*self.shape[:kept], *((size + constant(p - 1)) // constant(s) + constant(c) for size, p, s, c in axes))
    starts = (*[ZERO] * kept, *(constant(count - 1) for count in counts))
    places, held = _places(self), register(self.dtype)
    gradients = Select(grown, grad_output.dtype, grad_output, number(0.0, grad_output.dtype), starts)
    chosen = Select(grown, places.dtype, cast(indices, places.dtype), number(-1, places.dtype), starts)
    terms = []
    for before in combinations(*map(range, counts)):

        def at(position: Position, before: tuple[int, ...] = before) -> Position:
            inner = zip(position[kept:], axes, before, strict=True)
            return (
                *position[:kept],
                *((x + constant(p)) // constant(s) + constant(c - 1 - b) for x, (_, p, s, c), b in inner),
            )

        gradient, place = (move(one, self.shape, at) for one in (gradients, chosen))
        terms.append(pointwise(where(eq(A, B), C, 0.0), held, place, places, cast(gradient, held)))
    return cast(reduce(lambda one, two: pointwise(A + B, held, one, two), terms), self.dtype)


def _avg_pool(
    rank: int,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Scalar | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: Types,
) -> Tensor:
    sizes = _each(kernel_size, rank)
    strides, borders = _each(stride, rank) if stride else sizes, _each(padding, rank)
    if self.dtype not in FLOATS:
        raise Unsupported("an average of integers")
    if [size.number for size in self.shape[-rank:]] == sizes and not any(borders) and not divisor_override:
        return mean(self, list(range(-rank, 0)), keepdim=True, out=out)
    _check(sizes)
    held = register(self.dtype)

    def total(value: Tensor, borders: list[int]) -> Tensor:
        windows = _windows(value, shape_of(out), sizes, strides, borders, [1] * rank, number(0.0, held))
        return reduce(lambda one, two: pointwise(A + B, held, one, two), windows)

    count: Tensor = number(float(divisor_override or prod(sizes)), held)
    if not divisor_override and (ceil_mode or (any(borders) and not count_include_pad)):  # it differs among windows
        padded = [size + constant(2 * border) for size, border in zip(self.shape[-rank:], borders, strict=True)]
        shape = (*self.shape[:-rank], *padded) if count_include_pad else self.shape
        ones = cast(Iota(shape, "i32", lambda position: ONE), held)
        count = total(ones, [0] * rank if count_include_pad else borders)
    return cast(pointwise(A / B, held, total(cast(self, held), borders), count), out[0].dtype)


for _rank in (1, 2, 3):
    op(f"max_pool{_rank}d.default")(partial(_max_pool, _rank))
    op(f"avg_pool{_rank}d.default")(partial(_avg_pool, _rank))


def _adaptive_avg_pool(rank: int, self: Tensor, output_size: Sequence[int | Index], *, out: Types) -> Tensor:
    """Means over equal tiles of the image; the output size must divide the input size."""
    shape = shape_of(out)
    if all(size.number == 1 for size in shape[-rank:]):
        return mean(self, list(range(-rank, 0)), keepdim=True, out=out)
    sizes = []
    for size, target in zip(self.shape[-rank:], shape[-rank:], strict=True):
        if size.number is None or not target.number or size.number % target.number:
            raise Unsupported("parts of different sizes")
        sizes.append(size.number // target.number)
    return _avg_pool(rank, self, sizes, out=out)


for _rank, _names in {1: ("",), 2: ("", "_"), 3: ("", "_")}.items():
    op(*(f"{_name}adaptive_avg_pool{_rank}d.default" for _name in _names))(partial(_adaptive_avg_pool, _rank))


@op("col2im.default")
def col2im(
    self: Tensor,
    output_size: Sequence[int | Index],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    *,
    out: Types,
) -> Tensor:
    """The sums of windows of an image where they overlap: of each place in the window, the window, if there is one,
    that has an element of the image there."""
    shape, held = shape_of(out), register(self.dtype)
    sizes, spread, borders, strides = (_each(given, 2) for given in (kernel_size, dilation, padding, stride))
    _check(sizes)
    kept, axes = len(shape) - 2, (-2, -1)
    counts = [
        (shape[axis] + constant(2 * p - d * (k - 1) - 1)) // constant(s) + ONE
        for axis, k, d, p, s in zip(axes, sizes, spread, borders, strides, strict=True)
    ]
    form = (*shape[:kept], *map(constant, sizes), *counts)
    windows = move(self, form, lambda at: (*at[: kept - 1], *_flat(at[kept - 1 :], form[kept - 1 :])))

    def window(axis: int, place: int) -> Tensor:
        """Which window has each position at `place`; -1: none."""
        here = Iota(shape, "i64", lambda position: position[axes[axis]])
        start = pointwise(A + (borders[axis] - place * spread[axis]), "i64", here)
        is_one = (A >= 0) & eq(irem(A, strides[axis]), 0)
        return pointwise(where(is_one, idiv(A, strides[axis]), -1), "i64", start)

    terms = []
    for place in combinations(*map(range, sizes)):

        def at(position: Position, found: Position, place: tuple[int, ...] = place) -> Position:
            return (*position[:kept], *map(constant, place), *found)

        found = tuple(window(axis, one) for axis, one in enumerate(place))
        terms.append(cast(Gather(shape, self.dtype, windows, found, tuple(counts), at), held))
    return cast(reduce(lambda one, two: pointwise(A + B, held, one, two), terms), self.dtype)


def _flat(position: Position, form: Shape) -> tuple[Index, Index]:
    """The channel, with the place in the window, and the window, of the position in a form of five dimensions."""
    return ravel(position[:3], form[:3]), ravel(position[3:], form[3:])
