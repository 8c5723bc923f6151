"""Horizontal kernels: their parts in Triton's interpreter against the calls of their bodies, their source, and what
ptxas makes of many parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_rtx
from tests.lowering.kernels.kernel_bodies import body
from tests.lowering.test_kernel_models import check
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, Value, has_parts
from torch_rtx.irparse import parse
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.passes.fuse import fuse
from torch_rtx.lowering.passes.fuse_horizontally import fuse_horizontally
from torch_rtx.quantization import quantize
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import read_table, write_table
from torch_rtx.targets import PORTABLE, Target, arch_of

SOURCE = Path(__file__).with_name("sources") / "loops, three casts in one kernel.txt"
CASTS = """
    a: f32[3, 5]
    b: f32[1101, 3]
    c: f32[7]
    x: bf16[3, 5] = _to_copy.default(self=a, dtype='bf16')
    y: bf16[1101, 3] = _to_copy.default(self=b, dtype='bf16')
    z: bf16[7] = _to_copy.default(self=c, dtype='bf16')
    return x, y, z"""
GROUPS = {
    "casts": CASTS,
    "no elements": """
        a: H[16]
        b: H[0, 4]
        c: H[4, 1028]
        x: H[16] = neg.default(self=a)
        y: H[0, 4] = neg.default(self=b)
        z: H[4, 1028] = neg.default(self=c)
        return x, y, z""",
    "a number that all read": """
        n: f32[()]
        a: H[70]
        b: H[30, 30]
        x: H[70] = mul.Tensor(self=a, other=n)
        y: H[30, 30] = mul.Tensor(self=b, other=n)
        return x, y""",
    "several results": """
        a: f32[70]
        b: f32[3, 50]
        g: H[70]
        h: H[3, 50]
        p: f32[70] = add.Tensor(self=a, other=g, alpha=0.5)
        q: f32[3, 50] = add.Tensor(self=b, other=h, alpha=0.5)
        x: H[70] = _to_copy.default(self=p, dtype='bf16')
        y: H[3, 50] = _to_copy.default(self=q, dtype='bf16')
        return p, q, x, y""".replace("H[", "bf16["),
    "rows": """
        a: H[3, 33]
        b: H[70, 33]
        x: H[3, 33] = softmax.int(self=a, dim=-1)
        y: H[70, 33] = softmax.int(self=b, dim=-1)
        return x, y""",
    "the largest of rows, by a function": """
        a: H[5, 40]
        b: H[3, 7, 40]
        x: H[5] = amax.default(self=a, dim=[1])
        y: H[3, 7] = amax.default(self=b, dim=[2])
        return x, y""",
    "integers": """
        a: i64[5]
        b: i64[3, 7]
        x: i64[5] = add.Tensor(self=a, other=1)
        y: i64[3, 7] = add.Tensor(self=b, other=1)
        return x, y""",
    "any number of elements": """
        dim s = 0, 64, 1
        a: H[s, 5]
        b: H[s]
        x: H[s, 5] = exp.default(self=a)
        y: H[s] = exp.default(self=b)
        return x, y""",
    "operands that repeat along rows": """
        a: H[70, 128]
        n: H[128]
        b: H[3, 128]
        m: H[128]
        x: H[70, 128] = mul.Tensor(self=a, other=n)
        y: H[3, 128] = mul.Tensor(self=b, other=m)
        return x, y""",
    "values that are put in place": """
        c: H[1600, 128]
        d: H[1600, 128]
        a: H[5, 128]
        b: H[70, 128]
        i: i64[5] = arange.default(end=5, device='main')
        j: i64[70] = arange.default(end=70, device='main')
        u: H[5, 128] = neg.default(self=a)
        w: H[70, 128] = neg.default(self=b)
        x: H[1600, 128] = index_copy_.default(self=c, dim=0, index=i, source=u)
        y: H[1600, 128] = index_copy_.default(self=d, dim=0, index=j, source=w)
        return x, y""",
    "columns": """
        a: H[5, 6](1, 5)
        b: H[700]
        x: H[5, 6](1, 5) = exp.default(self=a)
        y: H[700] = exp.default(self=b)
        return x, y""",
}


def grouped(text: str, dtype: str = "f16") -> Node:
    """The only kernel of a graph, which has parts."""
    fused = fuse_horizontally(fuse(body(text, dtype), Inference(), PORTABLE), Inference(), PORTABLE)
    (node,) = fused.nodes
    assert node.body is not None
    assert has_parts(node.body)
    return node


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", GROUPS)
def test_parts(name: str, which: int) -> None:
    node = grouped(GROUPS[name])
    symbolic = node.body is not None and node.body.syms
    for size in (0, 1, 63) if symbolic else (0,):
        check(node, {"s": size}, which)


KINDS = {
    "two loops that share an operand": """
        n: H[64]
        a: H[70, 64]
        b: H[3, 64]
        x: H[70, 64] = mul.Tensor(self=a, other=n)
        y: H[3, 64] = add.Tensor(self=b, other=n)
        return x, y""",
    "one of two parts": """
        n: f32[()]
        a: f32[7, 9]
        b: f32[5]
        c: f32[1100]
        x: f32[7, 9] = mul.Tensor(self=a, other=n)
        y: f32[5] = add.Tensor(self=b, other=n)
        z: f32[1100] = sub.Tensor(self=c, other=n)
        return x, y, z""",
    "any number of elements": """
        dim s = 0, 64, 1
        n: H[5]
        a: H[s, 5]
        b: H[7, s, 5]
        x: H[s, 5] = mul.Tensor(self=a, other=n)
        y: H[7, s, 5] = add.Tensor(self=b, other=n)
        return x, y""",
    "an embedding of positions, and one that is put into a cache": """
        cache: H[2, 2, 32, 16]
        at: i64[1] = arange.default(end=1, device='main')
        qkv: H[2, 1, 128]
        cos: H[1, 16]
        q0: H[2, 1, 64](128, 128, 1) = slice.Tensor(self=qkv, dim=-1, start=0, end=64)
        q1: H[2, 1, 4, 16](128, 128, 16, 1) = view.default(self=q0, size=[2, 1, 4, 16])
        q: H[2, 4, 1, 16](128, 16, 128, 1) = transpose.int(self=q1, dim0=1, dim1=2)
        k0: H[2, 1, 32](128, 128, 1) = slice.Tensor(self=qkv, dim=-1, start=64, end=96)
        k1: H[2, 1, 2, 16](128, 128, 16, 1) = view.default(self=k0, size=[2, 1, 2, 16])
        k: H[2, 2, 1, 16](128, 16, 128, 1) = transpose.int(self=k1, dim0=1, dim1=2)
        x: H[2, 4, 1, 16](64, 16, 64, 1) = mul.Tensor(self=q, other=cos)
        r: H[2, 2, 1, 16](32, 16, 32, 1) = mul.Tensor(self=k, other=cos)
        y: H[2, 2, 32, 16] = index_copy_.default(self=cache, dim=2, index=at, source=r)
        return x, y""",
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_parts_of_several_kinds(name: str, which: int) -> None:
    node = grouped(KINDS[name])
    assert node.body is not None
    kernel = generate(node.body, "k", arch_of(80), which)
    assert kernel is not None
    assert kernel.source.count("def part") == kernel.source.count("    part") > 1
    for size in (0, 1, 63) if node.body.syms else (0,):
        check(node, {"s": size}, which)


LINEARS = """
    x: H[{rows}, 64]
    a: H[48, 64]
    b: H[48, 64]
    c: H[48, 64]
    d: H[48]
    e: H[48]
    f: H[48]
    q: H[{rows}, 48] = linear.default(input=x, weight=a, bias=d)
    k: H[{rows}, 48] = linear.default(input=x, weight=b, bias=e)
    v: H[{rows}, 48] = linear.default(input=x, weight=c, bias=f)
    return q, k, v"""
PRODUCTS = {
    "queries, keys and values": LINEARS.format(rows=40),
    "of one row": LINEARS.format(rows=1),
    "of any number of rows": "dim s = 0, 64, 1" + LINEARS.format(rows="s"),
    "gradients of weights, and what follows": """
        x: H[33, 24]
        y: H[33, 24]
        a: H[33, 40]
        b: H[33, 40]
        p: H[40, 33](1, 40) = permute.default(self=a, dims=[1, 0])
        q: H[40, 33](1, 40) = permute.default(self=b, dims=[1, 0])
        r: H[40, 24] = mm.default(self=p, mat2=x)
        t: H[40, 24] = mm.default(self=q, mat2=y)
        u: f32[40, 24] = _to_copy.default(self=r, dtype='f32')
        w: f32[40, 24] = _to_copy.default(self=t, dtype='f32')
        return u, w""",
    "batches": """
        x: H[3, 20, 32]
        a: H[3, 32, 24]
        b: H[3, 32, 24]
        u: H[3, 20, 24] = bmm.default(self=x, mat2=a)
        w: H[3, 20, 24] = bmm.default(self=x, mat2=b)
        return u, w""",
}


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: str) -> None:
    """Their programs choose matrices as those of loops choose tensors."""
    node = grouped(PRODUCTS[name], dtype)
    for size in (0, 1, 63) if node.body is not None and node.body.syms else (0,):
        for which in (0, 1):
            check(node, {"s": size}, which)


def test_products_of_which_none_has_a_kernel_alone() -> None:
    """Packed weights of an odd number of columns, in float32: no tile of one of them fits."""
    model = nn.ModuleList(nn.Linear(128, 131) for _ in range(3)).eval()
    quantize(model, "int4_weight_only")
    call = _Each(model)
    settings = CompilationSettings(
        device="cuda", targets="later", cache_built_engines=False, reuse_cached_engines=False
    )
    with torch.no_grad():
        graph = torch_rtx.compile(call, tuple(torch.randn(16, 128) for _ in range(3)), settings=settings).engine.graph
    assert sum(node.kind == "fallback" for node in graph.nodes) == 0


class _Each(nn.Module):
    """A layer for each argument."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, *given: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, given, strict=True)]


def test_halves_of_two_kinds_are_no_parts_of_one_kernel() -> None:
    """Their code reads the same, but a pointer has one type."""
    graph = body("""
        a: f16[70]
        b: bf16[9, 9]
        x: f16[70] = exp.default(self=a)
        y: bf16[9, 9] = exp.default(self=b)
        return x, y""")
    fused = fuse(graph, Inference(), PORTABLE)
    assert fuse_horizontally(fused, Inference(), PORTABLE) == fused


def test_one_tensor_in_two_parts() -> None:
    graph = fuse(
        body("x: f32[7, 9]\ny: bf16[7, 9] = _to_copy.default(self=x, dtype='bf16')\nreturn y"), Inference(), PORTABLE
    )
    (node,), (y,) = graph.nodes, graph.outputs
    assert isinstance(y, Value)
    twin = replace(y, name="z")
    twice = replace(graph, nodes=(node, replace(node, outputs=(twin,))), outputs=(y, twin))
    (both,) = fuse_horizontally(twice, Inference(), PORTABLE).nodes
    assert len(both.inputs) == 1
    check(both, {})


def test_source() -> None:
    node = grouped(CASTS)
    assert node.body is not None
    kernel = generate(node.body, "three_casts", arch_of(80), 0)
    assert kernel is not None
    assert kernel.source == SOURCE.read_text()


def test_an_engine_has_one_kernel_for_all_parts() -> None:
    """It is found again in the engine's text and table; the parts have no kernels of their own."""
    node = grouped(CASTS)
    graph = Graph("fused", node.inputs, nodes=(node,), outputs=node.results)
    table, report = build_kernels(graph, [Target(80)])
    assert not report.missing
    assert set(table.tactics) == {node.op}
    again = read_table(json.loads(json.dumps(write_table(table))), parse(str(graph)))
    assert again.tactics == table.tactics


def test_a_body_that_is_none_of_parts_has_no_kernel() -> None:
    """An engine file may have any: reductions beside other loops, results that nobody reads."""
    node = grouped(CASTS)
    text = str(node.body)
    cast = "op aten._to_copy.default(self=v1, dtype='bf16')"
    other = f"v1: f32[7] = op aten.softmax.int(self=in0, dim=0)\n    v2: bf16[7] = {cast}"
    for wrong in (
        text.replace(
            "v1: bf16[7] = op aten._to_copy.default(self=in0, dtype='bf16')\n    return [v1]",
            f"{other}\n    return [v2]",
        ),
        text.replace("return [v3, v4, v5]", "return [v3, v5]"),
    ):
        assert wrong != text
        with pytest.raises(Unsupported):
            generate(parse(wrong), "wrong", arch_of(80), 0)


@pytest.mark.parametrize("sm", [80, 89, 90])
def test_many_parts_have_vectors_and_few_registers(sm: int) -> None:
    """All of their code is one loop's."""
    sizes = [16 * (3 + which) for which in range(48)]
    lines = [f"a{i}: f32[{size}, 768]" for i, size in enumerate(sizes)]
    lines += [f"b{i}: bf16[{size}, 768] = _to_copy.default(self=a{i}, dtype='bf16')" for i, size in enumerate(sizes)]
    node = grouped("\n".join([*lines, f"return {', '.join(f'b{i}' for i in range(len(sizes)))}"]))
    assert node.body is not None
    kernel = generate(node.body, "many", arch_of(sm), 0)
    assert kernel is not None
    built = compile_kernels([(kernel, Target(sm))])[kernel, Target(sm)].aligned
    assert built is not None
    assert built.spills == 0
    assert built.registers <= 40
    assert b"ld.global.v4" in built.ptx
    assert b"st.global.v4" in built.ptx
    assert len(built.cubin) < 20_000
