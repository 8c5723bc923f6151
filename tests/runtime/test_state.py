"""State that a module keeps between calls: it starts as the model has it, and every session has its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import torch_rtx


class Accumulator(nn.Module):
    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("total", start, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 1


def test_zeros_are_not_in_the_file(tmp_path: Path) -> None:
    sizes = {}
    for name, start in (("zeros", torch.zeros(64, 64)), ("ones", torch.ones(64, 64))):
        torch_rtx.save(torch_rtx.compile(Accumulator(start), (torch.ones(64, 64),)), tmp_path / f"{name}.rtx")
        sizes[name] = (tmp_path / f"{name}.rtx").stat().st_size
        module = torch_rtx.load(tmp_path / f"{name}.rtx")
        for step in (1, 2, 3):
            assert torch.equal(module(torch.ones(64, 64)), start + step)
    assert sizes["ones"] - sizes["zeros"] > 64 * 64 * 3


def test_sessions_do_not_share_state(tmp_path: Path) -> None:
    torch_rtx.save(torch_rtx.compile(Accumulator(torch.zeros(4)), (torch.ones(4),)), tmp_path / "m.rtx")
    first, second = (torch_rtx.load(tmp_path / "m.rtx") for _ in range(2))
    assert torch.equal(first(torch.ones(4)), torch.ones(4))
    assert torch.equal(first(torch.ones(4)), 2 * torch.ones(4))
    assert torch.equal(second(torch.ones(4)), torch.ones(4))


def test_a_result_is_no_view_of_the_state() -> None:
    class Model(Accumulator):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.total.add_(x)

    module = torch_rtx.compile(Model(torch.zeros(4)), (torch.ones(4),))
    kept = module(torch.ones(4))
    kept.add_(100)
    assert torch.equal(module(torch.ones(4)), 2 * torch.ones(4))
