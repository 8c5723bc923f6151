"""`torch-rtx bench` and the benchmarks over one engine file."""

from __future__ import annotations

from benchmarks.agreement import in_turns
from benchmarks.cases import Workload


def test_both_measure_the_same_engine() -> None:
    theirs, ours = in_turns(Workload("bert_base", 1, 4, size="small"), "cpu", 2)
    assert len(theirs) == len(ours) == 2
    assert all(0.2 < mine / other < 5 for mine, other in zip(ours, theirs, strict=True))  # milliseconds, both
