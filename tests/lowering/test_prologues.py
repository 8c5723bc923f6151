"""Weights in packed integers: they stay packed in memory, and the product's kernel widens them on the way."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

import torch_rtx
from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from torch_rtx.backend import program_cache
from torch_rtx.ir import Node, TensorType, kernel_nodes
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.kernels.generate import forms
from torch_rtx.lowering.kernels.memory_model import bytes_of, prologue_us, streaming_us
from torch_rtx.lowering.kernels.region import region
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


PACKINGS = ("low first", "high first", "words", "words of rows", "halves", "blocks")
NF4 = torch.linspace(-1, 1, 16) ** 3


class Packed(nn.Module):
    """A layer of 4-bit weights in one of PACKINGS, or "table" for numbers from a table, with a scale, and a zero point
    or a minimum, for each group; as plain PyTorch operations."""

    def __init__(self, packing: str, columns: int, depth: int, group: int, dtype: torch.dtype, zero: str = "") -> None:
        super().__init__()
        self.packing, self.shape, self.group, self.zero = packing, (columns, depth), group, zero
        words = packing.startswith("words")
        shape = {"words": (columns, depth // 8), "words of rows": (depth // 8, columns)}.get(
            packing, (columns, depth // 2)
        )
        low, high, kind = (-(2**31), 2**31, torch.int32) if words else (0, 256, torch.uint8)
        self.register_buffer("packed", torch.randint(low, high, shape, dtype=kind))
        self.register_buffer("scale", (torch.rand(columns, depth // group, 1) / 100 + 0.01).to(dtype))
        zeros = torch.randint(0, 16, (columns, depth // group, 1))
        self.register_buffer("point", zeros.to(torch.int8 if zero == "integers" else dtype))
        self.register_buffer("table", NF4.to(dtype))

    def codes(self) -> torch.Tensor:
        """[columns, depth], of some integer dtype."""
        packed, (columns, depth) = self.packed, self.shape
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
        match self.packing:
            case "words":
                return (packed.unsqueeze(-1) >> shifts & 15).view(columns, depth)
            case "words of rows":
                found = torch.bitwise_right_shift(packed.unsqueeze(1), shifts.view(1, 8, 1)) & 15
                return found.to(torch.int8).view(depth, columns).t()
            case "halves":
                pairs = packed.view(columns, -1, 1, 16)
                return torch.cat([pairs & 15, pairs >> 4], 2).view(columns, depth).to(torch.int8) - 8
            case "blocks":
                return (
                    packed.view(columns, -1, 1, 16)
                    >> torch.tensor([0, 4], dtype=torch.uint8, device=packed.device).view(2, 1)
                    & 15
                )
        pair = [packed & 15, packed >> 4]
        return torch.stack(pair[:: -1 if self.packing == "high first" else 1], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (columns, depth), dtype = self.shape, self.scale.dtype
        codes = self.codes().reshape(columns, depth // self.group, self.group)
        wide = self.table[codes.long()] if self.packing == "table" else codes.to(dtype)
        if self.zero == "minimum":
            wide = wide * self.scale - self.point.to(dtype) * self.scale
        elif self.zero:
            wide = (wide - self.point.to(dtype)) * self.scale
        else:
            wide = wide * self.scale
        return nn.functional.linear(x, wide.view(columns, depth))


class Shared(Int8):
    """Two products read one wide weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.wide()
        return nn.functional.linear(x, wide) + nn.functional.linear(x.exp(), wide)


def compiled(
    model: nn.Module, x: torch.Tensor = X, targets: str = "portable", **options: bool
) -> torch_rtx.CompiledModule:
    """An engine with the graph that it has for a GPU."""
    settings = CompilationSettings(device="cuda", targets=targets, reuse_cached_engines=False, **options)
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
    assert len(module.engine.graph.nodes) == 1
    assert {"i8", "u8", "i32", "f8e4m3fn", "f8e5m2"} & set(stored(module).values())
    check(module, model, x)


@pytest.mark.parametrize("case", range(7))
def test_packings(case: int) -> None:
    """One layout in memory for all, of the same bytes, with other columns, rows and groups for each."""
    packing, zero = (*PACKINGS, "table")[case], ("", "floats", "integers", "minimum")[case % 4]
    rows, columns, depth = (1, 3, 16, 33)[case % 4], (24, 19, 40)[case % 3], (256, 384, 512)[case % 3]
    dtype, group = (torch.float16, torch.bfloat16)[case % 2], (32, 64, 128)[case % 3]
    model, other = (Packed(packing, columns, depth, group, dtype, zero).eval() for _ in range(2))
    x = torch.randn(rows, depth).to(dtype)
    module = compiled(model, x)
    assert len(module.engine.graph.nodes) == 1
    words = next(w for w in module.engine.graph.weights if "packed" in w.names)
    assert words.value.type == TensorType("i32", (columns, depth // 8), (depth // 8, 1))
    check(module, model, x)
    check(module, other, x)


class Blocks(nn.Module):
    """Blocks of 32 integers of 8 or 4 bits, each after its scale, as files of language models have them."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        scales = (torch.rand(24 * 8, 1) / 100 + 0.01).half().view(torch.uint8)
        integers = torch.randint(0, 256, (24 * 8, 4 * bits), dtype=torch.uint8)
        self.bits, self.blocks = bits, nn.Buffer(torch.cat([scales, integers], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, codes = self.blocks.split([2, 4 * self.bits], 1)
        if self.bits == 4:
            shifts = torch.tensor([0, 4], dtype=torch.uint8, device=codes.device).view(1, 1, 2, 1)
            codes = codes.reshape(-1, 1, 1, 16) >> shifts
            codes = (codes & 15).reshape(-1, 32).view(torch.int8) - 8
        wide = scale.contiguous().view(torch.float16).to(x.dtype) * codes.contiguous().view(torch.int8)
        return nn.functional.linear(x, wide.view(24, 256))


@pytest.mark.parametrize(("bits", "stored"), [(8, "u8[192, 32]"), (4, "i32[24, 32]")])
def test_blocks_part_from_their_scales(bits: int, stored: str) -> None:
    """So that loads are aligned: integers next to each other, and the scales by columns."""
    model, x = Blocks(bits).eval(), torch.randn(5, 256).half()
    module = compiled(model, x)
    assert len(module.engine.graph.nodes) == 1
    assert {str(weight.value.type) for weight in module.engine.graph.weights} == {stored, "f32[8, 24]"}
    check(module, model, x)


class Library(nn.Module):
    """The operator of PyTorch that takes weights packed for its own kernel; or what it computes."""

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, is_call: bool) -> None:
        super().__init__()
        self.packed, self.scales = nn.Buffer(packed), nn.Buffer(scales)
        self.codes, self.is_call = codes, is_call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_call:
            return torch.ops.aten._weight_int4pack_mm(x, self.packed, 64, self.scales)
        scale, zero = self.scales.transpose(0, 1).split(1, -1)
        wide = (self.codes.view(16, -1, 64) - 8).to(x.dtype) * scale + zero
        return nn.functional.linear(x, wide.view(16, -1))


@pytest.mark.parametrize("tiles", [2, 4, 8])  # of 16 values, in a run
def test_weights_packed_for_the_operator_of_pytorch(tiles: int) -> None:
    """Its layout, as aten/src/ATen/native/cuda/int4mm.cu has it: value by value."""
    codes = torch.randint(0, 16, (16, 256))
    packed = torch.zeros(2, 16 // tiles, 32, tiles // 2, dtype=torch.int64)
    for n, k in itertools.product(range(16), range(256)):
        lane, place = n % 8 * 4 + k % 8 // 2, k % 32 // 8 + 4 * (k % 2)
        packed[n // 8, k // (16 * tiles), lane, k // 32 % (tiles // 2)] |= codes[n, k] << 4 * place
    scales = torch.stack([torch.rand(4, 16) / 100, torch.randn(4, 16) / 100], -1).bfloat16()
    call, plain = (Library(packed.to(torch.int32), scales, codes, is_call) for is_call in (True, False))
    x = torch.randn(3, 256).bfloat16()
    module = compiled(call.eval(), x)
    assert len(module.engine.graph.nodes) == 1
    assert set(stored(module).values()) == {"i32", "f32"}
    check(module, plain, x)


class Library8(Int8):
    """As `Library`, of 8 bits, which PyTorch computes on CPUs too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            return nn.functional.linear(x, self.weight.double()) * self.scale[:, 0]
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale[:, 0])


def test_weights_of_8_bits_for_the_operator_of_pytorch() -> None:
    model, x = Library8().bfloat16().eval(), torch.randn(5, 128).bfloat16()
    module = compiled(model, x)
    assert len(module.engine.graph.nodes) == 1
    assert stored(module)["weight"] == "i32"  # four codes in a word
    check(module, model, x)


def check(module: torch_rtx.CompiledModule, model: nn.Module, x: torch.Tensor) -> None:
    """The kernel of the only product is right, with the weights that `module` gets of `model`."""
    node = product(module)
    module.refit(model)
    by_name = dict(zip((w.value.name for w in module.engine.graph.weights), module._store.values, strict=True))
    inputs = [by_name.get(value.name, x) for value in node.inputs]
    assert node.body is not None
    exact = copy.deepcopy(model).double()(x.double())
    for sm in (80, 90):
        head = next(head for head, _ in forms(node.body, node.op, arch_of(sm)) if OWN in head.kernels)
        output = torch.full_like(model(x), torch.nan)
        run(head.kernels[OWN], [*inputs, output], {})
        assert_right([output], [model(x)], [exact])


class Windows(nn.Module):
    """A layer of windows of an image, which is shifted; or of channels in another order, which is no order of rows."""

    def __init__(self, channels: int, swapped: bool = False) -> None:
        super().__init__()
        self.layer, self.swapped = nn.Linear(channels, 48).half(), swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.swapped:
            x = x.unflatten(3, (2, -1)).transpose(3, 4).flatten(3)
        x = x.roll((-2, -1), (1, 2)).unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).transpose(2, 3)
        return self.layer(x.reshape(-1, 16, self.layer.in_features))


def test_rows_in_another_order_are_read_where_they_lie() -> None:
    model, x = Windows(64).eval(), torch.randn(2, 8, 12, 64).half()
    module = compiled(model, x)
    (node,) = module.engine.graph.nodes
    check(module, model, x)
    assert node.body is not None
    found = region(node.body)
    assert prologue_us(found, arch_of(90)) > streaming_us(found.moved_types[:1], arch_of(90))
    plain = product(compiled(nn.Linear(64, 48).half(), x)).body
    assert plain is not None
    assert prologue_us(region(plain), arch_of(90)) == 0.0
    for other, image in ((Windows(32), x[..., :32].clone()), (Windows(64, swapped=True), x)):
        assert len(compiled(other.eval(), image).engine.graph.nodes) == 2


def test_the_prologue_is_left_to_a_kernel_of_its_own_beside_a_library_call() -> None:
    node = product(compiled(Int8()))
    assert node.body is not None
    inside = [one.op for one in kernel_nodes(node.body)]
    assert len(inside) == 2  # before the product and after it
    found = {head.kind: head for head, _ in forms(node.body, node.op, arch_of(90))}
    assert {"kernel", "library"} <= found.keys()
    assert found["library"].body is None
    assert found["library"].expected_us > found["kernel"].expected_us  # it writes the wide weight, and reads it


def test_a_kernel_before_a_call_reads_its_operands_and_writes_its_result_once() -> None:
    node, arch = product(compiled(Int8())), arch_of(90)
    assert node.body is not None
    found = region(node.body)
    assert found.anchor is not None
    wide = next(value for value in found.anchor.inputs if type_of(value).shape == (64, 128))
    codes, scales = node.body.inputs[:2]
    assert [type_of(value).shape for value in (codes, scales)] == [(64, 32), (64, 1)]  # four codes in a word
    read = (codes, scales)
    moved = sum(bytes_of(type_of(value)) for value in (*read, wide))
    assert prologue_us(found, arch) == pytest.approx(arch.chip.launch + moved / (arch.chip.memory * 1e3))


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
