"""explain() says what runs in the engine, what falls back, why, and where the model calls it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.compiled import Counter
from torch_rtx import CompilationSettings, explain
from torch_rtx.errors import PartitionError

X = torch.linspace(-1, 1, 12).view(3, 4)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        x = self.fc(x).relu() * scale
        rows = x[x.sum(1) > 0]  # as many rows as the data says
        return rows.sum() + x.exp().mean()


def test_a_model_that_is_all_engine():
    found = explain(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X)
    assert (found.engine_nodes, found.fallback_nodes, len(found.graphs)) == (2, 0, 1)
    assert str(found) == "1 graph: 2 nodes in engines, 0 fall back to PyTorch\ngraph 0: blocks of 2 nodes"


@pytest.mark.quick
def test_fallbacks_have_reason_and_location():
    model = Model()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = explain(model, X, scale=2.0)
    assert len(found.graphs) == 1
    fallback = next(f for f in found.graphs[0].fallbacks if f.op.startswith(("aten.nonzero", "aten.index")))
    assert "depends on the data" in fallback.reason
    assert fallback.loc.file.endswith("test_explain.py")
    text = str(found)
    assert f"fallback {fallback.op}: {fallback.reason}\n    at {fallback.loc}" in text
    assert f"{found.engine_nodes} nodes in engines, {found.fallback_nodes} fall" in text


def test_graph_breaks():
    found = explain(Model(), X)
    assert len(found.graphs) == 2
    assert found.graphs[0].break_reason
    assert "test_explain.py:" in found.graphs[0].break_reason
    assert found.graph_breaks == (found.graphs[0].break_reason,)
    assert f"graph break: {found.graphs[0].break_reason}" in str(found)
    assert found.graphs[-1].break_reason is None
    first = str(found).splitlines()[0]
    assert first.startswith("2 graphs, 1 graph break: ")
    assert first.endswith("PyTorch runs what is between the graphs")


def breaks_first(x):
    return torch.nonzero(x).float().exp()


def is_skipped(x):
    try:
        torch._dynamo.graph_break()  # Dynamo can't go on within `try`
        return x.exp()
    finally:
        pass


def test_graph_breaks_without_a_graph():
    """What Dynamo leaves to Python is reported although no graph ends there."""
    (text,) = explain(breaks_first, X).graph_breaks
    assert text.endswith(f"test_explain.py:{breaks_first.__code__.co_firstlineno + 1})")
    found = explain(is_skipped, X)
    assert (found.graphs, found.graph_breaks) == ((), ("is_skipped can't be compiled as a whole",))


def test_settings():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    found = explain(model, X, settings=CompilationSettings(torch_executed_ops={"aten.relu"}))
    fallbacks = [(f.op, f.reason) for f in found.graphs[0].fallbacks]
    assert fallbacks == [("aten.relu.default", "listed in torch_executed_ops")]
    assert found.graphs[0].blocks == (1, 1)
    found = explain(model, X, settings=CompilationSettings(torch_executed_ops={"aten.relu"}, min_block_size=2))
    assert (found.engine_nodes, found.fallback_nodes) == (0, 3)
    assert "blocks of none nodes" in str(found)
    assert "min_block_size is 2" in str(found)


def test_full_compilation_is_a_question_not_a_demand():
    """Who asks what must fall back is answered, whatever the compilation would demand."""
    settings = CompilationSettings(require_full_compilation=True, torch_executed_ops={"aten.relu"})
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert explain(model, X, settings=settings).fallback_nodes == 1
    with pytest.raises(PartitionError, match="aten.relu.default: listed in torch_executed_ops"):
        torch_rtx.compile(model, (X,), settings=settings)


def test_functions_hooks_and_gradients():
    assert explain(lambda x, k: (x + 1) * k, X, k=3).engine_nodes == 2
    model = nn.Linear(4, 4)
    model.register_forward_hook(lambda module, args, result: result + 1)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert explain(model, X).engine_nodes == 3
    x = X.clone().requires_grad_()
    assert explain(model, x).engine_nodes == 3
    assert x.grad is None
    model = nn.Linear(4, 4)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert explain(model, X).engine_nodes == 2


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(X)
    compiled = torch.compile(model, backend="rtx")
    compiled(X)
    explain(model, X)
    explain(compiled, X)
    assert torch.equal(model(X), expected)
    torch.testing.assert_close(compiled(X), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_many_times():
    """Dynamo stops to compile one function again and again; the account must not end there."""
    model = Model()
    first = explain(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            assert explain(model, X) == first
    counter = Counter()  # and of the user's own compilations it takes none
    compiled = torch.compile(model, backend=counter)
    for rows in range(2, 6):
        torch._dynamo.mark_static(x := torch.ones(rows, 4))
        compiled(x)
    assert counter.frame_count >= 4


def test_quantized_products_of_floats_have_a_reason():
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 16)
            self.register_buffer("scale", torch.rand(16, 2, 1))

        def forward(self, x):
            groups = (self.fc.weight.view(16, 2, 16) / self.scale).round().clamp(-8, 7) * self.scale
            x = (x * 8).round().clamp(-128, 127) / 8
            return nn.functional.linear(x, groups.view(16, 32)) + nn.functional.linear(x, (x[:1] * 8).expand(16, 32))

    report = explain(Groups(), torch.randn(4, 32))
    (found,) = report.graphs[0].floats
    assert "groups of terms" in found.reason
    assert found.loc.file.endswith("test_explain.py")
    assert f"floats in aten.linear.default: {found.reason}\n    at {found.loc}" in str(
        explain(Groups(), torch.randn(4, 32))
    )
