"""Weight streaming on the CPU: the code of the GPU with copies that end at once, or as late as they may."""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import torch_rtx
from tests.doubles.streams import FakeCuda, FakeStream, Recorded
from tests.helpers.ahead import IDS, Tied
from tests.helpers.compiled import compile_rtx
from torch_rtx import CompilationSettings, RuntimeSettings, SettingsError
from torch_rtx.ir import Graph, Node
from torch_rtx.irparse import parse
from torch_rtx.runtime import streaming
from torch_rtx.runtime.streaming import Streamer, Summary, weight_uses
from torch_rtx.runtime.streamplan import WeightUse, make_plan
from torch_rtx.settings import read_budget


class Late:
    """Copies that are made when somebody waits for them, or for a later one: the latest that CUDA could."""

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def copy(self, index: int, target: torch.Tensor, source: torch.Tensor) -> None:
        self.waiting[index] = target, source

    def wait(self, index: int) -> None:
        for earlier in [number for number in self.waiting if number <= index]:
            target, source = self.waiting.pop(earlier)
            target.copy_(source)

    def leave(self) -> None:
        assert not self.waiting

    def begin(self) -> None:
        pass

    follow = enter = finish = begin


@pytest.fixture(autouse=True)
def _setting(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    monkeypatch.setattr(streaming, "TINY", 512)  # the models are small
    with torch.no_grad():
        yield


def results(module: Any, args: Any, kwargs: Any = None) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(module(*args, **(kwargs or {})))]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def streamer_of(module: torch_rtx.CompiledModule) -> Streamer:
    assert module.session.streamer is not None
    return module.session.streamer


def settings(budget: int | str) -> RuntimeSettings:
    return RuntimeSettings(weight_streaming_budget=budget)


def least(path: Path) -> int:
    """The smallest budget of an engine, as the error says."""
    with pytest.raises(SettingsError) as error:
        torch_rtx.load(path, settings=settings(0))
    found = re.search(r"the least that works for this engine is (\d+) bytes", str(error.value))
    assert found is not None
    return int(found[1])


def bytes_of(graph: Graph) -> int:
    return sum(-(-use.size // 512) * 512 for use in weight_uses(graph))


class Deep(nn.Module):
    """Layers of one size, a weight of each used through a view, and one that is used at both ends."""

    def __init__(self, layers: int = 6, width: int = 48) -> None:
        super().__init__()
        self.ends = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ends(x)
        for layer in self.layers:
            x = layer(x).relu() + x.tanh() @ layer.weight[: x.shape[-1]].t()
        return self.ends(x)


X = torch.linspace(-1, 1, 4 * 48).view(4, 48)


@pytest.fixture
def deep(tmp_path: Path) -> tuple[Deep, Deep, Path]:
    """A model, another of other weights, and the engine of both in a file."""
    a, b = Deep(), Deep()
    path = tmp_path / "deep.rtx"
    torch_rtx.save(torch_rtx.compile(a, (X,)), path)
    return a, b, path


@pytest.mark.parametrize("name", ["resnet50", "gpt2", "llama_decode"])
def test_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what the resident engine computes, again and after refits, whenever the copies happen."""
    pytest.importorskip("transformers")
    from benchmarks import models

    (a, args, kwargs), (b, _, _) = models.build(name), models.build(name, seed=1)
    resident = torch_rtx.compile(copy.deepcopy(a), args, kwargs)
    path = tmp_path / "model.rtx"
    torch_rtx.save(resident, path)
    save_model(b, str(tmp_path / "b.safetensors"))
    expected = {}
    for key, model in (("a", a), ("b", b)):
        resident.refit(model)
        expected[key] = [results(resident, args, kwargs) for _ in range(2)]
    assert not equal(expected["a"][0], expected["b"][0])
    low, whole = least(path), bytes_of(resident.engine.graph)
    for share, copies in ((0.3, Late), (0.5, streaming._AtOnce), (0.8, Late)):
        monkeypatch.setattr(streaming, "_AtOnce", copies)
        budget = max(low, int(share * whole))
        module = torch_rtx.load(path, weights=copy.deepcopy(a), settings=settings(budget))
        assert isinstance(streamer_of(module)._copies, copies)
        summary = streamer_of(module).summary
        assert summary.resident + summary.staging <= budget < whole == summary.resident + summary.host
        for key, source in (("a", None), ("b", tmp_path / "b.safetensors"), ("a", a.state_dict())):
            if source is not None:
                module.refit(source)
            for call in expected[key]:
                assert equal(results(module, args, kwargs), call)


def test_generated_code(deep: tuple[Deep, Deep, Path]) -> None:
    """Each use is between the `wait` and the `release` of its load; without them it is an error, not stale memory."""
    a, _, path = deep
    module = torch_rtx.load(path, weights=a, settings=settings(least(path)))
    streamer, source = streamer_of(module), module.session.source
    lines = source.splitlines()
    names = [weight.value.name for weight in module.engine.graph.weights]
    assert lines.index("    _stream.begin()") < next(i for i, line in enumerate(lines) if "_stream.wait" in line)
    assert len(re.findall(r"_stream\.wait", source)) == len(streamer.plan.loads) > 7
    assert len({load.weight for load in streamer.plan.loads}) < len(streamer.plan.loads)  # `ends` is copied twice
    for index, load in enumerate(streamer.plan.loads):
        begin = lines.index(f"    {names[load.weight]} = _stream.wait({index})")
        released = f"    _stream.release({index})"
        assert released not in lines or begin < lines.index(released)
    without = re.sub(r"\n    (\w+) = _stream\.wait\(0\)", "", source)
    namespace = dict(module.session.specializer.base.code.run.__globals__)  # type: ignore[attr-defined]
    exec(without, namespace)
    with pytest.raises(UnboundLocalError):
        namespace["run"]([X], module._store.values)


def test_profiles(deep: tuple[Deep, Deep, Path]) -> None:
    """The code that is measured streams as well."""
    a, _, path = deep
    module = torch_rtx.load(path, weights=a, settings=settings("50%"))
    before = results(module, (X,))
    profile = torch_rtx.profile(module, X, repeats=2, warmup=1)
    assert len(profile.rows) >= len(module.engine.graph.nodes)
    assert equal(results(module, (X,)), before)


def test_inlined_kernels(tmp_path: Path) -> None:
    """Where kernels can't be launched their bodies run: each has the weights of the kernel that it stands for."""
    model = Deep()
    built = torch_rtx.compile(model, (X,), settings=CompilationSettings(device="cuda", targets=("sm_89",)))
    assert any(node.kind == "kernel" for node in built.engine.graph.nodes)
    torch_rtx.save(built, tmp_path / "deep.rtx")
    expected = results(torch_rtx.load(tmp_path / "deep.rtx", weights=model, device="cpu"), (X,))
    module = torch_rtx.load(tmp_path / "deep.rtx", weights=model, device="cpu", settings=settings("50%"))
    assert streamer_of(module).plan.loads
    assert equal(results(module, (X,)), expected)


def one_place(count: int) -> tuple[FakeCuda, Recorded]:
    """A streamer of weights that take turns in one place, each used by one node."""
    weights = [WeightUse(f"w{index}", 512, ((index, index),)) for index in range(count)]
    cuda = FakeCuda()
    return cuda, Recorded(cuda, FakeStream("copies"), make_plan(weights, 512), [512] * count)


def test_lines_around_bodies() -> None:
    """A weight is there before the first of the nodes that stand for a kernel, and released after the last of them."""
    _, recorded = one_place(3)
    assert recorded.streamer is not None
    node = Node("extern", "aten.neg.default", (), ())
    first, before, after = recorded.streamer.lines(recorded.graph, [[node], [node] * 3, [node] * 2])
    assert first == ["del w0, w1, w2", "_stream.begin()"]
    assert before == {0: ["w0 = _stream.wait(0)"], 1: ["w1 = _stream.wait(1)"], 4: ["w2 = _stream.wait(2)"]}
    assert after == {0: ["_stream.release(0)"], 3: ["_stream.release(1)"]}


def test_callers_graphs_are_not_ordered_by_events() -> None:
    """No event from outside may be waited for in a capture, nor one of the capture outside; a refit waits for calls."""
    cuda, recorded = one_place(3)
    streamer = recorded.streamer
    assert streamer is not None
    recorded.call(range(3))
    done = streamer._copies._done  # type: ignore[attr-defined]
    cuda.current, cuda.capturing = FakeStream("captured"), True
    recorded.call(range(3))
    assert done not in cuda.current.waited
    assert streamer._copies._done is done  # type: ignore[attr-defined]
    cuda.current, cuda.capturing = FakeStream("other"), False
    recorded.call(range(3))
    assert done in cuda.current.waited
    done = streamer._copies._done  # type: ignore[attr-defined]
    with streamer.idle():
        assert done.synchronized


USES = """graph fused {
  input x: f32[64, 64]
  parameter 'a': f32[64, 64]
  parameter 'b': f32[64, 64]
  parameter 'c': f32[64, 64]
  parameter 'd': f32[64, 64]
  parameter 'e': f32[64, 64]
  parameter 'f': f32[8]
  parameter 'g': f32[64, 64].cpu
  weight a: f32[64, 64] = 'a'
  weight b: f32[64, 64] = 'b'
  weight c: f32[64, 64] = 'c'
  weight d: f32[64, 64] = 'd'
  weight e: f32[64, 64] = 'e'
  weight f: f32[8] = 'f'
  weight g: f32[64, 64].cpu = 'g'
  v0: f32[64, 64](1, 64) = view aten.t.default(self=a)
  v1: f32[64, 64] = extern aten.mm.default(self=x, mat2=b)
  v2: f32[64, 64] = view aten.t.default(self=v0)
  v3: f32[64, 64] = extern aten.mm.default(self=v1, mat2=b)
  v4: f32[64, 64] = fallback python(index=0, inputs=[v3, c])
  v5: f32[64, 64] = extern aten.mm.default(self=v4, mat2=v2)
  v6: f32[64, 64](1, 64) = view aten.t.default(self=d)
  aten.copy_.default(self=e, src=v5)
  v7: f32[64, 64] = extern aten.mm.default(self=v5, mat2=a)
  return [v7, v6, f]
}
"""


def test_weight_uses() -> None:
    """Views keep a weight in use; what is returned, written, tiny, elsewhere or given to Python stays on the device."""
    graph = parse(USES.replace("  aten.copy_", "  extern aten.copy_"))
    uses = {use.name: use for use in weight_uses(graph)}
    assert uses["a"].spans == ((0, 5), (8, 8))
    assert uses["b"].spans == ((1, 1), (3, 3))
    assert uses["a"].size == 64 * 64 * 4
    assert uses["g"].size == 0  # it takes no memory of the device
    assert {name for name, use in uses.items() if use.fixed} == {"c", "d", "e", "f", "g"}


def test_a_view_that_does_not_say_so_is_one() -> None:
    """What `_unsafe_view` returns lies in the memory of the weight."""
    graph = parse("""\
graph fused {
  input x: f32[64, 64]
  parameter 'a': f32[64, 64]
  weight w: f32[64, 64] = 'a'
  v: f32[64, 64] = extern aten._unsafe_view.default(self=w, size=[64, 64])
  b: f32[64, 64] = extern aten.exp.default(self=x)
  c: f32[64, 64] = extern aten.mm.default(self=b, mat2=v)
  return [c]
}
""")
    (use,) = weight_uses(graph)
    assert use.spans == ((0, 2),)


class Constant(nn.Module):
    """A tensor that no state dict has, and one that is computed from it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(48, 48), nn.Linear(48, 48)
        self.table = torch.linspace(0, 1, 48 * 48).view(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x) @ self.table) @ (self.table * 2 + 1).t())


def test_constants(tmp_path: Path) -> None:
    model = Constant()
    resident = torch_rtx.compile(model, (X,))
    torch_rtx.save(resident, tmp_path / "model.rtx")
    module = torch_rtx.load(tmp_path / "model.rtx", model, settings=settings(least(tmp_path / "model.rtx")))
    assert streamer_of(module).hosts.keys() >= {
        i for i, w in enumerate(module.engine.graph.weights) if w.value.type.shape == (48, 48)
    }
    for _ in range(2):
        assert equal(results(module, (X,)), results(resident, (X,)))
        model.last.weight.add_(1)


def test_attached_models_are_followed(deep: tuple[Deep, Deep, Path]) -> None:
    """A change in place of a live model's parameter is seen by the next call, be the weight streamed or not."""
    model, _, path = deep
    module = torch_rtx.load(path, weights=model, settings=settings("50%"))
    resident = torch_rtx.load(path, weights=model)
    before = results(module, (X,))
    for parameter in model.parameters():
        parameter.mul_(1.5)
        now = results(module, (X,))
        assert not equal(now, before)
        assert equal(now, results(resident, (X,)))
        before = now
    addresses = [value.data_ptr() for value in module._store.values]
    generation = module._store.generation
    with torch.inference_mode():
        module(X)
    assert [value.data_ptr() for value in module._store.values] == addresses
    assert module._store.generation == generation


def test_refit_keeps_addresses_and_failing_changes_nothing(deep: tuple[Deep, Deep, Path]) -> None:
    a, b, path = deep
    module = torch_rtx.load(path, settings=settings("50%"))
    module.refit(a)
    generation, hosts = module._store.generation, streamer_of(module).hosts
    before, addresses = results(module, (X,)), [host.data_ptr() for host in hosts.values()]
    state = b.state_dict()
    state["layers.3.weight"] = state["layers.3.weight"].double()
    with pytest.raises(torch_rtx.RefitError, match="nothing was changed"):
        module.refit(state)
    assert equal(results(module, (X,)), before)
    module.refit(b.state_dict())
    assert not equal(results(module, (X,)), before)
    module.refit(a)
    assert equal(results(module, (X,)), before)
    assert module._store.generation == generation
    assert [host.data_ptr() for host in hosts.values()] == addresses
    b.layers[0].weight.zero_()  # nothing of the caller's is kept
    assert equal(results(module, (X,)), before)


def test_values_in_the_engine(deep: tuple[Deep, Deep, Path], tmp_path: Path) -> None:
    """An engine that is saved with its weights streams them, and is saved with those that it was given."""
    a, b, _ = deep
    unstripped = CompilationSettings(strip_weights=False)
    built = torch_rtx.compile(a, (X,), settings=unstripped, runtime=settings("50%"))
    built.refit(b)
    expected = results(built, (X,))
    torch_rtx.save(built, tmp_path / "whole.rtx")
    for budget in ("50%", "100%", None):
        module = torch_rtx.load(tmp_path / "whole.rtx", settings=RuntimeSettings(weight_streaming_budget=budget))
        assert equal(results(module, (X,)), expected)
        assert (module.session.streamer is None) == (budget != "50%")


def test_tied_weights(tmp_path: Path) -> None:
    model = Tied()
    torch_rtx.save(torch_rtx.compile(model, (IDS,)), tmp_path / "tied.rtx")
    module = torch_rtx.load(tmp_path / "tied.rtx", weights=model, settings=settings("100%"))
    assert module.session.streamer is None
    assert torch.equal(module(IDS), torch_rtx.load(tmp_path / "tied.rtx", weights=model)(IDS))


def test_threads_share_a_session(deep: tuple[Deep, Deep, Path]) -> None:
    """Many threads call one module while another gives it other weights: every result is that of one set of weights."""
    a, b, path = deep
    module, resident = (torch_rtx.load(path, settings=s) for s in (settings(least(path)), None))
    inputs = [X * (1 + index) for index in range(16)]
    expected = []
    for model in (a, b):
        resident.refit(model)
        expected.append([resident(x) for x in inputs])
    module.refit(a)
    wrong: list[int] = []
    seen: set[bool] = set()
    running, stop = threading.Barrier(17), threading.Event()

    def call(index: int) -> None:
        running.wait()
        while not stop.is_set():
            got = module(inputs[index])
            fits = [torch.equal(got, known[index]) for known in expected]
            seen.update(fits[:1])
            wrong.extend([index] * (True not in fits))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    running.wait()
    for count in range(1000):
        module.refit((b, a)[count % 2])
        if count % 2 and seen == {True, False}:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert seen == {True, False}
    assert all(torch.equal(module(x), known) for x, known in zip(inputs, expected[0], strict=True))


def test_refit_waits_for_calls(deep: tuple[Deep, Deep, Path]) -> None:
    """Nothing writes to host memory while a call may still copy from it."""
    a, b, path = deep
    module = torch_rtx.load(path, weights=a, settings=settings("50%"))
    streamer = streamer_of(module)
    refitted = threading.Thread(target=module.refit, args=(b,))
    hosts = {index: host.clone() for index, host in streamer.hosts.items()}
    with streamer.turn():
        refitted.start()
        refitted.join(0.2)
        assert refitted.is_alive()
        assert all(torch.equal(streamer.hosts[index], host) for index, host in hosts.items())
    refitted.join()
    assert any(not torch.equal(streamer.hosts[index], host) for index, host in hosts.items())


def test_a_failed_call_does_no_harm(deep: tuple[Deep, Deep, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    a, _, path = deep
    module = torch_rtx.load(path, weights=a, settings=settings(least(path)))
    expected = results(module, (X,))
    streamer, count = streamer_of(module), 0
    release = streamer.release

    def failing(index: int) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("out of memory")
        release(index)

    monkeypatch.setattr(streamer, "release", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        module(X)
    assert equal(results(module, (X,)), expected)


@pytest.mark.quick
def test_budgets(deep: tuple[Deep, Deep, Path], caplog: pytest.LogCaptureFixture) -> None:
    a, _, path = deep
    for budget in ("100%", "1GiB", "1 GB", 1 << 40):
        assert torch_rtx.load(path, weights=a, settings=settings(budget)).session.streamer is None
    enough = least(path)
    with caplog.at_level(logging.INFO, "torch_rtx.runtime.streaming"):
        module = torch_rtx.load(path, weights=a, settings=settings(enough))
    assert str(streamer_of(module).summary) in caplog.text
    for small in (0, "0%", "1B", enough - 1):
        with pytest.raises(
            SettingsError, match=r"too small: (layers\.\d+|ends)\.weight alone has 9216, and \d+ always"
        ):
            torch_rtx.load(path, settings=settings(small))
    with pytest.raises(SettingsError, match="too small"):
        torch_rtx.compile(a, (X,), runtime=settings(1))


@pytest.mark.parametrize(
    "odd",
    [-1, 1.5, True, "", "50", "-5%", "101%", "1e9B", "4 GiB ", "4  GiB", "GiB", "%", "٥%", "4gib", "nan%", b"5%", ()],
)
def test_odd_budgets(odd: Any) -> None:
    with pytest.raises(SettingsError, match="option weight_streaming_budget must be None, bytes such as"):
        RuntimeSettings(weight_streaming_budget=odd)


def test_read_budget() -> None:
    given = [7, "7B", "4GiB", "4 GB", "1.5KiB", "2MB", "1TiB", "0%", "12.5%", "100%"]
    assert [read_budget(text) for text in given] == [
        7,
        7,
        4 << 30,
        4 * 10**9,
        1536,
        2 * 10**6,
        1 << 40,
        0.0,
        0.125,
        1.0,
    ]


def test_not_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_rtx(nn.Linear(4, 4), options={"weight_streaming_budget": "50%"})
    with pytest.raises(Exception, match="weight_streaming_budget: torch.compile runs on the model's own parameters"):
        compiled(torch.ones(1, 4))
    monkeypatch.setenv("TORCH_RTX_WEIGHT_STREAMING_BUDGET", "50%")  # is for the engines of the process
    model = nn.Linear(4, 4)
    assert torch.equal(compile_rtx(model)(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_summary() -> None:
    summary = Summary(resident=3 << 20, staging=1 << 20, streamed=10 << 20, host=5 << 20, copies=7)
    assert str(summary) == (
        "3.0 MiB of weights stay on the device, 10.0 MiB per call are streamed in 7 copies through 1.0 MiB of staging, "
        "5.0 MiB are in host memory"
    )
