"""Conversions between data types."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.dtypes import PACKED, SIGNED, dtype_of
from torch_rtx.onnx.registry import op

FLOAT4 = torch.float4_e2m1fn_x2
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
# beyond this a value is rounded to more than the largest one, where PyTorch saturates
OVERFLOW = {torch.float8_e4m3fn: 464.0}


def to_float8(x: Tensor, dtype: torch.dtype, saturate: int) -> Tensor:
    """`x` rounded to a float8 type; what is out of its range becomes the largest value, or else infinite or NaN."""
    x = x if x.is_floating_point() and x.dtype.itemsize > 1 else x.float()
    if saturate:
        return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    if dtype in OVERFLOW:
        x = torch.where(x.abs() > OVERFLOW[dtype], torch.nan, x)
    return x.to(dtype)


def to_float8_e8m0(x: Tensor, saturate: int, round_mode: str) -> Tensor:
    """`x` rounded to a power of two: its exponent, as in float32."""
    x = x.float()
    bits = x.contiguous().view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    # A subnormal has the exponent 0, as the power of two 2 ** -127 that is half of the mantissa's range.
    half, small = 1 << 22, exponent == 0
    if round_mode == "up":
        more = torch.where(small, mantissa > half, mantissa != 0)
    elif round_mode == "nearest":
        more = torch.where(small, mantissa >= half + half // 2, mantissa >= half)
    elif round_mode == "down":
        more = torch.zeros_like(small)
    else:
        raise OnnxError(f"round_mode is {round_mode!r}, not 'up', 'down' or 'nearest'")
    rounded = exponent + more.to(torch.int32)
    rounded = rounded.clamp(max=254) if saturate else torch.where(x == 0, 255, rounded.clamp(max=255))
    return torch.where(torch.isnan(x), 255, rounded).to(torch.uint8).view(torch.float8_e8m0fnu)


def to_float4(x: Tensor) -> Tensor:
    """`x` rounded to e2m1: half steps below 2, whole ones below 4, then 4 and 6. Larger values are 6, NaN is -0."""
    x = x.float()
    size = x.abs().clamp(max=6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    size = torch.round(size / step) * step
    code = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    code = torch.where(torch.isnan(x), 8.0, code + torch.where(torch.signbit(x), 8.0, 0.0))
    return code.to(torch.uint8).view(FLOAT4)


def from_packed(x: Tensor) -> Tensor:
    """The values of a type of less than a byte, as bytes or as float32."""
    if x.dtype is not FLOAT4:
        return x.view(torch.int8 if x.dtype in SIGNED else torch.uint8)
    code = x.view(torch.uint8).to(torch.int32)
    exponent, mantissa = (code >> 1) & 3, (code & 1).float()
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * torch.exp2((exponent - 1).float()))
    return torch.where(code >= 8, -size, size)


def to_few_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as an integer of 2 or 4 bits; higher bits are dropped."""
    count, whole = 1 << PACKED[dtype], x.to(torch.int32)
    low = -count // 2 if dtype in SIGNED else 0
    return (((whole - low) & (count - 1)) + low).to(torch.int8 if dtype in SIGNED else torch.uint8).view(dtype)


def cast_to(x: Tensor, dtype: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in another dtype."""
    if dtype is x.dtype:
        return x
    x = from_packed(x) if x.dtype in PACKED else x
    if dtype is FLOAT4:
        return to_float4(x)
    if dtype in PACKED:
        return to_few_bits(x, dtype)
    if dtype is torch.float8_e8m0fnu:
        return to_float8_e8m0(x, saturate, round_mode)
    if dtype in FLOAT8:
        return to_float8(x, dtype, saturate)
    if x.is_floating_point() and dtype in (torch.uint16, torch.uint32):  # through a type that negative values fit
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


@op("Cast")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in another data type."""
    return cast_to(x, dtype_of(to), saturate, round_mode)


def cast_in(dtype: torch.dtype, x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Cast to float32, of a module that computes in another dtype."""
    return x.to(dtype)


@op("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """`x` in the data type of another tensor."""
    return cast_to(x, like.dtype, saturate, round_mode)


@op("BitCast")
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    """The bits of `x`, as another data type of the same width."""
    dtype = dtype_of(to)
    widths = [PACKED.get(kind, kind.itemsize * 8) for kind in (x.dtype, dtype)]
    if widths[0] != widths[1]:
        raise OnnxError(f"{x.dtype} has {widths[0]} bits, {dtype} has {widths[1]}")
    return to_few_bits(x.view(torch.uint8), dtype) if dtype in PACKED and dtype is not FLOAT4 else _bits(x).view(dtype)


def _bits(x: Tensor) -> Tensor:
    """A byte for each element, of which those of integers below a byte may have their sign in all higher bits."""
    return x.view(torch.uint8) & ((1 << PACKED[x.dtype]) - 1) if x.dtype in PACKED else x
