"""Kernels that write to caches on a GPU, launched and in CUDA graphs, beside eager mode."""

from __future__ import annotations

import pytest
import torch

import torch_rtx
from tests.helpers.ahead import Function
from torch_rtx.settings import CompilationSettings, RuntimeSettings

pytestmark = pytest.mark.gpu


def step(keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    keys.index_copy_(2, at, (x[..., :64] * 2).transpose(1, 2).to(keys.dtype))
    values[:, :, at - values.shape[2]] = x[..., 64:].transpose(1, 2).to(values.dtype)
    return keys.float().sum(-1) + values.float().sum(-1)


@pytest.mark.parametrize("graphs", ["disabled", "whole_graph_capture"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_caches(dtype: torch.dtype, graphs: str) -> None:
    mine = [torch.randn(2, 8, 128, 64, device="cuda").to(dtype) for _ in range(2)]
    theirs = [cache.clone() for cache in mine]
    given = (
        *(cache.clone() for cache in mine),
        torch.arange(5, device="cuda"),
        torch.randn(2, 5, 8, 128, device="cuda"),
    )
    runtime = RuntimeSettings(specialization_strategy="none", cuda_graph_strategy=graphs)
    settings = CompilationSettings(targets="current")
    module = torch_rtx.compile(Function(step), given, settings=settings, runtime=runtime)
    assert [node.kind for node in module.engine.graph.nodes if node.writes] == ["kernel"]
    for _ in range(4):
        at, x = torch.randperm(128, device="cuda")[:5], torch.randn(2, 5, 8, 128, device="cuda")
        torch.testing.assert_close(module(*mine, at, x), step(*theirs, at, x), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
