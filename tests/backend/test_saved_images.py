"""Images that a training step saves: their layout, what is still copied, and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.numerics import assert_right
from tests.lowering.test_training_graphs import OPTIONS, Residual, compiled_step, laid_out, step
from torch_rtx.backend import entry
from torch_rtx.ir import Graph, TensorType
from torch_rtx.lowering.passes.channels_last import strides_of

IMAGES, CLONE = 4, "aten.clone.default"
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mixed(nn.Module):
    """Images that are returned, joined, resampled and read as sequences, and a convolution of a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(16, 6, 1),
        )
        self.norm, self.up, self.volume = nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv3d(2, 3, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = F.silu(self.norm(self.first(x)))
        small = F.max_pool2d(F.gelu(self.deep(first)), 2)
        joined = self.last(torch.cat([self.up(small), first[:, :, 1:-1, 1:-1]], 1))
        sequence = joined.flatten(2).transpose(1, 2)
        return first, (sequence @ sequence.mT).softmax(-1), F.silu(self.volume(y)).sum((2, 3, 4))


def copies(graph: Graph) -> list[object]:
    """The channels of images and weights that are only copied."""
    copying = [
        node for node in graph.nodes if all(one.op == CLONE for one in (node.body.nodes if node.body else [node]))
    ]
    return [value.type.shape[1] for node in copying for value in node.results if isinstance(value.type, TensorType)]


def test_layouts() -> None:
    """What convolutions read and write is saved as they have it; only the result and its gradient are copied."""
    (forward, backward), _ = compiled_step(Residual(), (torch.randn(IMAGES, 3, 12, 10),), {})
    types = [value.type for value in backward.inputs if isinstance(value.type, TensorType)]
    images = [type_ for type_ in types if type_.shape[:2] == (IMAGES, 8) and len(type_.shape) == 4]
    assert len(images) >= 3
    assert all(type_.strides == strides_of(type_.shape) for type_ in images)
    assert (copies(forward), copies(backward)) == ([5], [5])


@pytest.mark.parametrize("as_rows", [True, False])
def test_gradients(as_rows: bool) -> None:
    torch.manual_seed(0)
    model, args = Mixed(), (torch.randn(2, 3, 10, 12), torch.randn(2, 2, 5, 4, 6))
    if not as_rows:
        for layer in (model.first, model.deep, model.last, model.up):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        args = laid_out(args[0]), args[1]
    wide = copy.deepcopy(model).double()
    exact = step(wide, wide, tuple(x.double() for x in args), {})
    _, found = compiled_step(copy.deepcopy(model), args, {})
    assert_right(found, step(model, model, args, {}), exact)


def test_graphs_that_run_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views in the backward find the layout that they were traced with."""
    monkeypatch.setattr(entry, "formed_for", lambda *_: (90,))
    monkeypatch.setattr(entry, "get_or_build", lambda *_: 1 / 0)
    torch.manual_seed(0)
    model, args = Mixed(), (torch.randn(2, 3, 10, 12), torch.randn(2, 2, 5, 4, 6))
    expected = step(copy.deepcopy(model), copy.deepcopy(model), args, {})[:1]
    compiled = torch.compile(model, backend="rtx", fullgraph=True, options={**OPTIONS, "fallback_on_error": True})
    torch.testing.assert_close(step(model, compiled, args, {})[:1], expected, rtol=1e-2, atol=1e-2)
    assert all(parameter.grad is not None for parameter in model.parameters())
