"""Models whose linear layers are products of float8: what becomes of them, and whether it is right."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

import torch_rtx
from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from torch_rtx.aten import DTYPES
from torch_rtx.backend import program_cache
from torch_rtx.ir import TensorType
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.runtime.candidate_check import CandidateCheck
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import arch_of

E4M3 = torch.float8_e4m3fn
X = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).half()


class Dynamic(nn.Module):
    """A linear layer with scales of rows and columns, followed by one with a scale for each of its operands."""

    def __init__(self) -> None:
        super().__init__()
        for name, (columns, depth) in {"first": (96, 64), "second": (48, 96)}.items():
            weight = torch.randn(columns, depth)
            scale = weight.abs().amax(*([1] if name == "first" else []), keepdim=name == "first") / 448
            self.register_buffer(name, (weight / scale).to(E4M3))
            self.register_buffer(f"{name}_scale", scale.reshape(1, -1) if name == "first" else scale)
        self.register_buffer("bias", torch.randn(96).half())
        self.register_buffer("input_scale", torch.tensor(0.1))

    def product(self, x: torch.Tensor, name: str, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, scales = getattr(self, name).t(), getattr(self, f"{name}_scale")
        return torch._scaled_mm(x, weight, scale, scales, bias, out_dtype=torch.float16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-12)
        hidden = torch.relu(self.product((x.float() / scale).clamp(-448, 448).to(E4M3), "first", scale, self.bias))
        quantized = (hidden.float() / self.input_scale).clamp(-448, 448).to(E4M3)
        return self.product(quantized, "second", self.input_scale, None)


class Recipes(Dynamic):
    """The same by `F.scaled_mm`."""

    def product(self, x: torch.Tensor, name: str, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, scales = getattr(self, name).t(), getattr(self, f"{name}_scale")
        kinds = nn.functional.ScalingType
        recipe = kinds.RowWise if scale.dim() else kinds.TensorWise
        given = {"bias": bias, "output_dtype": torch.float16}
        return nn.functional.scaled_mm(x, weight, scale, recipe, scales, recipe, **given)


def eager(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    """What the model computes; PyTorch 2.11 has no scales of rows on CPUs."""
    with patch.object(torch, "_scaled_mm", torch.ops.torch_rtx.scaled_mm.default):
        return model(x)


def compiled(model: nn.Module, targets: str | tuple[str, ...] = "portable") -> torch_rtx.CompiledModule:
    """An engine with the graph that it has for a GPU."""
    settings = CompilationSettings(device="cuda", targets=targets, reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        return torch_rtx.compile(copy.deepcopy(model), (X,), settings=settings)


@pytest.mark.parametrize("make", [Dynamic, Recipes])
def test_quantization_is_fused_with_what_is_before_it(make: type[Dynamic]) -> None:
    model = make()
    module = compiled(model)
    nodes = module.engine.graph.nodes
    assert [node.kind for node in nodes] == ["kernel"] * 3
    assert [node.op.rsplit("_", 1)[0] for node in nodes[1:]] == ["scaled_mm_relu_div_clamp", "scaled_mm"]
    assert [[getattr(value.type, "dtype", None) for value in node.results] for node in nodes] == [
        ["f32", "f8e4m3fn"],
        ["f8e4m3fn"],
        ["f16"],
    ]
    stored = {w.names[0]: w.value.type.dtype for w in module.engine.graph.weights}
    assert (stored["first"], stored["second"]) == ("f8e4m3fn", "f8e4m3fn")


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_kernels(sm: int) -> None:
    """Each kernel, for targets with float8 and without, against the calls that it stands for."""
    torch.manual_seed(0)
    model = Dynamic()
    module = compiled(model)
    module.refit(model)
    values = dict(zip((w.value.name for w in module.engine.graph.weights), module._store.values, strict=True))
    values["x"] = X
    for node in module.engine.graph.nodes:
        assert node.body is not None
        kernel = generate(node.body, node.op, arch_of(sm), 0)
        assert kernel is not None
        for value in node.results:
            assert isinstance(value.type, TensorType)
            values[value.name] = torch.full(value.type.shape, 1, dtype=DTYPES[value.type.dtype])
        run(kernel, [values[value.name] for value in (*node.inputs, *node.results)])
    exact = copy.deepcopy(model).float()
    (result,) = module.engine.graph.outputs
    found = values[result.name]
    assert_right([found], [eager(model)], [_in_float32(exact)])


def _in_float32(model: Dynamic) -> torch.Tensor:
    """What the model computes if products are not rounded to halves before they are quantized."""
    widened = lambda x, name, scale, bias: (  # noqa: E731
        (x.double() @ getattr(model, name).double().t() * scale.double() * getattr(model, f"{name}_scale").double())
        + (0 if bias is None else bias.double())
    )
    with patch.object(model, "product", widened):
        return model(X)


def test_candidates_are_compared_with_float64() -> None:
    """A call that PyTorch has for float8 alone is computed there by its definition."""
    node = compiled(Dynamic()).engine.graph.nodes[1]
    check = CandidateCheck(node, torch.device("cpu"))
    assert check.problem(check.code({})) is None


def test_a_model_runs_without_kernels() -> None:
    model = Dynamic()
    module = torch_rtx.compile(copy.deepcopy(model), (X,), settings=CompilationSettings(reuse_cached_engines=False))
    torch.testing.assert_close(module(X), eager(model))


def test_targets_without_float8_are_no_error() -> None:
    settings = CompilationSettings(device="cuda", targets=("sm_80", "sm_89"), reuse_cached_engines=False)
    module = torch_rtx.compile(Dynamic(), (X,), settings=settings)
    built = module.engine.kernels.tactics
    assert len(built) == 4  # one of them for what follows a library call
    assert all({str(target) for target in by_target} == {"sm_80", "sm_89"} for by_target in built.values())
