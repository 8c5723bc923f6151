"""Graphs of one live model have weights once that they compute in the same way, and only as long as they are equal."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from torch_rtx.runtime import leases
from torch_rtx.runtime.weights import WeightStore

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """Two products that become one, of a weight that is computed from both."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x).sin() * self.key(x)


@pytest.fixture
def stores(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WeightStore]]:
    """The stores that are attached to parameters, in their order."""
    found: list[WeightStore] = []
    original = WeightStore._attach

    def attach(store: WeightStore, *given: Any) -> None:
        original(store, *given)
        if store not in found:
            found.append(store)

    monkeypatch.setattr(WeightStore, "_attach", attach)
    with torch.no_grad():
        yield found


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="rtx", dynamic=False, options={"copy_weights": True})


def places(store: WeightStore) -> list[int]:
    """Where the weights lie that the store computed."""
    return [v.data_ptr() for v, w in zip(store.values, store.weights, strict=True) if w.recipe is not None]


def two_graphs(model: Gated) -> Any:
    """The model compiled, and called in two sizes."""
    call = compiled(model)
    gives(call, model)
    return call


def gives(call: Any, model: Gated) -> None:
    """The results for both sizes are those of the model."""
    for x in (X, torch.cat((X, X))):
        torch.testing.assert_close(call(x), model(x))


def test_graphs_of_several_sizes_have_one_copy(stores: list[WeightStore]) -> None:
    two_graphs(Gated())
    first, second = stores
    assert places(first)
    assert places(first) == places(second)


def test_changes_in_place_are_seen_by_both(stores: list[WeightStore]) -> None:
    model = Gated()
    call = two_graphs(model)
    before = places(stores[0])
    for step in range(3):
        for parameter in model.parameters():
            parameter.add_(0.1 * (step + 1))
        gives(call, model)
    assert places(stores[0]) == places(stores[1]) == before


@pytest.mark.parametrize("order", [1, -1])
def test_other_memory_for_a_parameter(stores: list[WeightStore], order: int) -> None:
    """The graph that is called first leaves what the other one still reads, and the other one follows."""
    model, sizes = Gated(), (X, torch.cat((X, X)))[::1]
    call = two_graphs(model)
    model.query.weight.data = torch.randn(8, 8)
    for x in sizes[::order]:
        torch.testing.assert_close(call(x), model(x))
    assert places(stores[0]) == places(stores[1])
    gives(call, model)


def test_an_equal_model_has_memory_of_its_own(stores: list[WeightStore]) -> None:
    one = Gated()
    other = copy.deepcopy(one)
    calls = [two_graphs(one), two_graphs(other)]
    other.key.weight.mul_(-1)
    for call, model in zip(calls, (one, other), strict=True):
        gives(call, model)
    assert places(stores[0]) != places(stores[2])


def test_refit_leaves_the_others_alone(stores: list[WeightStore]) -> None:
    """Modules that are attached to one model share; one that gets other weights no longer does."""
    model, other = Gated(), Gated()
    modules = [torch_rtx.compile(model, (X,)) for _ in range(2)]
    assert places(stores[0]) == places(stores[1])
    modules[0].refit(other)
    torch.testing.assert_close(modules[0](X), other(X))
    torch.testing.assert_close(modules[1](X), model(X))
    model.query.weight.add_(1)
    torch.testing.assert_close(modules[1](X), model(X))
    torch.testing.assert_close(modules[0](X), other(X))


def test_unloaded_weights_stay_with_the_others(stores: list[WeightStore]) -> None:
    model = Gated()
    modules = [torch_rtx.compile(model, (X,)) for _ in range(2)]
    modules[0].session.unload_weights()
    torch.testing.assert_close(modules[1](X), model(X))
    modules[0].session.load_weights()
    assert places(stores[0]) == places(stores[1])
    gives = [module(X) for module in modules]
    torch.testing.assert_close(*gives)


def test_nothing_is_kept_for_nobody(stores: list[WeightStore]) -> None:
    known = len(leases._KNOWN)
    model = Gated()
    call = two_graphs(model)
    assert len(leases._KNOWN) > known
    del call, model
    stores.clear()
    torch._dynamo.reset()
    gc.collect()
    assert len(leases._KNOWN) == known


def test_memory_with_other_values_is_not_shared() -> None:
    """What another store has not yet computed again is no weight for this one."""
    held, mine = leases.Leases(), leases.Leases()
    tensor = torch.ones(4)
    held.offer(0, "key", tensor)
    assert mine.find(3, "key", torch.zeros(4)) is None
    assert mine.find(3, "key", torch.ones(4, dtype=torch.float64)) is None
    assert held.alone(0)
    assert mine.find(3, "key", torch.ones(4)) is tensor
    assert not held.alone(0)
    mine.end(3)
    assert held.alone(0)
