"""Fake quantization is written out, and gives PyTorch's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torch_rtx
from torch_rtx.backend.fake_quantization import FAKE_QUANTIZATION

aten = torch.ops.aten
X = torch.cat([torch.randn(6, 997, generator=torch.Generator().manual_seed(0)), torch.full((6, 1), torch.inf).neg()], 1)
SCALES = torch.rand(6, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.003
ZEROS = torch.tensor([0, -5, 3, 17, -128, 127], dtype=torch.int32)
ON, OFF = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.fake_quantize_per_tensor_affine_cachemask, (X, 0.03, 3, -128, 127)),
    (aten.fake_quantize_per_tensor_affine_cachemask, (X, 0.1, 7, 0, 255)),
    (aten.fake_quantize_per_tensor_affine_cachemask, (X.bfloat16(), 0.017, -7, -128, 127)),
    (aten.fake_quantize_per_tensor_affine_cachemask, (X.half(), 0.017, 0, -8, 7)),
    (aten.fake_quantize_per_tensor_affine_cachemask, (X.double(), 0.017, 0, -8, 7)),
    (aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams, (X, SCALES[:1], ZEROS[1:2], ON, -128, 127)),
    (aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams, (X, SCALES[0], ZEROS[1], OFF, -128, 127)),
    (aten.fake_quantize_per_channel_affine_cachemask, (X, SCALES, ZEROS, 0, -128, 127)),
    (aten.fake_quantize_per_channel_affine_cachemask, (X.t(), SCALES, ZEROS, 1, -128, 127)),
    (aten.fake_quantize_per_channel_affine_cachemask, (X, SCALES, ZEROS + 0.25, 0, -128, 127)),
]


@pytest.mark.quick
@pytest.mark.parametrize(("op", "args"), CALLS)
def test_it_gives_the_same_bits(op: Any, args: tuple[Any, ...]) -> None:
    for found, wanted in zip(FAKE_QUANTIZATION[op.default](*args), op.default(*args), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("scale", [0.05, torch.tensor(0.05)])
def test_models_run_in_engines_and_get_the_same_gradients(scale: Any) -> None:
    zero = torch.tensor(2, dtype=torch.int32) if isinstance(scale, torch.Tensor) else 2

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127)
        w = torch.fake_quantize_per_channel_affine(w, SCALES, ZEROS * 0, 0, -127, 127)
        return (x @ w.t()).square().sum()

    given = [X[:, :96].clone().requires_grad_(), X[:, 96:192].clone().requires_grad_()]
    assert not torch_rtx.explain(function, *given).fallback_nodes
    results = []
    for one in (function, torch.compile(function, backend="rtx")):
        loss = one(*given)
        results.append((loss.detach(), *torch.autograd.grad(loss, given)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
