"""Weights that are unloaded: calls wait or are errors, and what comes back is what was there."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torch_rtx
from tests.helpers.ahead import IMAGE, Count, Net, Tied, through_file
from tests.helpers.compiled import same
from torch_rtx import CompilationSettings, CompiledModule, RuntimeSettings
from torch_rtx.errors import RefitError, RtxError
from torch_rtx.runtime.weights import WeightStore


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unload")
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(Net().eval(), (IMAGE,)), path / "net.rtx")
    return path / "net.rtx"


def unloaded(module: CompiledModule, keep: bool = True) -> CompiledModule:
    module.session.unload_weights(keep)
    with pytest.raises(RtxError, match="the weights of this engine are unloaded" if keep else "weight-stripped"):
        module(IMAGE)
    return module


@pytest.mark.parametrize("how", ["attached", "refitted", "copied"])
def test_weights_come_back(how: str, file: Path) -> None:
    model = Net().eval()
    module = torch_rtx.load(file, weights=model if how == "attached" else None)
    if how != "attached":
        module.refit(model)
    module = copy.deepcopy(module) if how == "copied" else module
    before = module(IMAGE)
    for _ in range(2):
        unloaded(module)
        module.session.unload_weights()  # a second time
        module.session.load_weights()
        assert torch.equal(module(IMAGE), before)
    module.session.load_weights()  # there is nothing to do
    unloaded(module)
    model.out.bias.add_(1)
    module.session.load_weights()
    same(module(IMAGE), model(IMAGE) if how == "attached" else before, atol=1e-5, rtol=1e-4)
    model.q.weight.add_(1)  # and is followed again
    same(module(IMAGE), model(IMAGE) if how == "attached" else before, atol=1e-5, rtol=1e-4)


def test_other_weights_in_their_place(file: Path) -> None:
    model, other = Net().eval(), Net().eval()
    for keep in (True, False):
        for give in (CompiledModule.refit, CompiledModule.attach):
            module = unloaded(torch_rtx.load(file, weights=model), keep)
            give(module, other)
            same(module(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
    module = unloaded(torch_rtx.load(file, weights=model))
    with pytest.raises(RefitError):
        module.refit({})
    module.session.load_weights()  # what was kept still is
    same(module(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)


def test_what_is_not_kept_is_gone(file: Path) -> None:
    module = torch_rtx.load(file)
    with pytest.raises(RtxError, match="weight-stripped"):  # none were given yet
        module.session.load_weights()
    module.refit(Net().eval())
    for first in (True, False):
        module.session.unload_weights(keep=first)
    with pytest.raises(RtxError, match="weight-stripped\n.*module.refit"):
        module.session.load_weights()
    assert len(list(module.parameters())) == 12
    assert all(parameter.is_meta for parameter in module.parameters())


def test_memory_is_free(file: Path) -> None:
    model = Net().eval()
    module = torch_rtx.load(file)
    module.attach({name: tensor.clone() for name, tensor in model.state_dict().items()})
    kept = [weakref.ref(value.untyped_storage()) for value in module._store.values]
    unloaded(module, keep=False)
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_an_engine_with_weights_in_it(tmp_path: Path) -> None:
    settings = CompilationSettings(strip_weights=False)
    module = through_file(torch_rtx.compile(Net().eval(), (IMAGE,), settings=settings), tmp_path)
    before = module(IMAGE)
    module.session.unload_weights(keep=False)
    module.session.load_weights()
    assert torch.equal(module(IMAGE), before)
    other = Net().eval()
    module.refit(other)
    before = module(IMAGE)
    module.session.unload_weights()
    module.session.load_weights()
    assert torch.equal(module(IMAGE), before)


def test_state_that_calls_have_written(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 8).view(2, 4)
    here = torch_rtx.compile(Count(), (x,))
    for module in (through_file(here, tmp_path, weights=Count()), here):
        module(x)
        twin = copy.deepcopy(module)
        module.session.unload_weights()
        again = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module)]
        module.session.load_weights()
        expected = twin(x)
        assert all(torch.equal(one(x), expected) for one in (module, *again))


def test_streamed_weights() -> None:
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)]).eval()
    x = torch.randn(2, 256)
    module = torch_rtx.compile(model, (x,), runtime=RuntimeSettings(weight_streaming_budget="60%"))
    streamer = module._store.streamer
    assert streamer is not None
    module.refit(model)
    before = module(x)
    module.session.unload_weights()
    assert streamer._staging.nbytes() == 0
    with pytest.raises(RtxError, match="unloaded"):
        module(x)
    module.session.load_weights()
    assert torch.equal(module(x), before)
    module.session.unload_weights(keep=False)
    module.attach({name: tensor * 2 for name, tensor in model.state_dict().items()})
    assert not torch.equal(module(x), before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("attached", [True, False])
def test_copies_while_unloaded(how: str, attached: bool, file: Path) -> None:
    make = copy.deepcopy if how == "deepcopy" else lambda module: pickle.loads(pickle.dumps(module))
    model = Net().eval()
    module = torch_rtx.load(file, weights=model if attached else None)
    if not attached:
        module.refit(model)
    before = module(IMAGE)
    assert torch.equal(make(unloaded(module))(IMAGE), before)
    size = len(pickle.dumps(module))
    module.session.unload_weights(keep=False)
    with pytest.raises(RtxError, match="weight-stripped"):
        make(module)(IMAGE)
    assert len(pickle.dumps(module)) < size - 1000


def test_a_load_that_fails_can_be_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **named: object) -> None:
        raise torch.OutOfMemoryError("no room")

    model = Net().eval()
    for attached in (True, False):
        module = torch_rtx.load(file, weights=model)
        module = module if attached else copy.deepcopy(module)
        before = module(IMAGE)
        unloaded(module)
        with monkeypatch.context() as patch:
            patch.setattr(WeightStore, "_run" if attached else "_copy", fail)
            with pytest.raises(torch.OutOfMemoryError):
                module.session.load_weights()
        with pytest.raises(RtxError, match="unloaded"):
            module(IMAGE)
        module.session.load_weights()
        assert torch.equal(module(IMAGE), before)


def test_calls_of_other_threads(file: Path) -> None:
    """Each is right or says that the weights are unloaded."""
    model = Net().eval()
    module = torch_rtx.load(file, weights=model)
    expected, stop, wrong = module(IMAGE), threading.Event(), []
    seen = {"right": 0, "unloaded": 0}

    def call() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    right = torch.equal(module(IMAGE), expected)
                    wrong.extend([] if right else ["other numbers"])
                    seen["right"] += 1
                except RtxError as error:
                    wrong.extend([] if "unloaded" in error.message else [error.message])
                    seen["unloaded"] += 1
                except Exception as error:
                    wrong.append(repr(error))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        for change in (module.session.unload_weights, module.session.load_weights):
            change()
            count = dict(seen)
            while seen["right"] == count["right"] and seen["unloaded"] == count["unloaded"]:
                stop.wait(1e-4)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(seen.values()) > 0


def test_deferred_weights(file: Path, tmp_path: Path) -> None:
    """The program first, the weights later."""
    model = Net().eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    module = torch_rtx.load(file)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    for call in (lambda: module(IMAGE), module.state_dict):
        with pytest.raises(RtxError, match="weight-stripped|does not have conv.weight"):
            call()
    module.refit(tmp_path / "model.safetensors")
    same(module(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-4)


def test_tied_weights_come_back() -> None:
    ids = torch.arange(12).view(2, 6)
    module = torch_rtx.compile(Tied(), (ids,))
    before = module(ids)
    module.session.unload_weights()
    module.session.load_weights()
    assert torch.equal(module(ids), before)
