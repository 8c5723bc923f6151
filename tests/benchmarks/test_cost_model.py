"""The benchmark of the cost model: its layers and their tactics, without a GPU."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("triton")

from benchmarks import cost_model
from torch_rtx.aten import ALLOWED
from torch_rtx.ir import verify
from torch_rtx.targets import Target, arch_of


def test_layers_are_valid() -> None:
    found = cost_model.layers()
    assert len(found) == 23
    for body in found.values():
        verify(body, ALLOWED)


def test_tactics_are_ranked_and_compiled() -> None:
    body = cost_model.layers()["softmax 512x4096"]
    order = cost_model.ranked(body, 90, arch_of(90).chip)
    assert 1 < len(order) <= cost_model.FIRST
    assert next(iter(order))[0] == "kernel"
    name = next(iter(order))
    made = cost_model.compiled({("layer", name): order[name]}, Target(90))
    tactic, binaries = made["layer", name]
    assert {v.binary for launch in tactic.kernels.values() for v in launch.variants} == binaries.keys()


def test_what_is_lost() -> None:
    order = {("a",): 1, ("b",): 2, ("c",): 3}
    assert cost_model.regret(order, {("b",): 3.0, ("c",): 2.0}) == 1.5  # what does not fit is never taken
    assert math.isnan(cost_model.regret(order, {("d",): 3.0}))
    assert cost_model.summary([1.0, 4.0, math.nan]) == {"mean": pytest.approx(2.0), "worst": 4.0}
