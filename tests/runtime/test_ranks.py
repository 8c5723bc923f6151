"""What ranks decide once for all of them, through a store."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from torch_rtx.runtime import ranks
from torch_rtx.runtime.tuning_db import Choice, TuningDatabase
from torch_rtx.targets import arch_of


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that all threads of this process see, as if they were ranks."""
    found = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "shared_store", lambda: found)
    return found


class Gone:
    """A store whose server has ended."""

    def __getattr__(self, name: str) -> Any:
        def raises(*_: object) -> None:
            raise torch.distributed.DistStoreError(f"{name}: connection reset")

        return raises


@pytest.mark.quick
def test_without_other_ranks_nobody_waits() -> None:
    assert ranks.shared_store() is None
    assert ranks.said("a", 60) is None
    assert ranks.agreed("a", "mine") == "mine"
    with ranks.one_rank_first("a"):
        pass


@pytest.mark.quick
def test_the_first_rank_decides(store: Any) -> None:
    assert ranks.said("a") is None
    assert [ranks.agreed("a", value) for value in ("first", "second")] == ["first", "first"]
    assert (ranks.said("a"), ranks.agreed("b", "second")) == ("first", "second")


@pytest.mark.quick
def test_one_rank_builds_and_the_others_find_it(store: Any) -> None:
    built: list[int] = []
    found: list[bool] = []

    def rank(index: int) -> None:
        with ranks.one_rank_first("a", 60):
            found.append(bool(built))
            if not built:
                time.sleep(0.05)
                built.append(index)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert sorted(found) == [False, True, True, True]


@pytest.mark.quick
def test_a_rank_that_fails_keeps_nobody_waiting(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="x"), ranks.one_rank_first("a", 60):
        raise ValueError("x")
    with ranks.one_rank_first("a", 60):
        assert not caplog.messages
    store.add("b claims", 1)  # by a rank that has ended since
    with ranks.one_rank_first("b", 0.05):
        assert "this one builds it, too" in caplog.messages[0]


@pytest.mark.quick
def test_a_store_that_failed_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dist, asked = torch.distributed, list[str]()

    class Failing(dist.Store):  # type: ignore[misc]
        def check(self, keys: list[str]) -> bool:
            asked.extend(keys)
            raise dist.DistStoreError("connection reset")

    failing = Failing()
    monkeypatch.setattr(ranks, "_failed", float("-inf"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: failing)
    assert ranks.place() == (1, 2)
    assert [ranks.said("a", 60), ranks.said("b", 60)] == [None, None]
    assert [key.rpartition("/")[2] for key in asked] == ["a"]
    assert ranks.place() == (0, 1)


@pytest.mark.quick
def test_a_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "shared_store", Gone)
    monkeypatch.setattr(ranks, "_failed", ranks._failed)  # as it was, afterwards
    assert ranks.agreed("a", "mine") == "mine"
    assert ranks.said("a", 60) is None
    with ranks.one_rank_first("a", 60):
        pass


@pytest.mark.quick
def test_all_ranks_choose_the_same_tactic(store: Any) -> None:
    """The second rank measured otherwise; a third one has measured nothing yet; other GPUs choose for themselves."""
    one, other = Choice("triton 1", 1, {"triton 1": 1.0}), Choice("library 0", 0, {"library 0": 2.0})
    first, second, third, foreign = (TuningDatabase(sm, None) for sm in (90, 90, 90, 89))  # type: ignore[arg-type]
    assert third.choice("r") is None
    assert [first.agreed("r", one), second.agreed("r", other), third.choice("r")] == [one] * 3
    assert foreign.choice("r") is None
    assert foreign.agreed("r", other) == other
    assert arch_of(90).chip != arch_of(89).chip
