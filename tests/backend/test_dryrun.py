"""dryrun() says what an engine would hold: the same as the engine that is built then."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.ahead import IDS, IMAGE, Net, Tied
from torch_rtx import CaptureError, CompilationSettings, Input, InputError, SettingsError, dryrun
from torch_rtx.backend import build


class Rows(nn.Module):
    """As many rows as the data says, and a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        y = self.linear(x).relu()
        return y[torch.nonzero(y[:, 0] > 0)[:, 0]].sum() + self.count


CASES: list[tuple[nn.Module, list[Any], dict[str, Any]]] = [
    (Net(), [IMAGE], {}),
    (Tied(), [IDS], {"torch_executed_ops": ["aten.layer_norm"]}),
    (Rows(), [Input(min_shape=(2, 8), opt_shape=(4, 8), max_shape=(9, 8))], {}),
    (Rows(), [Input((4, 8))], {"min_block_size": 4, "torch_executed_ops": ["aten.relu"], "device": "cuda"}),
]


@pytest.mark.parametrize(("model", "inputs", "options"), CASES)
def test_it_is_what_is_built(
    model: nn.Module, inputs: list[Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = model.eval(), CompilationSettings(**options)
    built = torch_rtx.compile(model, inputs=inputs, settings=settings)
    fallbacks = Counter(node.op for node in built.engine.graph.nodes if node.kind == "fallback")
    monkeypatch.setattr(build, "get_or_build", None)  # nothing is built from here on
    model = model.to("meta") if settings.device else model  # no weight is read
    found = dryrun(model, inputs=inputs, settings=settings)
    (graph,) = found.graphs
    assert found.fallback_nodes == fallbacks.total()
    assert Counter(one.op for one in graph.fallbacks) == fallbacks
    assert found.engine_nodes > 0
    assert all(size >= settings.min_block_size for size in graph.blocks)
    assert f"{found.engine_nodes} nodes in engines, {fallbacks.total()} fall back to PyTorch" in str(found)


def test_reasons_and_lines() -> None:
    settings = CompilationSettings(torch_executed_ops=["aten.relu"], require_full_compilation=True)
    (graph,) = dryrun(Rows().eval(), [torch.ones(4, 8)], settings=settings).graphs
    relu = next(one for one in graph.fallbacks if one.op == "aten.relu.default")
    assert relu.reason == "listed in torch_executed_ops"
    assert str(relu.loc).startswith("linear") or "test_dryrun.py" in str(relu.loc)


def test_exported_programs() -> None:
    model = Net().eval()
    program = torch.export.export(model, (IMAGE,))
    assert dryrun(program) == dryrun(program)  # which it leaves as it is
    assert dryrun(program).engine_nodes == dryrun(model, (IMAGE,)).engine_nodes


def test_what_would_fail() -> None:
    with pytest.raises(CaptureError, match="in training mode"):
        dryrun(nn.Sequential(nn.Linear(8, 8), nn.Dropout()), inputs=[torch.ones(4, 8)])
    with pytest.raises(InputError, match="args and inputs are both given"):
        dryrun(Net().eval(), [IMAGE], inputs=[IMAGE])
    with pytest.raises(SettingsError, match="no operator aten.sofmax"):
        dryrun(Net().eval(), [IMAGE], settings=CompilationSettings(torch_executed_ops=["aten.sofmax"]))
