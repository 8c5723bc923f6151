"""Layers over one input whose weights are quantized are one product of quantized weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tests.lowering.test_prologues import Packed, compiled
from torch_rtx.ir import Graph
from torch_rtx.op_work import PRODUCTS
from torch_rtx.quantization import quantize


class Attention(nn.Module):
    """Three layers over one input, before attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(256, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        heads = (layer(x).unflatten(-1, (2, 16)).transpose(-2, -3) for layer in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(*heads)


def products(graph: Graph) -> list[str]:
    """The products in a graph and its kernels."""
    inner = [op for node in graph.nodes if node.body is not None for op in products(node.body)]
    return [*inner, *(node.op for node in graph.nodes if node.op in PRODUCTS)]


@torch.no_grad()
@pytest.mark.parametrize(
    "preset", ["int8_dynamic", "int8_rotated", "int8_weight_only", "fp8_dynamic", "int4_weight_only"]
)
def test_presets(preset: str) -> None:
    """Results are those of separate layers, with other weights, too."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 256).half()
    models = [quantize(Attention().half().eval(), preset, lambda model: model(x)) for _ in range(2)]
    for model in models:
        for name, buffer in model.named_buffers():  # as calibrated on other data
            if name.endswith("weight_clip"):
                buffer.mul_(torch.rand_like(buffer) / 2 + 0.5)
    module = compiled(models[0], x)
    assert len(products(module.engine.graph)) == 1 + (preset == "int8_rotated")  # and that which rotates the input
    for model in models:
        module.refit(model)
        exact = deepcopy(model).double()(x.double())
        error, eager = (float((one - exact).norm() / exact.norm()) for one in (module(x), model(x)))
        assert error <= max(2 * eager, 2e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "merged", "stored"),
    [
        (None, False, {"f16[32, 256]", "f16[32]"}),  # a sum of their parts would be a copy of the parameters
        ("int8_dynamic", True, {"i8[256, 96](1, 256)", "f32[96]", "f16[96]"}),
        ("int4_weight_only", True, {"i32[96, 32]", "f32[2, 96]", "f16[96]"}),
    ],
)
def test_without_copies_of_weights(preset: str | None, merged: bool, stored: set[str]) -> None:
    """As under torch.compile: what recipes store anyway, they store merged and packed."""
    torch.manual_seed(0)
    model, x = Attention().half().eval(), torch.randn(2, 6, 256).half()
    if preset is not None:
        quantize(model, preset)
    module = compiled(model, x, copy_weights=False)
    assert len(products(module.engine.graph)) == (1 if merged else 3)
    assert {str(weight.value.type) for weight in module.engine.graph.weights} == stored


@pytest.mark.parametrize(("copies", "types"), [(False, {"u8"}), (True, {"i32"})])
def test_packed_parameters_are_not_copied(copies: bool, types: set[str]) -> None:
    """A layout for kernels is a copy, which takes `copy_weights`."""
    model = Packed("low first", 24, 256, 64, torch.float16, "").eval()
    module = compiled(model, torch.randn(5, 256).half(), copy_weights=copies)
    assert {w.value.type.dtype for w in module.engine.graph.weights if "packed" in w.names} == types
