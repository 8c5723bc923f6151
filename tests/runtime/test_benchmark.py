"""How long candidates are timed."""

from __future__ import annotations

import pytest

from torch_rtx.runtime.benchmark import FEWEST_RUNS, RUNS, row_of


@pytest.mark.quick
def test_long_runs_are_fewer() -> None:
    """Unless the device only waits for the host, which queues one launch after another."""
    assert [row_of(ms, 2e-5) for ms in (0.01, 0.1, 0.25, 0.5, 1.0, 50.0)] == [RUNS, RUNS, RUNS, 16, 8, FEWEST_RUNS]
    assert row_of(0.5, 3e-4) == RUNS
