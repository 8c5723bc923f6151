"""Several GPUs: engines on a device that is not the first, and models that span two."""

from __future__ import annotations

import copy
import threading
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


class Stage(nn.Module):
    """A part of a model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def stages(folder: Path) -> tuple[list[nn.Module], list[torch_rtx.CompiledModule]]:
    """Two parts of a model, and their engines on a GPU each."""
    models = [Stage(index).to(f"cuda:{index}").requires_grad_(False) for index in range(2)]
    engines = []
    for index, model in enumerate(models):
        torch_rtx.save(torch_rtx.compile(model, (torch.randn(8, 64, device=f"cuda:{index}"),)), folder / f"{index}.rtx")
        engines.append(torch_rtx.load(folder / f"{index}.rtx", model, f"cuda:{index}", trust_binaries=True))
    return models, engines


def test_a_pipeline_in_one_process(tmp_path: Path) -> None:
    """Engines on two GPUs work on the next batch and the last one at once, each on a stream of its own; the current
    device stays the first one."""
    models, engines = stages(tmp_path)
    batches = [torch.randn(8, 64, device="cuda:0") for _ in range(24)]
    streams = [torch.cuda.Stream(f"cuda:{index}") for index in range(2)]
    torch.cuda.synchronize(0)
    found = []
    for batch in batches:
        with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):  # the current ones of both GPUs
            first = engines[0](batch)
            assert torch.cuda.current_device() == 1
            found.append(engines[1](first.to("cuda:1", non_blocking=True)))
        assert torch.cuda.current_device() == 0
    for index in range(2):
        torch.cuda.synchronize(index)
    for batch, result in zip(batches, found, strict=True):
        torch.testing.assert_close(result, models[1](models[0](batch).to("cuda:1")))
    for engine in engines:
        torch_rtx.wait(60)
        assert engine.session.no_graphs is None


def test_threads_on_two_gpus(tmp_path: Path) -> None:
    """A thread for each GPU, with the first one as the current device, while kernels are measured on both."""
    models, engines = stages(tmp_path)
    problems: list[BaseException] = []

    def serve(index: int) -> None:
        try:
            for step in range(60):
                x = torch.randn(8, 64, device=f"cuda:{index}")
                torch.testing.assert_close(engines[index](x), models[index](x))
                assert torch.cuda.current_device() == 0
                if step == 30:
                    torch_rtx.wait(60)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert all(engine.session.stats().replays >= 20 for engine in engines)
    memories = [engine.session.pool.memory for engine in engines if engine.session.pool is not None]
    assert [memory.capture_stream.device.index for memory in memories] == [0, 1]


def test_a_callers_capture_on_the_second_gpu() -> None:
    model = Stage(0).to("cuda:1").requires_grad_(False)
    x = torch.randn(8, 64, device="cuda:1")
    module = torch_rtx.compile(model, (x,))
    for _ in range(3):
        module(x)
    torch_rtx.wait(60)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph):
        result = module(x)
    x.normal_()
    with torch.cuda.device(1):
        graph.replay()
    torch.cuda.synchronize(1)
    torch.testing.assert_close(result, model(x))
