"""Ranks that are gone while a GPU waits for them."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_rtx.errors import RanksError
from torch_rtx.irparse import parse
from torch_rtx.runtime import pulse
from torch_rtx.runtime.pulse import Pulse
from torch_rtx.runtime.together import Together

TIMEOUT_S = 0.2


def started(store: Any, rank: int, other: int, stuck: bool = True) -> tuple[Pulse, threading.Event]:
    ended = threading.Event()
    made = Pulse(store, rank, [other], TIMEOUT_S, lambda: stuck, ended.set)
    made.start()
    return made, ended


def test_a_rank_that_goes() -> None:
    """The other one ends if its GPU waits, and does not if it has nothing to wait for."""
    for stuck in (True, False):
        store = torch.distributed.HashStore()
        (first, ended), (second, _) = started(store, 0, 1, stuck), started(store, 1, 0, stuck)
        time.sleep(2 * TIMEOUT_S)
        assert (first.gone, second.gone, ended.is_set()) == (None, None, False)
        second.stopped.set()
        first.join(20)
        assert (first.gone, ended.is_set()) == ("rank 1", stuck)


def test_a_rank_that_goes_at_once() -> None:
    """Before its thread has counted: it is missed by who meets it."""
    store = torch.distributed.HashStore()
    second, _ = started(store, 1, 0)
    second.stopped.set()
    first, ended = started(store, 0, 1)
    first.join(20)
    assert (first.gone, ended.is_set()) == ("rank 1", True)


def test_a_rank_that_was_never_there() -> None:
    first, ended = started(torch.distributed.HashStore(), 0, 1)
    time.sleep(2 * TIMEOUT_S)
    assert (first.gone, ended.is_set(), first.is_alive()) == (None, False, True)
    first.stopped.set()


def test_the_store_goes() -> None:
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise torch.distributed.DistStoreError("connection reset")

    first, ended = started(Gone(), 0, 1)
    first.join(20)
    assert (first.gone, ended.is_set()) == ("the rank with the store", True)


def test_what_a_gpu_does_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = threading.Event()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: busy.wait(20))
    assert pulse.is_stuck(torch.device("cuda:1"), 0.01)
    busy.set()
    assert not pulse.is_stuck(torch.device("cuda:1"), 20)


def test_calls_after_a_rank_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """graph import {
  input x: f32[4]
  a: f32[4] = op _c10d_functional.all_reduce.default(input=x, reduce_op="sum", group_name="tp")
  b: f32[4] = op torch_rtx.wait.default(tensor=a)
  return [b]
}
"""
    together = Together(parse(text), torch.device("cpu"))
    found = SimpleNamespace(gone=None)
    monkeypatch.setattr("torch_rtx.runtime.together._meet", lambda *_: found)
    with together:
        pass
    found.gone = "rank 1"
    with pytest.raises(RanksError, match="rank 1 of the group 'tp' is gone"), together:
        raise AssertionError("the call began")
