"""Weights in packed integers: they stay packed in memory, and the product's kernel widens them on the way."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

import torch_rtx
from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from torch_rtx.backend import program_cache
from torch_rtx.ir import Node, kernel_nodes
from torch_rtx.lowering.kernels.generate import forms
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import OWN, KernelTable
from torch_rtx.targets import arch_of

X, E5M2 = torch.randn(16, 128).half(), torch.float8_e5m2


class Int8(nn.Module):
    """A scale for each output channel, a bias and an activation."""

    def __init__(self, columns: int = 64) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 128, (columns, 128), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(columns, 1).half() / 100)
        self.register_buffer("bias", torch.randn(columns).half())

    def wide(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(nn.functional.linear(x, self.wide(), self.bias))


class Int4(nn.Module):
    """Two elements a byte, a scale and a zero point for each group of 64."""

    def __init__(self, columns: int = 64, group: int = 64) -> None:
        super().__init__()
        self.shape = columns, 128 // group, group
        self.register_buffer("packed", torch.randint(0, 256, (columns, 64), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(columns, 128 // group, 1).half() / 100)
        self.register_buffer("zero", torch.full((columns, 128 // group, 1), 8).half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        elements = torch.stack([self.packed & 15, self.packed >> 4], -1).view(self.shape)
        weight = (elements.to(self.scale.dtype) - self.zero) * self.scale
        return nn.functional.linear(x, weight.view(self.shape[0], 128))


class Float8(Int8):
    """As `Int8`, with weights in float8."""

    def __init__(self, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(64, 128).to(dtype))


class Shared(Int8):
    """Two products read one wide weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.wide()
        return nn.functional.linear(x, wide) + nn.functional.linear(x.exp(), wide)


def compiled(model: nn.Module, x: torch.Tensor = X, targets: str = "portable") -> torch_rtx.CompiledModule:
    """An engine with the graph that it has for a GPU."""
    settings = CompilationSettings(device="cuda", targets=targets, reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        return torch_rtx.compile(copy.deepcopy(model), (x,), settings=settings)


def stored(module: torch_rtx.CompiledModule) -> dict[str, str]:
    """The dtypes of the weights as a call reads them, by the names of their parameters."""
    return {weight.names[0]: weight.value.type.dtype for weight in module.engine.graph.weights}


def product(module: torch_rtx.CompiledModule) -> Node:
    """The kernel around the product."""
    (node,) = (node for node in module.engine.graph.nodes if "linear" in node.op)
    assert node.kind == "kernel"
    return node


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("make", [Int8, Int4, Float8, lambda: Int8(48), lambda: Int4(56, 32), lambda: Float8(E5M2)])
def test_packed_weights_are_widened_in_the_products_kernel(make: type[nn.Module], rows: int) -> None:
    model, x = make().eval(), torch.randn(rows, 128).half()
    module = compiled(model, x)
    node = product(module)
    assert len(module.engine.graph.nodes) == 1
    assert {"i8", "u8", "f8e4m3fn", "f8e5m2"} & set(stored(module).values())
    assert not any(weight.recipe for weight in module.engine.graph.weights)
    exact = copy.deepcopy(model).double()(x.double())
    module.refit(model)
    by_name = dict(zip((w.value.name for w in module.engine.graph.weights), module._store.values, strict=True))
    inputs = [by_name.get(value.name, x) for value in node.inputs]
    assert node.body is not None
    for sm in (80, 90):
        head = next(head for head, _ in forms(node.body, node.op, arch_of(sm)) if OWN in head.kernels)
        output = torch.full_like(model(x), torch.nan)
        run(head.kernels[OWN], [*inputs, output], {})
        assert_right([output], [model(x)], [exact])


def test_the_prologue_is_left_to_a_kernel_of_its_own_beside_a_library_call() -> None:
    node = product(compiled(Int8()))
    assert node.body is not None
    inside = [one.op for one in kernel_nodes(node.body)]
    assert len(inside) == 2  # before the product and after it
    found = {head.kind: head for head, _ in forms(node.body, node.op, arch_of(90))}
    assert {"kernel", "library"} <= found.keys()
    assert found["library"].body is None
    assert found["library"].expected_us > found["kernel"].expected_us  # it writes the wide weight, and reads it


def test_wide_weights_of_several_products_are_stored() -> None:
    module = compiled(Shared())
    assert "f16" in {weight.value.type.dtype for weight in module.engine.graph.weights if weight.recipe}


def test_without_kernels_weights_are_widened_once() -> None:
    module = torch_rtx.compile(Int8().eval(), (X,), settings=CompilationSettings(reuse_cached_engines=False))
    assert any(weight.recipe for weight in module.engine.graph.weights)


def test_refit(tmp_path: Path) -> None:
    """A weight-stripped engine takes the packed parameters of another model, as they are."""
    first, second = Int4().eval(), Int4().eval()
    torch_rtx.save(compiled(first), tmp_path / "model.rtx")
    module = torch_rtx.load(tmp_path / "model.rtx", device="cpu", weights=first.state_dict())
    torch.testing.assert_close(module(X), first(X))
    module.refit(second)
    torch.testing.assert_close(module(X), second(X))
