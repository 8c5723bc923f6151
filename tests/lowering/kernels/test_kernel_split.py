"""Split forms: products, convolutions and attention as partial results and what is made of them, in Triton's
interpreter against ATen; and where they are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.splits import split_in
from tests.lowering.kernels import test_kernel_attention as attention
from tests.lowering.kernels import test_kernel_int8 as int8
from tests.lowering.kernels.kernel_bodies import body, check_split, check_split_graph, random_tensor, split
from tests.lowering.kernels.test_kernel_conv import CALLS as CONVOLUTIONS
from tests.lowering.kernels.test_kernel_gemm import CALLS, EPILOGUES, GATED, PROLOGUES, SYMBOLIC, linear
from tests.lowering.kernels.test_row_blocks import layer_norm
from tests.paths import ENGINES
from torch_rtx import CompilationSettings
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Loc, Node, Value, kernel_nodes, verify
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.families.family import Offer
from torch_rtx.lowering.kernels.generate import Form, _offered, generate
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.tactics import Tactic
from torch_rtx.targets import PORTABLE, Target, arch_of

DTYPES = ("f16", "bf16", "f32")
CONV = """
x: H[1, 512, 7, 7](25088, 1, 3584, 512)
w: H[512, 512, 3, 3](4608, 1, 1536, 512)
b: H[512]
r: H[1, 512, 7, 7](25088, 1, 3584, 512)
h: H[1, 512, 7, 7](25088, 1, 3584, 512) = conv2d.default(input=x, weight=w, bias=b, padding=[1, 1])
a: H[1, 512, 7, 7](25088, 1, 3584, 512) = add.Tensor(self=h, other=r)
y: H[1, 512, 7, 7](25088, 1, 3584, 512) = relu.default(self=a)
return y
"""


# ---- products --------------------------------------------------------------------------------------------------------

# The depths of these are 33, which three divides; all others are even.
ODD = ("transposed operands", "views of operands", "bmm", "bmm of one batch for all", "baddbmm", "matmul, broadcast",
       "matmul by a matrix")  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_products(name: str) -> None:
    check_split(CALLS[name], 3 if name in ODD else 2)


@pytest.mark.parametrize("name", [*EPILOGUES, *GATED])
def test_what_follows_a_product(name: str) -> None:
    check_split((EPILOGUES | GATED)[name], 4)


@pytest.mark.parametrize("name", PROLOGUES)
def test_what_precedes_a_product(name: str) -> None:
    check_split(PROLOGUES[name].replace("TYPE", "'f16'"), 2)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("text", [CALLS["addmm with factors"], EPILOGUES["bias and gelu"], GATED["two halves"]])
def test_other_dtypes_of_products(text: str, dtype: str) -> None:
    check_split(text, 2, dtype)


@pytest.mark.quick
@pytest.mark.parametrize("size", [0, 1, 9])
def test_symbolic_rows(size: int) -> None:
    form = check_split(SYMBOLIC.replace("LAST", "4096"), 4, dims={"s": size})
    assert str(form.nodes[0].outputs[0].type) == "f32[4, (2 * s), 48]"  # type: ignore[union-attr]


def test_partial_products_are_dots_of_halves() -> None:
    form = split_in(body(linear(40, 48, 256)), "k", 4)
    kernel = generate(form.nodes[0].body, "k", arch_of(80), 0)  # type: ignore[arg-type]
    assert kernel is not None
    assert ".to(tl.float32)" not in kernel.source
    assert kernel.pointers == ("f16", "f16", "f32")


# ---- convolutions ----------------------------------------------------------------------------------------------------

# Three channels, and one for each filter.
UNDIVIDED = {"tokens of patches", "a range of channels, depthwise", "in three dimensions, depthwise"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions(dtype: str) -> None:
    text = CONV.replace("512", "32").replace("25088", "1568").replace("3584", "224").replace("4608", "288")
    check_split(text.replace("1536", "96"), 4, dtype)


@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name not in UNDIVIDED])
def test_kinds_of_convolutions(name: str) -> None:
    check_split(CONVOLUTIONS[name].replace("TYPE", "'f16'"), 2)


# ---- attention -------------------------------------------------------------------------------------------------------


def check_attention(case: attention.Case, parts: int, dtype: str = "f16", hidden: Any = None) -> Graph:
    graph = case.graph(dtype)
    tensors = case.tensors(graph)
    if hidden is not None:
        tensors[3][hidden] = False
    return check_split_graph(graph, case.graph("f64"), parts, tensors, case.sizes)


NOT_IN_PARTS = ("causal", "band", "two dimensions", "repeated batch", "epilogue", "no keys")
IN_PARTS = [name for name in attention.CASES if not any(word in name for word in NOT_IN_PARTS)]


@pytest.mark.parametrize("name", IN_PARTS)
def test_attention(name: str) -> None:
    check_attention(attention.CASES[name], 4)


def decode(width: int, keys: int, shared: int = 1, dtype: str = "bool", heads: int = 1) -> attention.Case:
    inputs: dict[str, Any] = {
        "q": ((2, 2 * shared, 1, width),),
        "k": ((2, 2, keys, width),),
        "v": ((2, 2, keys, width),),
    }
    inputs["mask"] = ((2, heads, 1, keys), dtype)
    return attention.Case(inputs, lambda emit, *given: attention.attend(emit, *given, enable_gqa=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_widths_of_heads(width: int, dtype: str) -> None:
    check_attention(decode(width, 70, 4), 4, dtype)


@pytest.mark.parametrize("keys", [1, 3, 8, 33])
@pytest.mark.parametrize("dtype", ["bool", attention.FLOAT])
def test_odd_and_few_keys(keys: int, dtype: str) -> None:
    check_attention(decode(16, keys, 3, dtype, heads=6), 8)


@pytest.mark.parametrize("length", [1, 2, 5, 31, 64])
def test_an_open_number_of_keys(length: int) -> None:
    keys = attention.LENGTH
    case = attention.Case(
        {"q": ((1, 6, 1, 16),), "k": ((1, 2, keys, 16),), "v": ((1, 2, keys, 16),)},
        attention.options(enable_gqa=True),
        sizes={"s1": length},
    )
    check_attention(case, 4)


def test_rows_and_ranges_that_see_no_key() -> None:
    """A row that sees nothing at all, which is 0, and one that sees nothing of two of four ranges."""
    case = decode(16, 40, 2)
    form = check_attention(case, 4, "f32", hidden=(0, 0, 0))
    check_attention(case, 4, "f32", hidden=(1, 0, 0, slice(0, 20)))
    graph = case.graph("f32")
    tensors = case.tensors(graph)
    tensors[3][0] = False
    (out,) = compile_graph(form, torch.device("cpu"))(tensors, ())
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_parts_of_attention_as_models_write_it_out() -> None:
    """A query that sees no key is NaN; keys that are hidden by a number have a weight, which parts do not know."""
    text = attention.WRITTEN_OUT.format(mask="bool[2, 1, 1, 21]", fill="")
    tensors = [*torch.randn(1, 2, 2, 18, 16), *torch.randn(2, 2, 2, 21, 16), torch.rand(2, 1, 1, 21) < 0.6]
    tensors[3][0] = False
    form = check_split_graph(parse(text), parse(text.replace("f32", "f64")), 4, tensors, {})
    (out,) = compile_graph(form, torch.device("cpu"))(tensors, ())
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    with pytest.raises(Unsupported, match="hidden too"):
        split_in(parse(attention.WRITTEN_OUT.format(mask="bool[2, 1, 1, 21]", fill=", fill=-10000.0")), "k", 4)


def test_partial_attention_is_one_call() -> None:
    """Operands stay in their dtype: a kernel multiplies halves with tensor cores."""
    for name in ("plain", "mask of keys", "added mask", "grouped heads"):
        partial = split_in(attention.CASES[name].graph("f16"), "k", 2).nodes[0].body
        assert partial is not None
        (call,) = (node for node in partial.nodes if node.op == "torch_rtx.attention_partial.default")
        assert [one.type.dtype for one in call.inputs[:3]] == ["f16"] * 3  # type: ignore[union-attr]
        assert partial.outputs == call.outputs


def test_split_attention_of_engines_before_it_was_one_call() -> None:
    """Their bodies hold products around exponentials; where their binaries do not fit, these run call by call."""
    case = decode(16, 10, 2)
    graph = case.graph("f16")
    stored = parse((ENGINES / "v4" / "split_attention.txt").read_text())
    verify(stored, ALLOWED)
    now = split_in(graph, "k", 4)
    assert [node.op for node in stored.nodes] == [node.op for node in now.nodes]
    found = [compile_graph(form, torch.device("cpu"))(case.tensors(graph), ())[0] for form in (stored, now)]
    torch.testing.assert_close(*found)


def test_in_the_graph_of_an_engine() -> None:
    """The two kernels take the place of the node, with values and a place in the model that are its own."""
    inner = body(GATED["two halves"])
    graph = kernel_graph(inner, "k")
    graph = replace(graph, nodes=(replace(graph.nodes[0], loc=Loc("model.ff", "model.py", 3)),))
    form = split_in(inner, "k", 4)
    inside: Any = dict.fromkeys(node.op for node in kernel_nodes(form))
    divided = inline_kernels(graph, {"k": Tactic("split", 0.0, inside, form)})
    verify(divided, ALLOWED)
    assert [(node.kind, node.op, str(node.loc)) for node in divided.nodes] == [
        ("kernel", "k_parts4", "model.ff @ model.py:3"),
        ("kernel", "k_sum4", "model.ff @ model.py:3"),
    ]
    inputs = random_inputs(inner, 1)
    results = [compile_graph(one, torch.device("cpu"))(inputs, ())[0].float() for one in (graph, divided)]
    torch.testing.assert_close(*results, atol=2e-2, rtol=1e-2)


# ---- where they are chosen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sm", "expected"),
    [
        (linear(128, 768, 3072), 80, True),
        (linear(128, 768, 3072), 90, True),
        (linear(8, 768, 3072), 89, True),
        (CONV, 120, True),
        (linear(3072, 768, 3072), 90, False),  # fills the chip
        (linear(128, 768, 3070), 80, False),  # no parts that are multiples of 32
        (linear(128, 768, 256), 80, False),  # too short to gain by a second kernel
        (linear(1, 4096, 4096), 89, False),  # bound by memory
        (linear("s", 768, 3072), 80, False),  # may be many rows
        (linear(128, 768, 3072).replace("H[", "f64["), 80, False),
        (CONV.replace("512, 512, 3, 3](4608", "512, 1, 3, 3](9").replace("1])", "1], groups=512)"), 80, False),
        ("x: H[40]\ny: H[40] = exp.default(self=x)\nreturn y", 80, False),
    ],
)
def test_products_that_are_split(text: str, sm: int, expected: bool) -> None:
    form = split(body(text), "k", sm)
    assert (form is not None) is expected
    assert form == split(body(text), "k", sm)


@pytest.mark.parametrize(
    ("heads", "shared", "queries", "keys", "args", "expected"),
    [
        (32, 8, 1, 2048, {}, True),
        (12, 12, 1, 2048, {}, True),
        (32, 8, 4, 1000, {}, True),
        (32, 8, 1, attention.LENGTH, {}, True),
        (32, 8, 1, 128, {}, False),
        (32, 8, 64, 2048, {}, False),
        (1024, 256, 1, 2048, {}, False),
        (32, 8, 1, 2048, {"is_causal": True}, False),
    ],
)
def test_attention_that_is_split(
    heads: int, shared: int, queries: int, keys: Any, args: dict[str, Any], expected: bool
) -> None:
    inputs = {"q": ((1, heads, queries, 64),), "k": ((1, shared, keys, 64),), "v": ((1, shared, keys, 64),)}
    case = attention.Case(inputs, attention.options(enable_gqa=True, **args))
    assert (split(case.graph("f16"), "k", 90) is not None) is expected


def test_what_has_no_form() -> None:
    with pytest.raises(Unsupported, match="without an anchor"):
        split_in(body("x: H[40]\ny: H[40] = exp.default(self=x)\nreturn y"), "k", 2)
    with pytest.raises(Unsupported, match="causal"):
        split_in(attention.CASES["causal"].graph("f16"), "k", 2)


# ---- binaries --------------------------------------------------------------------------------------------------------


def kernel_graph(inner: Graph, op: str) -> Graph:
    """A graph of one kernel, of this body."""
    args = tuple((f"in{index}", value) for index, value in enumerate(inner.inputs))
    outputs = tuple(value for value in inner.outputs if isinstance(value, Value))
    return Graph("fused", inner.inputs, nodes=(Node("kernel", op, args, outputs, inner),), outputs=outputs)


BUILT = {
    "linear": body(EPILOGUES["bias and gelu"].replace("64]", "3072]")),
    "linear, int8": body(int8.int_mm(40, 3072, 48, rest=int8.EPILOGUES["bias, residual and activation"])),
    "conv": body(CONV),
    "conv, int8": body(int8.int_conv("3x3", int8.REQUANTIZED, source=(1, 256, 7, 7), weight=(128, 256, 3, 3)), "i8"),
    "attention": decode(128, 2048, 4).graph("f16"),
    "open attention": attention.Case(
        {"q": ((1, 8, 1, 64),), "k": ((1, 2, attention.LENGTH, 64),), "v": ((1, 2, attention.LENGTH, 64),)},
        attention.options(enable_gqa=True),
    ).graph("bf16"),
    "group norm": body(
        """
        x: H[2, 320, 16, 16](81920, 1, 5120, 320)
        r: H[2, 320, 16, 16](81920, 1, 5120, 320)
        w: H[320]
        b: H[320]
        h: H[2, 320, 16, 16](81920, 1, 5120, 320) = add.Tensor(self=x, other=r)
        n: H[2, 320, 16, 16](81920, 1, 5120, 320) = group_norm.default(input=h, num_groups=32, weight=w, bias=b)
        y: H[2, 320, 16, 16](81920, 1, 5120, 320) = silu.default(self=n)
        return h, y
        """
    ),
    "softmax": body(
        """
        dim s = 1, 4096, 1
        x: H[s, 40, 50]
        y: H[s, 40, 50] = softmax.int(self=x, dim=1)
        z: H[s, 40, 50] = log_softmax.int(self=y, dim=1)
        return z
        """
    ),
    "gradients of a layer norm": body(layer_norm("7, 301").replace("40", "768")),
}


def random_inputs(inner: Graph, size: int) -> list[torch.Tensor]:
    """Inputs of a body; `size` stands for every symbol."""
    torch.manual_seed(0)
    return [random_tensor(value.type, dict.fromkeys(inner.syms, size)) for value in inner.inputs]


def test_an_offer_of_kernels_that_cannot_be_generated_is_left_out() -> None:
    inner = body(
        "x: H[4, 8]\na: H[4] = sum.dim_IntList(self=x, dim=[1])\ny: H[4] = softmax.int(self=a, dim=0)\nreturn y"
    )
    with pytest.raises(Unsupported):
        generate(inner, "k", arch_of(90), 0)
    assert not list(_offered(Offer("split", 0.0, kernel_graph(inner, "k")), arch_of(90)))


def forced(parts: int) -> Callable[[Node, Target], list[Form]]:
    """What `build_kernels` asks for, so that every kernel is split in `parts`, and is not compiled whole."""

    def made(node: Node, target: Target) -> list[Form]:
        assert node.body is not None
        tactics = _offered(Offer("split", 0.0, split_in(node.body, node.op, parts)), target.arch)
        return [(next(tactics), tactics)]

    return made


@pytest.mark.parametrize("name", BUILT)
def test_every_target_without_spills(name: str) -> None:
    pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")
    if name == "linear":  # one body for every target, the others for one of them each
        targets = (Target(75), *PORTABLE)
    else:
        targets = (Target((75 if "int8" in name else 80, 120)[list(BUILT).index(name) % 2]),)
    table, report = build_kernels(kernel_graph(BUILT[name], "k"), targets, forced(4))
    assert {target for target, tactics in table.tactics["k"].items() if tactics[0].kind == "split"} == set(targets)
    assert report.missing == ()
    assert [kernel for kernel in report.kernels if kernel.spills and kernel.op != "k"] == []


def test_engines_with_split_bodies(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")
    settings = CompilationSettings(device="cuda", targets=["sm_80", "sm_86"], engine_cache_dir=str(tmp_path / "cache"))
    x = torch.randn(8, 3072).half()
    layers = nn.Sequential(nn.Linear(3072, 768), nn.GELU()).half().eval()
    module, again = (torch_rtx.compile(layers, (x,), settings=settings) for _ in range(2))
    table = module.engine.kernels
    assert again.engine.kernels == table  # from the cache
    (found,) = (
        found for found in table.tactics.values() if any(tactics[0].kind == "split" for tactics in found.values())
    )
    assert {str(target) for target, tactics in found.items() if tactics[0].kind == "split"} == {"sm_80", "sm_86"}
    assert [tactic.kind for tactic in found[Target(80)]] == ["split", "kernel", "library"]
    assert Target(90) not in found
    torch_rtx.save(module, tmp_path / "a.rtx")
    loaded = torch_rtx.load(tmp_path / "a.rtx", weights=layers.state_dict(), device="cpu")
    assert loaded.engine.kernels == table
    assert torch.allclose(loaded(x.float().half()).float(), layers(x).float(), atol=2e-2)
