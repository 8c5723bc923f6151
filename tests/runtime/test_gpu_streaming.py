"""Weight streaming on the GPU: the same results as resident, captured or not; how much memory and time it takes."""

from __future__ import annotations

import gc
import logging
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import torch_rtx
from torch_rtx import CompilationSettings, RuntimeSettings
from torch_rtx.runtime import streaming

pytestmark = pytest.mark.gpu
MIB = 1 << 20


class Layers(nn.Module):
    """Layers of 32 MiB in half precision, the first and the last one weight."""

    def __init__(self, count: int = 16, width: int = 4096) -> None:
        super().__init__()
        self.ends = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ends(x)
        for layer in self.layers:
            x = x + layer(x).relu() / len(self.layers)
        return self.ends(x)


def model_of(seed: int, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return Layers(**sizes).half().eval()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an engine for CUDA and of two files of weights for it; nothing of it is on the device."""
    folder = tmp_path_factory.mktemp("streaming")
    for seed in (0, 1):
        save_model(model_of(seed), str(folder / f"{seed}.safetensors"))
    dims = ({0: torch.export.Dim("n", min=1, max=1 << 16)},)
    settings = CompilationSettings(device="cuda")
    built = torch_rtx.compile(model_of(0), (torch.randn(4, 4096).half(),), dynamic_shapes=dims, settings=settings)
    torch_rtx.save(built, folder / "model.rtx")
    return folder


def load(folder: Path, budget: int | str | None, weights: Any = None, graphs: bool = True) -> torch_rtx.CompiledModule:
    strategy = "whole_graph_capture" if graphs else "disabled"
    settings = RuntimeSettings(
        weight_streaming_budget=budget, cuda_graph_strategy=strategy, specialization_strategy="none"
    )
    weights = weights or folder / "0.safetensors"
    return torch_rtx.load(folder / "model.rtx", weights, "cuda", settings, trust_binaries=True)


def inputs(count: int, batch: int = 4) -> list[torch.Tensor]:
    return [torch.randn(batch, 4096, device="cuda", dtype=torch.float16) for _ in range(count)]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize("budget", ["15%", "50%", "80%"])
def test_bit_for_bit(engine: Path, budget: str, graphs: bool) -> None:
    """Results are compared at the end: calls run into each other without anybody waiting for them."""
    resident, module = load(engine, None, graphs=graphs), load(engine, budget, graphs=graphs)
    assert module.session.streamer is not None
    given = [x for batch in (4, 64) for x in inputs(10, batch)]
    expected = [resident(x) for x in given]
    got = [module(x) for x in given]
    assert all(map(torch.equal, got, expected))
    if graphs:
        assert module.session.pool is not None
        assert module.session.pool.disabled is None
        assert module.session.pool.replays > 10


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
def test_refit(engine: Path, graphs: bool) -> None:
    """Other weights from a file and back, while calls are still running on the device."""
    resident, module = load(engine, None, graphs=graphs), load(engine, "50%", graphs=graphs)
    (x,) = inputs(1)
    pairs = []
    for step in range(6):
        for one in (resident, module):
            one.refit(engine / f"{step % 2}.safetensors")
        pairs += [(module(x), resident(x)) for _ in range(4)]
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(pairs[0][0], pairs[4][0])
    if graphs:
        assert module.session.pool is not None
        assert module.session.pool.captures == 1  # host memory stays where it is


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
def test_budgets_of_a_live_module(engine: Path, graphs: bool) -> None:
    """Bit for bit, while earlier calls still run on the device, with kernels that were measured before; memory of
    before is free at once."""
    resident, module = load(engine, None, graphs=graphs), load(engine, None, graphs=graphs)
    given = inputs(6)
    expected = [resident(x) for x in given]
    torch.cuda.synchronize()
    whole = torch.cuda.memory_allocated()
    with torch_rtx.runtime.weight_streaming(module) as weights:
        total = weights.total_device_budget
        for share in (0.5, 0.2, 1.0, 0.3):
            got = [module(x) for x in given]
            weights.device_budget = int(share * total)
            torch.cuda.synchronize()
            saved = whole - torch.cuda.memory_allocated()
            assert saved > (1 - share) * total - 120 * MIB  # 100 of results, and memory of CUDA graphs
            got += [module(x) for x in given]
            assert all(map(torch.equal, got, expected * 2))
            module.refit(engine / "1.safetensors")
            assert not torch.equal(module(given[0]), expected[0])
            module.refit(engine / "0.safetensors")
    assert module.session.streamer is None
    assert all(torch.equal(module(x), y) for x, y in zip(given, expected, strict=True))
    if graphs:
        assert module.session.pool is not None
        assert module.session.pool.disabled is None
        assert module.session.pool.replays > 0


def test_measured_kernels_stay(engine: Path) -> None:
    """Another budget changes no bit of what kernels compute that were compiled and chosen here."""
    settings = RuntimeSettings(specialization_strategy="eager", tuning_seconds=5)
    module = torch_rtx.load(engine / "model.rtx", engine / "0.safetensors", "cuda", settings, trust_binaries=True)
    (x,) = inputs(1)
    for _ in range(3):
        expected = module(x)
    with torch_rtx.runtime.weight_streaming(module) as weights:
        for budget in ("30%", None, "60%"):
            weights.device_budget = budget
            assert all(torch.equal(module(x), expected) for _ in range(4))
    assert torch.equal(module(x), expected)


def test_graphs_where_the_settings_have_none(engine: Path) -> None:
    module = load(engine, None, graphs=False)
    (x,) = inputs(1)
    expected = [module(x) for _ in range(3)][-1]
    assert module.session.pool is None
    with torch_rtx.runtime.enable_cudagraphs(module) as captured:
        assert all(torch.equal(captured(x), expected) for _ in range(4))
        assert module.session.pool is not None
        replays = module.session.pool.replays
        assert replays >= 2
    module(x)
    assert module.session.pool.replays == replays


def test_streams_and_threads(engine: Path) -> None:
    """Threads with streams of their own share one session, its staging and its graphs."""
    resident, module = load(engine, None), load(engine, "30%")
    wrong: list[int] = []
    given = {index: inputs(6, 4 + 4 * (index % 2)) for index in range(8)}
    expected = {index: [resident(x) for x in group] for index, group in given.items()}
    torch.cuda.synchronize()

    def call(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            got = [module(x) for _ in range(5) for x in given[index]]
            torch.cuda.current_stream().synchronize()
        wrong.extend(index for y, known in zip(got, expected[index] * 5, strict=True) if not torch.equal(y, known))

    threads = [threading.Thread(target=call, args=(index,)) for index in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_part_of_a_callers_graph(engine: Path) -> None:
    module = load(engine, "50%")
    (x,) = inputs(1)
    expected = module(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = module(x)
    for _ in range(3):
        got.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, expected)


def test_device_memory(engine: Path) -> None:
    """Neither loading, nor refit, nor calls have more on the device than the budget, and what one weight takes."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    budget = 200 * MIB
    module = load(engine, budget, graphs=False)
    (x,) = inputs(1)
    module(x)
    module.refit(engine / "1.safetensors")
    module(x)
    torch.cuda.synchronize()
    assert module.session.streamer is not None
    assert torch.cuda.max_memory_allocated() - before <= budget + 32 * MIB + 40 * MIB  # 32 for cuBLAS
    summary = module.session.streamer.summary
    assert summary.resident + summary.staging <= budget
    del module, x
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 40 * MIB  # what cuBLAS keeps


def test_a_live_model_is_warned_of(engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(0).cuda()
    with caplog.at_level(logging.WARNING, "torch_rtx"):
        module = load(engine, "50%", weights=model)
    assert "the model keeps its weights in device memory" in caplog.text
    (x,) = inputs(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    torch.testing.assert_close(module(x), model(x), atol=2e-2, rtol=2e-2)


def test_pageable_memory(engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where memory can't be pinned the copies are right all the same, without CUDA graphs, and the log says so."""
    monkeypatch.setattr(streaming, "_pinned", lambda memory, device: "no memory can be pinned")
    with caplog.at_level(logging.INFO, "torch_rtx"):
        module = load(engine, "50%")
    assert module.session.pool is None
    assert "no CUDA graphs for this module: no memory can be pinned" in caplog.text
    (x,) = inputs(1)
    assert torch.equal(module(x), load(engine, None, graphs=False)(x))


def seconds(call: Callable[[], object], count: int) -> float:
    """The median time of `call`, each waited for."""
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@pytest.mark.parametrize("batch", [1, 4096, 16384], ids=["copies are slower", "balanced", "computations are slower"])
def test_time(engine: Path, batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A call at half of the weights takes the time of its copies or that of the resident call, whichever is longer."""
    resident, module = load(engine, None), load(engine, "50%")
    assert module.session.streamer is not None
    summary = module.session.streamer.summary
    (x,) = inputs(1, batch)
    host, target = next(iter(module.session.streamer.hosts.values())), torch.empty(4096, 4096, device="cuda").half()
    for one in (resident, module):
        for _ in range(4):
            one(x)
    rate = 32 * MIB / seconds(lambda: target.copy_(host, non_blocking=True), 20)
    alone, streamed = seconds(lambda: resident(x), 10), seconds(lambda: module(x), 10)
    copies = summary.streamed / rate
    with capsys.disabled():
        print(
            f"\nbatch {batch}: resident {alone * 1e3:.2f} ms, copies {copies * 1e3:.2f} ms at {rate / 1e9:.1f} GB/s, "
            f"streamed {streamed * 1e3:.2f} ms, {streamed / max(alone, copies):.3f} of the longer one"
        )
    near = 0.5 < alone / copies < 2
    assert streamed <= (1.25 if near else 1.1) * max(alone, copies)
