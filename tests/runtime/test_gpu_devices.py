"""Several GPUs: engines on a device that is not the first, and models that span two."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx.backend.entry import rtx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def mlp(device: str) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)


@pytest.mark.usefixtures("unspecialized")
def test_second_gpu(tmp_path: Path) -> None:
    model = mlp("cuda:1")
    module = torch_rtx.compile(model, (torch.randn(4, 64, device="cuda:1"),))
    torch_rtx.save(module, tmp_path / "m.rtx")
    loaded = torch_rtx.load(tmp_path / "m.rtx", weights=model, device="cuda:1", trust_binaries=True)
    for _ in range(4):
        x = torch.randn(4, 64, device="cuda:1")
        torch.testing.assert_close(module(x), model(x))
        torch.testing.assert_close(loaded(x), model(x))
    assert module.session.pool is not None
    assert module.session.pool.replays == 3


def test_the_same_engine_on_both(tmp_path: Path) -> None:
    model = mlp("cuda:0")
    torch_rtx.save(torch_rtx.compile(model, (torch.randn(4, 64, device="cuda:0"),)), tmp_path / "m.rtx")
    devices = [f"cuda:{index}" for index in range(2)]
    modules = [torch_rtx.load(tmp_path / "m.rtx", model, device, trust_binaries=True) for device in devices]
    for _ in range(4):
        x = torch.randn(4, 64, device="cuda:0")
        for index, module in enumerate(modules):
            got = module(x.to(f"cuda:{index}"))
            assert got.device.index == index
            torch.testing.assert_close(got.to("cuda:0"), model(x))
    with pytest.raises(torch_rtx.InputError, match="is on cuda:0, expected cuda:1"):
        modules[1](torch.randn(4, 64, device="cuda:0"))


class Spanning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp("cuda:0"), mlp("cuda:1")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).to("cuda:1")).to("cuda:0") + 1


def test_model_over_two_gpus() -> None:
    torch._dynamo.reset()
    model = Spanning()
    compiled = torch.compile(model, backend=rtx, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, 64, device="cuda:0")
            torch.testing.assert_close(compiled(x), model(x))
        model.second[0].weight.add_(1)
        torch.testing.assert_close(compiled(x), model(x))


def test_training_over_two_gpus() -> None:
    torch._dynamo.reset()
    model = Spanning()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=rtx)
    x = torch.randn(4, 64, device="cuda:0")
    compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


class Low(nn.Module):
    """A weight that is a product of two: its recipe takes memory while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(64, 8)), nn.Parameter(torch.randn(8, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.a @ self.b).sin()


def test_recipes_on_the_second_gpu() -> None:
    model, x = Low().to("cuda:1"), torch.randn(4, 64, device="cuda:1")
    with torch.no_grad():
        torch.testing.assert_close(torch_rtx.compile(model, (x,))(x), model(x))
