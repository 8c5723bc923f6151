"""Known captures: a second process trains without a trace, a partition or a build, and computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.helpers.caching import Traffic
from tests.helpers.compiled import Recorder, compile_rtx, same
from torch_rtx import CompilationSettings
from torch_rtx.backend import aot_wrappers, capture, entry, program_cache
from torch_rtx.backend.capture_cache import CaptureEntry
from torch_rtx.backend.retrace import Retrace
from torch_rtx.cache.entries import EngineCache
from torch_rtx.cache.key import Key
from torch_rtx.cache.store import FileStore
from torch_rtx.errors import CaptureError, Uncacheable
from torch_rtx.quantization import quantize

X = torch.linspace(-1, 1, 12).view(3, 4)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def traffic(caplog: pytest.LogCaptureFixture) -> Traffic:
    return Traffic(caplog)


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, nothing is captured, partitioned or built."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this was to be skipped")

    def install() -> None:
        torch._dynamo.reset()
        for module, name in ((capture, "capture"), (entry, "get_or_build"), (program_cache, "compile_fx")):
            monkeypatch.setattr(module, name, fail)

    return install


class Conv(nn.Module):
    """Writes running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x.view(1, 1, 3, 4))).relu().flatten(1))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))


def first_only(x: Tensor, w: Tensor) -> Tensor:
    return x.detach() * w


def write(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x * w
    y[0].mul_(2)
    return y, y.argmax()


def grad_mode(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    torch.set_grad_enabled(False)
    return y


def autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ w.t()


class Function(nn.Module):
    """`function` of the input and of a parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.linspace(1, 2, 12).view(3, 4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        return self.function(x, self.w)


class Checkpointed(nn.Module):
    """Its activations are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = net(), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False).sin())


CASES: dict[str, Callable[[], nn.Module]] = {
    "a checkpoint": Checkpointed,
    "layers": net,
    "running statistics": Conv,
    "random": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)),
    "no gradient": lambda: Function(first_only),
    "a view of the input": lambda: Function(lambda x, w: (x * w, x[1:].t())),
    "the input": lambda: Function(lambda x, w: (x, x * w)),
    "a view of a result": lambda: Function(lambda x, w: (lambda y: (y, y[1:]))(x * w)),
    "views without their base": lambda: Function(lambda x, w: (lambda y: (y[:2], y[1:]))(x * w)),
    "a result that was written": lambda: Function(write),
    "a transposed result": lambda: Function(lambda x, w: (x * w).t().contiguous().t()),
    "other numbers": lambda: Function(lambda x, w: ((x * w).sum(), w.bool(), x.shape[0])),
    "the grad mode": lambda: Function(grad_mode),
    "autocast": lambda: Function(autocast),
    "quantized": lambda: quantize(net(), "int8_dynamic"),
}


def reaches(start: list[Any], end: Any) -> bool:
    """A backward from one of `start` runs `end`."""
    return any(node is end or reaches([f for f, _ in node.next_functions], end) for node in start if node is not None)


@dataclass
class Step:
    """What a step with a copy of `model` gives: results and how they are related, gradients, and what was written."""

    results: list[Any]
    gradients: list[Tensor | None]
    state: dict[str, Tensor]
    facts: list[object] = field(default_factory=list)

    @staticmethod
    def of(make: Callable[[], nn.Module], wrap: Callable[[Any], Any] = lambda model: model) -> Step:
        torch.manual_seed(0)
        model = make()
        x = X.clone().requires_grad_()
        given = x * 1  # not a leaf: the wrappers detach it where it gets no gradient
        torch.manual_seed(1)
        with torch.enable_grad():
            found = wrap(model)(given)
            facts: list[object] = [torch.is_grad_enabled()]
        results = list(found) if isinstance(found, tuple) else [found]
        tensors = [r for r in results if isinstance(r, Tensor)]
        for r in tensors:
            facts += [r.stride(), r.requires_grad, r._is_view(), r is given, r._base is given]
        memory = [t.untyped_storage().data_ptr() for t in (given, *tensors)]
        facts += [[memory.index(m) for m in memory], [b._version for b in model.buffers()]]
        facts.append(reaches([r.grad_fn for r in tensors if r is not given], given.grad_fn))
        wanted = [r for r in tensors if r.requires_grad]
        torch.autograd.backward(wanted, [torch.full_like(r, i + 1) for i, r in enumerate(wanted)])
        return Step(results, [x.grad, *(p.grad for p in model.parameters())], dict(model.named_buffers()), facts)

    def check(self, other: Step, exactly: bool) -> None:
        close = {"atol": 0.0, "rtol": 0.0} if exactly else {"atol": 1e-5, "rtol": 1e-4}
        assert not exactly or self.facts == other.facts
        assert [g is None for g in self.gradients] == [g is None for g in other.gradients]
        for mine, theirs in ((self.results, other.results), (self.state, other.state)):
            same(mine, theirs, **close)
        same([g for g in self.gradients if g is not None], [g for g in other.gradients if g is not None], **close)


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_not_captured_again(name: str, traffic: Traffic, no_capture: Callable[[], None]) -> None:
    """Same results, gradients, writes, views and version counters."""
    cold = Step.of(CASES[name], compile_rtx)
    if name != "random":
        cold.check(Step.of(CASES[name]), exactly=False)
    assert traffic.counts[0] == 0
    no_capture()
    Step.of(CASES[name], compile_rtx).check(cold, exactly=True)
    assert "without a capture" in traffic("hit")[0]


def test_a_known_step_is_used_as_any_other(no_capture: Callable[[], None]) -> None:
    """Two forwards before a backward, a backward twice, gradients that add up."""

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = net()
        compiled = compile_rtx(model)
        first, second = compiled(X), compiled(X + 1)
        first.sum().backward(retain_graph=True)
        second.sum().backward()
        first.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            first.sum().backward()
        again = torch.autograd.grad(compiled(X).sum(), model[0].weight, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="double backward"):
            again.sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = run()
    no_capture()
    same(run(), expected, atol=0.0, rtol=0.0)


def test_locations_in_a_checkpoint(recorder: Recorder, no_capture: Callable[[], None]) -> None:
    """A name of a nested graph is not that of the graph around it; what is not known has no location."""
    Step.of(Checkpointed, compile_rtx)
    no_capture()
    Step.of(Checkpointed, compile_rtx)
    cold, warm = (
        [node.loc for s in half for node in s.graph.nodes] for half in (recorder.sessions[:2], recorder.sessions[2:])
    )
    assert len(cold) == len(warm)
    assert all(mine in (None, theirs) for mine, theirs in zip(warm, cold, strict=True))
    assert any(location is not None and location.module == "last" for location in warm)


def test_what_cuda_graphs_need_is_known(monkeypatch: pytest.MonkeyPatch, no_capture: Callable[[], None]) -> None:
    """To the letter: both programs with their locations, and which tensors stay where they are."""
    sessions: list[Any] = []
    build = entry.Session
    monkeypatch.setattr(
        entry, "Session", lambda *args, **kwargs: sessions.append((args, kwargs)) or build(*args, **kwargs)
    )
    for prepare in (lambda: None, no_capture):
        prepare()
        Step.of(Conv, lambda model: torch.compile(model, backend="rtx", options={"static_outputs": True}))
    found = [(str(args[0]), kwargs["pinned"], kwargs["saved"]) for args, kwargs in sessions]
    assert found[:2] == found[2:]
    assert all("  # norm @ tests/backend/test_capture_cache.py:" in program and pinned for program, pinned, _ in found)
    assert found[0][2]
    assert not any(args[2].static_outputs for args, _ in sessions)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_autograd_reads_the_backward_graph(autocast: bool, traffic: Traffic) -> None:
    """It is captured again, also outside of the autocast that the forward had."""
    expected = []
    for compiled in (nullcontext, lambda: torch._dynamo.compiled_autograd._enable(lambda gm: gm)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = net()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compile_rtx(model)(X).float().sum()
        with compiled():
            loss.backward()
        expected.append([parameter.grad for parameter in model.parameters()])
    assert traffic.counts == (1, 2)
    same(*expected, atol=1e-2 if autocast else 1e-6, rtol=1e-2 if autocast else 1e-5)


def test_a_backward_graph_of_another_step() -> None:
    """Settings that changed since may lead to another partition, whose saved tensors are not those of the forward."""
    found: list[Retrace] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        found.append(Retrace(partial(capture.capture, gm), example_inputs))
        return gm.forward

    torch.compile(net(), backend=backend)(X)
    with pytest.raises(CaptureError, match=r"another backward graph.*\n.*reuse_cached_engines=False"):
        found[0].backward(["primals_1"])


# ---- what the key covers ---------------------------------------------------------------------------------------------


def key_of(model: nn.Module, *args: Any, settings: CompilationSettings | None = None) -> str | None:
    """The key of the capture of `model`; None if it has none."""
    found: list[CaptureEntry | None] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        found.append(CaptureEntry.of(gm, example_inputs, settings or CompilationSettings()))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    return None if found[0] is None else found[0].key.digest


def frozen() -> nn.Module:
    model = net()
    model[0].weight.requires_grad_(False)
    return model


def one_memory() -> nn.Module:
    """Statistics that are views of one tensor."""
    norm = nn.BatchNorm1d(4)
    flat = torch.ones(4)
    norm.running_mean, norm.running_var = flat.view(4), flat.view(4)
    return norm


def saved_again(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: checkpoint(function, x, w, use_reentrant=False)


def written(time: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A method that writes before or after another one reads."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        if time == 1:
            y.add_(1)
        total = y.sum()
        if time == 2:
            y.add_(1)
        return y + total

    return function


OTHERS: dict[str, Callable[[], str | None]] = {
    "written, of a leaf without a gradient": lambda: key_of(Function(lambda x, w: x.mul_(w)), X.clone()),
    "written, of another result": lambda: key_of(Function(lambda x, w: x.mul_(w)), X.clone().requires_grad_() * 1),
    "weights": lambda: key_of(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)), X),
    "a function": lambda: key_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), X),
    "a constant": lambda: key_of(nn.Sequential(nn.Linear(4, 4), nn.GELU("tanh"), nn.Linear(4, 2)), X),
    "dtype": lambda: key_of(net().double(), X.double()),
    "shape": lambda: key_of(net(), X[:2]),
    "strides": lambda: key_of(net(), X.t().contiguous().t()),
    "a frozen parameter": lambda: key_of(frozen(), X),
    "an input with a gradient": lambda: key_of(net(), X.clone().requires_grad_()),
    "an input that is no leaf": lambda: key_of(net(), X.clone().requires_grad_() * 1),
    "no gradients": lambda: torch.no_grad()(key_of)(net(), X),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(key_of)(net(), X),
    "autocast to half": lambda: torch.autocast("cpu", torch.float16)(key_of)(net(), X),
    "a memory budget": lambda: functorch_config.patch(activation_memory_budget=0.5)(key_of)(net(), X),
    "an estimator": lambda: functorch_config.patch(activation_memory_budget_runtime_estimator="profile")(key_of)(
        net(), X
    ),
    "fusions": lambda: inductor_config.patch(post_grad_fusion_options={"a": {}})(key_of)(net(), X),
    "a checkpoint": lambda: key_of(Function(saved_again(lambda x, w: x - w)), X),
    "a checkpoint, turned": lambda: key_of(Function(saved_again(lambda x, w: w - x)), X),
    "a checkpoint, written first": lambda: key_of(Function(saved_again(written(1))), X),
    "a checkpoint, written last": lambda: key_of(Function(saved_again(written(2))), X),
    "settings": lambda: key_of(net(), X, settings=CompilationSettings(min_block_size=2)),
    "training": lambda: key_of(nn.BatchNorm1d(4), X),
    "evaluation": lambda: key_of(nn.BatchNorm1d(4).eval(), X),
    "one memory": lambda: key_of(one_memory(), X),
}


def test_a_key_covers_what_a_capture_depends_on(cache_folder: Path) -> None:
    keys = {name: make() for name, make in {"": lambda: key_of(net(), X), **OTHERS}.items()}
    torch.use_deterministic_algorithms(True)
    try:
        keys["deterministic"] = key_of(net(), X)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, key in keys.items() if key is None] == []
    assert len(set(keys.values())) == len(keys)
    assert keys[""] == key_of(nn.Sequential(net()), X)  # names are no part of it


UNKNOWN: dict[str, Callable[[], Any]] = {
    "a function that is a setting": lambda: functorch_config.patch(activation_memory_budget_solver=lambda *a: 0),
    "a pass over the joint graph": lambda: functorch_config.patch(joint_custom_pass=lambda *a: a),
    "hooks on saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_key_covers_is_captured(name: str) -> None:
    assert key_of(net(), X) is not None
    with UNKNOWN[name]():
        assert key_of(net(), X) is None


def test_a_checkpoint_that_chooses_what_it_saves_is_captured() -> None:
    """A function of the user decides."""

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mul.Tensor])

    def chosen(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(torch.mul, x, w, use_reentrant=False, context_fn=contexts)

    assert key_of(Function(chosen), X) is None


def test_symbolic_sizes_are_captured() -> None:
    torch._dynamo.config.assume_static_by_default, before = False, torch._dynamo.config.assume_static_by_default
    try:
        assert key_of(net(), X) is None
    finally:
        torch._dynamo.config.assume_static_by_default = before


# ---- damage ----------------------------------------------------------------------------------------------------------


def without(fields: dict[str, Any], *path: Any) -> None:
    for step in path[:-1]:
        fields = fields[step]
    del fields[path[-1]]


DAMAGE: dict[str, Callable[[dict[str, Any]], None]] = {
    "no metadata": lambda entry: without(entry, "meta"),
    "metadata of another class": lambda entry: entry.update(meta={"type": "Tensor"}),
    "an unknown class": lambda entry: entry["meta"].update({"class": "Popen"}),
    "a field less": lambda entry: without(entry, "meta", "fields", "output_info"),
    "an item less": lambda entry: without(entry, "meta", "fields", "input_info", 0),
    "an unknown member": lambda entry: entry["meta"]["fields"].update(input_info={"enum": ["MutationType", "X"]}),
    "no graphs": lambda entry: entry.update(graphs=[]),
    "names less": lambda entry: without(entry, "graphs", 0, "names", 0),
    "locations less": lambda entry: without(entry, "graphs", 1, "locations", 0),
    "a word for a number": lambda entry: entry.update(detached=["first"]),
}


def stored(folder: Path) -> tuple[EngineCache, Key, dict[str, Any]]:
    """The cache, and key and fields of its only capture."""
    cache = EngineCache(FileStore(folder / "engines", 1 << 30))
    keys = [cache.head(item.name).key for item in cache.entries()]
    (key,) = (key for key in keys if key.kind == "capture")
    return cache, key, json.loads(cache.get(key) or b"")


def test_a_damaged_entry_is_made_again(
    cache_folder: Path, no_capture: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = Step.of(net, compile_rtx)
    for name, damage in DAMAGE.items():
        cache, key, fields = stored(cache_folder)
        damage(fields)
        cache.put(key, json.dumps(fields).encode())
        caplog.clear()
        torch._dynamo.reset()
        Step.of(net, compile_rtx).check(expected, exactly=True)
        assert "damaged entry of the engine cache" in caplog.text, name
    no_capture()
    Step.of(net, compile_rtx).check(expected, exactly=True)


@pytest.mark.parametrize("position", [0, 1])
def test_a_step_whose_engine_was_evicted_is_captured(position: int, cache_folder: Path, traffic: Traffic) -> None:
    expected = Step.of(net, compile_rtx)
    cache, _, fields = stored(cache_folder)
    cache.store.delete(fields["graphs"][position]["engine"])
    traffic.clear()
    torch._dynamo.reset()
    Step.of(net, compile_rtx).check(expected, exactly=True)
    assert traffic.counts == (1, 1)


def test_metadata_that_no_file_can_hold() -> None:
    class Unknown:
        pass

    meta = aot_wrappers.ViewAndMutationMeta.__new__(aot_wrappers.ViewAndMutationMeta)
    for value in (Unknown(), X, lambda: None, Unknown):
        meta.__dict__ = {"subclass_tangent_meta": [], "tokens": {"a token": value}}
        with pytest.raises(Uncacheable, match="AOTAutograd's metadata has a"):
            aot_wrappers.to_json(meta)
