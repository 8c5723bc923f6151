"""Copies of a compiled module, and what it makes of the methods of every `nn.Module`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops import while_loop

import torch_rtx
from tests.helpers.ahead import IMAGE, Count, Net, through_file
from tests.helpers.compiled import same
from torch_rtx import CompilationSettings, CompiledModule, RuntimeSettings
from torch_rtx.errors import RefitError, RtxError

X = torch.linspace(-1, 1, 8).view(2, 4)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def saved(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "saved": saved,
    "spawned": lambda module: pickle.loads(bytes(ForkingPickler.dumps(module))),  # as workers of a DataLoader get it
}


def same_modules(one: Any, other: Any) -> None:
    assert torch.equal(one(IMAGE), other(IMAGE))


@pytest.fixture(scope="module")
def engine() -> tuple[nn.Module, CompiledModule]:
    with torch.no_grad():
        model = Net().eval()
        return model, torch_rtx.compile(model, (IMAGE,))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_weights_of_its_own(how: str, tmp_path: Path) -> None:
    model, other = Net().eval(), Net().eval()
    built = torch_rtx.compile(model, (IMAGE,))
    torch_rtx.save(built, tmp_path / "net.rtx")
    refitted = torch_rtx.load(tmp_path / "net.rtx")
    refitted.refit(model)
    for module in (built, torch_rtx.load(tmp_path / "net.rtx", weights=model), refitted):
        copied = COPIES[how](module)
        before = module(IMAGE)
        assert type(copied) is CompiledModule
        assert torch.equal(copied(IMAGE), before)
        copied.refit(other)
        same(copied(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
        assert torch.equal(module(IMAGE), before)
        module.refit(other)
        copied.attach(model)
        assert torch.equal(copied(IMAGE), before)
        same_modules(COPIES[how](module), module)
    assert torch.equal(COPIES[how](COPIES[how](built))(IMAGE), built(IMAGE))


def test_a_copy_is_of_the_present_weights() -> None:
    model = Net().eval()
    module = torch_rtx.compile(model, (IMAGE,))
    model.conv.weight.data.mul_(2)
    copies = [make(module) for make in COPIES.values()]
    expected = module(IMAGE)
    model.conv.weight.mul_(2)
    assert not torch.allclose(module(IMAGE), expected, atol=1e-3)
    for copied in copies:  # and follows the model no longer
        assert torch.equal(copied(IMAGE), expected)


def test_what_is_pickled_has_no_tensors(engine: tuple[nn.Module, CompiledModule]) -> None:
    """A process that is spawned later would not find temporary ones in the shared memory of this process."""
    assert b"multiprocessing.reductions" in bytes(ForkingPickler.dumps(engine[0]))
    assert b"multiprocessing.reductions" not in bytes(ForkingPickler.dumps(engine[1]))


def test_a_deep_copy_shares_engine_and_code(engine: tuple[nn.Module, CompiledModule]) -> None:
    module = engine[1]
    pair = copy.deepcopy([module, module])
    assert pair[0] is pair[1]
    assert pair[0].engine is module.engine
    assert pair[0].session.specializer is module.session.specializer
    shared = copy.copy(module)
    assert shared._store is module._store


@pytest.mark.parametrize("how", COPIES)
def test_without_weights(how: str, engine: tuple[nn.Module, CompiledModule], tmp_path: Path) -> None:
    copied = COPIES[how](through_file(engine[1], tmp_path))
    with pytest.raises(RtxError, match="weight-stripped"):
        copied(IMAGE)
    copied.refit(engine[0])
    same_modules(copied, engine[1])


def test_an_engine_that_is_saved_with_weights(tmp_path: Path) -> None:
    model, other = Net().eval(), Net().eval()
    module = torch_rtx.compile(model, (IMAGE,), settings=CompilationSettings(strip_weights=False))
    for make in COPIES.values():
        copied = make(module)
        copied.refit(other)
        assert torch.equal(through_file(copied, tmp_path)(IMAGE), copied(IMAGE))
        assert torch.equal(through_file(module, tmp_path)(IMAGE), module(IMAGE))
        copied = make(module)
        model.q.weight.add_(1)
        assert torch.equal(through_file(copied, tmp_path)(IMAGE), copied(IMAGE))


def test_state_settings_and_what_users_add() -> None:
    module = torch_rtx.compile(Count(), (X,), runtime=RuntimeSettings(specialized_shapes=3))
    module(X)
    module.note = {"a": [1]}
    module.child = nn.Linear(2, 2)
    for make in COPIES.values():
        copied = make(module)
        assert copied.note == {"a": [1]}
        assert copied.note is not module.note
        assert copied.child.weight is not module.child.weight
        assert copied.session.settings == module.session.settings
        one, two = copied(X).clone(), copied(X)
        assert not torch.equal(one, two)
        assert torch.equal(make(module)(X), one)


def test_streamed_weights() -> None:
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)]).eval()
    x = torch.randn(2, 256)
    module = torch_rtx.compile(model, (x,), runtime=RuntimeSettings(weight_streaming_budget="60%"))
    assert module._store.streamer is not None
    for make in COPIES.values():
        copied = make(module)
        assert copied._store.streamer is not module._store.streamer
        before = module(x)
        assert torch.equal(copied(x), before)
        copied.refit({name: tensor + 1 for name, tensor in model.state_dict().items()})
        assert torch.equal(module(x), before)
        assert not torch.equal(copied(x), before)


def test_what_can_not_be_pickled() -> None:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            counted = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), (0, x))  # its state is a number
            return counted[1]

    module = torch_rtx.compile(Local(), (X,))
    assert torch.equal(copy.deepcopy(module)(X), module(X))
    with pytest.raises(RtxError, match="Python function"):
        pickle.dumps(module)


# Methods of nn.Module -------------------------------------------------------------------------------------------------


def test_what_changes_nothing_is_allowed(engine: tuple[nn.Module, CompiledModule]) -> None:
    module = engine[1]
    parent = nn.Sequential(nn.Linear(2, 2), module)
    before = module(IMAGE)
    for one in (module, parent):
        for call in (
            one.float, one.cpu, one.eval, lambda one=one: one.train(False), lambda one=one: one.to("cpu"),
            lambda one=one: one.to(torch.float32), lambda one=one: one.to(X), one.share_memory, one.zero_grad,
            lambda one=one: one.to(memory_format=torch.channels_last), lambda one=one: one.requires_grad_(False),
        ):  # fmt: skip
            result = call()
            assert result is one or result is None
    assert torch.equal(module(IMAGE), before)
    assert not module.training


def test_what_would_change_it_is_an_error(engine: tuple[nn.Module, CompiledModule]) -> None:
    module = engine[1]
    parent = nn.Sequential(module)
    for one in (module, parent):
        for call in (one.half, one.double, one.bfloat16, lambda one=one: one.to(torch.float16)):
            with pytest.raises(
                RtxError, match="weights are torch.float32 and can't become .*\n.*build the engine again"
            ):
                call()
        with pytest.raises(RtxError, match="runs on cpu and can't move to meta\n.*torch_rtx.load.*device='meta'"):
            one.to("meta")
        with pytest.raises(RtxError, match="built in evaluation mode and can't change to training mode\n.*model.train"):
            one.train()
    with pytest.raises(RtxError, match="no gradients"):
        module.requires_grad_()
    assert not module.training


def test_an_engine_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    module = torch_rtx.compile(torch.export.export(model, (X,)))
    assert module.training
    assert module.train() is module
    with pytest.raises(RtxError, match="built in training mode and can't change to evaluation mode\n.*model.eval"):
        module.eval()


def test_load_state_dict(engine: tuple[nn.Module, CompiledModule]) -> None:
    module, other = copy.deepcopy(engine[1]), Net().eval()
    state = other.state_dict()
    assert str(module.load_state_dict(state)) == "<All keys matched successfully>"
    same(module(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
    with pytest.raises(RefitError, match="unexpected: more"):
        module.load_state_dict({**state, "more": X})
    assert module.load_state_dict({**state, "more": X}, strict=False).unexpected_keys == ["more"]
    with pytest.raises(RefitError, match="missing: q.weight"):
        module.load_state_dict({name: t for name, t in state.items() if name != "q.weight"}, strict=False)
    module.load_state_dict(state, assign=True)
    other.out.bias.add_(1)
    same(module(IMAGE), other(IMAGE), atol=1e-5, rtol=1e-4)
