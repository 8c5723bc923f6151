"""Models in block-scaled formats: their kernels, sizes, files and refit."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

import torch_rtx
from tests.doubles.interpreter import run
from torch_rtx import aten
from torch_rtx.backend import program_cache
from torch_rtx.block_formats import (
    dequantize,
    from_blocked,
    linear,
    quantize_mx,
    quantize_nvfp4,
    to_blocked,
)
from torch_rtx.errors import RefitError
from torch_rtx.ir import evaluate
from torch_rtx.lowering.kernels.body_builder import flat
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import arch_of

ROWS, DEPTH, COLUMNS = 133, 160, 48


class Scaled(nn.Module):
    """A product of two operands in one format; activations are quantized by each call, with `tensor_scale` for all."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("tensor_scale", torch.tensor(0.01))
        data, scales = self.quantized(torch.randn(COLUMNS, DEPTH))
        self.register_buffer("data", data)
        self.register_buffer("scales", to_blocked(scales))
        self.register_buffer("bias", torch.randn(COLUMNS))
        self.register_buffer("factor", self.tensor_scale**2 if name == "nvfp4" else torch.tensor(1.0))

    def quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_nvfp4(x, self.tensor_scale) if self.name == "nvfp4" else quantize_mx(x, self.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        data, scales = self.quantized(x)
        total = torch._scaled_mm(data, self.data.t(), to_blocked(scales), self.scales, out_dtype=torch.float32)
        return torch.relu(total * self.factor + self.bias)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """The result in float64, by the definition."""
        data, scales = self.quantized(x)
        left = dequantize(data, scales).double()
        right = dequantize(self.data, from_blocked(self.scales, COLUMNS, scales.shape[1])).double()
        return torch.relu(left @ right.T * self.factor + self.bias)


class Linear(Scaled):
    """The same by `block_formats.linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.tensor_scale if self.name == "nvfp4" else None
        return torch.relu(linear(x, (self.data, self.scales), self.name, self.bias, own, own))


class Recipe(Scaled):
    """The same by `F.scaled_mm`, which takes scales of tensors, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kinds, swizzles = nn.functional.ScalingType, nn.functional.SwizzleType
        data, scales = self.quantized(x)
        recipe, swizzle = [kinds.BlockWise1x32], [swizzles.SWIZZLE_32_4_4]
        left, right = [to_blocked(scales)], [self.scales]
        if self.name == "nvfp4":
            recipe, swizzle = [kinds.BlockWise1x16, kinds.TensorWise], [*swizzle, swizzles.NO_SWIZZLE]
            left, right = [*left, self.tensor_scale], [*right, self.tensor_scale]
        given = {"swizzle_a": swizzle, "swizzle_b": swizzle, "bias": self.bias, "output_dtype": torch.float32}
        return torch.relu(nn.functional.scaled_mm(data, self.data.t(), left, recipe, right, recipe, **given))


def compiled(model: nn.Module, x: torch.Tensor, dynamic: bool = False) -> torch_rtx.CompiledModule:
    """An engine with the graph that it has for a GPU."""
    settings = CompilationSettings(device="cuda", targets=("sm_89", "sm_120"), reuse_cached_engines=False)
    shapes = ({0: torch.export.Dim("rows", min=129, max=1024)},) if dynamic else None
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        return torch_rtx.compile(model, (x,), dynamic_shapes=shapes, settings=settings)


def interpreted(module: torch_rtx.CompiledModule, model: nn.Module, x: torch.Tensor, sm: int) -> torch.Tensor:
    """The result of a call, all of which is kernels, run in the interpreter."""
    graph, buffers = module.engine.graph, dict(model.named_buffers())
    rows = dict.fromkeys(graph.syms, x.shape[0])
    values = {value.name: x for value in graph.inputs}
    for weight in graph.weights:
        stored = buffers[weight.names[0]]
        values[weight.value.name] = stored.t() if weight.recipe is not None else stored
    for node in graph.nodes:
        assert node.body is not None
        kernel = generate(node.body, node.op, arch_of(sm), 0)
        assert kernel is not None
        for value in node.results:
            shape = [evaluate(size, rows) for size in value.type.shape]
            values[value.name] = torch.zeros(shape, dtype=aten.DTYPES[value.type.dtype])
        run(kernel, [values[value.name] for value in (*node.inputs, *node.results)], rows)
    (result,) = graph.outputs
    return values[result.name]


@pytest.mark.parametrize(("name", "dynamic"), [("mxfp8", False), ("mxfp4", True), ("nvfp4", True)])
def test_a_layer_is_two_kernels(name: str, dynamic: bool) -> None:
    """One that quantizes, with the data and scales as results; and the product, which puts the scales in order."""
    torch.manual_seed(0)
    model, x = Scaled(name), torch.randn(ROWS, DEPTH)
    module = compiled(model, x, dynamic)
    quantize, product = module.engine.graph.nodes
    assert [value.type.dtype for value in quantize.results][0] == {"nvfp4": "f8e4m3fn"}.get(name, "u8")
    assert {"aten._scaled_mm.default", "aten.relu.default"} <= {node.op for node in flat(product.body.nodes)}
    exact = model.exact(x)
    for sm in (89, 120):
        found = interpreted(module, model, x, sm)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4 * float(exact.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), exact, rtol=1e-5, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize(("make", "name"), [(Recipe, "nvfp4"), (Linear, "mxfp8")])
def test_other_ways_to_write_it(make: type[Scaled], name: str) -> None:
    model, x = make(name), torch.randn(ROWS, DEPTH)
    module = compiled(model, x)
    assert [node.kind for node in module.engine.graph.nodes] == ["kernel"] * 2
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), model.exact(x), rtol=1e-4, atol=1e-2)


def test_files_and_refit(tmp_path: Path) -> None:
    model, other, x = Scaled("mxfp4"), Scaled("mxfp4"), torch.randn(ROWS, DEPTH)
    settings = CompilationSettings(strip_weights=False)
    torch_rtx.save(torch_rtx.compile(model, (x,), settings=settings), tmp_path / "model.rtx")
    module = torch_rtx.load(tmp_path / "model.rtx")
    assert torch.equal(module(x), torch_rtx.compile(model, (x,))(x))
    module.refit(other.state_dict())
    torch.testing.assert_close(module(x).double(), other.exact(x), rtol=1e-4, atol=1e-2)
    with pytest.raises(RefitError, match="data: expected dtype torch.float4_e2m1fn_x2, got torch.uint8"):
        module.refit({**other.state_dict(), "data": other.data.view(torch.uint8)})


def test_targets_without_the_instruction(tmp_path: Path) -> None:
    """They are no error, also where they are named one by one: what they compute is exact. `inspect` names them."""
    targets = ("sm_80", "sm_120")
    settings = CompilationSettings(device="cuda", targets=targets, reuse_cached_engines=False, strip_weights=False)
    module = torch_rtx.compile(Scaled("nvfp4"), (torch.randn(ROWS, DEPTH),), settings=settings)
    torch_rtx.save(module, tmp_path / "model.rtx")
    (layer,) = torch_rtx.inspect(tmp_path / "model.rtx").layers
    assert layer.emulated == ("sm_80",)
    assert str(layer).endswith("f4e2m1fn_x2 from u8 x f4e2m1fn_x2 -> f32, emulated on sm_80")


def test_a_live_model() -> None:
    model, x = Scaled("nvfp4"), torch.randn(ROWS, DEPTH)
    with torch.no_grad():
        call = torch.compile(model, backend="rtx", options={"reuse_cached_engines": False})
        torch.testing.assert_close(call(x).double(), model.exact(x), rtol=1e-4, atol=1e-2)
        model.data.copy_(Scaled("nvfp4").data)
        torch.testing.assert_close(call(x).double(), model.exact(x), rtol=1e-4, atol=1e-2)
