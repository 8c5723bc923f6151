"""Activations, and normalizations of a distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.onnx.registry import op

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Softsign": F.softsign,
    "Softplus": lambda x: F.softplus(x, threshold=40.0),  # from there on it is linear in float64, too
}


def _declare_plain(name: str, function: Callable[[Tensor], Tensor]) -> None:
    @op(name)
    def run(x: Tensor, *, consumed_inputs: Any = None) -> Tensor:
        return function(x)


for _name, _function in PLAIN.items():
    _declare_plain(_name, _function)


@op("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01, consumed_inputs: Any = None) -> Tensor:
    """x, times `alpha` where it is negative."""
    return F.leaky_relu(x, alpha)


@op("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor, *, consumed_inputs: Any = None) -> Tensor:
    """x, times `slope` where it is negative."""
    return torch.where(x < 0, x * slope, x)


@op("PRelu")
def prelu_channels(x: Tensor, slope: Tensor, *, consumed_inputs: Any = None) -> Tensor:
    """PRelu before opset 7: `slope` is one for all, or one for each channel."""
    return prelu(x, slope.reshape(-1, *[1] * (x.dim() - 2)) if slope.numel() > 1 and x.dim() > 1 else slope)


@op("Elu")
def elu(x: Tensor, *, alpha: float = 1.0, consumed_inputs: Any = None) -> Tensor:
    """x, or alpha * (exp(x) - 1) where it is negative."""
    return F.elu(x, alpha)


@op("Selu")
def selu_legacy(x: Tensor, *, alpha: float = 1.6732, gamma: float = 1.0507, consumed_inputs: Any = None) -> Tensor:
    """Selu with the rounded constants that it had before opset 6."""
    return selu(x, alpha=alpha, gamma=gamma)


@op("Selu", since=6)
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """gamma * elu(x)."""
    return gamma * F.elu(x, alpha)


@op("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """max(0, x) + min(0, alpha * (exp(x / alpha) - 1))."""
    return F.celu(x, alpha)


@op("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit, exact or by `tanh`."""
    return F.gelu(x, approximate=approximate)


@op("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5, consumed_inputs: Any = None) -> Tensor:
    """alpha * x + beta, limited to 0 and 1."""
    return torch.clamp(alpha * x + beta, 0, 1)


@op("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where it is larger than `alpha`, else 0."""
    return torch.where(x > alpha, x, 0.0)


@op("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@op("SwiGLU")
def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """swish(a) * b."""
    return swish(a, alpha=alpha) * b


@op("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """x, nearer to 0 by `bias`, where it is outside of -lambd to lambd, else 0."""
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
    return moved.to(x.dtype)


def _over_rows(function: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """`function` over all axes from `axis` on, as the operators of a distribution had it before opset 13."""
    axis = axis % max(x.dim(), 1)
    if axis == x.dim() - 1:
        return function(x)
    return function(x.reshape(math.prod(x.shape[:axis]), -1)).reshape(x.shape)


@op("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Exponentials along an axis, with the sum 1."""
    return torch.softmax(x, axis)


@op("Softmax")
def softmax_flat(x: Tensor, *, axis: int = 1) -> Tensor:
    """Softmax over all axes from `axis` on."""
    return _over_rows(softmax, x, axis)


@op("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """The logarithm of softmax."""
    return torch.log_softmax(x, axis)


@op("LogSoftmax")
def log_softmax_flat(x: Tensor, *, axis: int = 1) -> Tensor:
    """LogSoftmax over all axes from `axis` on."""
    return _over_rows(log_softmax, x, axis)


@op("Hardmax", since=13)
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first of the largest elements along an axis, 0 elsewhere."""
    moved = x.movedim(axis, -1)
    places = torch.arange(moved.shape[-1], device=x.device)
    return (places == moved.argmax(-1, keepdim=True)).to(x.dtype).movedim(-1, axis)


@op("Hardmax")
def hardmax_flat(x: Tensor, *, axis: int = 1) -> Tensor:
    """Hardmax over all axes from `axis` on."""
    return _over_rows(hardmax, x, axis)
