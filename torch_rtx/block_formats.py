"""Block-scaled formats: mxfp8, mxfp4 and nvfp4, as PyTorch calls that kernels are made of.

A row is cut into blocks of 32 values (mx) or 16 (nvfp4), which share a scale: a power of two in float8_e8m0fnu (OCP
Microscaling Formats 1.0, 2023), or float8_e4m3fn and a number in float32 for the whole tensor (nvfp4). Values are
float8, or e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, two in a byte of float4_e2m1fn_x2, the first one in
the low bits. Products take scales in the layout of the tensor cores, see `to_blocked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import frexp

import torch
from torch import Tensor
from torch.nn import functional

E4M3, E5M2, E8M0, E2M1_X2 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2
E2M1_MAX = 6.0
ROUNDINGS = ("floor", "ceil", "rceil")
TILE = (128, 4)  # rows and blocks of scales that lie together


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of `size` values of dtype `data`, with a scale of dtype `scales`."""

    size: int
    data: torch.dtype
    scales: torch.dtype

    @property
    def largest(self) -> float:
        """The largest value without its scale."""
        return E2M1_MAX if self.data == E2M1_X2 else torch.finfo(self.data).max


FORMATS = {
    "mxfp8": BlockFormat(32, E4M3, E8M0),
    "mxfp8_e5m2": BlockFormat(32, E5M2, E8M0),
    "mxfp4": BlockFormat(32, E2M1_X2, E8M0),
    "nvfp4": BlockFormat(16, E2M1_X2, E4M3),
}

# ---- values of four bits ---------------------------------------------------------------------------------------------


def pack_e2m1(first: Tensor, second: Tensor) -> Tensor:
    """The elements of float4_e2m1fn_x2 for pairs of float32: rounded to the nearest value, ties to the even one; what
    is too large to the largest; NaN to 0."""
    return (_e2m1(first) | (_e2m1(second) << 4)).view(E2M1_X2)


def _e2m1(x: Tensor) -> Tensor:
    """The codes of float32, uint8."""
    size = x.abs().clamp(max=E2M1_MAX)
    code = torch.where(size < 2, (size * 2).round(), torch.where(size < 4, size.round() + 2, (size * 0.5).round() + 4))
    return ((code.to(torch.int32) & 7) | ((x.view(torch.int32) >> 28) & 8)).to(torch.uint8)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The values, float32 [..., K], of float4_e2m1fn_x2 or uint8 [..., K / 2]."""
    data = packed.view(torch.uint8)
    code = torch.stack((data & 15, data >> 4), -1).flatten(-2).to(torch.int32)
    # Exponent and fraction are where float32 has them; 2**126 is what the exponents' biases differ by.
    return ((code & 7) << 22 | (code & 8) << 28).view(torch.float32) * 2.0**126


# ---- scales ----------------------------------------------------------------------------------------------------------


def to_blocked(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] in the layout of products: tiles of [128, 4], padded with zeros, row-major; in a tile the
    rows r, r + 32, r + 64 and r + 96 together. One dimension."""
    rows, blocks = scales.shape
    dtype, tall, wide = scales.dtype, *TILE
    down, across = (rows + tall - 1) // tall, (blocks + wide - 1) // wide
    # Where the number of rows is symbolic, a test whether they need padding would be a guard.
    padded = functional.pad(scales.view(torch.uint8), (0, across * wide - blocks, 0, down * tall - rows))
    return padded.view(down, 4, tall // 4, across, wide).permute(0, 3, 2, 1, 4).reshape(-1).view(dtype)


def from_blocked(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """Scales [rows, blocks] from what `to_blocked` makes of them."""
    dtype, tall, wide = scales.dtype, *TILE
    tiles = scales.reshape(-1).view(torch.uint8).view(-(-rows // tall), -(-blocks // wide), tall // 4, 4, wide)
    tiles = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // tall) * tall, -(-blocks // wide) * wide)
    return tiles[:rows, :blocks].contiguous().view(dtype)


# ---- quantization ----------------------------------------------------------------------------------------------------


def mx_scales(largest: Tensor, format_: BlockFormat, rounding: str = "floor") -> Tensor:
    """The scales of blocks whose largest absolute values are `largest`, float32. That of a block that is not finite is
    NaN.

    Args:
        rounding: of the power of two that the largest value is divided by, as torchao names it: "floor" (OCP: values
            may be beyond the largest of the format) or "ceil", of the largest value's own; "rceil", of its quotient by
            the largest value of the format, so that none is.
    """
    power = frexp(format_.largest)[1] - 1
    if rounding == "rceil":
        largest, power = largest / format_.largest, 0
    bits = largest.view(torch.int32)
    bits = bits if rounding == "floor" else bits + 0x7FFFFF
    exponent = ((bits >> 23) - power).clamp(min=0)
    return exponent.masked_fill(~largest.isfinite(), 255).to(torch.uint8).view(E8M0)


def quantize_mx(x: Tensor, name: str = "mxfp8", rounding: str = "floor") -> tuple[Tensor, Tensor]:
    """`x` [..., K] as data [..., K], or [..., K / 2] of mxfp4, and scales [..., K / 32].

    Raises:
        ValueError: K is no multiple of 32, or no format or rounding has this name.
    """
    format_ = _format(name)
    if rounding not in ROUNDINGS or format_.scales != E8M0:
        raise ValueError(f"{name} rounded by {rounding!r}: the formats are mx, the roundings {', '.join(ROUNDINGS)}")
    parts = _parts(x, format_)
    scales = mx_scales(_largest(parts), format_, rounding)
    inverse = (254 - scales.view(torch.uint8)).view(E8M0).float().unsqueeze(-1)
    return _data([part * inverse for part in parts], format_), scales


def quantize_nvfp4(x: Tensor, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x` [..., K] as e2m1 [..., K / 2] and scales [..., K / 16] that are relative to `tensor_scale`, one float32.

    Raises:
        ValueError: K is no multiple of 16.
    """
    format_, limits = FORMATS["nvfp4"], torch.finfo(E4M3)
    parts = _parts(x, format_)
    wanted = _largest(parts) / format_.largest
    if tensor_scale is not None:
        wanted = wanted / tensor_scale
    scales = wanted.clamp(limits.tiny, limits.max).to(E4M3)
    whole = (scales.float() if tensor_scale is None else scales.float() * tensor_scale).unsqueeze(-1)
    return _data([part / whole for part in parts], format_), scales


def dequantize(data: Tensor, scales: Tensor) -> Tensor:
    """The values, float32 [..., K], of data [..., K], or [..., K / 2] of e2m1, and scales [..., K / size]."""
    values = unpack_e2m1(data) if data.dtype == E2M1_X2 else data.float()
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)).flatten(-2)


def _format(name: str) -> BlockFormat:
    if name not in FORMATS:
        raise ValueError(f"no block-scaled format is called {name!r}: there are {', '.join(FORMATS)}")
    return FORMATS[name]


def _parts(x: Tensor, format_: BlockFormat) -> tuple[Tensor, ...]:
    """The blocks of `x`, float32 [..., blocks, size]; of values that are stored in pairs the first and the second ones
    [..., blocks, size / 2], so that one loop over these computes all of a block."""
    if x.shape[-1] % format_.size:
        raise ValueError(f"rows of {x.shape[-1]} values are not cut into blocks of {format_.size}")
    blocks = x.unflatten(-1, (-1, format_.size))
    parts = blocks.unflatten(-1, (-1, 2)).unbind(-1) if format_.data == E2M1_X2 else (blocks,)
    return tuple(part.float() for part in parts)


def _largest(parts: tuple[Tensor, ...]) -> Tensor:
    """The largest absolute value of each block."""
    return reduce(torch.maximum, [part.abs() for part in parts]).amax(-1)


def _data(parts: list[Tensor], format_: BlockFormat) -> Tensor:
    """Scaled blocks as the elements of rows."""
    if format_.data == E2M1_X2:
        return pack_e2m1(*parts).flatten(-2)
    return parts[0].clamp(-format_.largest, format_.largest).to(format_.data).flatten(-2)


# ---- products --------------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    weight: tuple[Tensor, Tensor],
    name: str,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """`F.linear` of activations that the call quantizes, in the dtype of `x`: a kernel that quantizes, and one product.

    Args:
        x: [..., in_features].
        weight: data [out_features, in_features], or half as many columns of e2m1, and scales in the layout of products,
            see `to_blocked`.
        name: the format of both, a key of FORMATS.
        bias: [out_features].
        weight_scale, input_scale: f32[]: see `quantize_nvfp4`, which alone has them.

    Raises:
        ValueError: in_features is no multiple of the block, or no format has this name.
    """
    rows = x.reshape(-1, x.shape[-1])
    data, scales = quantize_nvfp4(rows, input_scale) if name == "nvfp4" else quantize_mx(rows, name)
    operands = data, weight[0].t(), to_blocked(scales), weight[1]
    total = torch.ops.aten._scaled_mm.default(*operands, out_dtype=torch.float32)
    for scale in (weight_scale, input_scale):
        total = total if scale is None else total * scale
    total = total if bias is None else total + bias
    return total.to(x.dtype).view(*x.shape[:-1], total.shape[-1])


def block_scaled_mm(
    self: Tensor, mat2: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`aten._scaled_mm` with a scale per block, by its definition: the values times their scales, which float32 holds
    exactly, are multiplied in float32, or in float64 for a result in that."""
    wide = torch.promote_types(out_dtype, torch.float32)
    total = _operand(self, scale_a).to(wide) @ _operand(mat2.t(), scale_b).to(wide).t()
    return (total if bias is None else total + bias).to(out_dtype)


def _operand(data: Tensor, scales: Tensor) -> Tensor:
    """The values [rows, K] of an operand with scales in the layout of products."""
    rows, size = data.shape[0], 32 if scales.dtype == E8M0 else 16
    depth = data.shape[1] * (2 if data.dtype == E2M1_X2 else 1)
    rest = -depth % size
    blocks = from_blocked(scales, rows, (depth + rest) // size)
    values = unpack_e2m1(data) if data.dtype == E2M1_X2 else data.float()
    expanded = blocks.float().repeat_interleave(size, 1)[:, :depth]
    return values * expanded
