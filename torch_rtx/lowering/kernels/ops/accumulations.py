"""Operators that add to elements at data-dependent positions: to those that their opposites among `indexing` read.

Several threads may add to one element, in any order: floats are rounded in another order in each run.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import A, B
from torch_rtx.lowering.kernels.kernel_ir import Accumulate, Gather, Scalar, Tensor, cast, expand, number, pointwise
from torch_rtx.lowering.kernels.ops.indexing import indexed, selected, taken
from torch_rtx.lowering.kernels.ops.registry import Types, op
from torch_rtx.lowering.kernels.ops.views import move

# What every target adds to memory in one instruction. Halves would be rounded after each addition, and older targets
# than sm_90 add bfloat16 by a loop.
DTYPES = ("f32", "f64", "i32", "i64")


def accumulated(target: Gather, source: Tensor) -> Tensor:
    """`source`, of the shape of `target`, added to the elements that `target` reads."""
    if target.dtype not in DTYPES:
        raise Unsupported(f"additions to {target.dtype} in memory, in a kernel")
    return Accumulate(target.shape, target.dtype, target, cast(source, target.dtype))


@op("index_put.default", "_unsafe_index_put.default")
def index_put(
    self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, *, out: Types
) -> Tensor:
    """`values` added where `indices` point."""
    if not accumulate:
        raise Unsupported("elements that are replaced, in a kernel")
    target = indexed(self, indices)
    return accumulated(target, expand(values, target.shape))


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
