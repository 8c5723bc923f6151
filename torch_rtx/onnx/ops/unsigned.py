"""Dtypes that PyTorch has few kernels for, computed in others of the same bits or order."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from torch_rtx.onnx.dtypes import PACKED, SIGNED

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
SAME_WIDTH = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
    **{dtype: torch.int8 if dtype in SIGNED else torch.uint8 for dtype in PACKED},
}
LOWEST = -(2**63)


def widen(x: Tensor, *, order: bool = False) -> Tensor:
    """`x` in a dtype that all kernels take. uint64 becomes int64: the same bits or, with `order`, the same order."""
    if x.dtype is torch.uint64:
        return x.view(torch.int64) ^ LOWEST if order else x.view(torch.int64)
    return x.to(WIDER.get(x.dtype, x.dtype))


def narrow(y: Tensor, dtype: torch.dtype, *, order: bool = False) -> Tensor:
    """The inverse of `widen`; bits beyond `dtype` are dropped."""
    if dtype is torch.uint64:
        return (y ^ LOWEST if order else y).view(dtype)
    return y.to(dtype)


def widened(function: Callable[..., Tensor], *, order: bool = False) -> Callable[..., Tensor]:
    """A function whose result has its arguments' dtype (or bool), for all integer dtypes."""

    @wraps(function)
    def run(*tensors: Tensor, **options: Any) -> Tensor:
        dtype = tensors[0].dtype
        if dtype not in WIDER:
            return function(*tensors, **options)
        result = function(*(widen(tensor, order=order) for tensor in tensors), **options)
        return result if result.dtype is torch.bool else narrow(result, dtype, order=order)

    return run


def by_bits(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that only moves elements of its first argument's dtype, for all dtypes."""

    @wraps(function)
    def run(x: Any, *inputs: Any, **attributes: Any) -> Any:
        dtype = x.dtype if isinstance(x, Tensor) else None
        if dtype not in SAME_WIDTH:
            return function(x, *inputs, **attributes)
        bits = SAME_WIDTH[dtype]
        same = (v.view(bits) if isinstance(v, Tensor) and v.dtype is dtype else v for v in (x, *inputs))
        result = function(*same, **attributes)
        return tuple(part.view(dtype) for part in result) if isinstance(result, tuple) else result.view(dtype)

    return run
