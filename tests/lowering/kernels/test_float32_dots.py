"""Products of float32 on tensor cores. The interpreter multiplies what these read of float32."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks.numerics import relative_error
from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body, check, check_split, offered
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, attention_configs
from torch_rtx.lowering.kernels.attention_forward import attention_kernel
from torch_rtx.lowering.kernels.families.conv import conv_kernel
from torch_rtx.lowering.kernels.families.gemm import gemm_configs, gemm_kernel
from torch_rtx.lowering.kernels.float32_dots import TF32, TF32X3
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.matmul_template import GemmConfig
from torch_rtx.lowering.kernels.region import region
from torch_rtx.targets import Float32, arch_of

PRODUCT = """
x: H[20, 72]
w: H[24, 72]
bias: H[24]
y: H[20, 24] = linear.default(input=x, weight=w, bias=bias)
z: H[20, 24] = relu.default(self=y)
return z
"""
CONVOLUTION = """
x: H[2, 16, 6, 5](480, 1, 80, 16)
w: H[24, 16, 3, 3](144, 1, 48, 16)
y: H[2, 24, 6, 5](720, 1, 120, 24) = conv2d.default(input=x, weight=w, padding=[1, 1])
return y
"""
PLAIN = """
x: H[32, 64]
w: H[32, 64]
y: H[32, 32] = linear.default(input=x, weight=w)
return y
"""
ATTENTION = """
q: H[2, 3, 20, 32]
k: H[2, 3, 41, 32]
v: H[2, 3, 41, 32]
y: H[2, 3, 20, 32] = scaled_dot_product_attention.default(query=q, key=k, value=v, is_causal=True)
return y
"""
INF, NAN, LIMIT = math.inf, math.nan, torch.finfo(torch.float32).max


def made(x: torch.Tensor, w: torch.Tensor, precision: str) -> torch.Tensor:
    """x @ w.T by a kernel, in the interpreter."""
    kernel = gemm_kernel(region(body(PLAIN, "f32")), "kernel", GemmConfig(16, 16, 16, input_precision=precision))
    found = torch.full((32, 32), NAN)
    run(kernel, [x, w, found])
    return found


@pytest.mark.parametrize("config", [GemmConfig(16, 16, 16), GemmConfig(16, 32, 32, extra_n=16)])
def test_three_products_are_as_exact_as_float32(config: GemmConfig) -> None:
    check(PRODUCT, gemm_kernel, replace(config, input_precision=TF32X3), "f32")
    check(CONVOLUTION, conv_kernel, replace(config, extra_n=0, input_precision=TF32X3), "f32")


def test_attention() -> None:
    source = check(ATTENTION, attention_kernel, AttentionConfig(16, 32, 4, 1, input_precision=TF32X3), "f32").source
    assert source.count("= dot_tf32x3(") == 2 * source.count("p = tl.exp2(") > 0  # the scores, and the values
    for level, precisions in (("highest", [TF32X3, "ieee"]), ("high", [TF32, TF32X3, "ieee"])):
        arch = replace(arch_of(89), float32=Float32(level))
        found = [config.input_precision for config in attention_configs(region(body(ATTENTION, "f32")), arch)]
        assert found[: len(precisions)] == precisions  # the best of each come first
        assert {*found} == {*precisions}
        for config in attention_configs(region(body(ATTENTION, "bf16")), arch):
            assert config.input_precision == "ieee"


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_errors(scale: float) -> None:
    x, w = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ w.double().T * scale
    found = {precision: made(x * scale, w, precision) for precision in ("ieee", TF32X3, TF32)}
    errors = {precision: relative_error(result, exact) for precision, result in found.items()}
    assert errors[TF32X3] < 2 * errors["ieee"] + 2e-7
    assert 1e-4 < errors[TF32] < 4e-4
    for precision, limit in ((TF32X3, 1e-7), (TF32, 5e-5)):  # no result is on the whole too small: layers would add up
        size = float((found[precision] * exact).sum() / (exact * exact).sum())
        assert abs(size - 1) < limit


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_what_is_not_finite() -> None:
    """Every pair of special numbers, alone in a sum, and the sum of what overflows on both sides. The last places of
    TF32's smallest numbers are 2**-136."""
    special = [0.0, -0.0, 1.0, -3e-5, 1e30, -1e30, LIMIT, -LIMIT, 3.4e38, INF, -INF, NAN, 1e-38, 1e-41, 7e5, 2.0**127]
    x, w = torch.zeros(2, 32, 64)
    x[:16, 0] = w[:16, 0] = torch.tensor(special)
    x[16:, :2], w[16:, :2] = torch.tensor([1e30, 1e30]), torch.tensor([1e30, -1e30])
    x[20:, 1] = 0
    found, exact = made(x, w, TF32X3), made(x, w, "ieee")
    limit = (1 - 2**-9) * LIMIT  # above it, a product may be infinite
    for row, column in product(range(32), range(32)):
        mine, right = float(found[row, column]), float(exact[row, column])
        near = math.isfinite(right) and abs(right) > limit
        if not near:
            tiny = sum(abs(float(one)) for one in (x[row, 0], w[column, 0]) if one.isfinite()) * 2.0**-136
            assert mine == pytest.approx(right, rel=1e-6, abs=tiny, nan_ok=True), (x[row, :2], w[column, :2])
    kept = made(torch.eye(32, 64) * LIMIT, torch.eye(32, 64), TF32X3).diagonal()
    assert kept.tolist() == pytest.approx([LIMIT] * 32, rel=1e-6)


def test_split_k() -> None:
    deep = PRODUCT.replace("72", "128")
    split = check_split(deep, 2, "f32")
    part = next(node for node in split.nodes if node.body is not None)
    assert part.body is not None
    for level, precision in (("highest", TF32X3), ("high", TF32)):
        arch = replace(arch_of(80), float32=Float32(level))
        kernels = [generate(part.body, part.op, arch, which) for which in range(2)]
        sources = [kernel.source for kernel in kernels if kernel is not None]
        assert sum("= tl.dot(tf32_of(" in source for source in sources) == (precision == TF32)
        assert sum("= dot_tf32x3(" in source for source in sources) == 1
    assert "split" in offered(body(PRODUCT.replace("72", "4096"), "f32"), 90)


def test_levels_are_of_products_or_of_convolutions() -> None:
    arch = replace(arch_of(89), float32=Float32("highest", "high"))
    for text, precision in ((PRODUCT, TF32X3), (CONVOLUTION, TF32)):
        kernels = [generate(body(text, "f32"), "k", arch, which) for which in range(2)]
        sources = [kernel.source for kernel in kernels if kernel is not None]
        assert sum("= tl.dot(tf32_of(" in source for source in sources) == (precision == TF32)
        assert sum("= dot_tf32x3(" in source for source in sources) == 1
    assert {c.input_precision for c in gemm_configs(region(body(PRODUCT)), arch)} == {"ieee"}  # halves have one way
