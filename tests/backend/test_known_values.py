"""Models that ask for values which depend on none of their inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx.errors import CaptureError


class Call(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def positions(x: torch.Tensor) -> torch.Tensor:
    last = torch.arange(x.shape[1], device=x.device)[-1]
    return x[:, : int(last) - 1]


def masked(x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(x.shape, device=x.device)
    return x if bool((mask > 0).all()) else -x


def written(x: torch.Tensor) -> torch.Tensor:
    """In place, after a copy was made."""
    count = torch.zeros(3, device=x.device)
    before = count + 1
    count.add_(2).mul_(before)
    return x * float(count.sum()) + float(before[0])


def numbers(x: torch.Tensor) -> torch.Tensor:
    first = torch.tensor([3], device=x.device)
    return x * int(torch.cat((first, torch.arange(4, device=x.device)))[0])


@pytest.mark.parametrize("device", [None, "cuda"])
@pytest.mark.parametrize("function", [positions, masked, written, numbers], ids=lambda one: one.__name__)
def test_values_are_known(function: Callable[[torch.Tensor], torch.Tensor], device: str | None) -> None:
    x = torch.randn(3, 5)
    module = torch_rtx.compile(Call(function), (x,), device=device)
    assert {node.kind for node in module.engine.graph.nodes} <= {"kernel", "extern", "view"}
    torch.testing.assert_close(module(x), function(x))


def in_part(x: torch.Tensor) -> torch.Tensor:
    """The whole, of which a part was written."""
    mask = torch.zeros(4, device=x.device)
    mask[1:].copy_(x[0, 1:4])
    return x if bool(mask.any()) else -x


def drawn(x: torch.Tensor) -> torch.Tensor:
    return x if bool(torch.rand(2, device=x.device).sum() > 1) else -x


def given(x: torch.Tensor) -> torch.Tensor:
    return x if bool((torch.zeros_like(x) < x).any()) else -x


@pytest.mark.parametrize("function", [in_part, drawn, given], ids=lambda one: one.__name__)
def test_other_values_are_not(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(CaptureError, match="by the values of a tensor"):
        torch_rtx.compile(Call(function), (torch.randn(3, 5),))


class Strided(nn.Module):
    """A buffer of a number, which a call may change."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.register_buffer("stride", torch.tensor(2), persistent=False)
        self.changes = changes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.changes:
            self.stride.add_(1)
        return x[:, :3] if bool(self.stride > 1) else x


@pytest.mark.parametrize("device", [None, "cuda"])
def test_numbers_of_layers_are_known(device: str | None) -> None:
    x = torch.randn(3, 5)
    assert torch.equal(torch_rtx.compile(Strided(False), (x,), device=device)(x), x[:, :3])
    with pytest.raises(CaptureError, match="by the values of a tensor"):
        torch_rtx.compile(Strided(True), (x,), device=device)


class Rounded(nn.Module):
    """Whole numbers of a known range, in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.round().clamp(-4, 4).to(torch.bfloat16))


def test_passes_know_values_whatever_the_default_device_is() -> None:
    graphs = []
    for default in ("cpu", "meta"):
        model, x = Rounded().to("meta"), torch.rand(3, 8, device="meta")
        with torch.no_grad(), torch.device(default):
            graphs.append(str(torch_rtx.compile(model, (x,), device="cuda").engine.graph))
    assert graphs[0] == graphs[1]
