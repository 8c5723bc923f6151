"""How often a tactic runs to be timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch

from torch_rtx.runtime.benchmark import LEAST, MOST_ROUNDS, ROUND_US, RUNS, device_us


class Clock:
    """Of a GPU, which only runs advance, by what `us` says of a run's number."""

    def __init__(self, us: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.us, self.number = 0.0, us, count()
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now / 1000

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)

    def run(self) -> None:
        self.now += self.us(next(self.number))


@pytest.mark.parametrize(("us", "count"), [(2.0, RUNS), (ROUND_US / 10, 10), (10 * ROUND_US, LEAST)])
def test_long_runs_are_timed_less_often(us: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set of inputs is used as often as the others."""
    clock, made = Clock(lambda number: us, monkeypatch), [0, 0]

    def run(index: int) -> None:
        made[index] += 1
        clock.run()

    assert device_us([lambda: run(0), lambda: run(1)]) == pytest.approx(us)
    assert sum(made) == 2 + 4 * count  # the first round tells how long they take to launch
    assert made[0] - made[1] == 2 + 4 * (count % 2)


def test_what_others_run_between_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has the GPU in all of the first rounds but two."""
    first = 2 + RUNS
    busy = {0: 9.0, 1: 30.0, 3: 15.0, 4: 21.0}  # microseconds, by the number of a timed round
    clock = Clock(lambda number: 2.0 + busy.get((number - first) // RUNS, 0.0) * (number % RUNS == 7), monkeypatch)
    assert device_us([clock.run]) == pytest.approx(2.0)
    assert next(clock.number) == first + 6 * RUNS


def test_a_clock_that_never_agrees_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda number: 100.0 / (1 + number // RUNS), monkeypatch)
    device_us([clock.run])
    assert next(clock.number) < 2 + RUNS * (MOST_ROUNDS + 2)
