"""Operators that are position arithmetic alone: views, concatenation, padding, repetition, factories of positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch_rtx.dtypes import INTS, register
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import A, B, C, Expression, eq, sigmoid, where
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, is_natural, product, ravel, unravel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Iota,
    Position,
    Scalar,
    Select,
    Shape,
    Tensor,
    View,
    cast,
    expand,
    number,
    pointwise,
    reinterpret,
    squeeze,
)
from torch_rtx.lowering.kernels.ops.pointwise import Operand, tensor
from torch_rtx.lowering.kernels.ops.registry import Types, op

Size = int | Index


def index(size: Size) -> Index:
    """A size as an index."""
    return constant(size) if isinstance(size, int) else size


def shape_of(out: Types, which: int = 0) -> Shape:
    """The shape of a result."""
    return tuple(map(from_dim, out[which].shape))


def move(source: Tensor, shape: Shape, at: object) -> Tensor:
    """`source` at the positions that `at` maps to."""
    return View(shape, source.dtype, source, at)  # type: ignore[arg-type]


def reshape(source: Tensor, shape: Shape) -> Tensor:
    """The same elements in row-major order."""
    if source.shape == shape:
        return source
    return move(source, shape, lambda position: unravel(ravel(position, shape), source.shape))


@op("view.default", "_unsafe_view.default", "_reshape_alias.default", "view_copy.default")
def view(self: Tensor, *, out: Types, **_: object) -> Tensor:
    """The same elements in another shape."""
    return reshape(self, shape_of(out))


@op("view.dtype")
def view_dtype(self: Tensor, dtype: str, *, out: Types) -> Tensor:
    """The bits of each element as another dtype of its size."""
    return reinterpret(self, dtype)


@op("alias.default", "detach.default", "lift_fresh.default")
def alias(self: Tensor, *, out: Types) -> Tensor:
    """x."""
    return self


@op("expand.default", "expand_copy.default")
def expand_(self: Tensor, size: Sequence[Size], implicit: bool = False, *, out: Types) -> Tensor:
    """Dimensions of size 1 repeated."""
    return expand(self, shape_of(out))


@op("permute.default", "permute_copy.default")
def permute(self: Tensor, dims: Sequence[int], *, out: Types) -> Tensor:
    """The dimensions in another order."""
    order = [dim % len(self.shape) for dim in dims]
    return move(
        self,
        tuple(self.shape[axis] for axis in order),
        lambda position: tuple(position[order.index(axis)] for axis in range(len(order))),
    )


@op("transpose.int", "transpose_copy.int")
def transpose(self: Tensor, dim0: int, dim1: int, *, out: Types) -> Tensor:
    """Two dimensions exchanged."""
    order = list(range(len(self.shape)))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(self, order, out=out)


@op("t.default", "t_copy.default")
def t(self: Tensor, *, out: Types) -> Tensor:
    """A matrix transposed."""
    return permute(self, range(len(self.shape))[::-1], out=out)


@op("unsqueeze.default", "unsqueeze_copy.default")
def unsqueeze(self: Tensor, dim: int, *, out: Types) -> Tensor:
    """`self` with a dimension of size 1 inserted."""
    axis = dim % (len(self.shape) + 1)
    shape = (*self.shape[:axis], ONE, *self.shape[axis:])
    return move(self, shape, lambda position: (*position[:axis], *position[axis + 1 :]))


@op("squeeze.default", "squeeze.dim", "squeeze.dims", "squeeze_copy.default", "squeeze_copy.dim")
def squeeze_(self: Tensor, dim: int | Sequence[int] | None = None, *, out: Types) -> Tensor:
    """`self` without dimensions of size 1."""
    rank = len(self.shape)
    asked = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    return squeeze(self, {axis % rank for axis in asked if self.shape[axis % rank] == ONE} if rank else set())


@op("slice.Tensor")
def slice_(
    self: Tensor, dim: int = 0, start: Size | None = None, end: Size | None = None, step: int = 1, *, out: Types
) -> Tensor:
    """A range of a dimension."""
    first = index(0 if start is None else start)
    return _strided(self, dim % len(self.shape), _limited(first, self.shape[dim]), step, shape_of(out))


def _limited(first: Index, size: Index) -> Index:
    """The start of a slice in a dimension of `size`, negative starts wrapped, clamped to the size."""
    at, end = first.number, size.number
    if at is None or (at < 0 and end is None):
        raise Unsupported("a slice from a position that is a dim, or that counts from an end that is one")
    if end is None:
        return first
    return constant(min(max(at + end, 0) if at < 0 else at, end))


def _strided(self: Tensor, axis: int, first: Index, step: int, shape: Shape) -> Tensor:
    def at(position: Position) -> Position:
        return (*position[:axis], position[axis] * constant(step) + first, *position[axis + 1 :])

    return move(self, shape, at)


@op("select.int")
def select(self: Tensor, dim: int, index: Size, *, out: Types) -> Tensor:
    """One position of a dimension."""
    axis = dim % len(self.shape)
    at = _counted(index, self.shape[axis])
    return move(self, shape_of(out), lambda position: (*position[:axis], at, *position[axis:]))


def _counted(index: Size, size: Index) -> Index:
    """A position in a dimension of `size`; negative ones count from the end."""
    at = constant(index) if isinstance(index, int) else index
    if at.number is not None and at.number < 0:
        return at + size
    if not is_natural(at):
        raise Unsupported("a position that may count from the end")
    return at


@op("split.Tensor", "unsafe_split.Tensor")
def split(self: Tensor, split_size: Size, dim: int = 0, *, out: Types) -> tuple[Tensor, ...]:
    """Chunks of `split_size` along a dimension, the last one with the rest."""
    size = index(split_size)
    firsts = [size * constant(which) for which in range(len(out))]
    return tuple(_strided(self, dim % len(self.shape), f, 1, shape_of(out, i)) for i, f in enumerate(firsts))


@op("split_with_sizes.default", "split_with_sizes_copy.default")
def split_with_sizes(self: Tensor, split_sizes: Sequence[Size], dim: int = 0, *, out: Types) -> tuple[Tensor, ...]:
    """Chunks of the given sizes along a dimension."""
    firsts = [sum(map(index, split_sizes[:which]), start=ZERO) for which in range(len(out))]
    return tuple(_strided(self, dim % len(self.shape), f, 1, shape_of(out, i)) for i, f in enumerate(firsts))


@op("unbind.int", "unbind_copy.int")
def unbind(self: Tensor, dim: int = 0, *, out: Types) -> tuple[Tensor, ...]:
    """The slices along a dimension."""
    return tuple(select(self, dim, which, out=(type_,)) for which, type_ in enumerate(out))


@op("diagonal.default", "diagonal_copy.default")
def diagonal(self: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1, *, out: Types) -> Tensor:
    """The diagonal of two dimensions, as the last one."""
    first, second = dim1 % len(self.shape), dim2 % len(self.shape)

    def at(position: Position) -> Position:
        rest, along = iter(position[:-1]), position[-1]
        values = {first: along + constant(max(-offset, 0)), second: along + constant(max(offset, 0))}
        return tuple(values[axis] if axis in values else next(rest) for axis in range(len(self.shape)))

    return move(self, shape_of(out), at)


@op("unfold.default", "unfold_copy.default")
def unfold(self: Tensor, dimension: int, size: int, step: int, *, out: Types) -> Tensor:
    """Windows of a dimension, their elements as the last one."""
    axis = dimension % max(len(self.shape), 1)
    if not self.shape:
        raise Unsupported("windows of a single number")

    def at(position: Position) -> Position:
        inside = position[axis] * constant(step) + position[-1]
        return (*position[:axis], inside, *position[axis + 1 : -1])

    return move(self, shape_of(out), at)


@op("flip.default")
def flip(self: Tensor, dims: Sequence[int], *, out: Types) -> Tensor:
    """Dimensions in reverse."""
    axes = {dim % len(self.shape) for dim in dims} if self.shape else set()

    def at(position: Position) -> Position:
        return tuple(self.shape[a] - ONE - p if a in axes else p for a, p in enumerate(position))

    return move(self, self.shape, at)


@op("roll.default")
def roll(self: Tensor, shifts: Sequence[Size], dims: Sequence[int] = (), *, out: Types) -> Tensor:
    """Dimensions (or all elements, as one) rotated."""
    if not dims:
        flat = reshape(self, (product(self.shape),))
        return reshape(roll(flat, shifts, [0], out=out), self.shape)
    moves = {dim % len(self.shape): index(shift) for dim, shift in zip(dims, shifts, strict=True)}
    for axis, shift in moves.items():
        size = self.shape[axis].number
        if shift.number is None or size is None:
            raise Unsupported("a rotation by a dim")
        moves[axis] = constant(-shift.number % size) if size else ZERO

    def at(position: Position) -> Position:
        return tuple((p + moves[a]) % self.shape[a] if a in moves else p for a, p in enumerate(position))

    return move(self, self.shape, at)


@op("repeat.default")
def repeat(self: Tensor, repeats: Sequence[Size], *, out: Types) -> Tensor:
    """The whole tensor, repeated along dimensions."""
    shape = shape_of(out)
    source = (ONE,) * (len(shape) - len(self.shape)) + self.shape
    sizes = list(zip(shape, source, strict=True))

    def at(position: Position) -> Position:
        return tuple(p if whole == size else p % size for p, (whole, size) in zip(position, sizes, strict=True))

    return move(reshape(self, source), shape, at)


@op("pixel_shuffle.default")
def pixel_shuffle(self: Tensor, upscale_factor: int, *, out: Types) -> Tensor:
    """Channels to blocks of pixels (Shi et al., 2016)."""
    factor = constant(upscale_factor)

    def at(position: Position) -> Position:
        *batch, channel, y, x = position
        return (*batch, (channel * factor + y % factor) * factor + x % factor, y // factor, x // factor)

    return move(self, shape_of(out), at)


@op("pixel_unshuffle.default")
def pixel_unshuffle(self: Tensor, downscale_factor: int, *, out: Types) -> Tensor:
    """Blocks of pixels to channels."""
    factor = constant(downscale_factor)

    def at(position: Position) -> Position:
        *batch, channel, y, x = position
        inner = channel % (factor * factor)
        return (*batch, channel // (factor * factor), y * factor + inner // factor, x * factor + inner % factor)

    return move(self, shape_of(out), at)


# ---- several sources -------------------------------------------------------------------------------------------------


@op("cat.default")
def cat(tensors: Sequence[Tensor], dim: int = 0, *, out: Types) -> Tensor:
    """Tensors concatenated along a dimension."""
    shape, dtype = shape_of(out), out[0].dtype
    parts = [cast(part, dtype) for part in tensors if part.shape != (ZERO,) or shape == (ZERO,)]
    axis = dim % len(shape)
    starts = [sum((part.shape[axis] for part in parts[:which]), start=ZERO) for which in range(len(parts))]
    found = _strided(parts[-1], axis, ZERO - starts[-1], 1, shape)
    for part, start in reversed(list(zip(parts, starts, strict=True))[:-1]):
        found = Select(shape, dtype, part, found, tuple(start if a == axis else ZERO for a in range(len(shape))))
    return found


@op("stack.default")
def stack(tensors: Sequence[Tensor], dim: int = 0, *, out: Types) -> Tensor:
    """Tensors stacked along a new dimension."""
    axis = dim % len(out[0].shape)
    return cat([unsqueeze(part, axis, out=out) for part in tensors], axis, out=out)


@op("constant_pad_nd.default")
def constant_pad_nd(self: Tensor, pad: Sequence[Size], value: Scalar = 0, *, out: Types) -> Tensor:
    """A constant border; a negative width crops."""
    rank = len(self.shape)
    before = [ZERO] * rank
    for which, size in enumerate(pad[::2]):
        before[rank - 1 - which] = index(size)
    # `F.pad` passes a float whatever the dtype; in Triton it would make the elements floats.
    value = int(value) if self.dtype in INTS and isinstance(value, float) else value
    return Select(shape_of(out), self.dtype, self, number(value, self.dtype), tuple(before))


@op("tril.default")
def tril(self: Tensor, diagonal: Size = 0, *, out: Types) -> Tensor:
    """x on and below a diagonal, else 0."""
    return _triangle(A - B <= C, self, diagonal)


@op("triu.default")
def triu(self: Tensor, diagonal: Size = 0, *, out: Types) -> Tensor:
    """x on and above a diagonal, else 0."""
    return _triangle(A - B >= C, self, diagonal)


def _triangle(test: Expression, self: Tensor, diagonal: Size) -> Tensor:
    column, row = (positions(self.shape, axis) for axis in (-1, -2))
    inside = pointwise(test, "bool", column, row, number(diagonal, "i64"))
    return pointwise(where(A, B, C), self.dtype, inside, self, number(0, self.dtype))


def positions(shape: Shape, axis: int) -> Tensor:
    """At each element of `shape` its position along `axis`, i64."""
    return Iota(shape, "i64", lambda position: position[axis])


def _arange(start: Operand, step: Operand, out: Types) -> Tensor:
    dtype = out[0].dtype
    found = positions(shape_of(out), 0)
    if all(isinstance(x, int) and x >= 0 for x in (start, step)):
        first, by = (constant(int(x)) for x in (start, step))  # type: ignore[arg-type]
        at = Iota(found.shape, dtype if dtype in INTS else "i64", lambda position: position[0] * by + first)
        return cast(at, dtype)
    held = register(dtype)
    values = (tensor(x, held) for x in (found, step, start))
    return cast(pointwise(A * B + C, held, *values), dtype)


@op("arange.default")
def arange(end: Scalar, *, out: Types, **_: object) -> Tensor:
    """0, 1, ..."""
    return _arange(0, 1, out)


@op("arange.start", "arange.start_step")
def arange_start(start: Scalar, end: Scalar, step: Scalar = 1, *, out: Types, **_: object) -> Tensor:
    """start, start + step, ..."""
    return _arange(start, step, out)


@op("eye.default", "eye.m")
def eye(*, out: Types, **_: object) -> Tensor:
    """1 on the diagonal."""
    shape = shape_of(out)
    same = pointwise(eq(A, B), "bool", positions(shape, 0), positions(shape, 1))
    return cast(same, out[0].dtype) if out[0].dtype != "bool" else same


@op("select_scatter.default")
def select_scatter(self: Tensor, src: Tensor, dim: int, index: Size, *, out: Types) -> Tensor:
    """x with one position of a dimension replaced."""
    axis = dim % len(self.shape)
    at = _counted(index, self.shape[axis])
    starts = tuple(at if a == axis else ZERO for a in range(len(self.shape)))
    return Select(self.shape, self.dtype, unsqueeze(cast(src, self.dtype), axis, out=out), self, starts)


@op("slice_scatter.default")
def slice_scatter(
    self: Tensor,
    src: Tensor,
    dim: int = 0,
    start: Size | None = None,
    end: Size | None = None,
    step: int = 1,
    *,
    out: Types,
) -> Tensor:
    """x with a range of a dimension replaced."""
    if step != 1:
        raise Unsupported("a slice with steps")
    first = _limited(index(0 if start is None else start), self.shape[dim])
    starts = tuple(first if a == dim % len(self.shape) else ZERO for a in range(len(self.shape)))
    return Select(self.shape, self.dtype, cast(src, self.dtype), self, starts)


@op("glu.default")
def glu(self: Tensor, dim: int = -1, *, out: Types) -> Tensor:
    """The first half times the sigmoid of the second (Dauphin et al., 2017)."""
    axis, shape = dim % len(self.shape), shape_of(out)
    first, second = (_strided(self, axis, start, 1, shape) for start in (ZERO, shape[axis]))
    return pointwise(A * sigmoid(B), self.dtype, first, second)
