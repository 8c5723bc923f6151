"""An export that leaves out work gives the same program."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._export.passes import replace_set_grad_with_hop_pass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import proxy

import torch_rtx
from torch_rtx.backend import capture
from torch_rtx.backend.light_trace import light_trace


class Switches(nn.Module):
    """Gradients are switched in a layer that is called twice, with an effect if they are ever `enabled`."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = self.layer(x)
        with torch.set_grad_enabled(self.enabled):
            z = self.layer(y) * x.shape[0]
            with torch.set_grad_enabled(self.enabled):
                z = z + 1
            with torch.no_grad():
                z = z * 2
        torch.set_grad_enabled(False)
        return y, z


def described(monkeypatch: pytest.MonkeyPatch, context: Any, enabled: bool = False) -> list[Any]:
    """The program and, of each node, the lines of the model that made it."""
    monkeypatch.setattr(capture, "light_trace", context)
    shapes = ({0: torch.export.Dim("n", min=2, max=9)},)
    exported = capture.capture_export(Switches(enabled).eval(), (torch.ones(3, 4),), dynamic_shapes=shapes)
    texts = [str(exported.graph), str(exported.graph_signature), str(exported.range_constraints)]
    for node in exported.graph.nodes:
        texts += [str(node.meta.get(key)) for key in ("nn_module_stack", "val", "torch_fn", "stack_trace")]
    return [text for text in texts if "<eval_with_key>" not in text]  # a line of what PyTorch has divided


def test_programs_and_places_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = described(monkeypatch, nullcontext)
    assert "test_light_trace.py" in "".join(expected)
    assert described(monkeypatch, light_trace) == expected
    # Linear layers and norms stay whole where gradients are enabled: no inference differentiates them.
    assert described(monkeypatch, light_trace, enabled=True)[0] == expected[0]


def test_switches_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    divided: list[Any] = []

    def split(*given: Any) -> Any:
        divided.append(given)
        return before(*given)

    before = replace_set_grad_with_hop_pass.sequential_split
    monkeypatch.setattr(replace_set_grad_with_hop_pass, "sequential_split", split)

    class Disabled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x + 1

    for model, x in ((Disabled(), torch.ones(2)), (Switches(True).eval(), torch.ones(3, 4))):
        capture.capture_export(model, (x,))
    assert not divided


def test_models_that_begin_with_gradients() -> None:
    class Enabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y[0] += 1
            with torch.inference_mode():
                return self.layer(y.clone()) * (2 if torch.is_grad_enabled() else 3)

    model, x = Enabled(), torch.randn(2, 4)
    with torch.no_grad():
        compiled = torch_rtx.compile(model, (x,))
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.is_grad_enabled()


def test_types_of_layers_are_inferred_once() -> None:
    counts = []
    for layers in (2, 12):
        FakeTensorMode.cache_clear()
        capture.capture_export(nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))), (torch.ones(2, 3, 4),))
        info = FakeTensorMode.cache_info()
        counts.append(info.hits + info.misses + sum(info.bypasses.values()))
    assert counts[1] - counts[0] == 10  # by its parts, a linear layer has four calls


def test_pytorch_is_as_before() -> None:
    before = proxy.CapturedTraceback
    with light_trace():
        assert proxy.CapturedTraceback is not before
    assert proxy.CapturedTraceback is before
