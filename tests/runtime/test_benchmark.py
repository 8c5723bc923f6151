"""How often a tactic runs to be timed."""

from __future__ import annotations

import pytest
import torch

from torch_rtx.runtime.benchmark import LEAST, ROUND_US, RUNS, device_us


@pytest.mark.parametrize(("us", "count"), [(2.0, RUNS), (ROUND_US / 10, 10), (10 * ROUND_US, LEAST)])
def test_long_runs_are_timed_less_often(us: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only runs advance; each set of inputs is used as often as the others."""
    made = [0, 0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = us * sum(made) / 1000

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def run(index: int) -> None:
        made[index] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert device_us([lambda: run(0), lambda: run(1)]) == pytest.approx(us)
    assert sum(made) == 2 + 4 * count  # the first round tells how long they take to launch
    assert made[0] - made[1] == 2 + 4 * (count % 2)
