"""Random numbers and dropout. Generators differ between implementations: `seed` isn't used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_rtx.onnx.dtypes import dtype_of
from torch_rtx.onnx.registry import Ints, op


@op("RandomNormal")
def random_normal(
    *,
    shape: list[int],
    dtype: int = 1,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Numbers of a normal distribution."""
    return torch.randn(shape, dtype=dtype_of(dtype), device=device) * scale + mean


@op("RandomUniform")
def random_uniform(
    *,
    shape: list[int],
    dtype: int = 1,
    low: float = 0.0,
    high: float = 1.0,
    seed: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Numbers that are equally likely from `low` to `high`."""
    return torch.rand(shape, dtype=dtype_of(dtype), device=device) * (high - low) + low


@op("RandomNormalLike")
def random_normal_like(
    x: Tensor, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Numbers of a normal distribution, in the shape of `x`."""
    return torch.randn_like(x, dtype=_or_own(dtype, x)) * scale + mean


@op("RandomUniformLike")
def random_uniform_like(
    x: Tensor, *, dtype: int | None = None, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Numbers that are equally likely from `low` to `high`, in the shape of `x`."""
    return torch.rand_like(x, dtype=_or_own(dtype, x)) * (high - low) + low


def _or_own(dtype: int | None, x: Tensor) -> torch.dtype:
    return x.dtype if dtype is None else dtype_of(dtype)


@op("Bernoulli")
def bernoulli(x: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """1 with the probability that each element is, else 0."""
    return (torch.rand_like(x) < x).to(_or_own(dtype, x))


@op("Multinomial")
def multinomial(x: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Classes drawn with the logarithms of probabilities that each row of (batch, classes) has."""
    return torch.multinomial(torch.softmax(x.float(), -1), sample_size, replacement=True).to(dtype_of(dtype))


def _dropped(x: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    mask = torch.rand_like(x, dtype=torch.float32) >= ratio
    return torch.where(mask, x / (1 - ratio) if ratio < 1 else x, 0), mask


@op("Dropout")
def dropout_legacy(
    x: Tensor, *, ratio: float = 0.5, is_test: int = 0, consumed_inputs: Any = None
) -> tuple[Tensor, Tensor]:
    """Dropout before opset 7, where it trains unless told not to."""
    result, mask = (x, torch.ones_like(x)) if is_test else _dropped(x, ratio)
    return result, mask.to(x.dtype)


@op("Dropout", since=7)
def dropout_inference(x: Tensor, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """Dropout before opset 10, which never trains."""
    return x, torch.ones_like(x)


@op("Dropout", since=10)
def dropout_inference_mask(x: Tensor, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """Dropout before opset 12, with a mask of truth values."""
    return x, torch.ones_like(x, dtype=torch.bool)


@op("Dropout", since=12, ints=("ratio", "training_mode"))
def dropout(
    x: Tensor, ratio: Ints | None = None, training_mode: Ints | None = None, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """In training, `ratio` of the elements becomes 0 and the others are scaled; else `x` as it is."""
    if not training_mode or not training_mode[0]:
        return x, torch.ones_like(x, dtype=torch.bool)
    return _dropped(x, float(ratio[0]) if ratio else 0.5)
