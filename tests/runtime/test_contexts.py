"""Contexts that change how a live module runs: CUDA graphs, and the budget of streamed weights."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from tests.runtime.test_streaming import Constant, Deep, Late, X, least
from torch_rtx import CompiledModule, RuntimeSettings
from torch_rtx.errors import RtxError, SettingsError
from torch_rtx.runtime import streaming, weight_streaming


@pytest.fixture(autouse=True)
def _setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(streaming, "TINY", 512)  # the models are small
    monkeypatch.setattr(streaming, "_AtOnce", Late)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of `Deep`."""
    found = tmp_path_factory.mktemp("contexts") / "deep.rtx"
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(Deep(), (X,)), found)
    return found


def streamed(module: CompiledModule) -> int:
    """Bytes that a call streams."""
    return 0 if module.session.streamer is None else module.session.streamer.summary.streamed


# ---- the budget of weights -------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_budget_for_a_while(path: Path) -> None:
    model = Deep()
    module = torch_rtx.load(path, weights=model)
    expected, held = module(X), [value.data_ptr() for value in module._store.values]
    with torch_rtx.runtime.weight_streaming(module) as weights:
        total = weights.total_device_budget
        assert weights.device_budget == total
        weights.device_budget = total // 2
        assert weights.device_budget == total // 2
        summary = module.session.streamer.summary  # type: ignore[union-attr]
        assert summary.resident + summary.staging <= total // 2
        assert streamed(module) > 0
        assert torch.equal(module(X), expected)
        weights.device_budget = "60%"
        assert total // 2 < weights.device_budget < total
        assert torch.equal(module(X), expected)
        weights.device_budget = None
        assert (weights.device_budget, streamed(module)) == (total, 0)
        weights.device_budget = total
        assert (weights.device_budget, streamed(module)) == (total, 0)
        weights.device_budget = "40%"
    assert module.session.streamer is None
    assert module.session.settings == RuntimeSettings()
    assert torch.equal(module(X), expected)
    assert [value.data_ptr() for value in module._store.values] == held  # the model's own tensors again


def test_a_budget_that_is_too_small_changes_nothing(path: Path) -> None:
    module = torch_rtx.load(path, weights=Deep(), settings=RuntimeSettings(weight_streaming_budget="50%"))
    expected, streamer = module(X), module.session.streamer
    enough = least(path)
    with weight_streaming(module) as weights:
        for budget, message in ((enough - 1, "which is too small"), ("half", "must be None, bytes")):
            with pytest.raises(SettingsError, match=message):
                weights.device_budget = budget
        assert module.session.streamer is streamer
        weights.device_budget = enough
        assert torch.equal(module(X), expected)
    assert weights.device_budget < weights.total_device_budget
    assert torch.equal(module(X), expected)


def test_whatever_happens_between_changes(path: Path) -> None:
    """Beside a module whose weights stay: writes to the model, by `.data` as well, refits, attachments, copies."""
    a, b = Deep(), Deep()
    resident, module = (torch_rtx.load(path, weights=a) for _ in range(2))
    draw, total, moved = random.Random(0), 0, set()
    with weight_streaming(module) as weights:
        total = weights.total_device_budget
        for step in range(40):
            match draw.randrange(7):
                case 0:
                    draw.choice([*a.parameters(), *b.parameters()]).mul_(1.1)
                case 1:
                    draw.choice([*a.parameters(), *b.parameters()]).data.add_(0.1)
                case 2:
                    source = draw.choice([a, b.state_dict()])
                    resident.refit(source), module.refit(source)
                case 3:
                    source = draw.choice([a, b])
                    resident.attach(source), module.attach(source)
                case _:
                    weights.device_budget = draw.choice([None, draw.randint(least(path), total)])
                    moved.add(streamed(module) > 0)
            got = module(X)
            assert torch.equal(got, resident(X)), f"step {step}"
        assert moved == {True, False}
        weights.device_budget = "50%"
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert streamed(copied) == streamed(module)
            assert torch.equal(copied(X), got)


def test_weights_that_are_given_later(path: Path) -> None:
    model, module = Deep(), torch_rtx.load(path)
    with weight_streaming(module) as weights:
        for budget in ("50%", "30%", None, "40%"):
            weights.device_budget = budget
        with pytest.raises(RtxError, match="weight-stripped"):
            module(X)
        module.refit(model)
        assert torch.equal(module(X), torch_rtx.load(path, weights=model)(X))


def test_constants(tmp_path: Path) -> None:
    model = Constant()
    module = torch_rtx.compile(model, (X,))
    expected = module(X)
    with weight_streaming(module) as weights:
        for budget in ("30%", "60%", None, "30%"):
            weights.device_budget = budget
            assert torch.equal(module(X), expected)


def test_the_memory_of_before_is_freed(path: Path) -> None:
    """At the end of a change, not when the collector comes."""
    module = torch_rtx.load(path)
    module.refit(Deep())
    gc.disable()
    try:
        with weight_streaming(module) as weights:
            weights.device_budget = "30%"
            module(X)
            gone = [weakref.ref(module.session.streamer), weakref.ref(module.session.specializer)]
            weights.device_budget = None
            module(X)
            assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def test_while_other_threads_call(path: Path) -> None:
    module = torch_rtx.load(path, weights=Deep())
    expected, wrong, counts, stop = module(X), [], [0, 0], threading.Event()

    def call(index: int) -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    wrong.extend([] if torch.equal(module(X), expected) else ["differs"])
                except Exception as error:
                    wrong.append(str(error))
                counts[index] += 1

    threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    with weight_streaming(module) as weights:
        for budget in ("50%", None, "30%", "80%") * 5:
            before = min(counts)
            weights.device_budget = budget
            while min(counts) <= before and not wrong:
                pass
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_that_has_begun_runs_the_code_of_now(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has found its code when the weights move, and must not run it with them."""
    module = torch_rtx.load(path, weights=Deep())
    expected, session, refresh = module(X), module.session, module._store.refresh
    for budget in ("50%", "30%", None):
        before = session.streamer

        def moving(wait: bool, budget: str | None = budget) -> Any:
            monkeypatch.setattr(module._store, "refresh", refresh)
            session.stream_weights(budget)
            return refresh(wait)

        monkeypatch.setattr(module._store, "refresh", moving)
        if before is not None:
            monkeypatch.setattr(before, "begin", None)  # nobody may call it any more
        assert torch.equal(module(X), expected)
        assert session.streamer is not before


def test_shallow_copies_see_the_change(path: Path) -> None:
    module = torch_rtx.load(path, weights=Deep())
    shared, other = copy.copy(module), Deep()
    with weight_streaming(module) as weights:
        weights.device_budget = "30%"
        shared.refit(other)
        assert torch.equal(module(X), torch_rtx.load(path, weights=other)(X))


def test_only_engines_stream() -> None:
    for module in (Deep(), torch.compile(Deep(), backend="rtx")):
        with pytest.raises(RtxError, match=r"can't be streamed[\s\S]*build an engine"), weight_streaming(module):  # type: ignore[arg-type]
            pass
    with (
        pytest.raises(SettingsError, match=r"can't be changed per call[\s\S]*runtime.weight_streaming\(module\)"),
        torch_rtx.runtime_settings(weight_streaming_budget="50%"),
    ):
        pass


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["disabled", "whole_graph_capture"])
def test_graphs_for_a_while(path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the settings of a module have none, they are there in the context, and not after it."""
    settings = RuntimeSettings(cuda_graph_strategy=strategy, specialization_strategy="none")
    module = torch_rtx.load(path, weights=Deep(), settings=settings)
    session, pooled = module.session, []

    def pool(key: object, code: Any, inputs: Any, store: Any) -> list[Any]:
        pooled.append(key)
        return session.run(code, inputs, store.values)

    monkeypatch.setattr(session, "_new_pool", lambda: pool)
    monkeypatch.setattr(session, "no_graphs", None)  # as on a GPU
    expected = module(X)
    usual = strategy != "disabled"
    assert len(pooled) == usual
    with torch_rtx.runtime.enable_cudagraphs(module) as captured:
        assert captured is module
        assert torch.equal(captured(X), expected)
    assert len(pooled) == 1 + usual
    module(X)
    assert len(pooled) == 1 + 2 * usual


def test_no_graphs_on_the_cpu(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = torch_rtx.load(path, weights=Deep())
    with torch_rtx.runtime.enable_cudagraphs(module):
        assert caplog.messages == ["no CUDA graphs for this module: it runs on the CPU"]


def test_graphs_of_what_is_compiled() -> None:
    in_place = nn.Identity()
    in_place.compile(backend="rtx")
    for compiled in (torch.compile(nn.Linear(2, 2), backend="rtx"), torch.compile(torch.relu, backend="rtx"), in_place):
        with torch_rtx.runtime.enable_cudagraphs(compiled) as same:
            assert same is compiled
    with (
        pytest.raises(RtxError, match="a Linear is not compiled"),
        torch_rtx.runtime.enable_cudagraphs(nn.Linear(2, 2)),
    ):
        pass
