"""CUDA graphs: right under changing shapes, mutated inputs, aliases, changed weights, other streams and threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from tests.runtime.pools import graph_pools
from torch_rtx import RuntimeSettings
from torch_rtx.backend.entry import rtx
from torch_rtx.runtime.admission import PATIENCE
from torch_rtx.runtime.cudagraph import GraphPool

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unspecialized")]


def pool_of(module: torch_rtx.CompiledModule) -> GraphPool:
    assert module.session.pool is not None
    return module.session.pool


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).cuda()


def exported(model: nn.Module, *args: torch.Tensor, **settings: Any) -> torch_rtx.CompiledModule:
    dims = tuple({0: torch.export.Dim("n", min=1, max=64)} for _ in args)
    return torch_rtx.compile(model, args, dynamic_shapes=dims, runtime=RuntimeSettings(**settings))


def test_interleaved_shapes_and_eviction() -> None:
    model = mlp()
    module = exported(model, torch.randn(4, 64, device="cuda"), cuda_graph_pool_size=3)
    results = []
    for size in [*range(1, 6)] * 4 + [size for size in range(6, 9) for _ in range(PATIENCE + 4)]:
        x = torch.randn(size, 64, device="cuda")
        results.append((module(x), model(x)))
    for got, expected in results:  # compared at the end: later replays must not have touched earlier results
        torch.testing.assert_close(got, expected)
    pool = pool_of(module)
    assert len(pool.captured) == 3
    assert pool.captures == 6  # in turn, two of the first five got no graph


def test_more_shapes_than_graphs_stay_bounded() -> None:
    model = mlp(16)
    module = exported(model, torch.randn(4, 16, device="cuda"), cuda_graph_pool_size=2)
    for _ in range(3):
        for size in range(1, 64):
            x = torch.randn(size, 16, device="cuda")
            torch.testing.assert_close(module(x), model(x))
    assert len(pool_of(module).captured) <= 2


class Cache(nn.Module):
    def forward(self, cache: torch.Tensor, position: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, position, x)
        return cache.sum(0) + x


def test_mutated_inputs_are_written_in_place() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Cache(), backend=rtx, fullgraph=True)
    mine, eagers = (torch.zeros(32, 8, device="cuda") for _ in range(2))
    others = [torch.zeros(32, 8, device="cuda") for _ in range(3)]
    before = graph_pools()
    with torch.no_grad():
        for step in range(12):
            x, position = torch.randn(1, 8, device="cuda"), torch.tensor([step], device="cuda")
            got = compiled(mine, position, x)
            torch.testing.assert_close(got, Cache()(eagers, position, x))
            torch.testing.assert_close(mine, eagers)
            other = others[step % 3]  # another cache at another address, in between
            compiled(other, position, x)
            assert torch.equal(other[step], x[0])
    (pool,) = graph_pools() - before
    assert pool.replays >= 12


def test_cache_as_buffer_of_an_engine() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(16, 4))

        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            self.cache.index_copy_(0, position, x)
            return self.cache * 2

    eager = Model().cuda()
    model = Model().cuda()
    module = torch_rtx.compile(model, (torch.randn(1, 4, device="cuda"), torch.tensor([0], device="cuda")))
    held = []
    for step in range(8):
        x, position = torch.randn(1, 4, device="cuda"), torch.tensor([step], device="cuda")
        held.append((module(x, position), eager(x, position)))
    for got, expected in held:
        torch.testing.assert_close(got, expected)
    assert pool_of(module).replays == 7


class Aliases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return x, x[1:], y, y.t(), y, self.weight, y.expand(2, 4, 4)


def test_outputs_that_are_aliases() -> None:
    model = Aliases().cuda()
    module = torch_rtx.compile(model, (torch.randn(4, 4, device="cuda"),))
    for _ in range(4):
        x = torch.randn(4, 4, device="cuda")
        got, expected = module(x), model(x)
        for mine, eager in zip(got, expected, strict=True):
            assert (mine.shape, mine.stride()) == (eager.shape, eager.stride())
            assert torch.equal(mine, eager)
        assert got[0] is x
        assert got[1].data_ptr() == x[1:].data_ptr()
        assert got[5].data_ptr() == model.weight.data_ptr()
    assert pool_of(module).replays == 3


def test_changed_weights_are_seen_by_a_replay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(self.conv(x)).mean((2, 3)))

    torch._dynamo.reset()
    model = Model().cuda().eval()
    compiled = torch.compile(model, backend=rtx, fullgraph=True)
    module = torch_rtx.compile(model, (torch.randn(2, 3, 8, 8, device="cuda"),))
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with torch.no_grad():
        for change in range(6):
            for _ in range(3):
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(module(x), model(x), rtol=1e-3, atol=1e-4)
            if change % 3 == 0:
                model.conv.weight.add_(0.1)  # a recipe depends on it
            elif change % 3 == 1:
                model.fc.weight.mul_(1.5)  # used itself
            else:
                model.load_state_dict(
                    {k: v + 0.01 if v.is_floating_point() else v for k, v in model.state_dict().items()}
                )
    assert pool_of(module).captures == 1  # nothing moved, so that nothing was captured again


def test_refit_keeps_the_graph() -> None:
    a, b = mlp(), mlp()
    module = torch_rtx.compile(a, (torch.randn(4, 64, device="cuda"),))
    x = torch.randn(4, 64, device="cuda")
    results = []
    for source in (a, b, a, b):
        module.refit(source)
        results.append([module(x) for _ in range(3)])
        torch.testing.assert_close(results[-1][-1], source(x))
    assert all(torch.equal(p, q) for p, q in zip(results[0], results[2], strict=True))
    assert pool_of(module).captures == 1


def test_other_streams() -> None:
    model = mlp(256)
    module = torch_rtx.compile(model, (torch.randn(64, 256, device="cuda"),))
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for step in range(64):
        stream = streams[step % 4]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            x = torch.randn(64, 256, device="cuda")
            results.append((module(x), model(x)))
    torch.cuda.synchronize()
    for got, expected in results:
        torch.testing.assert_close(got, expected)


def test_threads() -> None:
    model = mlp(128)
    module = exported(model, torch.randn(8, 128, device="cuda"))
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(40):
                x = torch.randn(1 + (seed + step) % 4, 128, device="cuda", generator=generator)
                got, expected = module(x), model(x)
                if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
                    failures.append(f"thread {seed}, call {step}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool_of(module).disabled is None


def test_random_draws_differ_between_replays() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + torch.rand_like(x), backend=rtx, fullgraph=True)
    x = torch.zeros(1000, device="cuda")
    drawn = [compiled(x) for _ in range(5)]
    assert len({float(t.sum()) for t in drawn}) == 5
    assert all(float(t.min()) >= 0 and float(t.max()) < 1 for t in drawn)


def test_fallback_operator_is_in_the_graph() -> None:
    @torch.library.custom_op("rtx_gpu_test::scale", mutates_args=())
    def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    scale.register_fake(lambda x, factor: torch.empty_like(x))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: scale(x.relu(), 3.0).sum(0), backend=rtx, fullgraph=True)
    before = graph_pools()
    for _ in range(4):
        x = torch.randn(8, 8, device="cuda")
        torch.testing.assert_close(compiled(x), (x.relu() * 3).sum(0))
    (pool,) = graph_pools() - before
    assert pool.replays == 3


def test_what_cannot_be_captured_runs_plain(caplog: pytest.LogCaptureFixture) -> None:
    @torch.library.custom_op("rtx_gpu_test::host_sum", mutates_args=())
    def host_sum(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())  # waits for the device, which a capture must not

    host_sum.register_fake(lambda x: torch.empty_like(x))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: host_sum(x + 1), backend=rtx, fullgraph=True)
    with caplog.at_level("WARNING", "torch_rtx"):
        for _ in range(4):
            x = torch.randn(8, device="cuda")
            torch.testing.assert_close(compiled(x), (x + 1) * (x + 1).sum())
    assert sum("no CUDA graphs" in record.message for record in caplog.records) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_inside_a_callers_own_capture() -> None:
    model = mlp()
    module = torch_rtx.compile(model, (torch.randn(4, 64, device="cuda"),))
    x = torch.randn(4, 64, device="cuda")
    for _ in range(3):
        module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    x.copy_(torch.randn(4, 64, device="cuda"))
    graph.replay()
    torch.testing.assert_close(y, model(x))


def test_disabled() -> None:
    module = exported(mlp(), torch.randn(4, 64, device="cuda"), cuda_graph_strategy="disabled")
    assert module.session.pool is None


def test_data_of_a_parameter_is_replaced() -> None:
    """`parameter.data = other` after a capture: the next call computes with the new memory."""
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, backend=rtx, fullgraph=True)
    x = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))
        model[0].weight.data = torch.randn_like(model[0].weight)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))


def test_a_backward_through_a_replay_is_refused() -> None:
    model = mlp()
    module = exported(model, torch.randn(4, 64, device="cuda"))
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    results = [module(x) for _ in range(PATIENCE + 4)]
    assert len(pool_of(module).captured) == 1
    for result in results:
        torch.testing.assert_close(result.detach(), model(x).detach())
        with pytest.raises(RuntimeError, match="an engine computes no gradients"):
            result.sum().backward()


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_statistics_that_a_replay_writes() -> None:
    """Train-mode batch norm writes its statistics in a replay; the graph of eval mode reads them."""
    torch._dynamo.reset()
    mine, eagers = Statistics().cuda(), Statistics().cuda()
    compiled = torch.compile(mine, backend=rtx, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            for training in (True, True, True, False, False, False):
                mine.train(training)
                eagers.train(training)
                x = torch.randn(16, 8, device="cuda")
                torch.testing.assert_close(compiled(x), eagers(x))
                torch.testing.assert_close(mine.norm.running_var, eagers.norm.running_var)


def test_a_write_that_stays_in_pytorch() -> None:
    """The copy back into a mutated input is a fallback: it is part of the graph all the same."""
    torch._dynamo.reset()
    options = {"torch_executed_ops": ["aten.copy_"]}
    compiled = torch.compile(Cache(), backend=rtx, fullgraph=True, options=options)
    mine, eagers = (torch.zeros(32, 8, device="cuda") for _ in range(2))
    with torch.no_grad():
        for step in range(6):
            x, position = torch.randn(1, 8, device="cuda"), torch.tensor([step], device="cuda")
            torch.testing.assert_close(compiled(mine, position, x), Cache()(eagers, position, x))
            torch.testing.assert_close(mine, eagers)
