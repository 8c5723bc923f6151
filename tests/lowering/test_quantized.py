"""Products of quantized operands: drawn chains of them, and how large their errors are."""

from __future__ import annotations

import math
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import torch_rtx
from tests.lowering.test_passes import graph
from tests.lowering.test_prologues import compiled
from torch_rtx import aten
from torch_rtx.aten import DTYPES
from torch_rtx.errors import RefitError, Unsupported
from torch_rtx.ir import Attr, Graph, Parameter, Sym, TensorType, Value, Weight, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.raise_quantized import scales_wait
from torch_rtx.lowering.pipeline import PASSES, Context
from torch_rtx.lowering.quantized import type_of
from torch_rtx.lowering.rewrite import Rewriter
from torch_rtx.onnx.ops.math import matmul_integer
from torch_rtx.onnx.ops.quantized import dequantize, quantize
from torch_rtx.quantization import quantize as quantize_model
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import PORTABLE

CPU = torch.device("cpu")
FLOATS = ("aten.linear.default", "aten.matmul.default", "aten.conv2d.default")
RANGES = ((-128, 127), (-127, 127), (0, 255), (0, 127), (-8, 7), (100, 200))


class Chain:
    """A drawn program: its graph, and tensors for its parameters."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        self._weights: list[Weight] = []
        self.images = self.draw.random() < 0.5
        shape = (2, 16, 6, 6) if self.images else (2, 5, 32)
        self.x = Value("x", TensorType("f64", shape, contiguous(shape)))
        self.rewriter = Rewriter(Graph("import", (self.x,)), Inference())
        # As parameters come in while the program is drawn, inference must not know of the graph.
        value, results = self.x, []
        for _ in range(self.draw.randint(2, 4)):
            before, value = value, self.step(self.moved(self.quantized(value)))
            results.append(value)
            if before.type == value.type and self.draw.random() < 0.5:
                value = self.emit("add.Tensor", self=value, other=before)
            if self.draw.random() < 0.5:
                value = self.emit("relu.default", self=value)
        parameters = tuple(Parameter(w.names[0], w.value.type) for w in self._weights)  # type: ignore[arg-type]
        drawn = self.rewriter.finish()
        self.graph = replace(drawn, parameters=parameters, weights=tuple(self._weights), outputs=(value, *results[:-1]))

    def emit(self, op: str, /, **args: Attr) -> Value:
        return self.rewriter.emit(f"aten.{op}", **args)

    def parameter(self, tensor: torch.Tensor) -> Value:
        name = f"p{len(self.tensors)}"
        dtype = {torch.float64: "f64", torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32"}[tensor.dtype]
        shape = tuple(tensor.shape)
        value = Value(name, TensorType(dtype, shape, contiguous(shape)))
        self.tensors[name] = tensor
        self._weights.append(Weight(value, (name,)))
        return value

    def random(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def scale(self, shape: tuple[int, ...]) -> Value | float:
        if not shape and self.draw.random() < 0.5:
            return self.draw.uniform(0.01, 0.1)
        return self.parameter(self.random(*shape) * 0.1 + 0.01)

    def quantized(self, value: Value) -> Value:
        """Fake quantization of an activation, with integers in between or without."""
        low, high = self.draw.choice(RANGES)
        shape = value.type.shape  # type: ignore[union-attr]
        scale: Any
        if self.draw.random() < 0.3 and not self.images:
            size = self.emit("amax.default", self=self.emit("abs.default", self=value), dim=(-1,), keepdim=True)
            scale = self.emit("add.Tensor", self=self.emit("div.Tensor", self=size, other=high), other=1e-6)
        else:
            scale = self.scale(self.draw.choice(((), (1,))))
        zero: Any = self.draw.choice((0, 0, min(high, max(low, 0)) or 3, None))
        if zero is None:
            zero = self.parameter(torch.randint(low, high, (), generator=self.generator, dtype=torch.int32))
        whole = self.emit("round.default", self=self.emit("div.Tensor", self=value, other=scale))
        whole = whole if zero == 0 else self.emit("add.Tensor", self=whole, other=zero)
        whole = self.emit("clamp.default", self=whole, min=low, max=high)
        held = self.draw.choice(("i8", "i32") if high < 128 else ("u8", "i32"))
        if self.draw.random() < 0.5:
            whole = self.emit("_to_copy.default", self=whole, dtype=held)
            whole = self.emit("_to_copy.default", self=whole, dtype=self.draw.choice(("f64", "i32", "f32")))
        whole = whole if zero == 0 else self.emit("sub.Tensor", self=whole, other=zero)
        if self.draw.random() < 0.8 or whole.type.dtype != "f64":  # type: ignore[union-attr]
            whole = self.emit("_to_copy.default", self=whole, dtype="f64")
        if self.draw.random() < 0.3:
            scale = self.emit("reciprocal.default", self=scale) if isinstance(scale, Value) else 1 / scale
            result = self.emit("div.Tensor", self=whole, other=scale)
        else:
            result = self.emit("mul.Tensor", self=whole, other=scale)
        assert result.type.shape == shape  # type: ignore[union-attr]
        return result

    def moved(self, value: Value) -> Value:
        """The same elements in another order, or the largest ones."""
        kind = self.draw.randrange(4)
        shape: Any = value.type.shape  # type: ignore[union-attr]
        if self.images:
            if kind == 0:
                return self.emit("max_pool2d.default", self=value, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
            return self.emit("cat.default", tensors=(value, value), dim=1) if kind == 1 else value
        if kind == 0:
            turned = self.emit("permute.default", self=value, dims=(1, 0, 2))
            return self.emit("clone.default", self=turned, memory_format="contiguous_format")
        if kind == 1:
            return self.emit("view.default", self=value, size=(shape[0] * shape[1], 1, shape[2]))
        return self.emit("slice.Tensor", self=value, dim=1, start=0, end=max(1, shape[1] - 1)) if kind == 2 else value

    def weight(self, shape: tuple[int, ...]) -> Value:
        each = (shape[0],) + (1,) * (len(shape) - 1)
        scale = self.scale(self.draw.choice(((), each)))
        if not self.images and self.draw.random() < 0.2:
            data, zeros = torch.randint(0, 256, (2, *shape), generator=self.generator, dtype=torch.uint8)
            whole, zero = (self.parameter(one) for one in (data, zeros[:, :1].contiguous()))
            whole, zero = (self.emit("_to_copy.default", self=one, dtype="i32") for one in (whole, zero))
            whole = self.emit("_to_copy.default", self=self.emit("sub.Tensor", self=whole, other=zero), dtype="f64")
            return self.emit("mul.Tensor", self=whole, other=scale)
        if self.draw.random() < 0.5:
            data = torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)
            whole = self.emit("_to_copy.default", self=self.parameter(data), dtype="f64")
        else:
            floats = self.parameter((self.random(*shape) - 0.5) * 4)
            whole = self.emit("round.default", self=self.emit("div.Tensor", self=floats, other=scale))
            whole = self.emit("clamp.default", self=whole, min=-127, max=127)
        if self.draw.random() < 0.3:
            zeros = torch.zeros(each, dtype=torch.int32)
            whole = self.emit("sub.Tensor", self=whole, other=self.parameter(zeros))
        return self.emit("mul.Tensor", self=whole, other=scale)

    def step(self, value: Value) -> Value:
        """A product, or a convolution."""
        shape: Any = value.type.shape  # type: ignore[union-attr]
        bias = self.parameter(self.random(32)) if self.draw.random() < 0.5 else None
        if not self.images:
            weight = self.weight((32, shape[-1]))
            if self.draw.random() < 0.5:
                return self.emit("linear.default", input=value, weight=weight, bias=bias)
            return self.emit("matmul.default", self=value, other=self.emit("t.default", self=weight))
        groups = self.draw.choice((1, 2))
        weight = self.weight((32, shape[1] // groups, 3, 3))
        padding = self.draw.choice((0, 1))
        args: dict[str, Any] = {"stride": (1, 1), "padding": (padding, padding), "groups": groups}
        return self.emit("conv2d.default", input=value, weight=weight, bias=bias, **args)

    def run(self, graph: Graph) -> list[torch.Tensor]:
        store = WeightStore(graph, CPU, {})
        store.attach(self.tensors)
        shape: Any = self.x.type.shape  # type: ignore[union-attr]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results: list[torch.Tensor] = compile_graph(graph, CPU)([x], store.values)
        return results


def test_drawn_chains_keep_their_numbers() -> None:
    left = found = 0
    for seed in range(24):
        try:
            chain = Chain(seed)
        except Unsupported:  # an image got too small
            continue
        after = PASSES["raise_quantized"](chain.graph, Inference(), Context(CompilationSettings(), PORTABLE))
        for result, wanted in zip(chain.run(after), chain.run(chain.graph), strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, s=seed: f"{s}: {text}")
        left += sum(node.op in FLOATS for node in after.nodes)
        found += sum(node.op in FLOATS for node in chain.graph.nodes)
    assert found > 40
    assert left <= 0.1 * found


@pytest.mark.parametrize("sizes", [(1, 20, 7), (16, 24, 8), (17, 24, 8), (3, 8, 16), (20, 0, 3), (0, 8, 8)])
def test_products_of_all_sizes_are_padded_to_those_of_cuda(sizes: tuple[int, int, int]) -> None:
    """Until kernels are there, and where libraries win, PyTorch multiplies; on CUDA it refuses some sizes."""
    assert str(aten.overload("aten._int_mm.default")) == "torch_rtx.int_mm.default"
    rows, terms, columns = sizes
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((rows, terms), (columns, terms)))
    library, given = torch.ops.aten._int_mm.default, []

    def call(*args: torch.Tensor) -> torch.Tensor:
        given.append([tuple(arg.shape) for arg in args])
        return library(*args)

    with patch.object(torch.ops.aten, "_int_mm", SimpleNamespace(default=call)):
        found = aten._padded_int_mm(a, b.t())
    assert torch.equal(found, (a.long() @ b.t().long()).int())
    ((left, right),) = given
    assert left[0] > 16
    assert not any(size % 8 for size in right)


PRODUCT = """
input x: i8[7, 64]
input s: DTYPE[7, 1]
param w: i8[16, 64]
param t: DTYPE[16, 1]
param z: i8[16, 1]
param b: DTYPE[16]
a: DTYPE[7, 64] = op aten._to_copy.default(self=x, dtype='DTYPE')
c: DTYPE[7, 64] = op aten.mul.Tensor(self=a, other=s)
d: DTYPE[16, 64] = op aten._to_copy.default(self=w, dtype='DTYPE')
e: DTYPE[16, 1] = op aten._to_copy.default(self=z, dtype='DTYPE')
f: DTYPE[16, 64] = op aten.sub.Tensor(self=d, other=e)
g: DTYPE[16, 64] = op aten.mul.Tensor(self=f, other=t)
h: DTYPE[7, 16] = op aten.linear.default(input=c, weight=g, bias=b)
return [h]
"""


def product(dtype: str, zero: int) -> list[torch.Tensor]:
    """A product, and what it is raised to, in `dtype`; the product in float64."""
    torch.manual_seed(0)
    x, w = (torch.randint(-128, 128, (size, 64), dtype=torch.int8) for size in (7, 16))
    held = DTYPES[dtype]
    s, t, b = (one.to(held) for one in (torch.rand(7, 1) / 10, torch.rand(16, 1) / 100, torch.randn(16)))
    z = torch.full((16, 1), zero, dtype=torch.int8)
    results = []
    for name in (dtype, "f64"):
        program = graph(PRODUCT.replace("DTYPE", name))
        raised = PASSES["raise_quantized"](program, Inference(), Context(CompilationSettings(), PORTABLE))
        assert raised != program
        for one in (program, raised)[: 1 if name == "f64" else 2]:
            given = {
                key: value.to(DTYPES[name]) if value.is_floating_point() else value
                for key, value in {"w": w, "t": t, "z": z, "b": b}.items()
            }
            hoisted = PASSES["hoist_weights"](one, Inference(), Context(CompilationSettings(), PORTABLE))
            store = WeightStore(hoisted, CPU, {})
            store.attach(given)
            results += compile_graph(hoisted, CPU)([x, s.to(DTYPES[name])], store.values)
    return results


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_errors_are_no_larger_than_those_of_floats(dtype: str) -> None:
    floats, whole, exact = (result.double() for result in product(dtype, 0))
    assert (whole - exact).abs().max() <= (floats - exact).abs().max()


def test_weights_that_do_not_fit_without_their_zero_points_are_an_error() -> None:
    with pytest.raises(RefitError, match="w, z: less its zero points it has .* disabled_passes"):
        product("f32", 9)


def rounded(x: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    return (x / scale).round().clamp(-limit - 1, limit) * scale


class Quantized(nn.Module):
    """Fake-quantized layers, whose parameters are floats: int8, float8, and int4 in groups for the weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.int8, self.float8 = nn.Conv2d(16, 32, 3), nn.Linear(32, 32), nn.Linear(32, 32)
        self.int4 = nn.Linear(32, 16)
        self.register_buffer("amax", torch.tensor(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.amax / 127
        weight = self.conv.weight
        each = weight.detach().abs().amax((1, 2, 3)) / 127
        weight = torch.fake_quantize_per_channel_affine(weight, each, torch.zeros_like(each).int(), 0, -127, 127)
        x = nn.functional.conv2d(rounded(x, scale, 127), weight, self.conv.bias).mean((2, 3))
        weight = self.int8.weight
        rows = x.abs().amax(-1, keepdim=True) / 127
        weight = rounded(weight, weight.abs().amax(1, keepdim=True) / 127, 127)
        x = nn.functional.linear(rounded(x, rows, 127), weight, self.int8.bias)
        weight, scale = self.float8.weight, self.amax / 448
        weight = (weight / scale).to(torch.float8_e4m3fn).float() * scale
        x = nn.functional.linear((x / scale).to(torch.float8_e4m3fn).float() * scale, weight, self.float8.bias)
        groups = self.int4.weight.view(16, 2, 16)
        groups = rounded(groups, groups.abs().amax(-1, keepdim=True) / 7, 7)
        return nn.functional.linear(x, groups.view(16, 32), self.int4.bias)


def test_refit_quantizes_the_weights_of_a_module(tmp_path: Path) -> None:
    """As a new engine does, bit for bit; and no engine keeps a weight in more bits than its integers have."""
    first, second = Quantized().eval(), Quantized().eval()
    x = torch.randn(2, 16, 6, 6)
    values, results = [], []
    for model in (first, second):
        torch_rtx.save(compiled(model, x), tmp_path / "model.rtx")
        module = torch_rtx.load(tmp_path / "model.rtx", device="cpu", weights=model.state_dict())
        if model is first:
            torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)
            module.refit(second)
        values.append(module._store.values)
        results.append(module(x))
    for found, wanted in zip(*values, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
    assert torch.equal(*results)
    weights = [(weight.names[0], type_of(weight.value)) for weight in module.engine.graph.weights]
    stored = {name: type_.dtype for name, type_ in weights if "weight" in name and math.prod(type_.shape) >= 256}  # type: ignore[arg-type]
    assert stored == {"conv.weight": "i8", "int8.weight": "i8", "float8.weight": "f8e4m3fn", "int4.weight": "u8"}


class Onnx(nn.Module):
    """QuantizeLinear, DequantizeLinear, Conv, MaxPool and MatMulInteger, as the importer computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero", torch.tensor(117, dtype=torch.uint8))
        self.register_buffer("filters", torch.randint(-127, 128, (32, 16, 3, 3), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(32) / 100)
        self.register_buffer("zeros", torch.zeros(32, dtype=torch.int8))
        self.register_buffer("weight", torch.randint(-127, 128, (288, 16), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = dequantize(quantize(x, self.scale, self.zero, torch.uint8), self.scale, self.zero)
            x = nn.functional.max_pool2d(x, 2, 1) if x.shape[-1] > 5 else x
        x = nn.functional.conv2d(x, dequantize(self.filters, self.scales, self.zeros, axis=0), padding=1).relu()
        x = quantize(x[:, :, :3, :3].flatten(1), self.scale, self.zero, torch.uint8)
        return matmul_integer(x, self.weight, self.zero).float() * self.scale


def test_operators_of_onnx_become_products_of_integers(tmp_path: Path) -> None:
    model, x = Onnx(), torch.randn(3, 16, 6, 6)
    torch_rtx.save(compiled(model, x), tmp_path / "model.rtx")
    module = torch_rtx.load(tmp_path / "model.rtx", device="cpu", weights=model.state_dict())
    text = str(module.engine.graph)
    assert {op: op in text for op in ("int_conv", "_int_mm", "conv2d.default", "matmul", "linear")} == {
        **dict.fromkeys(("int_conv", "_int_mm"), True),
        **dict.fromkeys(("conv2d.default", "matmul", "linear"), False),
    }
    assert torch.equal(module(x), model(x))


@torch.no_grad()
def test_convolutions_of_float8_read_float8() -> None:
    """What kernels hand on has 8 bits: tensor cores sum in float32, to which a cast before them would widen images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 2, stride=2)
    model = quantize_model(nn.Sequential(*layers).half().eval(), "fp8_dynamic")
    x = torch.randn(2, 16, 12, 12).half()
    module = compiled(model, x)
    types = [value.type for node in module.engine.graph.nodes for value in node.results]
    assert {t.dtype for t in types if isinstance(t, TensorType) and math.prod(t.shape) > 2} == {"f8e4m3fn", "f16"}  # type: ignore[arg-type]
    exact = deepcopy(model).double()(x.double())
    error, eager = (float((one - exact).norm() / exact.norm()) for one in (module(x), model(x)))
    assert error <= max(2 * eager, 2e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "kind", "rows", "bias"),
    [
        ("bf16", "rows and columns", 18, True),
        ("bf16", "rows and columns", 3, True),
        ("bf16", "columns", 18, False),
        ("bf16", "whole", 18, True),
        ("f16", "rows and columns", 18, True),
    ],
)
def test_libraries_apply_scales_and_add_biases_before_they_round(dtype: str, kind: str, rows: int, bias: bool) -> None:
    """But for scales of rows and columns in f16, in which they have no such product, and of few rows: there they write
    sums in f16, times a power of two."""
    torch.manual_seed(0)
    channels = {"preset": "fp8", "weight": {"granularity": "channel"}}
    config = {"rows and columns": "fp8_dynamic", "columns": {"*": channels}, "whole": "fp8"}[kind]
    x = torch.randn(rows, 32, dtype=DTYPES[dtype])
    x = x.view(2, 9, 32) if rows == 18 else x
    plain = nn.Sequential(nn.Linear(32, 48, bias=bias)).to(x.dtype).eval()
    model = quantize_model(plain, config, forward_loop=lambda model: model(x))  # type: ignore[arg-type]
    module = compiled(model, x)
    product = next(line for line in str(module.engine.graph).splitlines() if "aten._scaled_mm.default" in line)
    assert "use_fast_accum=True" in product
    by_library = kind == "whole" or (dtype == "bf16" and rows > 3)
    assert f": {dtype if by_library else 'f16'}[{rows}, 48] =" in product
    assert ("bias=" in product) == (bias and by_library)
    exact = deepcopy(model).double()(x.double())
    error, eager = (float((one - exact).norm() / exact.norm()) for one in (module(x), model(x)))
    assert error <= max(2 * eager, 1e-2 if dtype == "bf16" else 2e-3)


@pytest.mark.parametrize(
    ("rows", "terms", "columns", "f16", "bf16"),
    [
        (3072, 768, 768, True, True),
        (3072, 768, 3072, True, True),  # tiles leave processors idle
        (6304, 768, 3072, False, False),
        (6304, 3072, 768, True, True),
        (4096, 3072, 3072, True, False),  # libraries multiply with scales of rows faster
        (4096, 3072, 12288, True, False),
        ("s0", 768, 3072, False, False),
        ("s0", 3072, 768, True, True),
    ],
)
def test_scales_wait_where_that_pays(rows: int | str, terms: int, columns: int, f16: bool, bf16: bool) -> None:
    size = Sym(rows) if isinstance(rows, str) else rows
    for dtype, late in (("f16", f16), ("bf16", bf16)):
        out = Value("out", TensorType(dtype, (size, columns), (columns, 1)))
        assert scales_wait(out, (terms, columns)) == late


@torch.no_grad()
def test_sums_of_float8_fit_in_halves() -> None:
    """The largest that there are, and those of rows in which one element hides all others."""
    torch.manual_seed(0)
    x = torch.randn(4, 3072).half()
    x[0], x[1, 0], x[2] = 1, 3e4, x[2] * 1e-5
    layer = nn.Linear(3072, 16).half().eval()
    layer.weight[0], layer.weight[1, 1:] = 1, layer.weight[1, 1:] * 1e-3
    model = quantize_model(nn.Sequential(layer), "fp8_dynamic")
    module = compiled(model, x)
    assert ": f16[4, 16] = op aten._scaled_mm" in str(module.engine.graph)
    exact, got, eager = deepcopy(model).double()(x.double()), module(x), model(x)
    size = exact.abs().amax(1, keepdim=True)
    error, own = (float(((one - exact) / size).abs().max()) for one in (got, eager))
    assert torch.isfinite(got).all()
    assert error <= max(2 * own, 1e-3)
