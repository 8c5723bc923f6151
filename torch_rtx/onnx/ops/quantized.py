"""Quantization, and operators on quantized tensors: q with a scale and a zero point stands for (q - zero) * scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.dtypes import PACKED, SIGNED, dtype_of
from torch_rtx.onnx.ops import nn
from torch_rtx.onnx.ops.cast import from_packed, to_float4, to_float8
from torch_rtx.onnx.ops.math import exact_matmul
from torch_rtx.onnx.ops.recurrent import lstm
from torch_rtx.onnx.registry import op

MS = "com.microsoft"


def values(x: Tensor) -> Tensor:
    """A tensor as one of a dtype that PyTorch can compute with: types below a byte as int8, uint8 or float32."""
    return from_packed(x) if x.dtype in PACKED else x


def saturated(x: Tensor, dtype: torch.dtype, saturate: bool = True) -> Tensor:
    """Floating-point numbers in a quantized type. What is out of range becomes the nearest, if it saturates."""
    if dtype.is_floating_point:
        return to_float4(x) if dtype in PACKED else to_float8(x, dtype, saturate)
    if dtype in PACKED:
        bits, signed = PACKED[dtype], dtype in SIGNED
        low = -(1 << bits - 1) if signed else 0
        return x.clamp(low, low + (1 << bits) - 1).to(torch.int8 if signed else torch.uint8).view(dtype)
    limits = torch.iinfo(dtype)
    return x.clamp(limits.min, limits.max).to(torch.int32).to(dtype)


def spread(parameter: Tensor, x: Tensor, axis: int = 1, block_size: int = 0) -> Tensor:
    """A scale or a zero point so that it broadcasts to `x`: of the tensor, of an axis, or of blocks of it."""
    axis = axis % x.dim() if x.dim() > 1 else 0
    if block_size:
        blocks = parameter.unsqueeze(axis + 1)
        shape = [*blocks.shape]
        shape[axis + 1] = block_size
        return blocks.expand(shape).flatten(axis, axis + 1).narrow(axis, 0, x.shape[axis])
    if parameter.dim() != 1:
        return parameter
    if parameter.shape[0] == 1:
        return parameter.reshape(())
    return parameter.view(-1, *[1] * (x.dim() - axis - 1))


def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    dtype: torch.dtype,
    *,
    axis: int = 1,
    block_size: int = 0,
    precision: torch.dtype | None = None,
    saturate: bool = True,
) -> Tensor:
    """`x` / scale + zero in a quantized type; integers are rounded to the nearest, ties to even."""
    precision = precision or (scale.dtype if scale.dtype.itemsize > 1 else torch.float32)
    ratio = x.to(precision) / spread(scale.to(precision), x, axis, block_size)
    if not dtype.is_floating_point:
        ratio = torch.round(ratio)
    ratio = ratio.to(torch.promote_types(precision, torch.float32))
    if zero is not None:
        ratio = ratio + spread(values(zero).to(ratio.dtype), x, axis, block_size)
    return saturated(ratio, dtype, saturate)


def dequantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - zero) * scale, in the type of the scale if no other is given."""
    dtype = dtype or (scale.dtype if scale.dtype.itemsize > 1 else torch.float32)
    if x.dtype.is_floating_point or zero is None:
        y = values(x).to(dtype)
        if zero is not None:
            y = y - spread(values(zero).to(dtype), x, axis, block_size)
    else:
        y = centered(x, spread(values(zero), x, axis, block_size)).to(dtype)
    return y * spread(scale.to(dtype), x, axis, block_size)


def centered(x: Tensor, zero: Tensor | None) -> Tensor:
    """Integers less a zero point that broadcasts to them, int32."""
    whole = values(x).to(torch.int32)
    return whole if zero is None else whole - values(zero).to(torch.int32)


@op("QuantizeLinear", since=10)
@op("QuantizeLinear", domain=MS)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """`x` in the type of `zero` or `output_dtype`, or in uint8."""
    dtype = zero.dtype if zero is not None else dtype_of(output_dtype) if output_dtype else torch.uint8
    return quantize(
        x,
        scale,
        zero,
        dtype,
        axis=axis,
        block_size=block_size,
        precision=dtype_of(precision) if precision else None,
        saturate=bool(saturate),
    )


@op("DequantizeLinear", since=10)
@op("DequantizeLinear", domain=MS)
def dequantize_linear(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(x - zero) * scale, in `output_dtype` or in the type of the scale."""
    dtype = dtype_of(output_dtype) if output_dtype else None
    return dequantize(x, scale, zero, axis=axis, block_size=block_size, dtype=dtype)


@op("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x` in uint8 by its own range, which always has 0; the scale; the zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = scale.masked_fill(scale == 0, 1)
    zero = saturated(torch.round(-low / scale), torch.uint8)
    return quantize(x, scale, zero, torch.uint8), scale, zero


def integer_conv(x: Tensor, w: Tensor, x_zero: Tensor | None, w_zero: Tensor | None, **attributes: Any) -> Tensor:
    """The exact convolution of integers, int32: algorithms for float32 transform elements, and round them."""
    x_zero = None if x_zero is None else spread(x_zero, x)
    w_zero = None if w_zero is None else spread(w_zero, w, 0)
    return nn.conv(centered(x, x_zero).double(), centered(w, w_zero).double(), **attributes).to(torch.int32)


@op("ConvInteger", since=10)
def conv_integer(
    x: Tensor, w: Tensor, x_zero_point: Tensor | None = None, w_zero_point: Tensor | None = None, **attributes: Any
) -> Tensor:
    """x (N, C, D...), w (M, C / group, K...), 8-bit integers -> (N, M, ...), int32."""
    return integer_conv(x, w, x_zero_point, w_zero_point, **attributes)


@op("QLinearConv", since=10)
@op("QLinearConv", domain=MS)
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    channels_last: int = 0,
    **attributes: Any,
) -> Tensor:
    """x (N, C, D...), w (M, C / group, K...) with scales for all or each of M, bias (M) in int32 steps."""
    if channels_last:
        x = x.movedim(-1, 1)
    total = integer_conv(x, w, x_zero, w_zero, **attributes)
    if bias is not None:
        total = total + spread(bias, total)
    factor = x_scale.reshape(()) * w_scale / y_scale.reshape(())
    y = requantize(total, spread(factor, total), y_zero)
    return y.movedim(1, -1) if channels_last else y


def requantize(total: Tensor, factor: Tensor, zero: Tensor) -> Tensor:
    """A sum of integer products by a factor, in the type of the zero point."""
    return saturated(torch.round(total.float() * factor.float()) + values(zero).float(), zero.dtype)


def _rows(parameter: Tensor) -> Tensor:
    """A parameter of a left factor, one for each of its rows, so that it broadcasts to the matrix."""
    return parameter.unsqueeze(-1) if parameter.dim() == 1 else parameter


@op("QLinearMatMul", since=10)
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """a (..., M, K) with scales for all or each row, b (..., K, N) for all or each column."""
    if a.is_floating_point():
        product = dequantize(a, _rows(a_scale)) @ dequantize(b, b_scale, axis=-1)
        return quantize(product, _rows(y_scale), y_zero, y_zero.dtype, axis=-2)
    total = exact_matmul(centered(a, _rows(a_zero)), centered(b, b_zero))
    factor = _rows(a_scale) * b_scale / _rows(y_scale)
    return requantize(total, factor, y_zero if y_zero.numel() == 1 else y_zero.unsqueeze(-1))


def matmul_to_float(
    a: Tensor, b: Tensor, scale: Tensor, a_zero: Tensor | None, b_zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(a - a_zero) @ (b - b_zero) * scale + bias, of 8-bit integers."""
    y = exact_matmul(centered(a, a_zero if a_zero is None else _rows(a_zero)), centered(b, b_zero)) * scale
    return y if bias is None else y + bias


@op("MatMulIntegerToFloat", domain=MS)
def matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """a (..., M, K), b (K, N), 8-bit integers, with scales for all, or each row of a and column of b."""
    return matmul_to_float(a, b, _rows(a_scale) * b_scale, a_zero, b_zero, bias)


@op("DynamicQuantizeMatMul", domain=MS)
def dynamic_quantize_matmul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """a (..., M, K), quantized by its own range, and b (K, N), 8-bit integers."""
    quantized, scale, zero = dynamic_quantize_linear(a)
    return matmul_to_float(quantized, b, scale * b_scale, zero, b_zero, bias)


@op("QGemm", domain=MS)
def qgemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha * (a @ b + c) of 8-bit integers, c in int32 steps; float32 if there is no scale for the result."""
    if transB:
        b = b.mT
    total = exact_matmul(centered(a.mT if transA else a, a_zero), centered(b, b_zero))
    total = total if c is None else total + c
    factor = alpha * a_scale * b_scale
    if y_scale is None:
        return total.float() * factor
    if y_zero is None:
        raise OnnxError("QGemm with y_scale lacks y_zero_point")
    return requantize(total, factor / y_scale, y_zero)


def _pointwise(name: str, function: Any) -> None:
    """Declares an operator that computes with two quantized tensors as with what they stand for."""

    @op(name, domain=MS)
    def compute(
        a: Tensor,
        a_scale: Tensor,
        a_zero: Tensor | None,
        b: Tensor,
        b_scale: Tensor,
        b_zero: Tensor | None,
        scale: Tensor,
        zero: Tensor | None = None,
    ) -> Tensor:
        y = function(dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero))
        return quantize(y, scale, zero, a.dtype)


_pointwise("QLinearAdd", torch.add)
_pointwise("QLinearMul", torch.mul)


def _unary(name: str, function: Any) -> None:
    """Declares an operator that computes with a quantized tensor as with what it stands for."""

    @op(name, domain=MS)
    def compute(
        x: Tensor,
        x_scale: Tensor,
        x_zero: Tensor | None,
        scale: Tensor,
        zero: Tensor | None = None,
        **attributes: Any,
    ) -> Tensor:
        return quantize(function(dequantize(x, x_scale, x_zero), **attributes), scale, zero, x.dtype)


def _channels_last(function: Any) -> Any:
    """A function of (N, C, D...), that also computes with (N, D..., C) if its `channels_last` is 1."""

    def compute(x: Tensor, *, channels_last: int = 0, **attributes: Any) -> Tensor:
        return function(x.movedim(-1, 1), **attributes).movedim(1, -1) if channels_last else function(x, **attributes)

    return compute


_unary("QLinearSigmoid", torch.sigmoid)
_unary("QLinearLeakyRelu", lambda x, alpha=0.01: F.leaky_relu(x, alpha))
_unary("QLinearGlobalAveragePool", _channels_last(nn.global_average_pool))
_unary("QLinearAveragePool", _channels_last(nn.average_pool))
_unary("QLinearSoftmax", lambda x, axis=-1, opset=13: softmax(x, axis, opset))


def softmax(x: Tensor, axis: int, opset: int) -> Tensor:
    """Until opset 13, of all axes from `axis` on."""
    return torch.softmax(x, axis) if opset >= 13 else torch.softmax(x.flatten(axis), -1).reshape(x.shape)


@op("QLinearWhere", domain=MS)
def qlinear_where(
    condition: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    y: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    scale: Tensor,
    zero: Tensor,
) -> Tensor:
    """Elements of two quantized tensors."""
    chosen = torch.where(condition, dequantize(x, x_scale, x_zero), dequantize(y, y_scale, y_zero))
    return quantize(chosen, scale, zero, zero.dtype)


@op("DynamicQuantizeLSTM", domain=MS)
def dynamic_quantize_lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    sequence_lens: Tensor | None,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    p: Tensor | None,
    w_scale: Tensor,
    w_zero: Tensor,
    r_scale: Tensor,
    r_zero: Tensor,
    **attributes: Any,
) -> tuple[Tensor, ...]:
    """LSTM of w (D, I, 4 * H) and r (D, H, 4 * H) of 8 bits. x and the states stay as they are."""
    shape = [w.shape[0], 1, -1]
    w = centered(w, w_zero.reshape(shape)).to(x.dtype) * w_scale.reshape(shape)
    r = centered(r, r_zero.reshape(shape)).to(x.dtype) * r_scale.reshape(shape)
    return lstm(x, w.mT, r.mT, b, sequence_lens, initial_h, initial_c, p, **attributes)


@op("QLinearConcat", domain=MS)
def qlinear_concat(scale: Tensor, zero: Tensor, *inputs: Tensor, axis: int) -> Tensor:
    """Tensors, each followed by its scale and its zero point."""
    parts = [dequantize(*inputs[i : i + 3]) for i in range(0, len(inputs), 3)]
    return quantize(torch.cat(parts, axis), scale, zero, zero.dtype)
