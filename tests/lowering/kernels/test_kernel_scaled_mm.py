"""Kernels around a product of float8, in Triton's interpreter against PyTorch's `_scaled_mm` and float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import FLOATS, body, check_split, empty, offered, random_tensor
from torch_rtx.errors import Unsupported
from torch_rtx.ir import attr_values
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.families.conv import conv_kernel
from torch_rtx.lowering.kernels.families.gemm import GemmConfig, gemm_configs, gemm_contraction, gemm_kernel
from torch_rtx.lowering.kernels.gemm_perf_model import shared_memory
from torch_rtx.lowering.kernels.gemm_problem import gemm_problem
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import Region, region
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import EMULATED, Target, arch_of

CPU = torch.device("cpu")
SMALL = GemmConfig(32, 32, 32, promoted=True)
EXTRA = GemmConfig(32, 32, 64, extra_n=16)
GEMV = GemmConfig(16, 16, 64, gemv=True)
BY_ROW = """
x: f8e4m3fn[40, 64]
w: f8e4m3fn[64, 48](1, 64)
a: f32[40, 1]
c: f32[1, 48]
y: f16[40, 48] = _scaled_mm.default(self=x, mat2=w, scale_a=a, scale_b=c, out_dtype='f16')
return y
"""
WHOLE = BY_ROW.replace("a: f32[40, 1]", "a: f32[()]").replace("c: f32[1, 48]", "c: f32[1]")
FOLLOWED = """
x: f8e4m3fn[40, 64]
w: f8e4m3fn[64, 48](1, 64)
a: f32[40, 1]
c: f32[1, 48]
b: bf16[48]
r: bf16[40, 48]
h: bf16[40, 48] = _scaled_mm.default(self=x, mat2=w, scale_a=a, scale_b=c, bias=b, out_dtype='bf16')
g: bf16[40, 48] = gelu.default(self=h)
y: bf16[40, 48] = add.Tensor(self=g, other=r)
return y
"""
QUANTIZED = FOLLOWED.replace(
    "return y",
    """s: bf16[40, 48] = mul.Scalar(self=y, other=3.0)
l: bf16[40, 48] = clamp.default(self=s, min=-448.0, max=448.0)
q: f8e4m3fn[40, 48] = _to_copy.default(self=l, dtype='f8e4m3fn')
return q""",
)
BODIES = {
    "factors of rows and columns": BY_ROW,
    "one factor for all": WHOLE,
    "in f32": WHOLE.replace("f16", "f32"),
    "sizes that libraries do not take": BY_ROW.replace("64", "50").replace("48", "19"),
    "less than a step": BY_ROW.replace("64", "16"),
    "two kinds": BY_ROW.replace("x: f8e4m3fn", "x: f8e5m2"),
    "bias and what follows": FOLLOWED,
    "a result that is quantized": QUANTIZED,
    "an operand by columns": BY_ROW.replace("(1, 64)", ""),
}


def check(
    text: str,
    config: GemmConfig,
    emulated: bool = False,
    make: Callable[[Region, str, GemmConfig], Kernel] = gemm_kernel,
) -> Kernel:
    """Interprets the kernel and compares its results by the float64 criterion; returns it."""
    graph = body(text)
    kernel = make(region(graph, EMULATED if emulated else frozenset()), "kernel", config)
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}) for value in graph.inputs]
    eager = compile_graph(graph, CPU)(inputs, ())
    exact = compile_graph(parse(re.sub(FLOATS, "f64", str(graph))), CPU)([one.double() for one in inputs], ())
    outputs = [empty(value.type, {}) for value in attr_values(graph.outputs)]
    run(kernel, [*inputs, *outputs])
    assert_right([one.float() for one in outputs], [one.float() for one in eager], exact)
    return kernel


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_products(name: str, emulated: bool) -> None:
    config = GemmConfig(32, 32, 32) if emulated else SMALL
    kernel = check(BODIES[name], config, emulated)
    assert ("float8" in kernel.source) == (not emulated)
    assert ("+= tl.dot" in kernel.source) == config.promoted


def test_wide_tiles_and_few_rows() -> None:
    check(FOLLOWED, EXTRA)
    for emulated in (False, True):
        check(BY_ROW.replace("40", "2"), GEMV, emulated)


def test_persistent_programs() -> None:
    """Where all around a step takes as long as the step itself: of operands of 8 bits, on Hopper."""
    check(FOLLOWED, replace(SMALL, promoted=False, programs=3))
    large = re.sub(r"\b(40|48|64)\b", "2048", BY_ROW).replace("out_dtype='f16'", "out_dtype='f16', use_fast_accum=True")
    for sm, text, is_persistent in ((90, large, True), (89, large, False), (120, large, False), (90, LARGE, False)):
        configs = gemm_configs(region(body(text)), arch_of(sm))
        assert any(one.programs for one in configs) == is_persistent
        for one in configs:
            if one.programs:
                assert one.programs * one.block_m * one.block_n < 2048 * 2048  # several tiles for each
    halves = re.sub(r"_scaled_mm.*", "mm.default(self=x, mat2=w)", LARGE).replace("f8e4m3fn", "bf16")
    assert not any(one.programs for one in gemm_configs(region(body(halves)), arch_of(90)))


def test_split() -> None:
    check_split(FOLLOWED.replace("64", "256"), 4)
    check_split(WHOLE.replace("64", "256"), 2)


def test_sums_of_tensor_cores() -> None:
    """Those of Ada and Hopper have 14 bits: their sums are added up in f32, unless the program says otherwise."""
    fast = BY_ROW.replace("out_dtype='f16'", "out_dtype='f16', use_fast_accum=True")
    for text, sm, promoted in ((BY_ROW, 89, True), (BY_ROW, 90, True), (BY_ROW, 120, False), (fast, 90, False)):
        assert {one.promoted for one in gemm_configs(region(body(text)), arch_of(sm))} == {promoted}
    assert all(one.block_k <= 128 for one in gemm_configs(region(body(BY_ROW.replace("64", "2048"))), arch_of(90)))


LARGE = re.sub(r"\b(40|48|64)\b", "2048", BY_ROW).replace("f16", "bf16")


def test_configurations_fit_their_target() -> None:
    for sm in (75, 80, 89, 90, 120):
        for text in (LARGE, BY_ROW, BY_ROW.replace("64", "16")):
            found = region(body(text), EMULATED if sm < 89 else frozenset())
            problem = gemm_problem(found, gemm_contraction(found), arch_of(sm))
            assert problem.dtype == ("f16" if sm < 89 else "f8e4m3fn")
            configs = gemm_configs(found, arch_of(sm))
            assert configs
            assert all(shared_memory(problem, one, arch_of(sm)) <= arch_of(sm).shared for one in configs)
            assert all(one.block_k >= 32 for one in configs if sm >= 89)
    with pytest.raises(Unsupported, match="f8e4m3fn on sm_80"):
        gemm_configs(region(body(BY_ROW)), arch_of(80))


def test_float8_takes_half_the_time_of_halves() -> None:
    half = re.sub(r"_scaled_mm.*", "mm.default(self=x, mat2=w)", LARGE).replace("f8e4m3fn", "bf16")
    for sm in (89, 90, 120):
        times = [offered(body(text), sm)["kernel"].expected_us for text in (LARGE, half)]
        assert 1.2 < times[1] / times[0] < 2.1


def test_libraries_have_some_sizes_on_some_targets() -> None:
    def kinds(text: str, sm: int) -> set[str]:
        return set(offered(body(text), sm))

    assert "library" in kinds(LARGE, 90)
    assert "library" in kinds(LARGE, 89)
    assert "library" not in kinds(LARGE, 80)
    for other in (
        LARGE.replace("bf16", "f16"),  # factors of rows
        LARGE.replace("(1, 2048)", ""),
        LARGE.replace("f8e4m3fn", "f8e5m2"),
        LARGE.replace("2048", "2047"),
    ):
        assert "library" not in kinds(other, 90)
    whole = LARGE.replace("a: f32[2048, 1]", "a: f32[()]").replace("c: f32[1, 2048]", "c: f32[()]")
    assert "library" in kinds(whole.replace("bf16", "f16"), 90)


def test_what_pytorch_refuses_is_computed_all_the_same() -> None:
    x, w = (torch.randn(5, 7).to(torch.float8_e4m3fn) for _ in range(2))
    scale_a, scale_b, bias = torch.rand(5, 1), torch.rand(1, 5), torch.randn(5)
    call = torch.ops.torch_rtx.scaled_mm.default
    wide = call(x.double(), w.double().t(), scale_a.double(), scale_b.double(), bias.double(), None, torch.float64)
    exact = x.double() @ w.double().t() * scale_a.double() * scale_b.double() + bias.double()
    assert torch.allclose(wide, exact)
    assert torch.allclose(call(x, w.t(), scale_a, scale_b, bias, None, torch.float32).double(), exact)
    whole = x, w.t(), torch.tensor(0.5), torch.tensor([2.0]), bias, None, torch.float32
    assert torch.allclose(call(*whole), torch._scaled_mm(*whole[:5], out_dtype=torch.float32))
    assert torch.allclose(call(*whole), x.float() @ w.float().t() + bias)
    three = torch.tensor(3.0).double()  # one tensor for both
    product = call(x.double(), w.double().t(), three, three, None, None, torch.float64)
    assert torch.allclose(product, 9 * x.double() @ w.double().t())


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("scales of blocks", BY_ROW.replace("a: f32[40, 1]", "a: f32[40, 2]")),
        ("a result in float8", BY_ROW.replace("y: f16", "y: f8e4m3fn").replace("'f16'", "'f8e4m3fn'")),
    ],
)
def test_refused(reason: str, text: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        gemm_kernel(region(body(text)), "kernel", SMALL)


WEIGHT_ONLY = """
x: H[40, 64]
q: f8e4m3fn[48, 64]
s: H[48, 1]
f: H[48, 64] = _to_copy.default(self=q, dtype=TYPE)
w: H[48, 64] = mul.Tensor(self=f, other=s)
y: H[40, 48] = linear.default(input=x, weight=w)
return y
"""
UNSCALED = re.sub(r"s: .*\n|w: .* mul.*\n", "", WEIGHT_ONLY).replace("weight=w", "weight=f")


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("text", [WEIGHT_ONLY, UNSCALED])
def test_weights_in_float8(text: str, dtype: str, emulated: bool) -> None:
    text = text.replace("H[", f"{dtype}[").replace("TYPE", repr(dtype))
    for config in (GemmConfig(32, 32, 32), GEMV):
        source = check(text if config is not GEMV else text.replace("[40", "[2"), config, emulated).source
        if config is not GEMV:
            assert (".to(tl.bfloat16)" if dtype == "bf16" else ".to(tl.float16)") in source


def test_products_of_float8_that_are_cast_before() -> None:
    text = """
x: f8e4m3fn[40, 64]
w: f8e4m3fn[48, 64]
a: f16[40, 64] = _to_copy.default(self=x, dtype='f16')
c: f16[48, 64] = _to_copy.default(self=w, dtype='f16')
y: f16[40, 48] = linear.default(input=a, weight=c)
return y
"""
    assert ".to(" not in check(text, SMALL).source
    kernel = generate(body(text), "kernel", arch_of(80), 0)
    assert kernel is not None
    assert kernel.pointers == ("u8", "u8", "f16")


@pytest.mark.parametrize("emulated", [False, True])
def test_convolutions_of_float8(emulated: bool) -> None:
    text = """
x: f8e4m3fn[2, 40, 6, 7](1680, 1, 280, 40)
w: f8e4m3fn[24, 40, 3, 3](360, 1, 120, 40)
a: f16[2, 40, 6, 7](1680, 1, 280, 40) = _to_copy.default(self=x, dtype='f16')
c: f16[24, 40, 3, 3](360, 1, 120, 40) = _to_copy.default(self=w, dtype='f16')
h: f16[2, 24, 6, 7](1008, 1, 168, 24) = conv2d.default(input=a, weight=c, padding=[1, 1])
y: f16[2, 24, 6, 7](1008, 1, 168, 24) = relu.default(self=h)
return y
"""
    source = check(text, GemmConfig(32, 32, 32, promoted=not emulated), emulated, conv_kernel).source
    assert (".to(" in source) == emulated  # float8 is multiplied as it is


def test_promoted_sums_are_so_in_code() -> None:
    """Triton makes one product of a sum and a product without a start, unless it is told otherwise."""
    found = {}
    for promoted in (True, False):
        kernel = gemm_kernel(region(body(BY_ROW)), "kernel", GemmConfig(32, 32, 32, promoted=promoted))
        (code,) = compile_kernels([(kernel, Target(89))])[kernel, Target(89)].codes
        assert b"e4m3.e4m3.f32" in code.ptx
        found[promoted] = code.ptx.count(b"add.f32") + code.ptx.count(b"add.rn.f32")
    assert found[True] - found[False] == 2 * 8  # steps, and accumulators of a thread
