"""What is expected of library calls against kernels."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.lowering.kernels.kernel_bodies import body, library
from torch_rtx import aten
from torch_rtx.chips import chip_named
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import fastest, forms
from torch_rtx.lowering.kernels.loops import LoopWriter
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.lowering.kernels.region import region
from torch_rtx.op_work import flops
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.strided import copy_strided
from torch_rtx.tactics import OWN, check_tactic
from torch_rtx.targets import arch_of

PRODUCT = """graph import {{
  input in0: f16[{m}, {k}]
  input in1: f16[{n}, {k}]
  v2: f16[{m}, {n}] = op aten.linear.default(input=in0, weight=in1)
  return [v2]
}}
"""
OTHERS = {
    "conv": (
        """graph import {
  input in0: f16[2, 8, 16, 16](2048, 1, 128, 8)
  input in1: f16[4, 8, 3, 3](72, 1, 24, 8)
  v2: f16[2, 4, 14, 14](784, 1, 56, 4) = op aten.conv2d.default(input=in0, weight=in1)
  return [v2]
}
""",
        2 * (2 * 4 * 14 * 14) * (8 * 3 * 3),
    ),
    "attention": (
        """graph import {
  dim s0 = 2, 64, 1
  input in0: f16[s0, 12, 128, 64]
  input in1: f16[s0, 12, 256, 64]
  input in2: f16[s0, 12, 256, 32]
  v2: f16[s0, 12, 128, 32] = op aten.scaled_dot_product_attention.default(query=in0, key=in1, value=in2)
  return [v2]
}
""",
        2 * (64 * 12 * 128 * 256) * (64 + 32),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_flops(kind: str) -> None:
    text, expected = OTHERS[kind]
    assert flops(parse(text).nodes[0], typical) == expected


@pytest.mark.parametrize(
    ("sizes", "sm", "expected"),
    [
        ((128, 3072, 768), 90, "slower"),
        ((3072, 768, 3072), 90, "faster"),
        ((3072, 768, 3072), 89, "faster"),
        ((128, 768, 768), 89, "slower"),  # a launch and more
        ((512, 768, 50257), 90, "slower"),  # no multiple of 16 bytes
        ((1, 4096, 4096), 90, "slower"),
    ],
)
def test_products(sizes: tuple[int, int, int], sm: int, expected: str) -> None:
    m, k, n = sizes
    body = parse(PRODUCT.format(m=m, k=k, n=n))
    assert flops(body.nodes[0], typical) == 2 * m * k * n
    assert library(body, sm) == expected


def test_a_loop_has_no_rival() -> None:
    body = parse(
        "graph import {\n  input in0: f16[4]\n  v1: f16[4] = op aten.exp.default(self=in0)\n  return [v1]\n}\n"
    )
    assert library(body, 90) == "none"


CONVOLUTION = """\
graph import {{
  input in0: f16[{n}, {c}, {h}, {w}]({c}*{h}*{w}, 1, {c}*{w}, {c})
  input in1: f16[{o}, {c}, {kh}, {kw}]({c}*{kh}*{kw}, 1, {c}*{kw}, {c})
  v1: f16[{n}, {o}, {h}, {w}]({o}*{h}*{w}, 1, {o}*{w}, {o}) = op aten.conv2d.default({call})
  return [v1]
}}
"""


@pytest.mark.parametrize(
    ("image", "channels", "window", "sm", "expected"),
    [
        ((2, 64, 64), (960, 320), (3, 3), 90, "faster"),
        ((2, 64, 64), (960, 320), (3, 3), 89, "faster"),
        ((1, 56, 56), (64, 64), (3, 3), 89, "slower"),
        ((32, 28, 28), (128, 128), (3, 3), 90, "slower"),
        ((2, 8, 8), (1280, 1280), (3, 3), 90, "slower"),  # too few programs for either
        ((8, 1, 3000), (768, 768), (1, 3), 90, "slower"),  # a sequence
        ((16, 64, 64), (320, 320), (1, 1), 90, "slower"),  # a product
        ((16, 64, 64), (640, 640), (3, 3), 90, "faster"),
    ],
)
def test_convolutions(
    image: tuple[int, int, int], channels: tuple[int, int], window: tuple[int, int], sm: int, expected: str
) -> None:
    (n, h, w), (c, o), (kh, kw) = image, channels, window
    call = f"input=in0, weight=in1, padding=[{kh // 2}, {kw // 2}]"
    text = CONVOLUTION.format(n=n, c=c, h=h, w=w, o=o, kh=kh, kw=kw, call=call)
    text = re.sub(r"\d+(\*\d+)+", lambda found: str(math.prod(map(int, found[0].split("*")))), text)
    assert library(parse(text), sm) == expected


# ---- on other GPUs ---------------------------------------------------------------------------------------------------

GPUS = {"RTX 2060": 75, "RTX 3050": 86, "RTX 3090": 86, "RTX 4060": 89, "RTX 4090": 89, "RTX 5090": 120, "H200": 90}


@cache
def expected(text: str, gpu: str) -> dict[str, float]:
    """The expected microseconds of a body's tactics on a GPU, by kind."""
    chip = chip_named(gpu, GPUS[gpu])
    assert chip is not None
    return {head.kind: head.expected_us for head, _ in forms(parse(text), "k", replace(arch_of(GPUS[gpu]), chip=chip))}


def linear(rows: int, columns: int, depth: int) -> str:
    """A linear layer without a bias."""
    return PRODUCT.format(m=rows, n=columns, k=depth)


ROW = """graph import {
  input in0: f16[1, 50257]
  v1: f16[1, 50257] = op aten._softmax.default(self=in0, dim=-1, half_to_float=False)
  return [v1]
}
"""


@pytest.mark.parametrize("gpu", GPUS)
def test_what_memory_bounds_is_no_library_s(gpu: str) -> None:
    chip = chip_named(gpu)
    assert chip is not None
    for rows, columns, depth in ((1, 4096, 4096), (16, 4096, 4096), (16, 50264, 768), (16, 14336, 4096)):
        found = expected(linear(rows, columns, depth), gpu)
        moved_us = 2 * columns * depth / (chip.memory * 1e3)
        assert min(found.values()) < found["library"], (rows, columns, depth)
        assert moved_us < min(found.values()) < 2 * moved_us + 5, (rows, columns, depth)  # about what it reads


@pytest.mark.parametrize("gpu", GPUS)
def test_what_tensor_cores_bound_takes_no_less_than_their_rate(gpu: str) -> None:
    chip, found = chip_named(gpu), expected(linear(4096, 4096, 4096), gpu)
    assert chip is not None
    least_us = 2 * 4096**3 / (chip.tensor * 1e6)
    assert least_us < found["library"] < found["kernel"] < 1.6 * least_us
    small = expected(linear(128, 768, 768), gpu)
    assert 0.9 * small["kernel"] < small["library"] < 1.5 * small["kernel"]  # of one order, whatever the GPU


@pytest.mark.parametrize(("small", "large"), [("RTX 3050", "RTX 3090"), ("RTX 4060", "RTX 4090")])
def test_the_larger_gpu_is_never_slower(small: str, large: str) -> None:
    layers = [linear(rows, 2048, 2048) for rows in (1, 16, 128, 2048)]
    for text in (*layers, ROW):
        assert min(expected(text, large).values()) < min(expected(text, small).values()), text


def test_a_row_is_split_on_every_gpu() -> None:
    for gpu in GPUS:
        found = expected(ROW, gpu)
        assert found["split"] < found["kernel"] / 4, gpu


# ---- library calls with what follows them ----------------------------------------------------------------------------

LAYER = """graph import {{
  input in0: {dtype}[4, 8, 64]
  input in1: {dtype}[32, 64]
  input in2: {dtype}[32]
  v0: {dtype}[4, 8, 32] = op aten.linear.default(input=in0, weight=in1{bias})
  v1: {dtype}[4, 8, 32] = op aten.{activation}
  return [{results}]
}}
"""
CHANNELS_LAST = "(3136, 1, 448, 64)"
WITH_ACTIVATION = """graph import {{
  input in0: {dtype}[2, 64, 7, 7](3136, 1, 448, 64)
  input in1: {dtype}[64, 64, 3, 3](576, 1, 192, 64)
  input in2: {dtype}[64]
  input in3: {dtype}[2, 64, 7, 7]{strides}
  v0: {dtype}[2, 64, 7, 7](3136, 1, 448, 64) = op aten.conv2d.default(input=in0, weight=in1{bias}, padding=[1, 1])
{sum}  v2: {dtype}[2, 64, 7, 7](3136, 1, 448, 64) = op aten.{activation}
  return [v2]
}}
"""
SUM = "  v1: {dtype}[2, 64, 7, 7](3136, 1, 448, 64) = op aten.add.Tensor(self={self}, other={other})\n"


def layer(
    dtype: str = "f16", activation: str = "relu.default(self=v0)", bias: bool = True, results: str = "v1"
) -> Graph:
    text = LAYER.format(dtype=dtype, activation=activation, bias=", bias=in2" if bias else "", results=results)
    return parse(text if bias else text.replace(f"  input in2: {dtype}[32]\n", ""))


def convolution(
    dtype: str = "f16", activation: str = "relu", bias: bool = True, added: str = "", strides: str = CHANNELS_LAST
) -> Graph:
    pair = {"": ("", ""), "left": ("in3", "v0"), "right": ("v0", "in3"), "itself": ("v0", "v0")}[added]
    text = SUM.format(dtype=dtype, self=pair[0], other=pair[1]) if added else ""
    source = f"{activation}.default(self={'v1' if added else 'v0'})"
    text = WITH_ACTIVATION.format(
        dtype=dtype, strides=strides, bias=", bias=in2" if bias else "", sum=text, activation=source
    )
    unused = [name for name in ("in2", "in3") if f"={name}" not in text]
    return parse("".join(line for line in text.splitlines(True) if not any(f"input {n}:" in line for n in unused)))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (layer(), True),
        (layer("bf16"), True),
        (layer(activation="gelu.default(self=v0, approximate='tanh')"), True),
        (layer(activation="gelu.default(self=v0)"), False),  # cuBLASLt has the tanh form
        (layer(activation="sigmoid.default(self=v0)"), False),
        (layer("f32"), False),
        (layer(bias=False), False),
        (layer(results="v1, v0"), False),
        (convolution(), False),
    ],
)
def test_cublaslt(body: Graph, expected: bool) -> None:
    found = [head for head, _ in forms(body, "k", arch_of(90)) if head.kind == "cublaslt"]
    assert bool(found) is expected
    for tactic in found:
        check_tactic(tactic.with_kernels(lambda op, kernel: 1 / 0), "k", body)  # it launches nothing
        assert "aten._addmm_activation.default" in str(tactic.body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (convolution(), "cudnn_convolution_relu"),
        (convolution("bf16", added="left"), "cudnn_convolution_add_relu"),
        (convolution(added="right"), "cudnn_convolution_add_relu"),
        (convolution(added="itself"), None),
        (convolution(added="right", strides=""), None),  # cuDNN wants both of one layout
        (convolution(activation="sigmoid"), None),
        (convolution(bias=False), None),
        (convolution("f32"), None),
        (layer(), None),
    ],
)
def test_cudnn(body: Graph, expected: str | None) -> None:
    found = forms(body, "k", arch_of(90))
    calls = [head for head, _ in found if head.kind == "cudnn"]
    assert len(calls) == (expected is not None)
    for tactic in calls:
        check_tactic(tactic.with_kernels(lambda op, kernel: 1 / 0), "k", body)
        assert f"aten.{expected}.default" in str(tactic.body)
        own = next(head for head, _ in found if OWN in head.kernels)
        assert tactic.expected_us > own.expected_us  # it is measured before it is used


ADDMM = """graph import {
  input in0: f32[12, 64]
  input in1: f32[64, 32]
  input in2: f32[32, 12]
  v0: f32[12, 32](1, 12) = op aten.permute.default(self=in2, dims=[1, 0])
  v1: f32[12, 64] = op aten.relu.default(self=in0)
  v2: f32[12, 32] = op aten.addmm.default(self=v0, mat1=v1, mat2=in1)
  v3: f32[12, 32] = op aten.mul.Tensor(self=v2, other=v0)
  return [v3]
}
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (layer("f32"), True),
        (layer("f32", activation="gelu.default(self=v0)", results="v1, v0"), True),
        (parse(ADDMM), True),  # what is added, and an operand, are computed before
        (parse(ADDMM.replace("mat2=in1)", "mat2=in1, beta=2)")), False),
        (layer(), False),  # halves would be rounded once more
        (layer("f32", bias=False), False),
        (convolution(), True),
        (convolution("f32", activation="gelu", added="left"), True),
        (convolution(bias=False), False),
    ],
)
def test_a_bias_is_added_after_the_call(body: Graph, expected: bool) -> None:
    found = [head for head, _ in forms(body, "k", arch_of(90)) if head.kind == "bare"]
    assert bool(found) is expected
    cpu = torch.device("cpu")
    given = [
        copy_strided(torch.randn(type_.shape).to(aten.DTYPES[type_.dtype]), type_.strides)
        for type_ in (value.type for value in body.inputs)
    ]
    for tactic in found:
        check_tactic(replace(tactic, kernels={}), "k", body)  # type: ignore[arg-type]
        assert tactic.body is not None
        *_, last = tactic.body.nodes
        assert tactic.kernels.keys() == {last.op} == {"k_bias"}
        results = compile_graph(tactic.body, cpu)(given, ())
        torch.testing.assert_close(results, compile_graph(body, cpu)(given, ()), rtol=1e-2, atol=1e-2)


def product(x: str, w: str, *nodes: str, results: str = "r") -> Graph:
    lines = "\n".join([f"input x: {x}", f"input w: {w}", *nodes, f"return [{results}]"])
    return parse(f"graph import {{\n{lines}\n}}")


X, W, MM = "bf16[32, 16]", "bf16[16, 24]", "p: bf16[32, 24] = op aten.mm.default(self=x, mat2=w)"
T = "t: bf16[24, 32](1, 24) = op aten.t.default(self=p)"
CAST = "r: f32[32, 24] = op aten._to_copy.default(self=p, dtype='f32')"
LINEAR = "p: bf16[2, 4, 24] = op aten.linear.default(input=x, weight=w)"
IN_FLOAT32 = {
    "mm": (product(X, W, MM, CAST), "mm"),
    "float16": (parse(str(product(X, W, MM, CAST)).replace("bf16", "f16")), "mm"),
    "views": (product(X, W, MM, T, "u: bf16[32, 24] = op aten.t.default(self=t)", CAST.replace("=p", "=u")), "mm"),
    "linear": (
        product("bf16[2, 4, 16]", "bf16[24, 16]", LINEAR, CAST.replace("[32, 24]", "[2, 4, 24]")),
        "mm",
    ),
    "reshaped": (
        product(
            "bf16[2, 4, 16]",
            "bf16[24, 16]",
            LINEAR,
            "u: bf16[8, 24] = op aten.view.default(self=p, size=[8, 24])",
            "r: f32[8, 24] = op aten._to_copy.default(self=u, dtype='f32')",
        ),
        "mm",
    ),
    "bmm": (
        product(
            "bf16[2, 32, 16]",
            "bf16[2, 16, 24]",
            "p: bf16[2, 32, 24] = op aten.bmm.default(self=x, mat2=w)",
            CAST.replace("[", "[2, ", 1),
        ),
        "bmm",
    ),
    "transposed": (product(X, W, MM, T, "r: f32[24, 32](1, 24) = op aten._to_copy.default(self=t, dtype='f32')"), None),
    "transposed in memory": (
        product(
            *(X, W, MM, T),
            "r: f32[24, 32] = op aten._to_copy.default(self=t, dtype='f32', memory_format='contiguous_format')",
        ),
        None,
    ),
    "float32": (parse(str(product(X, W, MM, CAST)).replace("bf16", "f32")), None),
    "float64": (parse(str(product(X, W, MM, CAST)).replace("f32", "f64")), None),
    "computed": (product(X, W, MM, CAST.replace("r:", "c:"), "r: f32[32, 24] = op aten.relu.default(self=c)"), None),
    "rounded": (
        product(X, W, MM, "h: f16[32, 24] = op aten._to_copy.default(self=p, dtype='f16')", CAST.replace("=p", "=h")),
        None,
    ),
    "a part": (
        product(
            *(X, W, MM, "u: bf16[32, 8](24, 1) = op aten.slice.Tensor(self=p, dim=1, start=0, end=8)"),
            "r: f32[32, 8] = op aten._to_copy.default(self=u, dtype='f32')",
        ),
        None,
    ),
    "two results": (product(X, W, MM, CAST, results="r, p"), None),
    "a bias": (
        product(X, W, "input b: bf16[24]", MM.replace("mm.default(self=x", "addmm.default(self=b, mat1=x"), CAST),
        None,
    ),
}


@pytest.mark.parametrize("case", IN_FLOAT32)
def test_cublas_writes_float32(case: str) -> None:
    """What a call on the CPU, which PyTorch lacks, would give is what the body does."""
    body, op = IN_FLOAT32[case]
    found = [head for head, _ in forms(body, "k", arch_of(90)) if head.kind == "cublas"]
    assert len(found) == (op is not None)
    cpu = torch.device("cpu")
    given = [torch.randn(value.type.shape).to(aten.DTYPES[value.type.dtype]) for value in body.inputs]
    for tactic in found:
        check_tactic(tactic.with_kernels(lambda op, kernel: 1 / 0), "k", body)  # it launches nothing
        assert tactic.body is not None
        assert [node.op for node in tactic.body.nodes if "mm" in node.op] == [f"aten.{op}.dtype"]
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl(f"{op}.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
            results = compile_graph(tactic.body, cpu)(given, ())
        torch.testing.assert_close(results, compile_graph(body, cpu)(given, ()), rtol=1e-2, atol=1e-2)


def test_a_call_on_the_cpu_gives_what_the_body_does() -> None:
    body = layer("bf16")
    (tactic,) = (head for head, _ in forms(body, "k", arch_of(90)) if head.kind == "cublaslt")
    assert tactic.body is not None
    inputs = [torch.randn(4, 8, 64), torch.randn(32, 64), torch.randn(32)]
    given = [x.bfloat16() for x in inputs]
    cpu = torch.device("cpu")
    torch.testing.assert_close(compile_graph(tactic.body, cpu)(given, ()), compile_graph(body, cpu)(given, ()))


def test_code_is_generated_once_for_all_sm_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop depends on its region and configuration alone."""
    text = """graph import {
  input in0: f32[64, 37]
  v1: f32[64, 37] = op aten.exp.default(self=in0)
  v2: f32[64, 1] = op aten.sum.dim_IntList(self=v1, dim=[-1], keepdim=True)
  return [v2]
}
"""
    written = []
    monkeypatch.setattr(LoopWriter, "write", lambda writer, write=LoopWriter.write: written.append(0) or write(writer))
    for sm in (80, 86, 89, 90, 120):
        forms(parse(text), "once", arch_of(sm))
    assert len(written) == 1


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("kind", ["product", *OTHERS])
def test_the_fastest_is_the_first_form(kind: str, sm: int) -> None:
    text = OTHERS[kind][0] if kind in OTHERS else PRODUCT.format(m=16, k=4096, n=64)
    assert fastest(parse(text), "k", arch_of(sm)) == forms(parse(text), "k", arch_of(sm))[0][0]


LOOKED_UP = """
ids: i64[1, 64]
table: H[256000, 2560]
x: H[1, 64, 2560] = embedding.default(weight=table, indices=ids)
y: H[1, 64, 2560] = rms_norm.default(input=x, normalized_shape=[2560])
return y
"""
RANGE = """
x: H[8, 513, 4, 16](32832, 1, 8208, 513)
a: H[8, 1, 4, 16](32832, 1, 8208, 513) = slice.Tensor(self=x, dim=1, start=0, end=1)
y: H[8, 1, 4, 16] = softmax.int(self=a, dim=-1)
return y
"""


@pytest.mark.parametrize(("text", "elements"), [(LOOKED_UP, (64, 64 * 2560)), (RANGE, (8 * 4 * 16,))])
def test_of_a_table_or_a_range_only_what_is_read_takes_time(text: str, elements: tuple[int, ...]) -> None:
    found = region(body(text))
    assert tuple(math.prod(type_.shape) for type_ in found.read_types) == elements
    best = fastest(found.body, "norm", arch_of(90))
    assert best is not None
    assert best.kind == "kernel"
    assert best.expected_us < 3.0
