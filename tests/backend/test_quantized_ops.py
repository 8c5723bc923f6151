"""Operators of quantization tools: each definition against the tool's own operator, or its formats written out here."""

import contextlib
import importlib.util
import itertools
import sys
import types

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn

import torch_rtx
from tests.helpers.ahead import Function
from tests.helpers.packed import Quantized as PackedLayers
from torch_rtx.backend import quantized_ops
from torch_rtx.backend.fast_path import FAST_PATH
from torch_rtx.errors import CaptureError

I8, U8, F32 = torch.int8, torch.uint8, torch.float32
NF4, FP4 = (quantized_ops._CODES[name] for name in ("nf4", "fp4"))


def floats(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*shape, low=-128, high=128, dtype=I8):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def scales(*shape, dtype=F32):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) / 16 + 0.01).to(dtype)


X, Q, S, Z = floats(5, 7), ints(5, 7), scales(7), ints(7, low=-9, high=9, dtype=torch.int64)
ONE, THREE, LOW, HIGH = torch.tensor([0.05]), torch.tensor([3]), torch.tensor(-128), torch.tensor(127)
# What PyTorch's own operators give, on odd shapes: (operator, arguments).
DECOMPOSED = [
    *(("quantize_per_tensor", (x, 0.05, 3, -128, 127, I8)) for x in (X, X.half(), X.bfloat16())),
    ("quantize_per_tensor.tensor", (X, ONE, THREE, -128, 127, I8)),
    ("quantize_per_tensor.tensor", (X, ONE.double(), THREE, 0, 255, U8)),
    ("quantize_per_tensor.tensor2", (X, ONE, THREE, LOW, HIGH, I8)),
    ("dequantize_per_tensor", (Q, 0.05, 3, -128, 127, I8)),
    ("dequantize_per_tensor.tensor", (Q, ONE, THREE, -128, 127, I8)),
    ("dequantize_per_tensor.tensor2", (Q, ONE, THREE, LOW, HIGH, I8)),
    *(("quantize_per_channel", (floats(7, 5, 7), S, Z, axis, -127, 127, I8)) for axis in (0, 2)),
    *(("dequantize_per_channel", (ints(7, 5, 7), S, Z, axis, -127, 127, I8)) for axis in (0, 2)),
    ("dequantize_per_channel", (Q, S, None, 1, -127, 127, I8)),
    ("dequantize_per_channel", (ints(7, low=-(2**30), high=2**30, dtype=torch.int32), S, Z, 0, -9, 9, torch.int32)),
    ("choose_qparams.tensor", (X, -128, 127, 1e-6, I8)),
    ("choose_qparams.tensor", (X.abs().half() + 1, 0, 255, 1e-6, U8)),
    ("choose_qparams.tensor", (torch.zeros(3), 0, 255, 1e-6, U8)),
    ("choose_qparams_symmetric.tensor", (X, -128, 127, 1e-6, I8)),
    ("choose_qparams_symmetric.tensor", (X, 0, 255, 1e-6, U8)),
    *(("choose_qparams_per_token", (x, I8)) for x in (X, X.half(), X.bfloat16())),
    ("choose_qparams_per_token_asymmetric", (X, I8)),
    ("quantize_per_token", (X, scales(5, 1).double(), ints(5, 1).long(), -128, 127, I8)),
    ("dequantize_per_token", (Q, scales(5, 1).double(), ints(5, 1).long(), -128, 127, I8, F32)),
    ("quantize_per_channel_group", (floats(3, 8), scales(3, 2), ints(3, 2), -8, 7, I8, 4)),
    ("dequantize_per_channel_group", (ints(3, 8), scales(3, 2), ints(3, 2), -8, 7, I8, 4, torch.bfloat16)),
    ("dequantize_per_channel_group", (ints(3, 8), scales(3, 1), None, -8, 7, I8, 128, F32)),
]
ATEN = [
    ("fake_quantize_per_tensor_affine_cachemask", (X * 9, 0.05, 3, -128, 127)),
    *(
        ("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", (X * 9, ONE, THREE.int(), on, -128, 127))
        for on in (torch.tensor([1]), torch.tensor([0]))
    ),
    ("fake_quantize_per_channel_affine_cachemask", (X * 9, S, Z.int(), 1, -128, 127)),
    ("_weight_int8pack_mm", (floats(3, 64, dtype=torch.bfloat16), ints(32, 64), scales(32, dtype=torch.bfloat16))),
]


def named(name):
    packet, _, overload = name.partition(".")
    return f"{packet}.{overload or 'default'}"


@pytest.mark.parametrize(
    ("operator", "args"),
    [(f"quantized_decomposed.{named(name)}", args) for name, args in DECOMPOSED]
    + [(f"aten.{named(name)}", args) for name, args in ATEN],
)
def test_definitions_give_what_the_operator_gives(operator, args):
    namespace, packet, overload = operator.split(".")
    call = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    wanted, found = call(*args), (FAST_PATH | quantized_ops.definitions())[call](*args)
    exact = packet != "_weight_int8pack_mm"  # which rounds its sum to a half once, and not twice
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0 if exact else 2e-2, atol=0 if exact else 2e-2)


# ---- formats, element by element -------------------------------------------------------------------------------------


def nearest(values, grid):
    """Each value's nearest member of a grid around 0 in float64; ties go to the one at an even distance from 0."""
    grid = torch.tensor(sorted(grid), dtype=torch.float64)
    distance = (values.double().unsqueeze(-1) - grid).abs()
    best = distance.amin(-1, keepdim=True)
    tied = (distance == best).long() * (2 - (torch.arange(len(grid)) - len(grid) // 2) % 2)
    return grid[tied.argmax(-1)]


def integers(x, amax, bits, unsigned, narrow):
    high = 2 ** (bits - 1 + unsigned) - 1
    low = 0 if unsigned else -high + (not narrow) * -1
    scale = (high / amax.float()).double()
    return ((x.float() * scale.float()).double().round().clamp(low, high) / scale).to(x.dtype)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "unsigned", "narrow"), [(8, False, True), (8, False, False), (4, False, False), (8, True, True)]
)
def test_fake_quantization_to_integers(bits, unsigned, narrow, dtype):
    x = floats(5, 7, dtype=dtype) if not unsigned else floats(5, 7, dtype=dtype).abs()
    amax = floats(5, 1).abs() + 1
    found = quantized_ops._fake_quantize(x, amax, bits, 0, unsigned, narrow)
    torch.testing.assert_close(found, integers(x, amax, bits, unsigned, narrow), rtol=1e-6, atol=0)
    assert not quantized_ops._fake_quantize(x, torch.zeros(5, 1), bits, 0, unsigned, narrow).any()


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_fake_quantization_to_float8(dtype):
    x, amax = floats(5, 7, dtype=dtype), floats(5, 1).abs() + 1
    scale = 448 / amax
    wanted = ((x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * (1 / scale)).to(dtype)
    assert torch.equal(quantized_ops._fake_quantize(x, amax, 8, 4, False, False), wanted)


E2M1 = [sign * value for sign in (-1, 1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)][1:]


def test_e2m1_rounds_to_the_nearest_of_its_values():
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(sorted(E2M1))])
    values = torch.cat((middles, middles * 1.01, middles * 0.99, torch.tensor([6.5, -100.0])))
    found = quantized_ops._e2m1(values)
    torch.testing.assert_close(found.double(), nearest(values, E2M1), rtol=0, atol=0)


def test_scales_that_are_powers_of_2_are_not_below_their_value():
    values = torch.tensor([1.0, 1.0001, 0.9999, 2.0**-100, 3 * 2.0**90])
    assert quantized_ops._power_of_2(values).tolist() == [1.0, 2.0, 1.0, 2.0**-100, 2.0**92]


@pytest.mark.parametrize("columns", [32, 37])
@pytest.mark.parametrize("element", [(4, 2), (8, 4), (8, 5), (8, 0)])
def test_blocks_with_scales_that_are_powers_of_2(element, columns):
    x = floats(3, columns, dtype=torch.bfloat16)
    found = quantized_ops._fake_quantize_blocks(x, 32, None, *element, 9, 8)
    for row, begin in itertools.product(range(3), range(0, columns, 32)):
        block = x[row, begin : begin + 32].double()
        most = {(4, 2): 6.0, (8, 4): 448.0, (8, 5): 57344.0, (8, 0): 127.0}[element]
        scale = 2.0 ** torch.log2(block.abs().amax() / most).ceil()
        if element == (4, 2):
            wanted = nearest(block / scale, E2M1) * scale
        elif element == (8, 0):
            wanted = (block / scale).round() * scale
        else:
            dtype = torch.float8_e4m3fn if element == (8, 4) else torch.float8_e5m2
            wanted = (block / scale).to(dtype).double() * scale
        assert torch.equal(found[row, begin : begin + 32], wanted.bfloat16())


def test_blocks_of_nvfp4():
    x, amax = floats(3, 40), torch.tensor(4.0)
    found = quantized_ops._fake_quantize_blocks(x, 16, amax, 4, 2, 8, 4)
    overall = amax.double() / (6 * 448)
    for row, begin in itertools.product(range(3), range(0, 40, 16)):
        block = x[row, begin : begin + 16].double()
        scale = (block.abs().amax() / 6 / overall).float().to(torch.float8_e4m3fn).double() * overall
        torch.testing.assert_close(found[row, begin : begin + 16].double(), nearest(block / scale, E2M1) * scale)
    assert not quantized_ops._fake_quantize_blocks(torch.zeros(2, 16), 16, amax, 4, 2, 8, 4).any()


def nibbles(packed, code, absmax, blocksize, shape):
    """4-bit codes of bitsandbytes, one after another."""
    codes = [half for byte in packed.reshape(-1).tolist() for half in (byte >> 4, byte & 15)]
    count = shape[0] * shape[1]
    values = [code[codes[i]] * absmax[i // blocksize] for i in range(count)]
    return torch.stack(values).reshape(shape)


PACKED, ABSMAX = ints(48, 1, low=0, high=256, dtype=U8), scales(2)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 32), (5, 19)])
def test_blocks_of_4_bits(kind, shape):
    wanted = nibbles(PACKED, NF4 if kind == "nf4" else FP4, ABSMAX, 64, shape)
    for packed in (PACKED, PACKED.view(-1).view(torch.bfloat16)):  # `quant_storage`
        found = quantized_ops._dequantize_4bit(packed, ABSMAX, 64, kind, shape, torch.float16)
        assert torch.equal(found, wanted.half())


def test_products_with_blocks_of_4_bits():
    x, shape = floats(4, 32), (3, 32)
    wanted = x @ nibbles(PACKED, NF4, ABSMAX, 64, shape).T
    with torch.device("meta"):  # on a CPU, the order of the codes is another one
        assert (
            quantized_ops._gemv_4bit(torch.empty(4, 32, device="cpu"), PACKED, shape, ABSMAX, NF4, 64) is NotImplemented
        )
    nested = ints(2, low=0, high=256, dtype=U8)
    table, offset = torch.linspace(-1, 1, 256), torch.tensor(0.5)
    absmax = torch.stack([table[code] * 0.25 + offset for code in nested.long()])
    wanted_nested = x @ nibbles(PACKED, NF4, absmax, 64, shape).T + 1

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    on_gpu = x.as_subclass(OnGpu)
    found = quantized_ops._gemv_4bit(on_gpu, PACKED, shape, ABSMAX, NF4, 64)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted)
    args = (on_gpu, PACKED, shape, torch.tensor([0.25]), 64, "nf4", torch.ones(3), nested, table, offset)
    torch.testing.assert_close(quantized_ops._gemm_4bit(*args).as_subclass(torch.Tensor), wanted_nested)


def test_int8_rows_of_bitsandbytes():
    x, weight = floats(5, 16, dtype=torch.float16), floats(7, 16)
    rows, stats, outliers = quantized_ops._int8_vectorwise_quant(x)
    assert outliers is None
    assert rows.dtype is I8
    assert rows.abs().amax(1).tolist() == [127] * 5
    absmax = weight.abs().amax(1)
    packed = (weight * 127 / absmax[:, None]).round().to(I8)
    found = quantized_ops._int8_scaled_mm(rows, packed, stats, absmax, torch.ones(7), F32)
    wide = (
        quantized_ops._int8_vectorwise_dequant(rows, stats) @ quantized_ops._int8_vectorwise_dequant(packed, absmax).T
    )
    torch.testing.assert_close(found, wide + 1, rtol=1e-3, atol=1e-4)
    assert quantized_ops._int8_vectorwise_quant(x, 6.0) is NotImplemented  # columns with outliers, by the values


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.5), torch.tensor([[0.5], [0.25]]), torch.tensor([[0.5, 1.0, 2.0]] * 2)]
)
def test_float8_with_scales(scale):
    x = floats(2, 6) * 100
    wide = scale.expand(2, -1).repeat_interleave(6 // scale.shape[-1], 1) if scale.dim() else scale
    packed = quantized_ops._quantize_float8(x, scale)
    assert torch.equal(packed.float(), (x / wide).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(quantized_ops._dequantize_float8(packed, scale), packed.float() * wide)


def test_every_definition_has_a_test():
    source = open(__file__).read()  # noqa: SIM115
    here = {f"quantized_decomposed.{named(name)}" for name, _ in DECOMPOSED} | {
        f"aten.{named(name)}" for name, _ in ATEN
    }
    for name, definition in quantized_ops._DEFINITIONS.items():
        assert name in here or f"quantized_ops.{definition.__name__}(" in source or name in INDIRECT, name


def test_products_of_groups():
    x, weights, ends = torch.randn(7, 4), torch.randn(3, 4, 5), torch.tensor([2, 2, 7], dtype=torch.int32)
    wanted = torch.cat([x[:2] @ weights[0], x[2:] @ weights[2]])
    torch.testing.assert_close(quantized_ops._grouped_mm_fallback(x, weights, ends), wanted)


INDIRECT = {  # parts of those above
    "bitsandbytes.dequantize_blockwise.default",
    "bitsandbytes.int8_linear_matmul.default",
    "bitsandbytes.int8_mm_dequant.default",
}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("quantized_decomposed.quantize_per_tensor.default", (X, float("nan"), 0, -128, 127, I8), "scale .* is nan"),
        ("quantized_decomposed.dequantize_per_tensor.default", (Q, 0.0, 0, -128, 127, I8), "scale .* is 0.0"),
        ("quantized_decomposed.dequantize_per_channel.default", (Q, S[:3], Z, 1, -128, 127, I8), "3 scales .* 7"),
        (
            "quantized_decomposed.dequantize_per_channel_group.default",
            (Q, scales(5, 2), None, -8, 7, I8, 4, F32),
            "blocks of 4 do not divide the 7 columns",
        ),
        ("bitsandbytes.dequantize_4bit.default", (PACKED, ABSMAX, 64, "nf4", (3, 30), F32), "48 packed bytes .* 45"),
        ("bitsandbytes.dequantize_4bit.default", (PACKED, ABSMAX, 32, "nf4", (3, 32), F32), "2 scales of blocks .* 3"),
    ],
)
def test_contradictions_are_errors(name, args, message):
    with pytest.raises(CaptureError, match=message):
        quantized_ops._DEFINITIONS[name](*args)


class Quantized(nn.Module):
    def __init__(self, scale=0.05):
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", ints(7, 5))
        self.register_buffer("steps", scales(7))

    def forward(self, x):
        ops = torch.ops.quantized_decomposed
        x = ops.quantize_per_tensor(x, self.scale, 3, -128, 127, I8)
        x = ops.dequantize_per_tensor(x, self.scale, 3, -128, 127, I8)
        return nn.functional.linear(x, ops.dequantize_per_channel(self.weight, self.steps, None, 0, -127, 127, I8))


def test_errors_name_the_layer():
    model = nn.Sequential(nn.Identity(), Quantized(float("inf")))
    with pytest.raises(CaptureError, match=r"scale of quantization is inf, in layer 1"):
        torch_rtx.compile(model, (floats(3, 5),))


@pytest.mark.parametrize("device", [None, "cuda"])
def test_scales_of_a_model_must_be_finite(device):
    settings = torch_rtx.CompilationSettings(device=device)
    model = nn.Sequential(nn.Identity(), Quantized())
    model[1].steps[3] = float("nan")
    with pytest.raises(CaptureError, match=r"^1\.steps has scales of quantization that are NaN .* in layer 1"):
        torch_rtx.compile(model, (floats(3, 5),), settings=settings)
    packed = PackedLayers()
    packed.up.weight.scale[2] = float("inf")
    with pytest.raises(CaptureError, match=r"^up\.weight has scales .* in layer up"):
        torch_rtx.compile(packed, (ints(2, 3, low=0, high=9).long(),), settings=settings)


class FakeQuantized(nn.Module):
    """A layer as ModelOpt leaves it: its float weight and what rounds it, by an operator for GPUs alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(floats(3, 8))
        self.register_buffer("_amax", self.weight.detach().abs().amax(1, keepdim=True))

    def forward(self, x):
        if not x.is_cuda:
            return nn.functional.linear(x, integers(self.weight.detach(), self._amax, 8, False, True))
        assert x.device.index == torch.cuda.current_device()
        assert torch.cuda.get_device_capability(x.device) == (8, 0)  # of the oldest portable target
        assert sys.modules["modelopt.torch.quantization.utils"].exported
        weight = torch.ops.tensorrt.quantize_op(self.weight, self._amax.detach(), 8, 0, False, True)
        return nn.functional.linear(x, weight)


@pytest.fixture
def modelopt(monkeypatch):
    """What capture needs of ModelOpt: its operator, and its way to say that layers are exported."""
    if not hasattr(torch.ops.tensorrt, "quantize_op"):
        schema = (
            "(Tensor input, Tensor amax, int num_bits, int exponent_bits, bool unsigned, bool narrow_range) -> Tensor"
        )
        torch.library.define("tensorrt::quantize_op", schema)
        torch.library.register_fake("tensorrt::quantize_op", lambda input, *_: torch.empty_like(input))

    @contextlib.contextmanager
    def export_torch_mode():
        module.exported = True
        yield
        module.exported = False

    module = types.SimpleNamespace(exported=False, export_torch_mode=export_torch_mode)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization.utils", module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_layers_of_modelopt_for_a_gpu_that_is_not_there(modelopt):
    model, x = FakeQuantized(), floats(5, 8)
    asked = torch.cuda.current_device, torch.cuda.get_device_capability
    module = torch_rtx.compile(model, (x,), settings=torch_rtx.CompilationSettings(device="cuda"))
    assert (torch.cuda.current_device, torch.cuda.get_device_capability) == asked
    assert not modelopt.exported
    assert [node.op for node in module.engine.graph.nodes if node.kind == "fallback"] == []
    torch.testing.assert_close(module(x), model(x))
    with torch.no_grad():
        model.weight.mul_(0.5)  # a refit takes float weights, as LoRA merges them, and rounds them
    module.refit(model)
    torch.testing.assert_close(module(x), model(x))


def test_products_that_are_wider_than_their_operands():
    def product(a, b, wide):
        out_dtype = torch.ops.higher_order.out_dtype
        op = torch.ops.aten.mm.default
        return out_dtype(op, torch.int32, a, b), out_dtype(op, F32, wide, wide)

    args = ints(5, 7), ints(7, 3), floats(3, 3, dtype=torch.float16)
    settings = torch_rtx.CompilationSettings(device="cuda")
    module = torch_rtx.compile(Function(product), args, settings=settings)
    calls = [node.kind for node in module.engine.graph.nodes if node.kind == "fallback" or "mm" in node.op]
    assert calls == ["kernel", "fallback"]


def test_no_call_stays_in_pytorch():
    module = torch_rtx.compile(Quantized(), (floats(3, 5),))
    assert [node.op for node in module.engine.graph.nodes if node.kind == "fallback"] == []
    assert torch.equal(module(floats(3, 5)), Quantized()(floats(3, 5)))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed (make models)")
def test_names_of_operators_of_torchao_exist():
    import torchao.quantization  # noqa: F401

    found = {str(operator) for operator in quantized_ops.definitions()}
    assert {name for name in quantized_ops._DEFINITIONS if name.startswith("torchao.")} <= found
