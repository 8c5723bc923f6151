"""Attention kernels on a GPU: heads of all widths, and rows of keys that end within a block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

import torch_rtx
from benchmarks.numerics import assert_right
from tests.lowering.kernels.test_gpu_kernels import FORMS, target_of
from torch_rtx.runtime.inline import launched

pytestmark = pytest.mark.gpu
# Widths of keys and of values, queries, keys, causal.
CASES = {
    "64, values of 32": (64, 32, 300, 77, False),
    "16, values of 64": (16, 64, 300, 77, False),
    "40": (40, 40, 300, 77, False),
    "48, causal": (48, 48, 300, 300, True),
    "72": (72, 72, 300, 300, False),
    "80": (80, 80, 300, 77, False),
    "96, causal": (96, 96, 300, 300, True),
    "128": (128, 128, 300, 300, False),
    "160": (160, 160, 130, 50, False),
    "192, values of 128, causal": (192, 128, 300, 300, True),
    "256": (256, 256, 130, 100, False),
}


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "compute_75"])
@pytest.mark.parametrize("name", CASES)
def test_right(name: str, form: str) -> None:
    width, values, queries, keys, causal = CASES[name]
    target = str(target_of(form))
    sizes = ((queries, width), (keys, width), (keys, values))
    inputs = tuple(torch.randn(2, length, 4, size, device="cuda", dtype=torch.float16) for length, size in sizes)
    model = Attention(causal)
    settings = torch_rtx.CompilationSettings(targets=[target])
    runtime = torch_rtx.RuntimeSettings(tactics="kernel", specialization_strategy="none")
    module = torch_rtx.compile(model, inputs, settings=settings, runtime=runtime)
    assert len(launched(module.session.tactics)) == 1
    exact = [model(*(x.double() for x in inputs))]
    for _ in range(2):
        assert_right(module(*inputs), model(*inputs), exact)


class Sink(nn.Module):
    """As models write a sink out, beside a causal mask or a sliding window; query heads share keys."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.sink, self.window = nn.Parameter(torch.randn(8)), window

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (x.repeat_interleave(4, 1) for x in (key, value))
        keys = torch.arange(key.shape[2], device=key.device)
        place = keys[-query.shape[2] :, None]
        seen = (keys <= place) & (keys > place - self.window)
        scores = (query @ key.mT * 0.125).masked_fill(~seen, -torch.inf)
        sink = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ value


@pytest.mark.parametrize(("queries", "window"), [(300, 1000), (300, 70), (1, 1000)])
def test_sinks(queries: int, window: int) -> None:
    sizes = ((8, queries), (2, 300), (2, 300))
    inputs = tuple(torch.randn(2, heads, length, 64, device="cuda", dtype=torch.float16) for heads, length in sizes)
    model = Sink(window).cuda().half()
    exact = [copy.deepcopy(model).double()(*(x.double() for x in inputs))]
    runtime = torch_rtx.RuntimeSettings(tactics="kernel", specialization_strategy="none")
    settings = torch_rtx.CompilationSettings(targets=[str(target_of("native"))])
    module = torch_rtx.compile(model, inputs, settings=settings, runtime=runtime)
    assert 1 <= len(launched(module.session.tactics)) <= 2  # of one query, the keys may be split
    for _ in range(2):
        assert_right(module(*inputs), model(*inputs), exact)
