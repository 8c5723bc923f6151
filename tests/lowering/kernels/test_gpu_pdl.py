"""Kernels that start while those before them end: replays give the bits of plain calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

import torch_rtx
from torch_rtx.runtime import captured
from torch_rtx.runtime.pdl import use_programmatic_edges
from torch_rtx.targets import arch_of

pytestmark = pytest.mark.gpu
WIDTH = 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("tactics", ["kernel", "split", "library"])
@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("target", ["current", "compute_80"])
def test_replays_of_long_chains(rows: int, tactics: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[int] = []

    def spy(*given: Any) -> int:
        changed.append(use_programmatic_edges(*given))
        return changed[-1]

    monkeypatch.setattr(captured, "use_programmatic_edges", spy)
    model = nn.Sequential(*(Block() for _ in range(12))).half().cuda()
    inputs = [torch.randn(rows, WIDTH, device="cuda", dtype=torch.float16) for _ in range(16)]
    settings = torch_rtx.CompilationSettings(targets=[target])
    runtime = torch_rtx.RuntimeSettings(tactics=tactics, specialization_strategy="none")
    with torch.no_grad():
        module = torch_rtx.compile(model, (inputs[0],), settings=settings, runtime=runtime)
        with torch_rtx.runtime_settings(cuda_graph_strategy="disabled"):
            expected = [module(x) for x in inputs]
        torch.testing.assert_close(expected[0], model(inputs[0]), rtol=2e-2, atol=2e-2)
        for _ in range(8):
            got = [module(x) for x in inputs]
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    major, minor = torch.cuda.get_device_capability()
    waits = target == "current" and "griddepcontrol" in arch_of(10 * major + minor).features
    assert len(changed) == 1
    # At least each norm follows another kernel, and of what is generated nearly all does.
    assert changed[0] >= (11 if tactics == "library" else 30) if waits else changed[0] == 0
