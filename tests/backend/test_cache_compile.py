"""Hits through torch.compile and torch_rtx.compile: one engine for other weights, names and processes, refitted."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.ahead import IDS, IMAGE, Net, Tied
from tests.helpers.caching import Traffic
from tests.helpers.compiled import Recorder, check, compile_rtx, same
from tests.paths import ROOT
from torch_rtx import CompilationSettings, SettingsError
from torch_rtx.backend import build, capture, entry, fx_hash, program_cache
from torch_rtx.backend.capture_cache import CaptureEntry
from torch_rtx.errors import PartitionError

X, Y = torch.linspace(-1, 1, 16).view(4, 4), torch.linspace(1, 2, 16).view(4, 4)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def traffic(caplog: pytest.LogCaptureFixture) -> Traffic:
    return Traffic(caplog)


def renamed(model: nn.Module) -> nn.Module:
    """The same architecture behind another path."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(model)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.inner(given)

    return Outer().eval()


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
@torch.no_grad()
def test_other_weights_and_names(traffic: Traffic, recorder: Recorder) -> None:
    """One build serves every model of the architecture, each with its own weights, recipes and names."""
    models = [Net().eval(), Net().eval(), renamed(Net().eval())]
    for model in models:
        torch._dynamo.reset()
        same(compile_rtx(model)(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
    assert traffic.counts == (2, 1)
    names = [[p.name for p in session.graph.parameters] for session in recorder.sessions]
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("inner.0.") for name in names[2])
    assert all("inner.0" in str(node.loc) for node in recorder.sessions[2].graph.nodes if node.loc and node.loc.module)


@torch.no_grad()
@pytest.mark.parametrize("capture", [True, False], ids=["known capture", "new capture"])
def test_a_hit_is_the_program_that_was_built(
    capture: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the letter: names, types, locations."""
    if not capture:
        monkeypatch.setattr(CaptureEntry, "of", lambda *args: None)
    model = Net().eval()
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        results.append(compile_rtx(model)(IMAGE))
    first, second = (session.graph for session in recorder.sessions)
    assert str(first) == str(second)
    assert first == second
    assert torch.equal(*results)


@torch.no_grad()
def test_a_known_capture_is_not_made_again(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warm cache, what remains is Dynamo's own tracing."""
    model = Net().eval()
    expected = compile_rtx(model)(IMAGE)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this was to be skipped")

    for module, name in ((capture, "capture"), (entry, "get_or_build"), (program_cache, "compile_fx")):
        monkeypatch.setattr(module, name, fail)
    torch._dynamo.reset()
    assert torch.equal(compile_rtx(model)(IMAGE), expected)
    assert "without a capture" in traffic("hit")[0]


def test_a_hit_follows_its_weights(traffic: Traffic) -> None:
    """Changed in place or anew, the weights that a hit computes are those of the model."""
    model, other = Net().eval(), Net().eval()
    with torch.no_grad():
        compile_rtx(model)(IMAGE)
        torch._dynamo.reset()
        compiled = compile_rtx(other)
        compiled(IMAGE)
        other.bn.running_var.mul_(3)
        other.q.weight.add_(1)
        same(compiled(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
    assert traffic.counts == (1, 1)


@torch.no_grad()
def test_identical_subgraphs_are_built_once(traffic: Traffic) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).relu()

    blocks = [Block() for _ in range(3)]
    compiled = [torch.compile(block.forward, backend="rtx") for block in blocks]

    def run(x: torch.Tensor, calls: list[Callable[..., torch.Tensor]]) -> torch.Tensor:
        for call in calls:
            x = call(x)
            torch._dynamo.graph_break()
        return x

    same(run(X, compiled), run(X, blocks))
    assert len(traffic("miss")) == 1


def test_threads_build_once(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    build = program_cache.compile_fx
    monkeypatch.setattr(program_cache, "compile_fx", lambda *args: built.append(1) or build(*args))
    model = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (X,))
    threads = [threading.Thread(target=torch_rtx.compile, args=(model,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert traffic.counts == (3, 1)


@pytest.mark.parametrize("same", [True, False])
def test_threads_compile_one_program_one_after_another(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While PyTorch infers a type for one of them, all tensors of the program are on the device `meta`."""
    models = [torch.export.export(nn.ReLU(), (X,)) for _ in range(2)]
    built, there = build._built, threading.Barrier(2)
    met: list[bool] = []

    def waiting(*args: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            there.wait(0.3 if same else 60)
            met.append(True)
        return built(*args)

    monkeypatch.setattr(build, "_built", waiting)
    threads = [threading.Thread(target=torch_rtx.compile, args=(models[0 if same else i],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == ([] if same else [True, True])


def test_the_export_of_another_thread_changes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch switches mkldnn and cuDNN off for the process while it decomposes a program."""
    model, before, exporting = torch.export.export(nn.ReLU(), (X,)), fx_hash.torch_state(), threading.Event()

    def waiting(*args: Any, **kwargs: Any) -> Any:
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            exporting.set()
            time.sleep(0.1)
        return decomposed(*args, **kwargs)

    decomposed = capture.decomposed
    monkeypatch.setattr(capture, "decomposed", waiting)
    thread = threading.Thread(target=torch_rtx.compile, args=(model,))
    thread.start()
    assert exporting.wait(60)
    assert fx_hash.torch_state() == before
    thread.join()


STEPS = """
import sys
import torch
from torch import nn
torch.manual_seed(SEED)
model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).eval()
x = torch.ones(3, 1, 4, 4)
with torch.no_grad():
    compiled = torch.compile(model, backend="rtx")
    torch.testing.assert_close(compiled(x), model(x))
    captured = "torch_rtx.backend.capture" in sys.modules
    torch.testing.assert_close(compiled(x[:2]), model(x[:2]))
torch._dynamo.reset()
torch.compile(model, backend="rtx")(x).sum().backward()
found = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()
model(x).sum().backward()
torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])
"""
LOADED = """
if captured or "torch_rtx.lowering.pipeline" in sys.modules:
    print("built", file=sys.stderr)
"""
LOGGED = """
import logging, sys
logging.basicConfig(stream=sys.stderr, format="%(message)s")
logging.getLogger("torch_rtx.cache").setLevel(logging.INFO)
SEED = 1
"""


def test_another_process(cache_folder: Path, traffic: Traffic) -> None:
    """What this process builds another one finds, whose hashes of strings are others."""
    exec(STEPS, {"SEED": 0})
    assert traffic.counts == (0, 4)
    hashes = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", LOGGED + STEPS + LOADED],
        env={**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert [what for what in said if what in ("hit", "miss", "built")] == [
        "hit"
    ] * 3  # a known step is one hit, and no pass is imported


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "mutation": (lambda x, y: (x.add_(y), x * 2)[1], (X, Y)),
    "two mutations": (lambda x, y: (y.mul_(x), x.sub_(y))[0] + 1, (X, Y)),
    "view of an input": (lambda x, y: (x[1:], x + y), (X, Y)),
    "the same result twice": (lambda x, y: (lambda r: (r, r))(x + y), (X, Y)),
    "equal results": (lambda x, y: (x + y, x + y), (X, Y)),
    "constant": (lambda x, y: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), (X, Y)),
    "complex": (lambda x, y: torch.view_as_real(torch.complex(x, y).conj() * 1j), (X, Y)),
    "complex constant": (lambda x, y: (x + torch.tensor([1j], dtype=torch.complex128)).abs(), (X, Y)),
    "nested graph": (lambda x, y: torch.cond(x.sum() > y.sum(), lambda a: a.sin(), lambda a: a.cos(), (x,)), (X, Y)),
    "size of data": (lambda x, y: x[x > 0] * 2, (X, Y)),
    "number of data": (lambda x, y: x * y.sum().item(), (X, Y)),
    "expanded": (lambda x, y: x + y, (X[:1].expand(4, 4), Y)),
    "transposed": (lambda x, y: x.t().contiguous() + y, (X.t(), Y)),
    "no dimension": (lambda x, y: x * y, (X, torch.tensor(2.0))),
    "number": (lambda x, y: x * y, (X, 3)),
    "float": (lambda x, y: x * y, (X, 2.5)),
    "random": (lambda x, y: torch.nn.functional.dropout(x, 0.0, training=True) + y, (X, Y)),
    "inputs that are one": (lambda x, y: x + y, (X, X)),
    "a view of the other input": (lambda x, y: (x.add_(1), y * 2)[1], (X, X[1:])),
    "gradients off inside": (lambda x, y: x * torch.no_grad()(lambda: y + 1)(), (X, Y)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hit_computes_what_a_build_does(name: str, traffic: Traffic) -> None:
    """Also where AOTAutograd's own wrappers have work to do, and where nodes fall back."""
    function, args = CASES[name]
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for _ in range(2):
            torch._dynamo.reset()
            check(function, *args, compiled=compile_rtx(function))
    assert traffic.counts == (1, 1)


def test_a_python_fallback_is_that_of_the_model(traffic: Traffic, recorder: Recorder) -> None:
    """Nested graphs are no part of an entry: a hit calls those of the graph that it was made for."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda a: a * 2, lambda a: a * 3, (x,)) + 1

    for _ in range(2):
        torch._dynamo.reset()
        check(model, X + 1)
        check(model, X - 1)
    assert recorder.fallbacks
    assert len(traffic("miss")) == 1


def test_custom_operators(traffic: Traffic) -> None:
    @torch.library.custom_op("rtx_cache_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)
    for _ in range(2):
        torch._dynamo.reset()
        check(lambda x: twice(x) + 1, X)
    assert traffic.counts == (1, 1)
    assert "without a capture" not in traffic("hit")[0]


@torch.no_grad()
def test_dynamic_shapes(traffic: Traffic) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    for _ in range(2):
        torch._dynamo.reset()
        compiled = compile_rtx(model)
        for rows in (2, 3, 5):
            x = torch.ones(rows, 4)
            same(compiled(x), model(x))
    assert traffic.counts == (2, 2)


def test_a_guard_that_the_capture_adds_is_not_lost(traffic: Traffic) -> None:
    """Symbolic sizes: AOTAutograd may specialize while it traces, so that such a capture is always made."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1) + 1

    for _ in range(2):
        torch._dynamo.reset()
        compiled = compile_rtx(model, dynamic=True)
        for rows in (4, 6, 7, 8):
            if rows % 2 == 0:
                same(compiled(torch.ones(rows, 1)), model(torch.ones(rows, 1)))
            else:
                with pytest.raises(Exception, match="shape"):
                    compiled(torch.ones(rows, 1))


def test_training(traffic: Traffic) -> None:
    """Forward and backward graphs are engines like any other."""
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
        x = X.clone().requires_grad_()
        compile_rtx(model)(x).sum().backward()
        found = [parameter.grad for parameter in (*model.parameters(), x)]
        for parameter in (*model.parameters(), x):
            parameter.grad = None
        model(x).sum().backward()
        same(found, [parameter.grad for parameter in (*model.parameters(), x)])
    assert traffic.counts == (1, 2)
    assert "without a capture" in traffic("hit")[0]


def test_gradients_on_and_off(traffic: Traffic) -> None:
    """A capture without gradients is none for calls that need them."""
    model = nn.Linear(4, 4)
    for grad in (False, True, False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            assert compile_rtx(model)(X).requires_grad == grad


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """Ambient autocast changes what is traced, and no graph says so."""

    def run() -> torch.Tensor:
        torch._dynamo.reset()
        return compile_rtx(torch.nn.functional.linear)(X, Y)

    first = run()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        assert run().dtype == (torch.bfloat16 if inside else torch.float32)
    same(run(), first)


def test_modules_of_one_graph(traffic: Traffic) -> None:
    """A hit serves several modules in turn, as a build does."""
    compiled = torch.compile(lambda m, x: m(x), backend="rtx")
    with torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            modules = [nn.Linear(4, 4), nn.Linear(4, 4)]
            for module in (*modules, *modules):
                same(compiled(module, X), module(X))


def test_options(traffic: Traffic, cache_folder: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[int, int]:
        torch._dynamo.reset()
        traffic.clear()
        compile_rtx(torch.relu, options=options)(X)
        return traffic.counts

    assert run(cache_built_engines=False) == (0, 1)
    assert not cache_folder.exists()
    assert run(cache_built_engines=False, reuse_cached_engines=False) == (0, 0)
    assert run(engine_cache_dir=str(tmp_path / "own")) == (0, 1)
    assert run(engine_cache_dir=str(tmp_path / "own")) == (1, 0)
    assert len(list((tmp_path / "own" / "engines").iterdir())) == 2
    assert run() == (0, 1)
    assert run(reuse_cached_engines=False) == (0, 0)
    assert run() == (1, 0)
    assert run(dump_dir=str(tmp_path / "dump")) == (0, 0)
    assert list((tmp_path / "dump" / "graph_000").glob("*_finish.rtxir"))


def test_what_the_user_asked_for_is_checked_before_the_cache(traffic: Traffic) -> None:
    """A hit must not hide an error that a build would raise."""
    options: dict[str, Any] = {"torch_executed_ops": ["aten.relu"]}
    compile_rtx(torch.relu, options=options)(X)
    torch._dynamo.reset()
    with pytest.raises(PartitionError, match="require_full_compilation is set"):
        compile_rtx(torch.relu, options={**options, "require_full_compilation": True})(X)
    with pytest.raises(SettingsError, match="no operator rtx_cache_test.absent"):
        torch_rtx.compile(nn.ReLU(), (X,), settings=CompilationSettings(torch_executed_ops={"rtx_cache_test.absent"}))


def test_fallback_on_error_holds_for_a_known_capture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"fallback_on_error": True}
    compile_rtx(torch.relu, options=options)(X)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no session today")

    monkeypatch.setattr(entry, "Session", fail)
    torch._dynamo.reset()
    assert torch.equal(compile_rtx(torch.relu, options=options)(X), X.relu())
    assert "this graph runs in PyTorch: no session today" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no session today"):
        compile_rtx(torch.relu)(X)


def test_a_miss_says_what_differs(traffic: Traffic) -> None:
    compile_rtx(torch.relu)(X)
    torch._dynamo.reset()
    compile_rtx(torch.relu, options={"min_block_size": 2})(X)
    assert "the cache has no entries" in traffic("miss")[0]
    assert traffic("miss")[1].endswith("settings: min_block_size 1 -> 2")


# ---- ahead of time ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("make", "given"), [(Net, IMAGE), (Tied, IDS)])
def test_ahead_of_time(make: Callable[[], nn.Module], given: torch.Tensor, traffic: Traffic, tmp_path: Path) -> None:
    """The second model's engine is the first one's with its own weights and names, in a file too."""
    first, second = make().eval(), renamed(make().eval())
    torch_rtx.compile(first, (given,))
    module = torch_rtx.compile(second, (given,))
    assert traffic.counts == (1, 1)
    same(module(given), second(given), atol=1e-5, rtol=1e-4)
    assert module.engine.manifest.inputs == ("given",)
    torch_rtx.save(module, tmp_path / "cached.rtx")
    torch_rtx.save(
        torch_rtx.compile(second, (given,), settings=CompilationSettings(reuse_cached_engines=False)),
        tmp_path / "b.rtx",
    )
    loaded = torch_rtx.load(tmp_path / "cached.rtx", weights=second)
    assert torch.equal(loaded(given), module(given))
    assert (tmp_path / "cached.rtx").read_bytes() == (tmp_path / "b.rtx").read_bytes()


def test_inputs_that_are_called_like_values_of_the_program(traffic: Traffic) -> None:
    class First(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a + b).relu() * a

    class Second(nn.Module):
        def forward(self, v2: torch.Tensor, v3: torch.Tensor) -> torch.Tensor:
            return (v2 + v3).relu() * v2

    torch_rtx.compile(First(), (X, Y))
    module = torch_rtx.compile(Second(), (X, Y))
    assert traffic.counts == (1, 1)
    same(module(X, Y), Second()(X, Y))
    with pytest.raises(torch_rtx.InputError):
        module(X, Y.double())


def test_state_and_constants_are_the_models(traffic: Traffic) -> None:
    """Buffers outside of the state dict travel in the engine: their data is the model's own, not the entry's."""

    class Shift(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.register_buffer("by", torch.full((4,), by), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.by

    for by in (1.0, 2.0):
        same(torch_rtx.compile(Shift(by), (X,))(X), X + by)
    assert traffic.counts == (1, 1)


def test_cuda_engines_without_a_gpu(traffic: Traffic) -> None:
    """The device is in the key, and a hit is for the device that it was asked for."""
    if sys.platform != "linux":
        return
    for device in ("cpu", "cuda", "cuda"):
        module = torch_rtx.compile(nn.Linear(4, 4), (X,), settings=CompilationSettings(device=device))
        assert module.engine.manifest.device == device
    assert traffic.counts == (1, 2)


@torch.no_grad()
def test_kernels_are_kept(traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit brings the kernels, bit for bit and without Triton; other targets are another engine."""

    def built(model: nn.Module, targets: str | list[str]) -> torch_rtx.CompiledModule:
        return torch_rtx.compile(model, (X,), settings=CompilationSettings(device="cuda", targets=targets))

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8)).eval()

    torch_rtx.save(built(make(), "sm_86"), tmp_path / "first.rtx")
    traffic.clear()
    with monkeypatch.context() as without:
        without.setattr(program_cache, "kernels_of", None)
        again = built(make(), "sm_86")
    assert traffic.counts == (1, 0)
    torch_rtx.save(again, tmp_path / "second.rtx")
    assert (tmp_path / "first.rtx").read_bytes() == (tmp_path / "second.rtx").read_bytes()
    assert {str(target) for target in again.engine.kernels.targets} == {"sm_86"}
    model = make()
    again.refit(model)
    same(again(X), model(X), atol=1e-5, rtol=1e-4)
    built(make(), ["sm_86", "ptx"])
    assert traffic.counts == (1, 1)
    with monkeypatch.context() as other:
        other.setattr(fx_hash, "assemblers", lambda: {"TRITON_PTXAS_PATH": "/opt/ptxas (1, 2)"})
        built(make(), "sm_86")
    assert traffic.counts == (1, 2)
    assert "TRITON_PTXAS_PATH none -> /opt/ptxas (1, 2)" in traffic("miss")[-1]
