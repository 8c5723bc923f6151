"""Sums of the pixels of images, block by block as they lie in memory, interpreted, against float64."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body, empty, offered, random_tensor
from torch_rtx.errors import Unsupported
from torch_rtx.ir import attr_values
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.families.loop import FAMILY
from torch_rtx.lowering.kernels.generate import tactics
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.split_columns import best_pixels
from torch_rtx.lowering.kernels.split_reduction import split_by_blocks
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import arch_of

CPU = torch.device("cpu")
IMAGE, WIDE = (f"{dtype}[2, 24, 8, 6](1152, 1, 144, 24)" for dtype in ("H", "f32"))
SUMS = "f32[1, 24, 1, 1]"
# The gradient of a batch norm behind a pooling whose windows overlap.
GRADIENT = f"""
    g: H[2, 24, 4, 3](288, 1, 72, 24)
    x: {IMAGE}
    i: i64[2, 24, 4, 3](288, 1, 72, 24)
    m: f32[1, 24, 1, 1]
    a: {IMAGE} = max_pool2d_with_indices_backward.default(grad_output=g, self=x, kernel_size=[3, 3], stride=[2, 2],\
 padding=[1, 1], dilation=[1, 1], ceil_mode=False, indices=i)
    b: {WIDE} = _to_copy.default(self=a, dtype='f32')
    c: {WIDE} = sub.Tensor(self=x, other=m)
    d: {WIDE} = mul.Tensor(self=b, other=c)
    s: {SUMS} = sum.dim_IntList(self=d, dim=[0, 2, 3], keepdim=True)
    t: {SUMS} = sum.dim_IntList(self=b, dim=[0, 2, 3], keepdim=True)
    e: {WIDE} = mul.Tensor(self=c, other=s)
    f: {WIDE} = sub.Tensor(self=b, other=e)
    h: {WIDE} = sub.Tensor(self=f, other=t)
    y: {IMAGE} = _to_copy.default(self=h, dtype='bf16')
    return s, t, y"""


@pytest.mark.parametrize("block", [32, 48])
def test_gradients_of_norms(block: int) -> None:
    graph = body(GRADIENT, "bf16")
    form = split_by_blocks(graph, "k", block)
    assert [node.op for node in form.nodes] == [f"k_{kind}{block}" for kind in ("parts", "sum", "rest")]
    parts, _, rest = form.nodes
    assert sum(len(value.type.shape) == 4 for value in parts.results) == 1  # type: ignore[union-attr]  # the pooling's
    assert not any("pool" in node.op for node in rest.body.nodes)  # type: ignore[union-attr]
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}) for value in graph.inputs]
    _, inputs[2] = F.max_pool2d(inputs[1], 3, 2, 1, return_indices=True)
    eager = compile_graph(graph, CPU)(inputs, ())
    wide = parse(re.sub(r"\b(bf16|f32)\b", "f64", str(graph)))
    exact = compile_graph(wide, CPU)([one.double() if one.is_floating_point() else one for one in inputs], ())
    values = {value.name: tensor for value, tensor in zip(graph.inputs, inputs, strict=True)}
    for node in form.nodes:
        found = region(node.body)  # type: ignore[arg-type]
        kernel = FAMILY.kernel(found, node.op, FAMILY.configs(found, arch_of(80))[0])
        made = {value.name: empty(value.type, {}) for value in node.results}
        run(kernel, [*(values[value.name] for value in node.inputs), *made.values()], {})
        values |= made
    assert_right([values[value.name] for value in attr_values(form.outputs)], eager, exact)


def test_what_is_no_block_of_pixels() -> None:
    graph = body(GRADIENT, "bf16")
    with pytest.raises(Unsupported, match="blocks of 64"):
        split_by_blocks(graph, "k", 64)
    rows = parse(str(graph).replace("(1152, 1, 144, 24)", "").replace("(288, 1, 72, 24)", ""))
    with pytest.raises(Unsupported, match="blocks of 32"):
        split_by_blocks(rows, "k", 32)
    assert best_pixels(rows, arch_of(90)) is None


LARGE = GRADIENT.replace("[2, 24, 8, 6](1152, 1, 144, 24)", "[32, 24, 64, 48](73728, 1, 1152, 24)")
LARGE = LARGE.replace("[2, 24, 4, 3](288, 1, 72, 24)", "[32, 24, 32, 24](18432, 1, 576, 24)")


def test_the_kernel_that_adds_blocks_has_its_best_configuration() -> None:
    """Whatever suits the one that reads the image."""
    found = [one for one in tactics(body(LARGE, "bf16"), "k", arch_of(90)) if one.kind == "split"]
    blocked = [one.kernels for one in found if "k_parts128" in one.kernels]
    assert len({kernels["k_parts128"].source for kernels in blocked}) > 1
    assert len({kernels["k_sum128"].source for kernels in blocked}) == 1


def test_large_images_are_summed_by_blocks() -> None:
    form = offered(body(LARGE, "bf16"), 90)["split"].body
    assert form is not None
    kernel = offered(form.nodes[0].body, 90)["kernel"].kernels["self"]  # type: ignore[arg-type]
    assert "for start in range" in kernel.source
    assert kernel.source.count("tl.store") == 3


def test_a_result_that_is_stored_at_once_is_stored_once() -> None:
    """It takes so long that it would be stored for the last kernel as well."""
    image = "f32[2, 64, 32]"
    form = split_by_blocks(
        body(f"""
            g: {image}
            x: {image}
            a: {image} = gelu_backward.default(grad_output=g, self=x)
            s: f32[1, 1, 32] = sum.dim_IntList(self=a, dim=[0, 1], keepdim=True)
            y: {image} = sub.Tensor(self=a, other=s)
            return a, s, y"""),
        "k",
        64,
    )
    names = [value.name for value in form.nodes[0].results]
    assert names.count("a") == 1 == len({*names}) - 1
