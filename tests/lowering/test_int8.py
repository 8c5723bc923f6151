"""Layers quantized to int8: which kernels they become."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torch_rtx
from benchmarks.numerics import assert_right
from tests.lowering.test_prologues import compiled
from torch_rtx.ir import Graph, kernel_nodes


class Dynamic(nn.Module):
    """A linear layer with a scale for each token, from its largest element, and one for each channel."""

    def __init__(self, depth: int = 64, columns: int = 48) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (columns, depth), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(columns) / 100)
        self.register_buffer("bias", torch.randn(columns).half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-6) / 127
        rounded = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
        total = torch._int_mm(rounded, self.weight.t())
        return torch.relu((total.float() * scale * self.scale).to(x.dtype) + self.bias)


class Heads(nn.Module):
    """Three layers over one input, before attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Dynamic() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x.view(-1, 64)).view(*x.shape[:-1], 3, 16).transpose(1, 2) for layer in self.layers)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Static(nn.Module):
    """Two convolutions and a residual, with scales that are known."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        for name in ("first", "second"):
            weight = torch.randint(-127, 128, (channels, channels, 3, 3), dtype=torch.int8)
            self.register_buffer(name, weight)
        self.register_buffer("scale", torch.rand(channels, 1, 1) / 4000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = quantized(x)
        total = torch.ops.torch_rtx.int_conv(rounded, self.first, [1, 1], [1, 1])
        inner = torch.relu(total.float() * self.scale)
        rounded = quantized(inner)
        total = torch.ops.torch_rtx.int_conv(rounded, self.second, [1, 1], [1, 1])
        return torch.relu(total.float() * self.scale + x)


class Branches(nn.Module):
    """A block of a residual network with a convolution in either branch, and one whose residual is its input."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (3, channels, channels, 1, 1), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(channels, 1, 1) / 4000)

    def convolution(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return torch.ops.torch_rtx.int_conv(x, self.weight[which]).float() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = quantized(x)
        one, two = (quantized(self.convolution(rounded, which)).float() * STEP for which in range(2))
        rounded = quantized(torch.relu(one + two))
        return torch.relu(quantized(self.convolution(rounded, 2)).float() * STEP + rounded.float() * STEP).mean((2, 3))


STEP = 0.0625  # a power of two, so that quotients are exact


def quantized(x: torch.Tensor) -> torch.Tensor:
    return (x / STEP).round().clamp(-128, 127).to(torch.int8)


def shown(graph: Graph) -> list[str]:
    """The operations of each kernel, without the digests of their names, and other calls."""
    return [node.op.rsplit("_", 1)[0] if node.kind == "kernel" else node.op for node in graph.nodes]


@pytest.mark.parametrize("rows", [1, 40])
def test_a_dynamic_layer_is_two_kernels(rows: int) -> None:
    model, x = Dynamic().eval(), torch.randn(rows, 64).half()
    module = compiled(model, x)
    assert shown(module.engine.graph) == ["abs_amax_round_clamp", "int_mm_to_copy_add_relu"]
    by_name = {weight.value.name: weight for weight in module.engine.graph.weights}
    (product,) = (node for node in kernel_nodes(module.engine.graph) if "int_mm" in node.op)
    assert {by_name[value.name].names[0] for value in product.inputs if value.name in by_name} == {
        *("weight", "scale", "bias")
    }
    exact = copy.deepcopy(model).double()(x.double())
    assert_right([module(x)], [model(x)], [exact])


def types(graph: Graph) -> list[list[str]]:
    """The types of the results of each kernel or call."""
    return [[str(value.type) for value in node.results] for node in graph.nodes]


def test_a_product_before_another_layer_writes_halves() -> None:
    """The scales of the sums are its epilogue; bias and activation join the loop over rows, which quantizes."""
    model, x = nn.Sequential(Dynamic(64, 64), Dynamic()).eval(), torch.randn(40, 64).half()
    module = compiled(model, x)
    assert shown(module.engine.graph) == [
        *("abs_amax_round_clamp", "int_mm_to_copy_mul", "add_relu_round_clamp", "int_mm_to_copy_add_relu")
    ]
    assert types(module.engine.graph)[1:3] == [["f16[40, 64]"], ["f32[40, 1]", "i8[40, 64]"]]
    exact = copy.deepcopy(model).double()(x.double())
    assert_right([module(x)], [model(x)], [exact])


def test_layers_over_one_input_are_one_product() -> None:
    model, x = Heads().eval(), torch.randn(2, 20, 64).half()
    module = compiled(model, x)
    assert shown(module.engine.graph)[:2] == ["abs_amax_round_clamp", "int_mm_to_copy_add_relu"]
    assert types(module.engine.graph)[1] == ["f16[40, 144]"]
    assert len(module.engine.graph.nodes) == 3
    torch.testing.assert_close(module(x), model(x))
    other = Heads().eval()
    module.refit(other)
    torch.testing.assert_close(module(x), other(x))


def test_a_convolution_quantizes_for_the_next_one() -> None:
    module = compiled(Static().eval(), torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last))
    graph = module.engine.graph
    assert [name.split("_to_")[0] for name in shown(graph)] == ["div_round_clamp", "int_conv", "int_conv"]
    assert [results[0].partition("[")[0] for results in types(graph)] == ["i8", "i8", "f32"]


def test_tensors_between_convolutions_are_int8() -> None:
    """Not the sums of the first branch, nor the dequantized residual."""
    model, x = Branches().eval(), torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    module = compiled(model, x)
    names = [name.split("_to_")[0] for name in shown(module.engine.graph)]
    assert names == ["div_round_clamp", "int_conv", "int_conv", "int_conv", "to_copy_mul_relu_mean"]
    assert [results[0][:3] for results in types(module.engine.graph)] == ["i8[", "i8[", "i8[", "i8[", "f32"]
    assert all(len(results) == 1 for results in types(module.engine.graph))
    torch.testing.assert_close(module(x), model(x))


def test_the_operator_is_captured_as_it_is() -> None:
    model, x = Static().eval(), torch.randn(2, 16, 8, 8)
    settings = torch_rtx.CompilationSettings(reuse_cached_engines=False)
    module = torch_rtx.compile(model, (x,), settings=settings)
    assert sum("int_conv" in node.op for node in module.engine.graph.nodes) == 2
    torch.testing.assert_close(module(x), model(x))
