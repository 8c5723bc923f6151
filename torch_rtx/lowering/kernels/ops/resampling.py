"""Interpolation of images: each element is a weighted sum of elements at computed positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from torch_rtx.dtypes import register
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import (
    A,
    B,
    C,
    Expression,
    absolute,
    apply,
    divide,
    eq,
    floor,
    fmax,
    fmin,
    fmod,
    where,
)
from torch_rtx.lowering.kernels.index import Index, constant, product
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    Gather,
    Iota,
    Position,
    Shape,
    Tensor,
    cast,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.ops.pointwise import floating
from torch_rtx.lowering.kernels.ops.reductions import size_as
from torch_rtx.lowering.kernels.ops.registry import Types, op
from torch_rtx.lowering.kernels.ops.views import move, shape_of

Taps = list[tuple[Tensor, Tensor | None]]  # positions along a dimension, and the weights of the elements there
Factors = list[float | None]  # of sizes, per dimension; None: the ratio of the sizes


def place_dtype(source: Tensor) -> str:
    """The integers that hold positions in `source`."""
    return "i32" if (product(source.shape).number or 1 << 31) < 1 << 31 else "i64"


def blend(source: Tensor, shape: Shape, taps: Sequence[Taps]) -> Tensor:
    """The tensor of `shape` whose elements are sums of those of `source` at the positions in `taps`, a list for each of
    the last dimensions, times the product of the weights. A position out of range counts as 0."""
    first, held = len(shape) - len(taps), register(source.dtype)

    def at(position: Position, found: Position) -> Position:
        return (*position[:first], *found)

    def along(axis: int, places: tuple[Tensor, ...]) -> Tensor:
        if axis == len(taps):
            return Gather(shape, source.dtype, source, places, source.shape[first:], at)
        inner = ((along(axis + 1, (*places, place)), weight) for place, weight in taps[axis])
        parts = (one if weight is None else pointwise(A * B, held, cast(one, held), weight) for one, weight in inner)
        return reduce(lambda one, two: pointwise(A + B, held, one, two), parts)

    return along(0, ())


# ---- from one size to another ----------------------------------------------------------------------------------------


def _scale(old: Index, new: Index, factor: float | None, aligned: bool, held: str) -> Tensor:
    """The distance in the source between neighbours in the result."""
    if not aligned and factor:
        return number(1.0 / factor, held)
    spaces = (old - ONE, new - ONE) if aligned else (old, new)
    if all(size.number is not None for size in spaces):
        before, after = (float(size.number or 0) for size in spaces)
        return number(before / after if after else 0.0, held)
    ratio = pointwise(divide(A, B), held, *(size_as(size, held) for size in spaces))
    return pointwise(where(A > 0, B, 0.0), held, size_as(spaces[1], held), ratio) if aligned else ratio


def _source(shape: Shape, axis: int, how: Expression, held: str, scale: Tensor) -> Tensor:
    """`how` of the position along an axis (A) and the scale (B)."""
    place = cast(Iota(shape, "i32", lambda position: position[axis]), held)
    return pointwise(how, held, place, scale)


def _limited(place: Tensor, size: Index) -> Tensor:
    return pointwise(fmin(fmax(A, 0), B), place.dtype, place, number(size - ONE, place.dtype))


def _linear(source: Tensor, shape: Shape, axis: int, scale: Tensor, aligned: bool) -> Taps:
    held, size = scale.dtype, source.shape[axis]
    exact = _source(shape, axis, A * B if aligned else fmax((A + 0.5) * B - 0.5, 0.0), held, scale)
    low = _limited(cast(exact, place_dtype(source)), size)
    high = _limited(pointwise(A + 1, low.dtype, low), size)
    part = pointwise(A - B, held, exact, cast(low, held))
    return [(low, pointwise(1.0 - A, held, part)), (high, part)]


def cubic_weights(part: Tensor) -> list[Tensor]:
    """Of the elements at -1, 0, 1 and 2 from where `part` is 0 (Keys, 1981, with a = -0.75)."""
    a = -0.75

    def near(x: Expression) -> Expression:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0

    def far(x: Expression) -> Expression:
        return ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a

    return [pointwise(one, part.dtype, part) for one in (far(A + 1.0), near(A + 0.0), near(1.0 - A), far(2.0 - A))]


def _cubic(source: Tensor, shape: Shape, axis: int, scale: Tensor, aligned: bool) -> Taps:
    held = scale.dtype
    exact = _source(shape, axis, A * B if aligned else (A + 0.5) * B - 0.5, held, scale)
    below = pointwise(floor(A), held, exact)
    first = cast(below, place_dtype(source))
    places = (_limited(pointwise(A + step, first.dtype, first), source.shape[axis]) for step in (-1, 0, 1, 2))
    return list(zip(places, cubic_weights(pointwise(A - B, held, exact, below)), strict=True))


def _nearest(exact: bool, source: Tensor, shape: Shape, factors: Factors) -> Tensor:
    """PyTorch computes positions in float32, whatever the dtype; by whole factors they are integer arithmetic."""
    kept = len(shape) - len(factors)
    whole = list(map(_whole, source.shape[kept:], shape[kept:], factors))
    if all(whole):
        parts = (ONE,) * kept + tuple(constant(one or 1) for one in whole)
        return move(source, shape, lambda position: tuple(p // part for p, part in zip(position, parts, strict=True)))
    taps: list[Taps] = []
    for axis, factor in enumerate(factors, kept):
        scale = _scale(source.shape[axis], shape[axis], factor, False, "f32")
        place = _source(shape, axis, (A + 0.5) * B if exact else A * B, "f32", scale)
        taps.append([(_limited(cast(place, place_dtype(source)), source.shape[axis]), None)])
    return blend(source, shape, taps)


def _whole(old: Index, new: Index, factor: float | None) -> int | None:
    """The factor between two sizes, if it is a whole number."""
    if old.number and new.number:
        found = new.number // old.number
        return found if old.number * found == new.number and factor in (None, found) else None
    found = int(factor or 1)
    return found if old * constant(found) == new and factor in (None, found) else None


def _weighted(
    taps: Callable[[Tensor, Shape, int, Tensor, bool], Taps],
    aligned: bool,
    source: Tensor,
    shape: Shape,
    factors: Factors,
    out: Types,
) -> Tensor:
    floating(out)
    kept, held = len(shape) - len(factors), register(source.dtype)
    found = []
    for axis, factor in enumerate(factors, kept):
        scale = _scale(source.shape[axis], shape[axis], factor, aligned, held)
        found.append(taps(source, shape, axis, scale, aligned))
    return cast(blend(source, shape, found), source.dtype)


_Sizes = Sequence[int | Index] | None


def _upsample(
    mode: str,
    rank: int,
    source: Tensor,
    align_corners: bool,
    factors: Sequence[float | Index | None],
    out: Types,
) -> Tensor:
    if any(isinstance(one, Index) for one in factors):
        raise Unsupported("a factor that is a dim")
    given: Factors = [one if isinstance(one, int | float) else None for one in factors] or [None] * rank
    if mode.startswith("nearest"):
        return _nearest(mode == "nearest_exact", source, shape_of(out), given)
    return _weighted(_cubic if mode == "bicubic" else _linear, align_corners, source, shape_of(out), given, out)


def _declare(name: str, mode: str, rank: int) -> None:
    scales = ("scales",) if rank == 1 else ("scales_d", "scales_h", "scales_w")[-rank:]

    def default(
        self: Tensor, output_size: _Sizes, align_corners: bool = False, *, out: Types, **given: float
    ) -> Tensor:
        return _upsample(mode, rank, self, align_corners, [given.get(one) for one in scales], out)

    def vec(
        input: Tensor,
        output_size: _Sizes,
        align_corners: bool = False,
        scale_factors: Sequence[float] | None = None,
        *,
        out: Types,
    ) -> Tensor:
        return _upsample(mode, rank, input, align_corners, scale_factors or (), out)

    op(f"{name}.default")(default)
    op(f"{name}.vec")(vec)


for _rank in (1, 2, 3):
    _declare(f"upsample_nearest{_rank}d", "nearest", _rank)
    _declare(f"_upsample_nearest_exact{_rank}d", "nearest_exact", _rank)
for _rank, _name in enumerate(("linear", "bilinear", "trilinear"), 1):
    _declare(f"upsample_{_name}{_rank}d", "linear", _rank)
_declare("upsample_bicubic2d", "bicubic", 2)


# ---- at given positions ----------------------------------------------------------------------------------------------

LINEAR, NEAREST, CUBIC = range(3)  # of `grid_sampler`: how
ZEROS, BORDER, REFLECTION = range(3)  # and what lies outside of the image


def _inside(place: Tensor, size: Index, beyond: int, aligned: bool) -> Tensor:
    """Positions in the image, or near it, for positions anywhere."""
    held = place.dtype
    if beyond == ZEROS:
        return place
    if beyond == REFLECTION:
        low, count = (0.0, size - ONE) if aligned else (-0.5, size)
        span = pointwise(fmax(A, 1e-30), held, size_as(count, held))  # of one pixel: all is that
        far = pointwise(absolute(A - low), held, place)
        rest = pointwise(fmod(A, B), held, far, span)
        times = pointwise(apply("rint", (A - B) / C), held, far, rest, span)  # quotients of GPUs are a little off
        odd = eq(B - 2.0 * floor(B * 0.5), 1.0)
        place = pointwise(where(odd, C - A, A) + low, held, rest, times, span)
    return pointwise(fmin(fmax(A, 0.0), B), held, place, size_as(size - ONE, held))


def _taps_at(place: Tensor, size: Index, how: int, beyond: int, aligned: bool, dtype: str) -> Taps:
    held = place.dtype
    if how == NEAREST:
        return [(cast(pointwise(apply("rint", A), held, _inside(place, size, beyond, aligned)), dtype), None)]
    if how == LINEAR:
        place = _inside(place, size, beyond, aligned)
    below = pointwise(floor(A), held, place)
    part = pointwise(A - B, held, place, below)
    if how == LINEAR:
        first, weights = 0, [pointwise(1.0 - A, held, part), part]
    else:
        first, weights = -1, cubic_weights(part)
    places = [pointwise(A + float(step), held, below) for step in range(first, first + len(weights))]
    if how == CUBIC:
        places = [_inside(one, size, beyond, aligned) for one in places]
    return [(cast(one, dtype), weight) for one, weight in zip(places, weights, strict=True)]


@op("grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default")
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool, *, out: Types
) -> Tensor:
    """The elements of an image at positions between -1 and 1 (Jaderberg et al., 2015), [batch, *sizes, dimensions], the
    last dimension of the image first."""
    floating(out)
    shape, held, rank = shape_of(out), register(input.dtype), len(input.shape) - 2
    taps: list[Taps] = []
    for axis, size in enumerate(input.shape[2:]):
        which = constant(rank - 1 - axis)
        given = move(grid, shape, lambda position, which=which: (position[0], *position[2:], which))
        how = (A + 1.0) / 2.0 * (B - 1.0) if align_corners else ((A + 1.0) * B - 1.0) / 2.0
        place = pointwise(how, held, cast(given, held), size_as(size, held))
        taps.append(_taps_at(place, size, interpolation_mode, padding_mode, align_corners, place_dtype(input)))
    return cast(blend(input, shape, taps), input.dtype)
