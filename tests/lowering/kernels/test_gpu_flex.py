"""Kernels of `flex_attention` on a GPU: engines for each target, and training steps, against eager and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

import torch_rtx
from benchmarks.numerics import assert_right
from tests.helpers.flex import causal, soft_cap, uncompiled, window
from tests.lowering.kernels.test_gpu_kernels import FORMS, target_of
from torch_rtx.runtime.inline import launched

pytestmark = pytest.mark.gpu
BATCH, HEADS = 2, 4
# Queries, keys, width, heads of keys, what modifies the scores, what masks them.
CASES: dict[str, tuple[int, int, int, int, str, str]] = {
    "causal": (384, 384, 64, 4, "", "causal"),
    "window, shared heads": (300, 300, 128, 2, "", "window"),
    "alibi": (256, 256, 64, 4, "alibi", "causal"),
    "bias and documents": (130, 200, 80, 4, "bias", "documents"),
    "soft cap": (256, 256, 64, 1, "soft cap", ""),
    "decoding": (1, 300, 128, 2, "alibi", "first"),
    "rows without keys": (256, 256, 64, 4, "soft cap", "late"),
}
TRAINED = [name for name in CASES if name != "decoding"]


class Attention(nn.Module):
    """One case, with the operands as inputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        queries, keys, _, _, score, mask = CASES[name]
        self.register_buffer("slopes", torch.rand(HEADS))
        self.register_buffer("bias", torch.randn(HEADS, queries, keys))
        self.register_buffer("ids", (torch.arange(max(queries, keys)) // 70).expand(BATCH, -1).contiguous())
        self.to("cuda")
        scores: dict[str, Any] = {
            "alibi": lambda s, b, h, q, k: s + (k - q) * self.slopes[h],
            "bias": lambda s, b, h, q, k: s + self.bias[h, q, k],
            "soft cap": soft_cap,
        }
        masks: dict[str, Any] = {
            "causal": causal,
            "window": window,
            "documents": lambda b, h, q, k: self.ids[b, q] == self.ids[b, k],
            "first": lambda b, h, q, k: k < 200 - b,
            "late": lambda b, h, q, k: (q >= k) & (q > 100),
        }
        self.score_mod, self.mask_mod = scores.get(score), masks.get(mask)
        self.block_mask = self.mask_mod and create_block_mask(self.mask_mod, BATCH, None, queries, keys, device="cuda")

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        options: dict[str, Any] = {"block_mask": self.block_mask, "enable_gqa": True}
        return flex_attention(query, key, value, self.score_mod, **options)


def operands(name: str) -> list[Tensor]:
    queries, keys, width, shared, _, _ = CASES[name]
    torch.manual_seed(0)
    sizes = (HEADS, queries), (shared, keys), (shared, keys)
    return [torch.randn(BATCH, *size, width, device="cuda").half() for size in sizes]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "compute_75"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_engine(name: str, form: str) -> None:
    model, inputs = Attention(name), tuple(operands(name))
    settings = torch_rtx.CompilationSettings(targets=[str(target_of(form))])
    runtime = torch_rtx.RuntimeSettings(tactics="kernel", specialization_strategy="none")
    module = torch_rtx.compile(model, inputs, settings=settings, runtime=runtime)
    assert len(launched(module.session.tactics)) == 1
    with uncompiled():
        eager = model(*inputs)
    exact = definition(model)(*(one.double() for one in inputs))
    for _ in range(2):
        assert_right(module(*inputs), eager, [exact])


def definition(model: Attention) -> Callable[..., Tensor]:
    """PyTorch's own, of any dtype."""
    score_mod = model.score_mod or (lambda score, *_: score)
    mask_mod = model.mask_mod or (lambda b, *_: b.new_ones((), dtype=torch.bool))

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return math_attention(query, key, value, score_mod, (mask_mod,), query.shape[-1] ** -0.5, {})[0]

    return run


@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str) -> None:
    """A few steps, so that kernels are compiled, checked, measured and used meanwhile."""
    model, inputs = Attention(name), [one.requires_grad_() for one in operands(name)]
    upstream = torch.randn_like(inputs[0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="rtx", options={"require_full_compilation": True})
    wide = [one.detach().double().requires_grad_() for one in inputs]
    found = definition(model)(*inputs)
    exact = definition(model)(*wide)
    eager = [found, *torch.autograd.grad(found, inputs, upstream)]
    reference = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    for _ in range(4):
        out = compiled(*inputs)
        assert_right([out, *torch.autograd.grad(out, inputs, upstream)], eager, reference)
