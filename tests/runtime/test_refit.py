"""Refit: an engine with other weights is the engine that these weights would have been built into, bit for bit."""

from __future__ import annotations

import copy
import threading
from contextlib import AbstractContextManager

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import torch_rtx
from tests.helpers.ahead import IDS, IMAGE, Net, Tied, through_file
from tests.helpers.compiled import same
from torch_rtx.errors import EngineFormatError, RefitError, RtxError
from torch_rtx.runtime import code, weights
from torch_rtx.runtime.weights import WeightStore


@pytest.fixture(autouse=True)
def _inference(fresh_dynamo):
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def stripped(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "net.rtx"
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(Net().eval(), (IMAGE,)), path)
    return path


@pytest.fixture
def net(stripped):
    """A model, other weights for it, and its engine from a file, without weights."""
    return Net().eval(), Net().eval(), torch_rtx.load(stripped)


def results(module, args, kwargs=None):
    return [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(module(*args, **(kwargs or {})))]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("name", ["resnet50", "gpt2", "swin_t"])
def test_equal_to_a_fresh_build(name, tmp_path):
    """Folded batch norms, merged projections, a tied embedding, and tables that are computed from buffers."""
    pytest.importorskip("transformers")
    from benchmarks import models

    a, args, kwargs = models.build(name)
    b, _, _ = models.build(name, seed=1)
    modules = [torch_rtx.compile(model, args, kwargs) for model in (a, b)]
    built = [results(module, args, kwargs) for module in modules]
    assert not torch.equal(built[0][0], built[1][0])
    engine = through_file(modules[0], tmp_path)
    save_model(b, str(tmp_path / "b.safetensors"))
    for source, expected in [
        (a, 0), (b.state_dict(), 1), (a.state_dict(), 0), (tmp_path / "b.safetensors", 1), (a, 0), (b, 1)
    ]:  # fmt: skip
        engine.refit(source)
        assert equal(results(engine, args, kwargs), built[expected])
    attached = torch_rtx.load(tmp_path / "model.rtx", weights=b)
    assert equal(results(attached, args, kwargs), built[1])


@pytest.mark.quick
def test_there_and_back(net):
    a, b, engine = net
    seen = []
    for source in (a, b, a, b.state_dict(), a.state_dict()):
        engine.refit(source)
        seen.append(engine(IMAGE))
    assert equal(seen[::2], [seen[0]] * 3)
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_all_problems_are_one_error_and_change_nothing(net):
    a, b, engine = net
    engine.refit(a)
    before = engine(IMAGE)
    state = b.state_dict()
    del state["q.weight"], state["bn.running_mean"]
    state |= {
        "nonsense": torch.ones(1),
        "k.weight": torch.ones(8, 7),
        "v.weight": state["v.weight"].double(),
        "out.bias": torch.ones(8, device="meta"),
        "conv.bias": [0.0] * 8,
    }
    for give in (engine.refit, lambda state: torch_rtx.refit_module_weights(engine, state)):
        with pytest.raises(RefitError, match="nothing was changed") as error:
            give(state)
        assert set(error.value.missing) == {"q.weight", "bn.running_mean"}
        assert error.value.unexpected == ("nonsense",)
        assert error.value.mismatched == {
            "k.weight": "expected shape [8, 8], got [8, 7]",
            "v.weight": "expected dtype torch.float32, got torch.float64",
            "out.bias": "is on the meta device and has no values",
            "conv.bias": "expected a tensor, got list",
        }
        assert all(name in str(error.value) for name in ("q.weight", "nonsense", "k.weight", "conv.bias"))
        assert torch.equal(engine(IMAGE), before)
    with pytest.raises(RefitError, match="missing: q.weight"):
        engine.attach(state)
    assert torch.equal(engine(IMAGE), before)
    # It has bn.num_batches_tracked, which the engine does not need, and what another release keeps as buffers.
    engine.refit(b.state_dict() | {"position_ids": torch.arange(8), "causal": torch.ones(8, 8, dtype=torch.bool)})
    same(engine(IMAGE), b(IMAGE), atol=1e-5, rtol=1e-4)


def test_tied_weights(tmp_path):
    model, other = Tied(), Tied()
    engine = through_file(torch_rtx.compile(model, (IDS,)), tmp_path)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    one = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    two = {name: tensor for name, tensor in state.items() if name != "embed.weight"}
    save_model(other, str(tmp_path / "tied.safetensors"))
    for source in (other, state, one, two, tmp_path / "tied.safetensors", str(tmp_path / "tied.safetensors")):
        engine.refit(model)
        engine.refit(source)
        same(engine(IDS), other(IDS), atol=1e-5, rtol=1e-4)
    before = engine(IDS)
    state["head.weight"] += 1
    with pytest.raises(RefitError, match="is tied to .*, which has other values"):
        engine.refit(state)
    assert torch.equal(engine(IDS), before)


def test_nothing_of_the_caller_is_written(net, stripped):
    a, b, engine = net
    attached = torch_rtx.load(stripped, weights=a)
    first, second = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    state = b.state_dict()
    for module in (attached, engine):
        module.refit(state)
        result = module(IMAGE)
        for tensor in state.values():  # nor is it read again
            tensor.zero_()
        assert torch.equal(module(IMAGE), result)
        b.load_state_dict(second)
        module.refit(first)
    assert all(torch.equal(a.state_dict()[name], tensor) for name, tensor in first.items())
    assert all(torch.equal(state[name], tensor) for name, tensor in second.items())
    with torch.no_grad():
        a.out.bias.add_(1)  # after a refit the module it was loaded with is no longer followed
    same(attached(IMAGE), engine(IMAGE), atol=0, rtol=0)


def test_attached_weights_are_aliases(net, stripped, monkeypatch):
    model = net[0]
    engine = torch_rtx.load(stripped, weights=model)
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    values = engine._store.values
    own = [value for value in values if value.untyped_storage().data_ptr() not in theirs]
    assert {model.out.weight.data_ptr(), model.out.bias.data_ptr()} <= {value.data_ptr() for value in values}
    assert sorted(value.shape[0] for value in own) == [8, 8, 24, 24]  # the folded convolution, the merged projections
    made, original = [], WeightStore._run
    monkeypatch.setattr(weights, "AUDIT_GAP", float("inf"))
    engine.attach(model)
    monkeypatch.setattr(
        WeightStore,
        "_run",
        lambda store, batch, *a: (made.extend(store.weights[i].names for (i,) in batch), original(store, batch, *a))[1],
    )
    engine(IMAGE)
    assert made == []
    model.out.weight.mul_(2)
    same(engine(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
    assert made == []
    model.q.bias.add_(1)
    same(engine(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
    assert made == [("q.bias", "k.bias", "v.bias")]
    model.load_state_dict(net[1].state_dict())
    same(engine(IMAGE), net[1](IMAGE), atol=1e-5, rtol=1e-4)
    assert len(made) == 1 + 4


@pytest.mark.parametrize("give", ["refit", "attach"])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_failing_recipe_changes_nothing(give, at, net, monkeypatch):
    a, b, engine = net
    getattr(engine, give)(a)
    before, original, count = engine(IMAGE), WeightStore._run, 0

    def fail(*given, **named):
        nonlocal count
        count += 1
        if count > at:
            raise RuntimeError("out of memory")
        return original(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(WeightStore, "_run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            getattr(engine, give)(b)
    assert torch.equal(engine(IMAGE), before)
    if give == "attach":  # still follows the first model
        a.out.bias.add_(1)
        a.q.weight.add_(1)
        same(engine(IMAGE), a(IMAGE), atol=1e-5, rtol=1e-4)
    getattr(engine, give)(b)
    same(engine(IMAGE), b(IMAGE), atol=1e-5, rtol=1e-4)


def test_a_recipe_that_fails_in_a_call_runs_again_in_the_next(net, monkeypatch):
    model, _, engine = net
    engine.attach(model)
    model.v.weight.add_(1)
    model.conv.weight.mul_(2)

    def fail(*given, **named):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(WeightStore, "_run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine(IMAGE)
    same(engine(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)


def test_weights_files_that_do_not_fit(net, stripped, tmp_path):
    a, b, engine = net
    engine.refit(a)
    before, path = engine(IMAGE), tmp_path / "weights.safetensors"
    state = dict(b.state_dict())
    save_file({name: tensor for name, tensor in state.items() if name != "q.weight"}, path)
    with pytest.raises(RefitError, match="missing: q.weight"):
        engine.refit(path)
    save_file(state, path)
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw[:100], raw[:4], b"", b"no safetensors file at all", b"\xff" * 64):
        path.write_bytes(damaged)
        for give in (engine.refit, engine.attach, lambda path: torch_rtx.load(stripped, path)):
            with pytest.raises(EngineFormatError, match="weights.safetensors is no safetensors file"):
                give(path)
    with pytest.raises(OSError, match="absent"):
        engine.refit(tmp_path / "absent.safetensors")
    assert torch.equal(engine(IMAGE), before)
    path.write_bytes(raw)
    engine.refit(path)
    same(engine(IMAGE), b(IMAGE), atol=1e-5, rtol=1e-4)


def test_load_with_weights_that_do_not_fit(stripped):
    with pytest.raises(RefitError, match="missing: q.weight"):
        torch_rtx.load(stripped, weights={})


# What torch.compile returned -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wrapped", "in_place"])
def test_refit_of_a_compiled_model(how, tmp_path):
    model, other = Net().eval(), Net().eval()
    if how == "wrapped":
        compiled = torch.compile(model, backend="rtx", fullgraph=True)
    else:
        model.compile(backend="rtx", fullgraph=True)
        compiled = model
    before, addresses = compiled(IMAGE), [p.data_ptr() for p in model.parameters()]
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    for source in (other, other.state_dict(), tmp_path / "other.safetensors"):
        torch_rtx.refit_module_weights(compiled, source)
        same(compiled(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
        model.q.weight.zero_()
    model.load_state_dict(other.state_dict())
    result = compiled(IMAGE)
    bad = {**other.state_dict(), "k.weight": torch.ones(3), "more": torch.ones(1)}
    del bad["q.weight"]
    with pytest.raises(RefitError) as error:
        torch_rtx.refit_module_weights(compiled, bad)
    assert (error.value.missing, error.value.unexpected) == (("q.weight",), ("more",))
    assert error.value.mismatched == {"k.weight": "expected shape [8, 8], got [3]"}
    assert torch.equal(compiled(IMAGE), result)
    assert not torch.equal(result, before)
    model.out.weight.data.add_(1)  # no version counter tells, so that the model is passed itself
    model.q.weight.data.add_(1)
    torch_rtx.refit_module_weights(compiled, model)
    expected = copy.deepcopy(model)
    expected._compiled_call_impl = None
    same(compiled(IMAGE), expected(IMAGE), atol=1e-5, rtol=1e-4)
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_refit_of_a_compiled_model_with_tied_weights(tmp_path):
    model, other = Tied(), Tied()
    compiled = torch.compile(model, backend="rtx", fullgraph=True)
    compiled(IDS)
    save_model(other, str(tmp_path / "tied.safetensors"))
    torch_rtx.refit_module_weights(compiled, tmp_path / "tied.safetensors")
    same(compiled(IDS), other(IDS), atol=1e-5, rtol=1e-4)
    state = {**other.state_dict(), "head.weight": torch.ones(16, 8)}
    with pytest.raises(RefitError, match="is tied to"):
        torch_rtx.refit_module_weights(compiled, state)
    same(compiled(IDS), other(IDS), atol=1e-5, rtol=1e-4)


def test_exported_programs(tmp_path):
    """As Torch-TensorRT's function of this name takes weights, and with the module as its result."""
    model, other = Net().eval(), Net().eval()
    engine = through_file(torch_rtx.compile(model, (IMAGE,)), tmp_path)
    program = torch.export.export(other, (IMAGE,))
    assert torch_rtx.refit_module_weights(engine, program) is engine
    same(engine(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
    same(torch_rtx.load(tmp_path / "model.rtx", weights=program)(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
    compiled = torch.compile(model, backend="rtx")
    assert torch_rtx.refit_module_weights(compiled, program) is compiled
    assert torch.equal(model.q.weight, other.q.weight)
    with pytest.raises(RefitError, match="missing: bn.bias"):
        engine.refit(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)))


def test_modules_that_are_not_compiled():
    for module in (Net(), nn.Identity()):
        with pytest.raises(RtxError, match="is not compiled"):
            torch_rtx.refit_module_weights(module, {})


class Low(nn.Module):
    """A weight that is a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.a @ self.b).sin()


def test_recipes_have_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute in the dtypes of the capture, on the device of the weights, whatever is around a refit."""
    other, x = Low(), torch.randn(2, 16)
    devices: list[torch.device] = []

    def undisturbed(device: torch.device) -> AbstractContextManager[None]:
        devices.append(device)
        return code.undisturbed(device)

    monkeypatch.setattr(weights, "undisturbed", undisturbed)
    module = torch_rtx.compile(Low(), (x,))
    module.refit(other)
    expected = module(x)
    devices.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.refit(other)
        assert torch.equal(module(x), expected)
    assert devices == [torch.device("cpu")]


# Threads -------------------------------------------------------------------------------------------------------------


def test_no_call_during_a_refit_mixes_weights(net):
    """Each result is that of one set of weights."""
    models, engine = [*net[:2], Net().eval()], net[2]
    engine.refit(models[0])
    expected, stop, torn, failures = [model(IMAGE) for model in models], threading.Event(), [], []

    def call():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    result = engine(IMAGE)
                    if not any(torch.allclose(result, one, atol=1e-5) for one in expected):
                        torn.append(result)
        except Exception as error:
            failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for thread in callers:
        thread.start()
    for step in range(150):
        give = engine.attach if step % 10 == 9 else engine.refit
        give(models[step % 3])
    stop.set()
    for thread in callers:
        thread.join()
    assert (torn, failures) == ([], [])
    same(engine(IMAGE), expected[149 % 3], atol=1e-5, rtol=1e-4)


def test_threads_that_see_changes_at_once(net, monkeypatch):
    """One of them computes the weights; the others wait for it."""
    model, _, engine = net
    engine.attach(model)
    made, original, lock = [], WeightStore._run, threading.Lock()

    def run(store, batch, *given):
        with lock:
            made.extend(store.weights[index].names for (index,) in batch)
        return original(store, batch, *given)

    monkeypatch.setattr(WeightStore, "_run", run)
    monkeypatch.setattr(weights, "AUDIT_GAP", float("inf"))
    for write in (lambda: model.q.bias.add_(1), lambda: model.q.bias.data.add_(1)):
        made.clear()
        write()
        expected, wrong, start = model(IMAGE), [], threading.Barrier(6)

        def call(expected=expected, wrong=wrong, start=start):
            start.wait()
            with torch.no_grad():
                if not torch.allclose(engine(IMAGE), expected, atol=1e-5):
                    wrong.append(1)

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(made) == len(set(made))


def test_an_engine_of_a_live_model_sees_writes_through_data(stripped, net):
    model, other, _ = net
    engine = torch_rtx.load(stripped, weights=model)
    for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(value)
    same(engine(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
    settings = torch_rtx.RuntimeSettings(watch_weights=False)
    without = torch_rtx.load(stripped, weights=model, settings=settings)
    model.conv.weight.data.mul_(2)
    assert not torch.allclose(without(IMAGE), model(IMAGE), atol=1e-3)
    same(engine(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
    without.attach(model)
    assert torch.equal(without(IMAGE), engine(IMAGE))


def test_weights_that_are_first_made_in_inference_mode(stripped, net):
    model, other, engine = net
    with torch.inference_mode():
        attached = torch_rtx.load(stripped, weights=model)
        attached(IMAGE)
        engine.refit(model)
    for change in (lambda: model.conv.weight.mul_(2), lambda: model.conv.weight.data.mul_(2)):
        change()
        same(attached(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)
    engine.refit(other)
    same(engine(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
