"""What the tests of engines ahead of time share: models by feature, and going through a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import torch_rtx
from tests.helpers.compiled import same


class Net(nn.Module):
    """Two recipes, a folded batch norm and merged projections, and parameters that are used as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            for tensor in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias):
                tensor.uniform_(0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Tied(nn.Module):
    """An embedding whose weight is the head's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(16, 8), nn.LayerNorm(8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids)))


IMAGE = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)
IDS = torch.arange(12).view(2, 6)


class Function(nn.Module):
    """A function as a module, without its names of arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def through_file(module: torch_rtx.CompiledModule, folder: Path, **options: Any) -> torch_rtx.CompiledModule:
    """`module`, saved and loaded."""
    torch_rtx.save(module, folder / "model.rtx")
    return torch_rtx.load(folder / "model.rtx", **{"trust_binaries": True, **options})


def both(model: nn.Module, args: Any, folder: Path, **options: Any) -> list[torch_rtx.CompiledModule]:
    """The engine of `model` in this process, and the same from a file with the weights of `model`; right for `args`."""
    here = torch_rtx.compile(model, args, **options)
    modules = [here, through_file(here, folder, weights=model)]
    for module in modules:
        same(module(*args), model(*args), atol=1e-5, rtol=1e-4)
    return modules


class Count(nn.Module):
    """Its calls write to its buffers, of which one is no part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("steps", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seen.add_(x.sum(0)) + self.steps.add_(1)
