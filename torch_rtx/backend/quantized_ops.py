"""Operators of quantization tools, and of transformers, as ATen calls: capture rewrites those that a graph has by this
table.

Their libraries register them when they are imported, which may be never: the table has names. A definition that does
not fit a call returns NotImplemented; the call then stays in PyTorch, and `explain` names it. Every definition gives
what the tool's own operator gives, rounding included, but for operands that a tool rounds more than once.

- `quantized_decomposed.*`: PT2E, of PyTorch and of torchao;
- `torchao.*`: those that torchao does not decompose itself;
- `tensorrt.*`: fake quantization of NVIDIA ModelOpt;
- `bitsandbytes.*`: blocks of 4 or 8 bits with a table of values (nf4, fp4), int8 with a scale per row;
- `aten.*`: products with packed weights, fake quantization of PyTorch;
- `transformers.*`: products of experts where PyTorch has none, which wait for the lengths of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.traceback import get_current_meta
from torch.nn import functional as F

from torch_rtx.errors import CaptureError
from torch_rtx.lowering.location import module_path

Definition = Callable[..., Any]
Number = float | Tensor
_HALVES = (torch.float16, torch.bfloat16)
_DEFINITIONS: dict[str, Definition] = {}
_FP8, _FP8_MAX, _FP4_MAX = torch.float8_e4m3fn, 448.0, 6.0
# The values of bitsandbytes' 4-bit types, by their codes.
_VALUES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * n / 12 for sign in (1, -1) for n in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
_CODES = {kind: torch.tensor(values, dtype=torch.float32) for kind, values in _VALUES.items()}


def definitions() -> dict[torch._ops.OperatorBase, Definition]:
    """The definitions of those operators that exist in this process."""
    found: dict[torch._ops.OperatorBase, Definition] = {torch.ops.higher_order.out_dtype: _out_dtype}
    for name, definition in _DEFINITIONS.items():
        namespace, packet, overload = name.split(".")
        operator = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if operator is not None:
            found[operator] = definition
    return found


def _defines(*names: str) -> Callable[[Definition], Definition]:
    """Enter a definition for each operator, as `namespace.name.overload`."""

    def enter(definition: Definition) -> Definition:
        _DEFINITIONS.update(dict.fromkeys(names, definition))
        return definition

    return enter


def _refuse(problem: str, hint: str) -> CaptureError:
    """The error for a call that its own operands contradict; names the layer, if the graph knows it."""
    stack = get_current_meta().get("nn_module_stack") or {}
    layer = next((module_path(path) for path, _ in reversed(stack.values())), "")
    return CaptureError(f"{problem}, in layer {layer}" if layer else problem, hint=hint)


def _check_blocks(size: int, block: int, what: str) -> None:
    if block < 1 or size % block:
        raise _refuse(
            f"blocks of {block} do not divide the {size} columns of {what}", "quantize with another group size"
        )


def _check_count(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise _refuse(f"there are {found} {what}, and {expected} are needed", "quantize the model again")


def check_scale(scale: object) -> None:
    """Raises CaptureError for a number that is no scale of quantization: not finite, or not above 0."""
    if isinstance(scale, float) and not (math.isfinite(scale) and scale > 0):
        raise _refuse(
            f"a scale of quantization is {scale}", "calibrate the model with finite inputs, and quantize again"
        )


# ---- affine quantization ---------------------------------------------------------------------------------------------


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.dtype in _HALVES else value


def _number(value: Number) -> Number:
    """A tensor of one element without dimensions, so that it takes no part in type promotion; a number as it is."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def _along(value: Tensor, axis: int, like: Tensor) -> Tensor:
    """A vector as an operand that broadcasts to `like`, with its elements along `axis`."""
    axis %= like.dim()
    _check_count(value.numel(), like.shape[axis], f"scales or zero points of dimension {axis}")
    return value.reshape([-1 if index == axis else 1 for index in range(like.dim())])


def _quantized(x: Tensor, scale: Number, zero: Number, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Rounds to the nearest number of steps, ties to even, then adds the zero point."""
    return ((_wide(x) * (1.0 / scale)).round() + zero).clamp(low, high).to(dtype)


def _dequantized(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(q - zero) * scale in the dtype of the scale; differences that it may not hold exactly, or that wrap around, are
    those of integers."""
    if zero is None:
        return (q * scale).to(dtype)
    wraps = torch.promote_types(q.dtype, zero.dtype).itemsize == 1
    if not wraps and q.dtype.itemsize <= 2 and scale.dtype not in _HALVES:
        return ((q.to(scale.dtype) - zero.to(scale.dtype)) * scale).to(dtype)
    return ((q - zero) * scale).to(dtype)


_PER_TENSOR = "quantized_decomposed.{}quantize_per_tensor.{}"


@_defines(*(_PER_TENSOR.format("", overload) for overload in ("default", "tensor", "tensor2")))
def _quantize_per_tensor(
    input: Tensor, scale: Number, zero_point: Number, quant_min: Any, quant_max: Any, dtype: torch.dtype
) -> Tensor:
    check_scale(scale)
    low, high = _number(quant_min), _number(quant_max)
    return _quantized(input, _number(scale), _number(zero_point), low, high, dtype)  # type: ignore[arg-type]


@_defines(*(_PER_TENSOR.format("de", overload) for overload in ("default", "tensor", "tensor2")))
def _dequantize_per_tensor(
    input: Tensor,
    scale: Number,
    zero_point: Number,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_scale(scale)
    return (input.to(out_dtype or torch.float32) - _number(zero_point)) * _number(scale)


@_defines("quantized_decomposed.quantize_per_channel.default")
def _quantize_per_channel(
    input: Tensor, scales: Tensor, zero_points: Tensor, axis: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    scales, zero_points = (_along(value, axis, input) for value in (scales, zero_points))
    return _quantized(input, scales, zero_points, quant_min, quant_max, dtype)


@_defines("quantized_decomposed.dequantize_per_channel.default")
def _dequantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    zero = None if zero_points is None else _along(zero_points, axis, input)
    return _dequantized(input, _along(scales, axis, input), zero, out_dtype or torch.float32)


@_defines("quantized_decomposed.quantize_per_token.default")
def _quantize_per_token(
    input: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    return (input * (1.0 / scales) + zero_points).round().clamp(quant_min, quant_max).to(dtype)


@_defines("quantized_decomposed.dequantize_per_token.default")
def _dequantize_per_token(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> Tensor:
    return ((input - zero_points) * scales).to(output_dtype)


def _groups(input: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """`input` with one group in each row."""
    if group_size > input.shape[-1] and scales.shape[-1] == 1:
        group_size = input.shape[-1]
    _check_blocks(input.shape[-1], group_size, "a weight")
    _check_count(scales.numel(), input.numel() // group_size, "scales of groups")
    return input.reshape(-1, group_size)


@_defines("quantized_decomposed.quantize_per_channel_group.default")
def _quantize_per_group(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int,
) -> Tensor:
    grouped = _groups(input, scales, group_size) * (1.0 / scales.reshape(-1, 1)) + zero_points.reshape(-1, 1)
    return grouped.round().clamp(quant_min, quant_max).to(dtype).reshape(input.shape)


@_defines("quantized_decomposed.dequantize_per_channel_group.default")
def _dequantize_per_group(
    w_int8: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int,
    output_dtype: torch.dtype,
) -> Tensor:
    zero = None if zero_points is None else zero_points.reshape(-1, 1)
    grouped = _groups(w_int8, scales, group_size)
    return _dequantized(grouped, scales.reshape(-1, 1), zero, output_dtype).reshape(w_int8.shape)


# ---- scales from the values of a tensor ------------------------------------------------------------------------------


def _range(input: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value, and 0."""
    low, high = torch.aminmax(input)
    return low.clamp(max=0), high.clamp(min=0)


@_defines("quantized_decomposed.choose_qparams.tensor")
def _choose_affine(
    input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    low, high = _range(input)
    scale = ((high - low) / float(quant_max - quant_min)).to(torch.float32).clamp(min=eps).reshape(1)
    zero = (quant_min - (low / scale).round()).clamp(quant_min, quant_max)
    return scale.to(torch.float64), zero.to(torch.int64)


@_defines("quantized_decomposed.choose_qparams_symmetric.tensor")
def _choose_symmetric(
    input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    low, high = _range(input)
    scale = (torch.maximum(-low, high) / (float(quant_max - quant_min) / 2)).to(torch.float32).clamp(min=eps)
    middle = 128 if dtype is torch.uint8 else 0
    return scale.to(torch.float64).reshape(1), torch.full((1,), middle, dtype=torch.int64, device=input.device)


@_defines("quantized_decomposed.choose_qparams_per_token.default")
def _choose_per_token(input: Tensor, dtype: torch.dtype) -> Any:
    if dtype is not torch.int8:
        return NotImplemented
    largest = input.abs().amax(-1, keepdim=True)
    scale = (largest.float() if largest.dtype is torch.float16 else largest).clamp(min=1e-5) / 127
    return scale, torch.zeros_like(scale)


@_defines("quantized_decomposed.choose_qparams_per_token_asymmetric.default")
def _choose_per_token_affine(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Signed 8 bits; the zero point has the smaller error of those that the smallest and the largest value ask for."""
    least, most = -128, 127
    low, high = input.amin(-1, keepdim=True).clamp(max=0), input.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / float(most - least)).clamp(min=torch.finfo(torch.float32).eps)
    below, above = low / scale, high / scale
    zero = torch.where((least + below) + (most + above) > 0, least - below, most - above)
    return scale.to(torch.float64), zero.clamp(least, most).round().to(torch.int64)


# ---- float8 of torchao -----------------------------------------------------------------------------------------------


def _per_block(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale of each element, where `scale` has one per block of the tensor."""
    if scale.numel() == 1:
        return _number(scale)  # type: ignore[return-value]
    for axis, (count, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if count not in (1, size):
            _check_blocks(size, size // count, "a tensor")
            scale = scale.repeat_interleave(size // count, axis)
    return scale


@_defines("torchao.quantize_affine_float8_non_decomposed.default")
def _quantize_float8(tensor: Tensor, scale: Tensor, float8_dtype: torch.dtype = _FP8) -> Tensor:
    most = torch.finfo(float8_dtype).max
    return (tensor.to(torch.float32) / _per_block(scale, tensor.shape)).clamp(-most, most).to(float8_dtype)


@_defines("torchao.dequantize_affine_float8_non_decomposed.default")
def _dequantize_float8(tensor: Tensor, scale: Tensor, output_dtype: torch.dtype = torch.float32) -> Tensor:
    return (tensor.to(torch.float32) * _per_block(scale, tensor.shape)).to(output_dtype)


# ---- fake quantization of ModelOpt -----------------------------------------------------------------------------------


@_defines("tensorrt.quantize_op.default")
def _fake_quantize(
    input: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, unsigned: bool, narrow_range: bool
) -> Any:
    """Float8, or integers of `num_bits`. `amax` is what the largest number of the type stands for; it broadcasts."""
    amax = amax.to(torch.float32)
    tiny = amax <= 2.0**-24
    safe = torch.where(tiny, 1.0, amax)
    if (num_bits, exponent_bits) == (8, 4):
        scale = _FP8_MAX / safe
        wide = (input.to(torch.float32) * scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
        return (wide.to(torch.float32) * (1.0 / scale)).to(input.dtype)
    if exponent_bits or not 2 <= num_bits <= 8:
        return NotImplemented
    high = 2 ** (num_bits - 1 + unsigned) - 1
    low = 0 if unsigned else -high if narrow_range else -high - 1
    scale = high / safe
    steps = (input.to(torch.float32) * torch.where(tiny, 0.0, scale)).round().clamp(low, high)
    return (steps / scale).to(input.dtype)


@_defines("tensorrt.dynamic_block_quantize_op.default", "tensorrt.dynamic_block_quantize_op.overload")
def _fake_quantize_blocks(
    input: Tensor,
    block_size: int,
    amax: Tensor | None,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> Any:
    """Blocks along the last dimension, which share a scale: nvfp4 (scales in e4m3, and a scale of the tensor by
    `amax`), mxfp4, mxfp8 and mxint8 (scales in e8m0: powers of 2)."""
    element, scale = (num_bits, exponent_bits), (scale_num_bits, scale_exponent_bits)
    most = {(4, 2): _FP4_MAX, (8, 4): _FP8_MAX, (8, 5): 57344.0, (8, 0): 127.0}.get(element)
    if most is None or scale not in ((8, 4), (9, 8)) or (scale == (8, 4) and amax is None):
        return NotImplemented
    columns = input.shape[-1]
    wide = F.pad(input.to(torch.float32), (0, -columns % block_size)).unflatten(-1, (-1, block_size))
    largest = wide.abs().amax(-1, keepdim=True)
    if scale == (8, 4):
        overall = amax.to(torch.float32).amax() / (most * _FP8_MAX)  # type: ignore[union-attr]
        overall = torch.where(overall > 0, overall, 1e-12)
        steps = (largest / (most * overall)).clamp(max=_FP8_MAX).to(_FP8).to(torch.float32) * overall
        steps = torch.where(steps >= 1e-5, steps, 1.0)
    else:
        steps = torch.where(largest > 0, _power_of_2(largest / most), 1.0)
    scaled = wide / steps
    if num_bits == 4:
        rounded = _e2m1(scaled)
    elif exponent_bits == 0:
        rounded = scaled.round().clamp(-most, most)
    else:
        dtype = _FP8 if exponent_bits == 4 else torch.float8_e5m2
        rounded = scaled.clamp(-most, most).to(dtype).to(torch.float32)
    return (rounded * steps).flatten(-2)[..., :columns].to(input.dtype)


def _power_of_2(value: Tensor) -> Tensor:
    """The smallest power of 2 that is not below a positive number, of those that e8m0 has."""
    exponent = ((value.view(torch.int32) + 0x7FFFFF) >> 23).clamp(1, 254)
    return (exponent << 23).view(torch.float32)


def _e2m1(value: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign of `value`, ties to even."""
    size = value.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (value / step).round().mul(step).clamp(-_FP4_MAX, _FP4_MAX)


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def _blocks_of(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Elements of a flat tensor, each times the scale of its block."""
    count = values.numel()
    _check_count(absmax.numel(), -(-count // blocksize), f"scales of blocks of {blocksize}")
    scales = absmax.reshape(-1, 1).expand(-1, blocksize).reshape(-1)[:count]
    return values * scales


def _values_of(packed: Tensor, code: Tensor, shape: Sequence[int]) -> Tensor:
    """The values of 4-bit codes, flat; the higher half of a byte comes first."""
    count = math.prod(shape)
    flat = packed.reshape(-1)
    flat = flat if flat.dtype is torch.uint8 else flat.view(torch.uint8)
    _check_count(flat.numel(), (count + 1) // 2, f"packed bytes for a weight of {list(shape)}")
    pairs = torch.stack((flat >> 4, flat & 15), -1).reshape(-1)[:count]
    return code[pairs.to(torch.int32)]


@_defines("bitsandbytes.dequantize_4bit.default")
def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Any:
    if quant_type not in _CODES:
        return NotImplemented
    code = torch.ops.aten.lift_fresh_copy(_CODES[quant_type]).to(A.device)  # a constant of the graph
    return _blocks_of(_values_of(A, code, shape), absmax, blocksize).to(dtype).reshape(list(shape))


@_defines("bitsandbytes.gemv_4bit.default")
def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Any:
    if A.device.type == "cpu":
        return NotImplemented  # the order of the codes depends on the processor there
    weight = _blocks_of(_values_of(B, code, shapeB), absmax.to(torch.float32), blocksize).to(A.dtype)
    return F.linear(A, weight.reshape(list(shapeB)))


@_defines("bitsandbytes.gemm_4bit.default")
def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Any:
    """The scales of blocks may be quantized themselves, in blocks of 256."""
    if A.device.type == "cpu":
        return NotImplemented
    if absmax_8bit is not None:
        assert absmax_code is not None
        assert absmax_offset is not None
        absmax = _dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    weight = _dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype)
    return weight if weight is NotImplemented else F.linear(A, weight, bias)


@_defines("bitsandbytes.dequantize_blockwise.default")
def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    values = code[A.reshape(-1).to(torch.int32)]
    return _blocks_of(values, absmax, blocksize).to(dtype).reshape(A.shape)


@_defines("bitsandbytes.int8_linear_matmul.default")
def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return torch._int_mm(A.reshape(-1, A.shape[-1]), B.t()).reshape(*A.shape[:-1], B.shape[0])


@_defines("bitsandbytes.int8_mm_dequant.default")
def _int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    out = A.reshape(-1, A.shape[-1]) * (row_stats.reshape(-1, 1) * col_stats.reshape(1, -1)) * 6.200124e-05  # 1 / 127^2
    return (out if bias is None else out + bias).to(dtype or torch.float16).reshape(A.shape)


@_defines("bitsandbytes.int8_scaled_mm.default")
def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _int8_mm_dequant(_int8_linear_matmul(A, B), row_stats, col_stats, dtype, bias)


@_defines("bitsandbytes.int8_vectorwise_dequant.default")
def _int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    return A * stats.view(-1, 1) * 7.874015718698502e-3  # 1 / 127


@_defines("bitsandbytes.int8_vectorwise_quant.default")
def _int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> Any:
    """With a threshold, the values decide how many columns are no int8: this stays in PyTorch."""
    if threshold:
        return NotImplemented
    stats = A.abs().amax(1).to(torch.float32)
    return (A * (127.0 / stats.unsqueeze(-1))).round().to(torch.int8), stats, None


# ---- transformers ----------------------------------------------------------------------------------------------------


@_defines("transformers.grouped_mm_fallback.default")
def _grouped_mm_fallback(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return torch.ops.torch_rtx.grouped_mm(input, weight, offs)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def _out_dtype(op: torch._ops.OpOverload, output_dtype: torch.dtype, *args: Any) -> Any:
    """A call whose result is wider than its operands, as torchao multiplies int8 on GPUs."""
    narrow = all(isinstance(arg, Tensor) and arg.dtype is torch.int8 for arg in args)
    if op is not torch.ops.aten.mm.default or output_dtype is not torch.int32 or not narrow:
        return NotImplemented
    return torch._int_mm(*args)
