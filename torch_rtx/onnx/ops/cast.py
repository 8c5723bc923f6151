"""Conversions between data types."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_rtx.errors import InputError
from torch_rtx.onnx.dtypes import INTEGER_BITS, torch_dtype, type_name
from torch_rtx.onnx.registry import op

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
# from here on a value is rounded to more than the largest one, where PyTorch saturates
OVERFLOW = {torch.float8_e4m3fn: 464.0}


def to_float8(x: Tensor, dtype: torch.dtype, saturate: int) -> Tensor:
    """`x` rounded to a float8 type; what is out of its range becomes the largest value, or else infinite or NaN."""
    x = x if x.is_floating_point() else x.float()
    if saturate:
        return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    if dtype in OVERFLOW:
        x = torch.where(x.abs() > OVERFLOW[dtype], torch.nan, x)
    return x.to(dtype)


def to_float8_e8m0(x: Tensor, saturate: int, round_mode: str) -> Tensor:
    """`x` rounded to a power of two: its exponent, as in float32."""
    bits = x.float().contiguous().view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    half = 1 << 22
    small = exponent == 0  # subnormal: the power of two below the others is half of the mantissa's range
    if round_mode == "up":
        more = torch.where(small, mantissa > half, mantissa != 0)
    elif round_mode == "nearest":
        more = torch.where(small, mantissa > half + half // 2, mantissa >= half)
    elif round_mode == "down":
        more = torch.zeros_like(small)
    else:
        raise InputError(f"Cast: round_mode is {round_mode!r}, not up, down or nearest")
    rounded = exponent + more
    if saturate:
        rounded = rounded.clamp(max=254)
    else:
        rounded = torch.where(x.float() == 0, 255, rounded)
    return torch.where(torch.isnan(x.float()), 255, rounded.clamp(max=255)).to(torch.uint8).view(torch.float8_e8m0fnu)


def to_float4(x: Tensor) -> Tensor:
    """`x` rounded to e2m1: half steps below 2, whole ones below 4, then 4 and 6. Larger values are 6."""
    x = x.float()
    size = x.abs().clamp(max=6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = torch.copysign(torch.round(size / step) * step, x)
    return rounded.to(torch.float8_e4m3fn)


def to_few_bits(x: Tensor, name: str) -> Tensor:
    """`x` as an integer of 2 or 4 bits, whose higher ones are dropped."""
    bits, whole = INTEGER_BITS[name], x.to(torch.int32)
    if name.startswith("U"):
        return (whole & (1 << bits) - 1).to(torch.uint8)
    top = 1 << bits - 1
    return (((whole + top) & (1 << bits) - 1) - top).to(torch.int8)


@op("Cast")
def cast(x: Tensor, *, to: int | str, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in another data type."""
    name = type_name(to)
    dtype = torch_dtype(to)
    if name == "FLOAT4E2M1":
        return to_float4(x)
    if name in INTEGER_BITS:
        return to_few_bits(x, name)
    return cast_to(x, dtype, saturate, round_mode)


def cast_to(x: Tensor, dtype: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in another dtype."""
    if dtype is x.dtype:
        return x
    if dtype is torch.float8_e8m0fnu:
        return to_float8_e8m0(x, saturate, round_mode)
    if dtype in FLOAT8:
        return to_float8(x, dtype, saturate)
    if x.is_floating_point() and dtype in (torch.uint16, torch.uint32):  # through a type that negative values fit
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


@op("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in the data type of another tensor."""
    return cast_to(x, like.dtype, saturate, round_mode)


@op("BitCast")
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    """The bits of `x`, as another data type of the same width."""
    dtype = torch_dtype(to)
    if type_name(to) in (*INTEGER_BITS, "FLOAT4E2M1"):
        raise InputError(f"BitCast: the bits of {type_name(to)} can't be reinterpreted")
    if dtype.itemsize != x.dtype.itemsize:
        raise InputError(f"BitCast: {x.dtype} and {dtype} have different widths")
    return x.view(dtype)
