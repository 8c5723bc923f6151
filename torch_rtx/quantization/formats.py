"""Formats of quantized tensors, and the quantization of a tensor in plain operations with gradients.

A tensor x becomes codes q = round(x / scale) of an integer or float8 type, and q * scale stands for it. The scale comes
from amax, the largest magnitude that the codes reach: of the whole tensor, of each channel, token or block of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_rtx.errors import QuantizationError

# Below this amax everything is zero: the scale stays a normal float32.
SMALLEST = 2.0**-100


@dataclass(frozen=True)
class Codes:
    """The codes of a dtype: the type that holds them, the largest one, and bits of each."""

    dtype: torch.dtype
    most: float
    bits: int
    integer: bool = False


CODES = {
    "int8": Codes(torch.int8, 127, 8, True),
    "int4": Codes(torch.int8, 7, 4, True),
    "float8_e4m3fn": Codes(torch.float8_e4m3fn, 448, 8),
    "float8_e5m2": Codes(torch.float8_e5m2, 57344, 8),
    "float4_e2m1": Codes(torch.float8_e4m3fn, 6, 4),  # float8 has every number of it
}
GRANULARITIES = ("tensor", "channel", "token", "block")
CALIBRATIONS = ("max", "percentile", "entropy", "mse")


@dataclass(frozen=True)
class Format:
    """How a weight or an input of layers is quantized.

    Attributes:
        dtype: `int8`, `int4`, `float8_e4m3fn`, `float8_e5m2` or `float4_e2m1`.
        granularity: what shares a scale: the `tensor`, a `channel` (of outputs: weights alone), a `token` (inputs
            alone; of convolutions a sample) or a `block` of the last axis.
        block: elements of a block. Blocks of `float4_e2m1` have float8_e4m3fn scales and the tensor a float32 one (16
            elements: nvfp4); the scales of other blocks are float32.
        dynamic: the scale of an input is computed in each call, not calibrated. Scales of weights are always computed
            from the weight, so that other weights get scales of their own.
        calibration: how amax is chosen: `max`; of inputs also `percentile` and `entropy` (the histogram whose
            quantized form has the least Kullback-Leibler divergence; integers alone); `mse`, the least square error,
            for weights of smooth layers that of the output.
        percentile: percent of magnitudes that amax reaches, in (0, 100].
    """

    dtype: str = "int8"
    granularity: str = "tensor"
    block: int = 0
    dynamic: bool = False
    calibration: str = "max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        for field, known in (("dtype", CODES), ("granularity", GRANULARITIES), ("calibration", CALIBRATIONS)):
            if getattr(self, field) not in known:
                raise QuantizationError(f"{field} must be one of {', '.join(known)}, not {getattr(self, field)!r}")
        if (self.granularity == "block") != (self.block > 0) or self.block < 0:
            raise QuantizationError(f"granularity {self.granularity!r} with block={self.block}: blocks have elements")
        if self.dtype == "float4_e2m1" and not self.block:
            raise QuantizationError("float4_e2m1 needs blocks, such as Format('float4_e2m1', 'block', 16)")
        if not 0 < self.percentile <= 100:
            raise QuantizationError(f"percentile must be in (0, 100], not {self.percentile}")
        if self.calibration == "entropy" and not self.codes.integer:
            raise QuantizationError(f"entropy calibrates integers, not {self.dtype}: use mse or percentile")

    @property
    def codes(self) -> Codes:
        """What is stored for an element."""
        return CODES[self.dtype]

    @property
    def bits(self) -> float:
        """Bits of an element, with the scale of its block."""
        scale = 8 if self.dtype == "float4_e2m1" else 32
        return self.codes.bits + (scale / self.block if self.block else 0)

    @property
    def two_levels(self) -> bool:
        """Whether blocks have scales in float8 below one of the tensor."""
        return self.dtype == "float4_e2m1"

    def __str__(self) -> str:
        name = self.dtype.removesuffix("fn").replace("float", "fp")
        what = f"block {self.block}" if self.block else self.granularity
        return f"{name}/{what}" + ("/dynamic" if self.dynamic else "")


def blocked(x: Tensor, block: int) -> Tensor:
    """`x` with its last axis as (blocks, block) if there are blocks."""
    return x.unflatten(-1, (-1, block)) if block else x


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype that scales are computed in: float32, of double tensors float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which exported graphs have as three calls, in one: each layer has ten of them."""
    return x if x.dtype == dtype else torch.ops.aten._to_copy.default(x, dtype=dtype)


def amax_of(x: Tensor, form: Format, axes: tuple[int, ...]) -> Tensor:
    """The largest magnitudes of what shares a calibrated or computed amax, broadcastable to `blocked(x, form.block)`:
    over `axes` of `x`; over each block; over all where blocks have scales of two levels."""
    wide = blocked(cast(x.detach(), work_dtype(x)), form.block).abs()
    if form.two_levels:
        return wide.amax()
    return wide.amax(-1 if form.block else axes, keepdim=True)


def scale_of(amax: Tensor, form: Format) -> Tensor:
    """The scale of which codes reach `amax`."""
    return amax.clamp(min=SMALLEST) / form.codes.most


def codes_of(ratio: Tensor, form: Format) -> Tensor:
    """The nearest codes of numbers in units of the scale, ties to even."""
    most = form.codes.most
    if form.codes.integer:
        least = -8 if form.dtype == "int4" else -most
        return cast(ratio.round().clamp(least, most), torch.int8)
    ratio = ratio.clamp(-most, most)
    if form.dtype == "float4_e2m1":
        size = ratio.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(ratio.dtype)
        ratio = (ratio / step).round() * step
    return cast(ratio, form.codes.dtype)


def block_scales(wide: Tensor, amax: Tensor, form: Format) -> Tensor:
    """Scales of blocks in float8 times the tensor's, such that codes times scales reach `amax`."""
    top = torch.finfo(torch.float8_e4m3fn)
    tensor = scale_of(amax, form) / top.max
    own = wide.abs().amax(-1, keepdim=True) / form.codes.most / tensor
    # The smallest float8 instead of zero: a block of small numbers is zeros, not a division by zero.
    return own.clamp(2.0**-9, top.max).to(torch.float8_e4m3fn).to(wide.dtype) * tensor


class _FakeQuantize(torch.autograd.Function):
    """Gradients pass straight through where `x` is within amax, and end beyond it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, amax: Tensor, form: Format) -> Tensor:
        wide = blocked(cast(x, work_dtype(x)), form.block)
        amax = cast(amax, wide.dtype)
        scale = block_scales(wide, amax, form) if form.two_levels else scale_of(amax, form)
        result = cast(codes_of(wide / scale, form), wide.dtype) * scale
        result = result.flatten(-2) if form.block else result
        # PyTorch 2.11's Dynamo loses the gradient of a result that `to` returns as it is.
        return cast(result, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, amax, ctx.form = inputs
        ctx.save_for_backward(x, amax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, amax = ctx.saved_tensors
        within = blocked(x.to(work_dtype(x)), ctx.form.block).abs() <= amax
        return grad * (within.flatten(-2) if ctx.form.block else within), None, None


def fake_quantize(x: Tensor, amax: Tensor, form: Format) -> Tensor:
    """The values that the codes of `x` stand for, in its shape and dtype; `amax` as from `amax_of`, or a calibrated
    one. Differentiable: codes count as the numbers that they stand for."""
    return _FakeQuantize.apply(x, amax, form)
