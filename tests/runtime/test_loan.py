"""Engines of one model have the weights once that they compute in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx.errors import RtxError


class Projections(nn.Module):
    """Two products that become one, of a weight that is computed from both, and another one."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self._last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.query(x).sin() * self.key(x)
        return self.out(y) if self._last else y * 2


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two engines of one model; the second one computes something else with it."""
    found = []
    for last in (True, False):
        path = tmp_path_factory.mktemp("engines") / "model.rtx"
        torch_rtx.save(torch_rtx.compile(Projections(last), (X,)), path)
        found.append(path)
    return found[0], found[1]


def sharing(files: tuple[Path, Path]) -> tuple[torch_rtx.CompiledModule, torch_rtx.CompiledModule]:
    lender, borrower = map(torch_rtx.load, files)
    borrower.session.store.share(lender.session.store)
    return lender, borrower


def model(seed: int) -> Projections:
    torch.manual_seed(seed)
    return Projections(last=False)


def places(module: torch_rtx.CompiledModule) -> set[int]:
    return {value.data_ptr() for value in module.session.store.values}


def gives(module: torch_rtx.CompiledModule, of: Projections) -> None:
    torch.testing.assert_close(module(X), of(X).detach())


class Scaled(nn.Module):
    """A weight times numbers of the program's own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer, self._scale = nn.Linear(8, 8, bias=False), torch.arange(1.0, 9.0) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layer.weight * self._scale)


def test_constants_of_one_name_may_differ() -> None:
    """A weight is not borrowed if a constant is in it."""
    torch.manual_seed(0)
    models = [Scaled(scale) for scale in (1, 3)]
    models[1].load_state_dict(models[0].state_dict())
    lender, borrower = (torch_rtx.compile(model, (X,)) for model in models)
    borrower.session.store.share(lender.session.store)
    for module, of in zip((lender, borrower), models, strict=True):
        module.attach(models[0].state_dict())
        torch.testing.assert_close(module(X), of(X).detach())


@pytest.mark.parametrize("way", ["attach", "refit"])
def test_weights_are_there_once_and_stay_up_to_date(files: tuple[Path, Path], way: str) -> None:
    lender, borrower = sharing(files)
    for seed in (1, 2):
        for module in (lender, borrower):
            getattr(module, way)(model(seed).state_dict())
        gives(borrower, model(seed))
        assert places(borrower) <= places(lender)


def test_what_the_lender_computes_again_is_seen(files: tuple[Path, Path]) -> None:
    lender, borrower = sharing(files)
    live = model(1)
    for module in (lender, borrower):
        module.attach(live)
    gives(borrower, live)
    with torch.no_grad():
        live.key.weight.mul_(3)
    gives(borrower, live)  # before any call of the lender


def test_weights_that_were_there_before_are_given_up(files: tuple[Path, Path]) -> None:
    lender, borrower = map(torch_rtx.load, files)
    for module in (lender, borrower):
        module.attach(model(1))
    assert not places(borrower) & places(lender)
    borrower.session.store.share(lender.session.store)
    gives(borrower, model(1))
    assert places(borrower) <= places(lender)


def test_unloading(files: tuple[Path, Path]) -> None:
    lender, borrower = sharing(files)
    for module in (lender, borrower):
        module.refit(model(1).state_dict())
    gives(borrower, model(1))
    borrower.session.unload_weights()
    borrower.session.load_weights()
    gives(borrower, model(1))
    lender.session.unload_weights()
    with pytest.raises(RtxError, match="unloaded"):
        borrower(X)
    lender.session.load_weights()
    gives(borrower, model(1))


@pytest.mark.parametrize("first", ["share", "stream"])
def test_streamed_weights_are_not_shared(files: tuple[Path, Path], first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lender, borrower = map(torch_rtx.load, files)
    for module in (lender, borrower):
        module.attach(model(1))
    if first == "share":
        borrower.session.store.share(lender.session.store)
    monkeypatch.setattr(lender.session.store, "streamer", object())
    if first == "stream":
        borrower.session.store.share(lender.session.store)
        gives(borrower, model(1))
    else:
        with pytest.raises(RtxError, match="streams them"):
            borrower(X)
