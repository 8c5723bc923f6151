"""Ranks measure together: each a part, whoever else comes, and all use the same tactics."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.doubles.emulated import Device
from tests.runtime.test_specialize import right, session
from torch_rtx.runtime import ranks
from torch_rtx.runtime.background import Background, Stopped
from torch_rtx.runtime.shared_tuning import SharedTuning
from torch_rtx.runtime.variant import SPECIALIZED

NAMES = ["a", "b", "c", "d", "e"]
HERE = threading.local()  # the number of the rank that a thread is


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store of two ranks, which are threads."""
    found = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "shared_store", lambda: found)
    monkeypatch.setattr(ranks, "place", lambda: (HERE.rank, 2))
    return found


def shared(rank: int) -> SharedTuning:
    HERE.rank = rank
    return SharedTuning(NAMES)


def never() -> None:
    raise Stopped


@pytest.mark.quick
def test_without_other_ranks_one_measures_all() -> None:
    alone = SharedTuning(NAMES)
    assert (alone.take(), alone.take(), alone.heard(60, never)) == (NAMES, [], [])


@pytest.mark.quick
def test_each_rank_measures_a_part(store: Any) -> None:
    first, second = shared(0), shared(1)
    assert (first.take(), second.take()) == (["a", "b"], ["c", "d", "e"])
    first.give(["a", "b"])
    assert (first.take(), second.take()) == ([], [])
    assert second.heard(60, never) == ["a", "b"]
    with pytest.raises(Stopped):  # the process ends while it waits
        first.heard(60, never)
    assert first.heard(0, lambda: None) == []  # as if the other rank had ended
    second.give(["c", "d", "e"])
    assert first.heard(60, never) == ["c", "d", "e"]


@pytest.mark.quick
def test_nobody_waits_for_a_rank_that_comes_late_or_never(store: Any) -> None:
    first = shared(0)
    assert (first.take(), first.take(), first.take()) == (["a", "b"], ["c", "d", "e"], [])
    assert first.heard(60, never) == []
    late = shared(1)
    assert late.take() == []
    first.give(NAMES)
    assert late.heard(60, never) == NAMES


def test_two_ranks_use_the_same_tactics(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one, library calls are faster than kernels, on the other one they are slower."""
    both = threading.Barrier(2)
    place = ranks.place
    monkeypatch.setattr(ranks, "place", lambda: (both.wait(60), place())[1])
    devices = [Device(calls=0.5), Device(calls=2.0)]
    backgrounds = [Background(), Background()]
    made = [session(device, background) for device, background in zip(devices, backgrounds, strict=True)]
    for rank, background in enumerate(backgrounds):
        background.submit(lambda rank=rank: setattr(HERE, "rank", rank), threading.Event())  # type: ignore[misc]
    for one, model in made:
        right(one, model)
    for one, model in made:
        assert one.specializer.wait(60)
        right(one, model)
        assert one.specializer.base.tier == SPECIALIZED
    for background in backgrounds:
        background.stop()
    choices = [{one.key: one.choice for one in made.specializer.base.regions} for made, _ in made]
    assert choices[0] == choices[1]
    assert None not in choices[0].values()
    assert all(device.timed for device in devices)
    fastest = {choice.name.partition(" ")[0] for choice in choices[0].values() if choice is not None}
    assert fastest == {"library", "kernel"}  # as each found
