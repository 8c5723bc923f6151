"""Models that torchao and PT2E quantized, unchanged: each source by each way in gives what the tool gives in eager."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_rtx
from tests.helpers.compiled import Recorder, compile_rtx

pytest.importorskip("torchao", reason="make setup installs it from requirements-models.txt", exc_type=ImportError)
logging.getLogger("torchao").setLevel(logging.ERROR)
from torchao.quantization import (  # noqa: E402
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402
from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer  # noqa: E402
from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack  # noqa: E402


class Layers(nn.Sequential):
    """Two linear layers of odd sizes, but for a multiple of 8 in the first, which groups need."""

    def __init__(self):
        super().__init__(nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 5, bias=False))


class Words(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(11, 24), nn.Linear(24, 5))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 7, 3, padding=1), nn.Linear(7, 5)

    def forward(self, x):
        return self.out(F.relu(self.conv(x)).mean((2, 3)))


ROWS = torch.linspace(-2, 2, 5 * 24).reshape(5, 24).sin()
INPUTS = {Layers: ROWS, Words: torch.arange(10).reshape(2, 5), Image: torch.linspace(-1, 1, 270).reshape(2, 3, 9, 5)}


def torchao(config, kind=Layers, dtype=torch.float32):
    def make():
        model = kind().to(dtype).eval().requires_grad_(False)
        layers = (nn.Linear, nn.Embedding) if kind is Words else nn.Linear
        quantize_(model, config, lambda module, _: isinstance(module, layers) and module.weight.shape[1] % 8 == 0)
        x = INPUTS[kind]
        return model, x.to(dtype) if x.is_floating_point() else x

    return make


def pt2e(quantizer, kind=Layers):
    def make():
        x = INPUTS[kind]
        shapes = ({0: torch.export.Dim.AUTO(min=1, max=64)},)
        prepared = prepare_pt2e(torch.export.export(kind().eval(), (x,), dynamic_shapes=shapes).module(), quantizer())
        prepared(x)
        return convert_pt2e(prepared), x

    return make


def of_x86(**options):
    return lambda: x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(**options))


def of_xnnpack(**options):
    return lambda: xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(**options))


GROUPS = {"weight_dtype": torch.int4, "granularity": PerGroup(8)}
SOURCES = {
    "int8 weights": torchao(Int8WeightOnlyConfig()),
    "int8 weights, halves": torchao(Int8WeightOnlyConfig(), dtype=torch.bfloat16),
    "int8 weights in groups": torchao(Int8WeightOnlyConfig(granularity=PerGroup(8))),
    "int8": torchao(Int8DynamicActivationInt8WeightConfig()),
    "int8 per tensor": torchao(Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())),
    "int8, static": torchao(
        Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.full((1, 1), 0.02), granularity=PerTensor())
    ),
    "int8 and int4 weights": torchao(Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(8))),
    "int4 weights": torchao(IntxWeightOnlyConfig(**GROUPS)),
    "int3 weights": torchao(IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0))),
    "int4 embedding": torchao(IntxWeightOnlyConfig(**GROUPS), Words),
    "float8 weights": torchao(Float8WeightOnlyConfig()),
    "PT2E for x86": pt2e(of_x86()),
    "PT2E for x86, dynamic": pt2e(of_x86(is_dynamic=True)),
    "PT2E for x86, convolution": pt2e(of_x86(), Image),
    "PT2E of XNNPACK": pt2e(of_xnnpack()),
    "PT2E of XNNPACK, channels": pt2e(of_xnnpack(is_per_channel=True), Image),
    "PT2E of XNNPACK, dynamic": pt2e(of_xnnpack(is_per_channel=True, is_dynamic=True)),
    "PT2E of embeddings": pt2e(EmbeddingQuantizer, Words),
}


def check(found, wanted):
    """A step of int8 is the largest difference: a sum in another order may round an activation to the next step."""
    assert found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=wanted.abs().max().item() / 100)


def fallbacks(module):
    return [node.op for node in module.engine.graph.nodes if node.kind == "fallback"]


@pytest.mark.parametrize("source", SOURCES)
def test_models_for_a_gpu_give_what_the_tool_gives(source):
    torch.manual_seed(0)
    model, x = SOURCES[source]()
    rest = x.shape[1:]
    rows = torch_rtx.Input(min_shape=(1, *rest), opt_shape=x.shape, max_shape=(64, *rest), dtype=x.dtype)
    module = torch_rtx.compile(model, (rows,), settings=torch_rtx.CompilationSettings(device="cuda"))
    for count in (1, 3, len(x)):
        given = x[:1].expand(count, *rest) if count != len(x) else x
        check(module(given), model(given))
    assert fallbacks(module) == []


@pytest.mark.parametrize("source", ["int8 weights", "int8", "int4 embedding", "PT2E for x86, dynamic"])
def test_programs_give_what_the_tool_gives(source):
    model, x = SOURCES[source]()
    module = torch_rtx.compile(torch.export.export(model, (x,)))
    check(module(x), model(x))
    assert fallbacks(module) == []


@pytest.mark.parametrize("source", ["int8", "int4 embedding", "PT2E for x86, convolution"])
def test_compiled_models_give_what_the_tool_gives(source, monkeypatch, fresh_dynamo):
    model, x = SOURCES[source]()
    recorder = Recorder(monkeypatch)
    with torch.no_grad():
        check(compile_rtx(model)(x), model(x))
    assert recorder.fallbacks == []


@pytest.mark.parametrize("granularity", [PerRow, PerTensor])
def test_float8_products_for_a_gpu(granularity):
    """torchao makes such weights on GPUs alone, by `quantize_`, and has no product of them on a CPU."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization.quantize_.workflows import Float8Tensor, QuantizeTensorToFloat8Kwargs

    layer, x = nn.Linear(32, 16).bfloat16().requires_grad_(False), ROWS.flatten()[: 3 * 32].reshape(3, 32).bfloat16()
    wanted = layer(x)
    kwargs = QuantizeTensorToFloat8Kwargs(granularity=granularity())
    options = {"granularity": granularity(), "mm_config": Float8MMConfig(use_fast_accum=True)}
    packed = Float8Tensor.from_hp(layer.weight.detach(), **options, act_quant_kwargs=kwargs)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    module = torch_rtx.compile(layer, (x,), settings=torch_rtx.CompilationSettings(device="cuda"))
    assert [node.kind for node in module.engine.graph.nodes if "mm" in node.op] == ["kernel"]
    assert fallbacks(module) == []
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=0.1 * wanted.abs().max().item())  # as float8 is


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        *(Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig(), IntxWeightOnlyConfig(**GROUPS)),
        *(Float8WeightOnlyConfig(), Float8DynamicActivationFloat8WeightConfig()),
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        Int4WeightOnlyConfig(group_size=64),
    ],
    ids=lambda config: type(config).__name__,
)
def test_models_quantized_on_a_gpu(config, monkeypatch, fresh_dynamo):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256, bias=False))
    model = model.to("cuda", torch.bfloat16).eval().requires_grad_(False)
    try:
        quantize_(model, config)
    except (ImportError, AssertionError) as error:  # what torchao asks for: another library, a newer GPU
        pytest.skip(str(error))
    recorder = Recorder(monkeypatch)
    for rows in (1, 33):
        x = torch.linspace(-1, 1, rows * 256, device="cuda").reshape(rows, 256).sin().bfloat16()
        with torch.no_grad():
            wanted = model(x)
            check(compile_rtx(model)(x), wanted)
        check(torch_rtx.compile(model, (x,))(x), wanted)
    assert recorder.fallbacks == []


def test_nvfp4_weights(monkeypatch, fresh_dynamo):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    model, x = nn.Sequential(nn.Linear(32, 16)).bfloat16().requires_grad_(False), ROWS[:, :1].expand(5, 32).bfloat16()
    model[0].weight = nn.Parameter(NVFP4Tensor.to_nvfp4(model[0].weight.detach()), requires_grad=False)
    recorder = Recorder(monkeypatch)
    with torch.no_grad():
        check(compile_rtx(model)(x), model(x))
    assert recorder.fallbacks == []
    module = torch_rtx.compile(model, (x,), settings=torch_rtx.CompilationSettings(device="cuda"))
    check(module(x), model(x))  # whose constants PyTorch's own decomposition of programs forgets
    assert fallbacks(module) == []


def test_float_weights_that_pt2e_replaced_are_no_part_of_an_engine(tmp_path):
    quantizer = of_xnnpack()()
    prepared = prepare_pt2e(torch.export.export(nn.Linear(256, 256), (torch.ones(2, 256),)).module(), quantizer)
    prepared(torch.ones(2, 256))
    program = torch.export.export(convert_pt2e(prepared), (torch.ones(2, 256),))
    module = torch_rtx.compile(program, settings=torch_rtx.CompilationSettings(strip_weights=False))
    assert {math.prod(p.type.shape): p.type.dtype for p in module.engine.graph.parameters} == {
        1 << 16: "i8",
        256: "f32",
    }
    torch_rtx.save(module, tmp_path / "model.rtx")
    assert (tmp_path / "model.rtx").stat().st_size <= 1.1 * ((1 << 16) + 256 * 4)
