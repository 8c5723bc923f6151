"""Operators that add to elements at data-dependent positions, or put values there: those that their opposites among
`indexing` read.

Several threads may add to one element, in any order: floats are rounded in another order in each run.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import A, B, C, where
from torch_rtx.lowering.kernels.index import product
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Gather,
    Scalar,
    Scatter,
    Tensor,
    cast,
    expand,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.ops.indexing import indexed, replaced, selected, taken
from torch_rtx.lowering.kernels.ops.pointwise import Operand, tensor
from torch_rtx.lowering.kernels.ops.registry import Types, op
from torch_rtx.lowering.kernels.ops.views import move

# What every target adds to memory in one instruction. Halves would be rounded after each addition, and older targets
# than sm_90 add bfloat16 by a loop.
DTYPES = ("f32", "f64", "i32", "i64")


def accumulated(target: Gather, source: Tensor) -> Tensor:
    """`source`, of the shape of `target`, added to the elements that `target` reads."""
    if target.dtype not in DTYPES:
        raise Unsupported(f"additions to {target.dtype} in memory, in a kernel")
    return Scatter(target.shape, target.dtype, target, cast(source, target.dtype))


@op("index_put.default", "_unsafe_index_put.default")
def index_put(
    self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, *, out: Types
) -> Tensor:
    """`values` added or put where `indices` point; one value also where a mask of the first dimensions is true."""
    first = indices[0] if len(indices) == 1 else None
    if first is not None and first.dtype == "bool" and not accumulate:
        if product(values.shape) != ONE or first.shape != self.shape[: len(first.shape)]:
            raise Unsupported("several values where a mask is true")
        mask = move(first, self.shape, lambda position: position[: len(first.shape)])
        value = move(cast(values, self.dtype), self.shape, lambda position: (ZERO,) * len(values.shape))
        return pointwise(where(A, B, C), self.dtype, mask, value, self)
    target = indexed(self, indices)
    return (accumulated if accumulate else replaced)(target, expand(values, target.shape))


@op("index_put_.default")
def index_put_in_place(
    self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, *, out: Types
) -> Tensor:
    """`values` added or put where `indices` point."""
    target = indexed(self, indices)
    return (accumulated if accumulate else replaced)(target, expand(values, target.shape))


@op("index_copy.default", "index_copy_.default")
def index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor, *, out: Types) -> Tensor:
    """Each slice of `source` put where `index` says."""
    return replaced(selected(self, dim, index, source.shape), source)


@op("index_fill.int_Scalar", "index_fill.int_Tensor")
def index_fill(self: Tensor, dim: int, index: Tensor, value: Operand, *, out: Types) -> Tensor:
    """One number in the slices that `index` names."""
    (count,), axis = index.shape or (ONE,), dim % max(len(self.shape), 1)
    shape = tuple(count if at == axis else size for at, size in enumerate(self.shape))
    return replaced(selected(self, dim, index, shape), expand(tensor(value, self.dtype), shape))


@op("index_add.default")
def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Scalar = 1, *, out: Types) -> Tensor:
    """`alpha` times each slice of `source` added to the one that `index` names."""
    scaled = source if alpha == 1 else pointwise(A * B, source.dtype, source, number(alpha, source.dtype))
    return accumulated(selected(self, dim, index, source.shape), scaled)


@op("scatter_add.default")
def scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor, *, out: Types) -> Tensor:
    """Each element of `src` added where `index` points along one dimension."""
    target = taken(self, dim, index)
    return accumulated(target, move(src, target.shape, lambda position: position))


@op("scatter_reduce.two")
def scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool = True, *, out: Types
) -> Tensor:
    """A sum alone, as `scatter_add`."""
    if reduce != "sum" or not include_self:
        raise Unsupported(f"a scatter of the {reduce}, in a kernel")
    return scatter_add(self, dim, index, src, out=out)
