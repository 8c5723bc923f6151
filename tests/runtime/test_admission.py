"""Which keys are admitted, for orders of calls that are known to be hard."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from torch_rtx.runtime.admission import MISSES_FOR_FREE_SLOT, PATIENCE, TRACKED_PER_SLOT, AdmissionPolicy


class Kept:
    """Something that keeps a few keys, and what it did: `made` lists the keys that were admitted, in order."""

    def __init__(self, count: int, doubling: bool = False) -> None:
        self.holders: dict[int, SimpleNamespace] = {}
        self.policy = AdmissionPolicy(self.holders, count, doubling)
        self.made: list[int] = []
        self.hits = self.calls = 0

    def call(self, keys: Iterable[int]) -> None:
        for key in keys:
            self.calls += 1
            if key in self.holders:
                self.hits += 1
            elif self.policy.record_miss(key):
                evicted = self.policy.evict_for(key)
                if evicted is not None:
                    del self.holders[evicted]
                self.holders[key] = SimpleNamespace()
                self.made.append(key)
            if key in self.holders:
                self.holders[key].used = self.calls


def test_free_slots_go_to_what_recurs() -> None:
    kept = Kept(2)
    kept.call([1, 2, 3, 1, 1])
    assert (kept.made, kept.hits) == ([1], MISSES_FOR_FREE_SLOT - 1)
    assert not kept.policy.full


@pytest.mark.parametrize("keys", [9, 24, 400])
def test_more_keys_than_slots_in_turn(keys: int) -> None:
    kept = Kept(8)
    kept.call(list(range(keys)) * 100)
    assert kept.made == list(range(8))
    assert kept.hits == 8 * 98


def test_more_keys_than_slots_by_chance() -> None:
    """Slots hardly ever change hands: one in 2^PATIENCE tries at first, and fewer with each that does."""
    chance, kept = random.Random(0), Kept(8, doubling=True)
    kept.call(chance.choices(range(24), k=200_000))
    assert len(kept.made) < 8 * 4
    assert kept.hits > 0.99 * 200_000 * 8 / 24


def test_what_comes_more_often_gets_in() -> None:
    chance, kept = random.Random(0), Kept(2, doubling=True)
    kept.call([*range(10), *range(10)])
    kept.call(chance.choices(range(10), [1] * 8 + [20] * 2, k=2000))
    assert set(kept.holders) == {8, 9}


def test_other_keys_from_some_time_on() -> None:
    """They take all slots, as soon as each was met a few times."""
    kept = Kept(4, doubling=True)
    kept.call([0, 1, 2, 3] * 1000)
    before = kept.calls
    while set(kept.holders) != {4, 5, 6, 7} and kept.calls < before + 1000:
        kept.call([4, 5, 6, 7])
    assert kept.calls - before <= 4 * 4 * PATIENCE


def test_keys_in_bursts() -> None:
    """Each comes often enough in a row to be admitted, again and again: the work grows with the logarithm of calls."""
    work = []
    for turns in (10, 100, 1000):
        kept = Kept(4, doubling=True)
        kept.call([key for _ in range(turns) for key in range(8) for _ in range(20)])
        work.append(len(kept.made))
    assert work[0] <= work[1] <= work[2] <= 4 * 4


def test_keys_that_are_all_different() -> None:
    kept = Kept(8)
    kept.call(range(10_000))
    assert kept.made == []
    assert len(kept.policy._misses) == 8 * TRACKED_PER_SLOT
