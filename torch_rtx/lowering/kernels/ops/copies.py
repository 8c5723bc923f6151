"""Copies: casts, clones, and what replaces the contents of a tensor."""

from __future__ import annotations

from torch_rtx.dtypes import DTYPES, FLOAT
from torch_rtx.lowering.kernels.kernel_ir import Tensor, cast, expand
from torch_rtx.lowering.kernels.nearest import nearest
from torch_rtx.lowering.kernels.ops.registry import Types, op


@op("_to_copy.default")
def to_copy(
    self: Tensor,
    dtype: str | None = None,
    layout: str | None = None,
    device: str | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: str | None = None,
    *,
    out: Types,
) -> Tensor:
    """A cast: it rounds even where no memory is involved."""
    target = out[0].dtype
    if (whole := nearest(self, target)) is not None:
        return whole
    if DTYPES[self.dtype].kind == FLOAT and target == "u8":
        self = cast(self, "i64")  # as PyTorch does, so that negative numbers wrap
    return cast(self, target, rounded=True)


@op("clone.default", "alias_copy.default", "lift_fresh_copy.default")
def clone(self: Tensor, memory_format: str | None = None, *, out: Types) -> Tensor:
    """x."""
    return self


@op("copy.default")
def copy(self: Tensor, src: Tensor, non_blocking: bool = False, *, out: Types) -> Tensor:
    """src, broadcast and cast to what self is."""
    return expand(cast(src, out[0].dtype, rounded=True), self.shape)
