"""Decomposes PyTorch's fake quantization: numbers are rounded to those that integers with a scale can stand for.

The integers then are in the graph, where products of them are found. The formulas are those of PyTorch's kernels, in
float32 but for the numbers that are rounded, and give the same bits; but NaN stays NaN, and does not become a number.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from torch_rtx.backend.quantized_ops import check_scale

Pair = tuple[Tensor, Tensor]  # the numbers, and where they are in range, which gradients pass


def _rounded(x: Tensor, inverse: Any, scale: Any, zero: Any, low: int, high: int) -> Pair:
    wide = x if x.dtype == torch.float64 else x.float()
    if isinstance(zero, Tensor) and zero.is_floating_point():
        whole = torch.round(wide * inverse + zero)
    else:
        whole = torch.round(wide * inverse) + zero
    inside = (whole >= low) & (whole <= high)
    return ((whole.clamp(low, high).float() - zero) * scale).to(x.dtype), inside


def _per_tensor(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Pair:
    check_scale(scale)
    scale = c_float(scale).value
    return _rounded(x, c_float(1 / scale).value, scale, zero_point, quant_min, quant_max)


def _per_tensor_of_tensors(
    x: Tensor, scale: Tensor, zero_point: Tensor, fake_quant_enabled: Tensor, quant_min: int, quant_max: int
) -> Pair:
    scale, zero_point = scale.reshape(()).float(), zero_point.reshape(())
    rounded, inside = _rounded(x, scale.reciprocal(), scale, zero_point, quant_min, quant_max)
    enabled = fake_quant_enabled.reshape(()) >= 1
    return torch.where(enabled, rounded, x), inside | ~enabled


def _per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Pair:
    shape = [1] * x.dim()
    shape[axis] = -1
    scale, zero_point = scale.float().view(shape), zero_point.view(shape)
    return _rounded(x, scale.reciprocal(), scale, zero_point, quant_min, quant_max)


_aten = torch.ops.aten
FAKE_QUANTIZATION: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
    _aten.fake_quantize_per_tensor_affine_cachemask.default: _per_tensor,
    _aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: _per_tensor_of_tensors,
    _aten.fake_quantize_per_channel_affine_cachemask.default: _per_channel,
}


def _types(x: Tensor, *_: Any) -> Pair:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


# PyTorch runs its kernels on zeros to learn these types, which fails for tensors of a GPU that is not there.
_LIBRARY = torch.library.Library("aten", "IMPL", "Meta")
for _operator in FAKE_QUANTIZATION:
    if not _operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.Meta):
        _LIBRARY.impl(_operator, _types)
