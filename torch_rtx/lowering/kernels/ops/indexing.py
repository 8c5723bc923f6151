"""Operators that read at data-dependent positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch_rtx.dtypes import DTYPES, INTS, PACKED
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import A, B, C, D, Expression, absolute, eq, fmax, fmin, where
from torch_rtx.lowering.kernels.index import Index
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ONE_HOT,
    Gather,
    Iota,
    Position,
    Scalar,
    Scatter,
    Shape,
    Tensor,
    broadcast,
    cast,
    expand,
    is_zero,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.ops.registry import Types, op
from torch_rtx.lowering.kernels.ops.views import index as index_of
from torch_rtx.lowering.kernels.ops.views import move, shape_of


@op("embedding.default")
def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    out: Types,
) -> Tensor:
    """Rows of `weight` at `indices`."""
    rows = cast(indices, "i64")
    wide = move(rows, shape_of(out), lambda position: position[:-1])
    return Gather(shape_of(out), weight.dtype, weight, (wide,), weight.shape[:1], lambda at, found: (found[0], at[-1]))


@op("index.Tensor", "_unsafe_index.Tensor")
def index(self: Tensor, indices: Sequence[Tensor | None], *, out: Types) -> Tensor:
    """`self` indexed by broadcast index tensors along adjacent dimensions; negative indices wrap."""
    return indexed(self, indices, shape_of(out))


def indexed(self: Tensor, indices: Sequence[Tensor | None], shape: Shape | None = None) -> Gather:
    """See `index`; `shape` is that of the result, if known."""
    axes = [axis for axis, one in enumerate(indices) if one is not None]
    given = [one for one in indices if one is not None]
    if axes != list(range(axes[0], axes[0] + len(axes))) or any(one.dtype not in INTS for one in given):
        raise Unsupported("masks as indices, or indices that are not next to each other")
    common, first, last = broadcast(given), axes[0], axes[-1]
    whole = shape or (*self.shape[:first], *common, *self.shape[last + 1 :])
    rank = len(common)

    def at(position: Position, found: Position) -> Position:
        return (*position[:first], *found, *position[first + rank :])

    def aligned(one: Tensor) -> Tensor:
        wide = expand(cast(one, "i64"), common)
        return move(wide, whole, lambda position: position[first : first + rank])

    sizes = self.shape[first : last + 1]
    return Gather(whole, self.dtype, self, tuple(map(aligned, given)), sizes, at, wrap=True)


@op("index_select.default")
def index_select(self: Tensor, dim: int, index: Tensor, *, out: Types) -> Tensor:
    """The slices of `self` at `index` along one dimension."""
    return selected(self, dim, index, shape_of(out))


def selected(self: Tensor, dim: int, index: Tensor, shape: Shape) -> Gather:
    """See `index_select`; `shape` is that of the result."""
    if not self.shape:
        raise Unsupported("a single number by index")
    axis = dim % len(self.shape)
    wide = move(cast(index, "i64"), shape, lambda position: (position[axis],) if index.shape else ())

    def at(position: Position, found: Position) -> Position:
        return (*position[:axis], *found, *position[axis + 1 :])

    return Gather(shape, self.dtype, self, (wide,), (self.shape[axis],), at)


@op("gather.default")
def gather(self: Tensor, dim: int, index: Tensor, sparse_grad: bool = False, *, out: Types) -> Tensor:
    """`self` with the position along `dim` taken from `index`."""
    return taken(self, dim, index)


def taken(self: Tensor, dim: int, index: Tensor) -> Gather:
    """See `gather`."""
    if not self.shape or len(index.shape) != len(self.shape):
        raise Unsupported("a single number by index, or an index of another rank")
    axis = dim % len(self.shape)

    def at(position: Position, found: Position) -> Position:
        return (*position[:axis], *found, *position[axis + 1 :])

    return Gather(index.shape, self.dtype, self, (cast(index, "i64"),), (self.shape[axis],), at)


@op("one_hot.default")
def one_hot(self: Tensor, num_classes: int = -1, *, out: Types) -> Tensor:
    """1 at the class of each element, along a new last dimension; nowhere for a class that does not exist."""
    shape = shape_of(out)
    place = Iota(shape, "i64", lambda position: position[-1])
    return cast(pointwise(eq(A, B), "bool", place, move(self, shape, lambda position: position[:-1])), "i64")


def replaced(target: Gather, source: Tensor) -> Scatter:
    """`source`, of the shape of `target`, in place of the elements that `target` reads."""
    if DTYPES[target.dtype].bits < 8 or target.dtype == PACKED:
        raise Unsupported(f"elements of {target.dtype} that are replaced, in a kernel")
    return Scatter(target.shape, target.dtype, target, cast(source, target.dtype), adds=False)


@op("scatter.src", "scatter.value")
def scatter(
    self: Tensor, dim: int, index: Tensor, src: Tensor | None = None, value: Scalar = 0, *, out: Types
) -> Tensor:
    """`self` with the elements along `dim` that `index` names replaced; where that is one of each row, by a choice."""
    shape, axis = self.shape, dim % max(len(self.shape), 1)
    source = number(value, self.dtype) if src is None else move(src, index.shape, lambda position: position)
    if index.shape != (*shape[:axis], ONE, *shape[axis + 1 :]) or not shape:
        return replaced(taken(self, dim, index), expand(source, index.shape))
    place = Iota(shape, "i64", lambda position: position[axis])
    given = place, cast(index, "i64"), cast(source, self.dtype)
    if is_zero(self):
        return pointwise(ONE_HOT, self.dtype, *given)
    return pointwise(where(eq(A, B), C, D), self.dtype, *given, self)


@op("scatter_.src", "scatter_.value")
def scatter_in_place(
    self: Tensor, dim: int, index: Tensor, src: Tensor | None = None, value: Scalar = 0, *, out: Types
) -> Tensor:
    """The elements of `self` along `dim` that `index` names replaced."""
    source = number(value, self.dtype) if src is None else move(src, index.shape, lambda position: position)
    return replaced(taken(self, dim, index), expand(source, index.shape))


def _padded(mirrored: Expression, self: Tensor, padding: Sequence[int | Index], *, out: Types) -> Tensor:
    """`self` at the positions `mirrored(A, B)`; A is the position less the padding before, B the last valid one."""
    shape, rank = shape_of(out), len(self.shape)
    axes = [rank - 1 - which for which in range(len(padding) // 2)]
    found, sizes = [], []
    for axis, before in zip(axes, padding[::2], strict=True):
        shift = index_of(before)
        moved = Iota(shape, "i64", lambda position, axis=axis, shift=shift: position[axis] - shift)  # type: ignore[misc]
        found.append(pointwise(mirrored, "i64", moved, number(self.shape[axis] - ONE, "i64")))
        sizes.append(self.shape[axis])

    def at(position: Position, chosen: Position) -> Position:
        places = dict(zip(axes, chosen, strict=True))
        return tuple(places.get(axis, where) for axis, where in enumerate(position))

    return Gather(shape, self.dtype, self, tuple(found), tuple(sizes), at)


RANKS = (1, 2, 3)
op(*(f"reflection_pad{rank}d.default" for rank in RANKS))(partial(_padded, B - absolute(B - absolute(A))))
op(*(f"replication_pad{rank}d.default" for rank in RANKS))(partial(_padded, fmin(fmax(A, 0), B)))
