"""Sums over the rows of a tile, in the epilogue of products and convolutions, interpreted, against float64."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body, check, empty, offered, random_tensor
from torch_rtx.errors import Unsupported
from torch_rtx.ir import attr_values
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.families.conv import conv_kernel
from torch_rtx.lowering.kernels.families.gemm import gemm_configs, gemm_kernel
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.matmul_template import GemmConfig
from torch_rtx.lowering.kernels.region import region
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import arch_of

CPU = torch.device("cpu")

IMAGE, SUMS = "H[2, 16, 8, 16](2048, 1, 256, 16)", "f32[2, 1, 16]"
# Statistics of blocks of 128 pixels, of a convolution whose windows overlap.
STATISTICS = f"""
    x: {IMAGE}
    w: H[16, 16, 3, 3](144, 1, 48, 16)
    y: {IMAGE} = convolution.default(input=x, weight=w, bias=None, stride=[1, 1], padding=[1, 1], dilation=[1, 1],
    transposed=False, output_padding=[0, 0], groups=1)
    a: f32[2, 16, 8, 16](2048, 1, 256, 16) = _to_copy.default(self=y, dtype='f32')
    p: f32[2, 8, 16, 16] = permute.default(self=a, dims=[0, 2, 3, 1])
    b: f32[2, 128, 16] = view.default(self=p, size=[2, 128, 16])
    v: {SUMS}, m: {SUMS} = var_mean.correction(self=b, dim=[1], correction=0, keepdim=True)
    return y, v, m""".replace("dilation=[1, 1],\n   ", "dilation=[1, 1],")
# A gradient behind an activation, its sums by columns, and those of its product with an image.
GRADIENTS = """
    g: H[192, 24]
    w: H[24, 72]
    r: H[192, 72]
    x: H[192, 72]
    m: f32[72]
    y: H[192, 72] = mm.default(self=g, mat2=w)
    t: H[192, 72] = threshold_backward.default(grad_output=y, self=r, threshold=0)
    a: f32[192, 72] = _to_copy.default(self=t, dtype='f32')
    c: f32[192, 72] = sub.Tensor(self=x, other=m)
    n: f32[192, 72] = mul.Tensor(self=a, other=c)
    b: f32[3, 64, 72] = view.default(self=n, size=[3, 64, 72])
    d: f32[3, 64, 72] = view.default(self=a, size=[3, 64, 72])
    p: f32[3, 1, 72] = sum.dim_IntList(self=b, dim=[1], keepdim=True)
    q: f32[3, 1, 72] = sum.dim_IntList(self=d, dim=[1], keepdim=True)
    return p, t, q"""


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sums(dtype: str) -> None:
    check(STATISTICS, conv_kernel, GemmConfig(128, 16, 16), dtype)
    check(GRADIENTS, gemm_kernel, GemmConfig(64, 32, 16), dtype)


def test_two_accumulators() -> None:
    """Columns in tiles of 64 and 32, the last of which is not whole."""
    check(GRADIENTS, gemm_kernel, GemmConfig(64, 64, 16, extra_n=32))


def test_tiles_have_the_rows_of_a_block() -> None:
    for sm in (80, 90):
        configs = gemm_configs(region(body(GRADIENTS)), arch_of(sm))
        assert {config.block_m for config in configs} == {64}
        assert all(config.block_n >= 32 and config.num_warps >= 4 for config in configs)
    with pytest.raises(Unsupported, match="no tiles"):
        conv_kernel(region(body(STATISTICS)), "k", GemmConfig(64, 16, 16))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return p, t, q", "z: f32[3, 64, 72] = sub.Tensor(self=b, other=p)\n    return p, z"),
        ("p: f32[3, 1, 72] = sum.dim_IntList(self=b", "p: f32[3, 1, 72] = amax.default(self=b"),
        ("sum.dim_IntList(self=b, dim=[1]", "sum.dim_IntList(self=b, dim=[0]"),
    ],
)
def test_other_reductions_are_refused(old: str, new: str) -> None:
    text = GRADIENTS.replace(old, new)
    if "dim=[0]" in new:
        text = text.replace("p: f32[3, 1, 72]", "p: f32[1, 64, 72]")
    with pytest.raises(Unsupported):
        generate(body(text), "k", arch_of(90), 0)


@pytest.mark.parametrize("text", [STATISTICS, GRADIENTS])
def test_a_product_and_its_sums_apart(text: str) -> None:
    """Each way to run them gives the same numbers."""
    graph = body(text, "bf16")
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}) for value in graph.inputs]
    eager = compile_graph(graph, CPU)(inputs, ())
    exact = compile_graph(parse(re.sub(r"\b(bf16|f32)\b", "f64", str(graph))), CPU)(
        [one.double() for one in inputs], ()
    )
    form = offered(graph, 80)["apart"].body
    assert form is not None
    assert [node.op for node in form.nodes] == ["k_product", "k_sums"]
    values = {value.name: tensor for value, tensor in zip(graph.inputs, inputs, strict=True)}
    for node in form.nodes:
        kernel = generate(node.body, node.op, arch_of(80), 0)  # type: ignore[arg-type]
        assert kernel is not None
        made = {value.name: empty(value.type, {}) for value in node.results}
        run(kernel, [*(values[value.name] for value in node.inputs), *made.values()], {})
        values |= made
    assert_right([values[value.name] for value in attr_values(form.outputs)], eager, exact)
