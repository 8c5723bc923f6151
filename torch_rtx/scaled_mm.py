"""Products of float8 with scales where libraries lack them: `torch_rtx.scaled_mm`, which is `aten._scaled_mm`, but for
all sizes, layouts and GPUs, and for float64, in which results are checked.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from torch_rtx.block_formats import block_scaled_mm
from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import TensorType
from torch_rtx.op_work import library_has, scales_of

_NAMES = {getattr(torch, row.torch): name for name, row in DTYPES.items() if hasattr(torch, row.torch)}


def _scaled_mm(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """The product of float8 matrices [M, K] and [K, N], in f32, times `scale_a` and `scale_b`, plus `bias` [N], in
    `out_dtype`. The scales are f32, of one element, or [M, 1] and [1, N]; or those of blocks, see `block_formats`."""
    tensors = {"self": self, "mat2": mat2, "scale_a": scale_a, "scale_b": scale_b, "bias": bias}
    types = {name: _type(tensor) for name, tensor in tensors.items() if tensor is not None}
    result = TensorType(_NAMES[out_dtype or self.dtype], (self.shape[0], mat2.shape[1]), (mat2.shape[1], 1))
    by_row = (scale_a, (self.shape[0], 1)), (scale_b, (1, mat2.shape[1]))
    plain = all(scale.numel() == 1 or scale.shape == each for scale, each in by_row)
    scales = scales_of(types)
    # On CPUs, scales of rows came with PyTorch 2.12.
    has = library_has(_sm(self.device), types, result) if self.is_cuda else scales == "whole"
    if scales == "by block" and not has and scale_result is None:
        return block_scaled_mm(self, mat2, scale_a, scale_b, bias, out_dtype or torch.bfloat16)
    if has or not plain:
        call = torch.ops.aten._scaled_mm.default
        return call(self, mat2, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum)
    wide = torch.promote_types(torch.float32, scale_a.dtype)
    total = self.to(wide) @ mat2.to(wide)
    for scale, _ in by_row:
        total = total * (scale.reshape(()) if scale.numel() == 1 else scale)
    total = total if bias is None else total + bias
    return (total if scale_result is None else total * scale_result).to(out_dtype or self.dtype)


def _type(tensor: Tensor) -> TensorType:
    return TensorType(_NAMES[tensor.dtype], tuple(tensor.shape), tuple(tensor.stride()))


@cache
def _sm(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _room(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    torch._check(self.dim() == mat2.dim() == 2, lambda: f"matrices of {self.dim()} and {mat2.dim()} dimensions")
    torch._check(self.shape[1] == mat2.shape[0], lambda: f"rows of {self.shape[1]} by columns of {mat2.shape[0]}")
    return self.new_empty((self.shape[0], mat2.shape[1]), dtype=out_dtype or self.dtype)


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_LIBRARY.define(str(torch.ops.aten._scaled_mm.default._schema).removeprefix("aten::_"))
_LIBRARY.impl("scaled_mm", _scaled_mm, "CompositeExplicitAutograd")
_LIBRARY.impl("scaled_mm", _room, "Meta")
