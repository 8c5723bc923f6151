"""CUDA graphs of generated kernels: nothing is copied at their borders, and results are right whatever callers do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

import torch_rtx
from tests.runtime.pools import graph_pools, node_kinds
from torch_rtx import CompilationSettings, RuntimeSettings
from torch_rtx.backend.entry import rtx

pytestmark = pytest.mark.gpu
GENERATED = CompilationSettings(targets="current")


def compiled(model: nn.Module, *args: torch.Tensor, dynamic: bool = False, **settings: Any) -> torch_rtx.CompiledModule:
    """Every kernel that can be generated is."""
    dims = tuple({0: torch.export.Dim("n", min=1, max=64)} for _ in args) if dynamic else None
    runtime = RuntimeSettings(tactics="kernel", specialization_strategy="none", **settings)
    return torch_rtx.compile(model, args, dynamic_shapes=dims, settings=GENERATED, runtime=runtime)


def kinds_of(module: torch_rtx.CompiledModule) -> list[Counter[str]]:
    assert module.session.pool is not None
    assert module.session.pool.disabled is None
    return [node_kinds(found.graph) for found in module.session.pool.captured.values()]


class Block(nn.Module):
    """Norm, product, activation and residual: reads its input more than once."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(F.gelu(self.fc(self.norm(x))))


def block() -> nn.Module:
    return Block().cuda().half()


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def assert_all_close(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)


def test_kernels_alone_are_captured_without_copies() -> None:
    model = block()
    module = compiled(model, halves(32, 64))
    held = []
    with torch.no_grad():
        for step in range(20):
            x = halves(32, 64)
            held.append((module(x), model(x)))
            if step % 3 == 0:
                del held[step // 2]  # its memory is used again
    assert_all_close(held)
    (kinds,) = kinds_of(module)
    assert set(kinds) == {"KERNEL"}


def test_a_library_call_gets_copies() -> None:
    """What it reads and writes is copied, the other input is not."""

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.linalg.inv(x), F.gelu(y) * 2

    x, y = torch.eye(8, device="cuda"), halves(1000)
    module = compiled(Model(), x, y)
    pairs = []
    for _ in range(6):
        x, y = torch.eye(8, device="cuda") + torch.rand(8, 8, device="cuda") / 100, halves(1000)
        pairs += list(zip(module(x, y), Model()(x, y), strict=True))
    assert_all_close(pairs)
    pool = module.session.pool
    assert pool is not None
    if pool.disabled is None:  # a library of linear algebra may refuse captures
        assert kinds_of(module)[0]["MEMCPY"] >= 2


def test_shapes_in_turn() -> None:
    model = block()
    module = compiled(model, halves(8, 64), dynamic=True, cuda_graph_pool_size=3)
    with torch.no_grad():
        pairs = [(module(x), model(x)) for x in (halves(1 + step % 5, 64) for step in range(60))]
    assert_all_close(pairs)
    assert all(set(kinds) == {"KERNEL"} for kinds in kinds_of(module))


def test_inputs_at_odd_addresses_and_with_other_strides() -> None:
    model = block()
    module = compiled(model, halves(32, 64))
    base = halves(1 << 16)
    with torch.no_grad():
        pairs = []
        for step in range(24):
            shift = step % 8 if step > 2 else 0
            strides = (64, 1) if step % 3 else (1, 32)
            x = base.as_strided((32, 64), strides if step > 2 else (64, 1), shift)
            pairs.append((module(x), model(x)))
    assert_all_close(pairs)
    assert set(kinds_of(module)[0]) == {"KERNEL"}


def test_a_result_is_the_next_input() -> None:
    """The result of a call is freed when the next one has read it, which may be before that one has run."""
    model = block()
    module = compiled(model, halves(32, 64))
    with torch.no_grad():
        for _ in range(3):
            x = y = halves(32, 64) / 8
            for _ in range(20):
                x, y = module(x) / 2, model(y) / 2
            torch.testing.assert_close(x, y, rtol=3e-2, atol=3e-2)


def test_the_same_tensor_twice_and_results_that_are_aliases() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            z = F.gelu(x) * y
            return z, z.t(), x[1:], z[:, :8]

    module = compiled(Model(), halves(16, 16), halves(16, 16))
    held = []
    for step in range(8):
        x = halves(16, 16)
        y = x if step % 2 else halves(16, 16)
        got = module(x, y)
        assert got[2].data_ptr() == x[1:].data_ptr()
        held += list(zip(got, Model()(x, y), strict=True))
    assert_all_close(held)
    assert all(got.stride() == expected.stride() for got, expected in held)
    assert "MEMCPY" not in kinds_of(module)[0]


def test_streams_and_threads() -> None:
    model = block()
    module = compiled(model, halves(8, 64), dynamic=True)
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            held = []
            for step in range(60):
                x = torch.randn(1 + (seed + step) % 4, 64, device="cuda", generator=generator).half()
                held.append((module(x), model(x)))
            for step, (got, expected) in enumerate(held):
                if not torch.allclose(got, expected, rtol=5e-3, atol=5e-3):
                    failures.append(f"thread {seed}, call {step}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(set(kinds) == {"KERNEL"} for kinds in kinds_of(module))


class Cache(nn.Module):
    def forward(self, cache: torch.Tensor, position: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, position, F.gelu(x))
        return F.softmax(cache, -1) * x


def test_caches_are_written_in_place() -> None:
    torch._dynamo.reset()
    options = {"targets": "current", "tactics": "kernel", "specialization_strategy": "none"}
    run = torch.compile(Cache(), backend=rtx, fullgraph=True, options=options)
    mine, eagers = (torch.zeros(32, 8, device="cuda") for _ in range(2))
    others = [torch.zeros(32, 8, device="cuda") for _ in range(3)]
    pairs = []
    with torch.no_grad():
        for step in range(12):
            x, position = torch.randn(1, 8, device="cuda"), torch.tensor([step], device="cuda")
            pairs.append((run(mine, position, x), Cache()(eagers, position, x)))
            torch.testing.assert_close(mine, eagers)
            run(others[step % 3], position, x)
    assert_all_close(pairs)


def test_static_outputs() -> None:
    model = block()
    module = compiled(model, halves(32, 64), static_outputs=True)
    with torch.no_grad():
        for _ in range(2):
            module(halves(32, 64))
        first = module(halves(32, 64))
        x = halves(32, 64)
        second = module(x)
        assert first.data_ptr() == second.data_ptr()
        assert_all_close([(second, model(x))])


def test_with_weight_streaming(tmp_path: Path) -> None:
    model = nn.Sequential(*(Block(512) for _ in range(4))).cuda().half()
    path = tmp_path / "model.rtx"
    torch_rtx.save(torch_rtx.compile(model, (halves(16, 512),), settings=GENERATED), path)
    settings = RuntimeSettings(tactics="kernel", weight_streaming_budget="50%", specialization_strategy="none")
    module = torch_rtx.load(path, device="cuda", settings=settings, trust_binaries=True)
    module.refit(model)
    with torch.no_grad():
        pairs = [(module(x), model(x)) for x in (halves(16, 512) for _ in range(10))]
    assert_all_close(pairs)
    (kinds,) = kinds_of(module)
    assert module.session.streamer is not None
    assert kinds["MEMCPY"] == module.session.streamer.summary.copies


@pytest.mark.parametrize("targets", [None, "current"])
def test_frames_share_memory(targets: str | None) -> None:
    """Three graphs of one model, with several shapes: results that live on are right, and the memory is one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
                torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    model = Model().cuda().half()
    before = graph_pools()
    options = {"targets": targets, "tactics": "kernel", "specialization_strategy": "none"}
    run = torch.compile(model, backend=rtx, dynamic=False, options=options)
    pairs = []
    with torch.no_grad():
        for step in range(24):
            x = halves((8, 16)[step // 2 % 2], 64)
            pairs.append((run(x), model(x)))
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            pairs += [(run(x), model(x)) for x in (halves(16, 64) for _ in range(4))]
        torch.cuda.synchronize()
        pairs += [(run(x), model(x)) for x in (halves(16, 64) for _ in range(4))]
    assert_all_close(pairs)
    pools = graph_pools() - before
    assert len(pools) >= 3
    assert all(pool.replays > 8 and pool.disabled is None for pool in pools)
    assert len({id(pool.memory) for pool in pools}) == 1
    assert len({found.graph.pool() for pool in pools for found in pool.captured.values()}) == 1
