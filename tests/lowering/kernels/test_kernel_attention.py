"""Attention kernels in Triton's interpreter, against the ATen calls that they stand for, by the float64 criterion."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import library
from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Sym, TensorType, Value, contiguous
from torch_rtx.irparse import parse
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.attention import attention_of
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, attention_configs
from torch_rtx.lowering.kernels.attention_forward import attention_kernel
from torch_rtx.lowering.kernels.region import Region, region
from torch_rtx.lowering.rewrite import Rewriter
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import ARCHES, Arch, Target, arch_of

CPU = torch.device("cpu")
SMALL = AttentionConfig(16, 16, 4, 1)
FLOAT = "float"  # stands for the dtype that is tested
BATCH, LENGTH = Sym("s0", 0, 64), Sym("s1", 0, 4096)
Emit = Callable[..., Value]


@dataclass(frozen=True)
class Case:
    """A body: its inputs (shape, dtype, strides) and the calls on them."""

    inputs: dict[str, tuple[Any, ...]]
    calls: Callable[..., Any]
    config: AttentionConfig = SMALL
    sizes: dict[str, int] = field(default_factory=dict)

    def graph(self, dtype: str) -> Graph:
        """The body with `dtype` for FLOAT."""
        values = tuple(Value(name, self.type(dtype, *given)) for name, given in self.inputs.items())
        rewriter = Rewriter(Graph("import", values), Inference())

        def emit(op: str, **args: Attr) -> Value:
            args = {key: dtype if arg == FLOAT else arg for key, arg in args.items()}
            return rewriter.emit(op if op.startswith("torch_rtx.") else f"aten.{op}", **args)

        results = self.calls(emit, *values)
        graph = rewriter.finish()
        outputs = results if isinstance(results, tuple) else (results,)
        return Graph("import", graph.inputs, nodes=graph.nodes, outputs=outputs)

    @staticmethod
    def type(float_: str, shape: tuple[Dim, ...], dtype: str = FLOAT, strides: Any = None) -> TensorType:
        return TensorType(float_ if dtype == FLOAT else dtype, shape, strides or contiguous(shape))

    def tensors(self, graph: Graph) -> list[torch.Tensor]:
        """Inputs, drawn at the precision of the dtype."""
        torch.manual_seed(0)
        found = []
        for value in graph.inputs:
            assert isinstance(value.type, TensorType)
            shape, strides = ([self.number(d) for d in dims] for dims in (value.type.shape, value.type.strides))
            dtype = aten.DTYPES[value.type.dtype]
            count = 1 + sum(stride * max(size - 1, 0) for size, stride in zip(shape, strides, strict=True))
            drawn = torch.randn(count).to(dtype) if dtype.is_floating_point else torch.rand(count) < 0.6
            found.append(drawn.as_strided(shape, strides))
        return found

    def number(self, dim: Dim) -> int:
        return dim if isinstance(dim, int) else int(eval(str(dim), {}, self.sizes))

    def check(self, dtype: str) -> None:
        """The kernel, the ATen calls, and these in float64."""
        graph = self.graph(dtype)
        tensors = self.tensors(graph)
        kernel = attention_kernel(region(graph), "attention", self.config)
        eager = compile_graph(graph, CPU)(tensors, [])
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
        exact = compile_graph(self.graph("f64"), CPU)(wide, [])
        outputs = [torch.full_like(result, torch.nan) for result in eager]
        run(kernel, [*tensors, *outputs], self.sizes)
        assert_right(outputs, eager, exact)


def attend(emit: Emit, q: Value, k: Value, v: Value, mask: Value | None = None, **args: Attr) -> Value:
    given = {} if mask is None else {"attn_mask": mask}
    return emit("scaled_dot_product_attention.default", query=q, key=k, value=v, **given, **args)


def plain(b: Dim, h: int, q: Dim, k: Dim, d: int, **rest: Any) -> dict[str, Any]:
    """Query, key, value as [batch, heads, length, width]."""
    return {"q": ((b, h, q, d),), "k": ((b, h, k, d),), "v": ((b, h, k, d),), **rest}


def joined(emit: Emit, result: Value, size: tuple[Dim, ...]) -> Value:
    """[batch, heads, length, width] as [batch, length, heads * width]."""
    moved = emit("transpose.int", self=result, dim0=1, dim1=2)
    moved = emit("clone.default", self=moved, memory_format="contiguous_format")
    return emit("view.default", self=moved, size=size)


def packed_projection(emit: Emit, qkv: Value, causal: bool = False) -> Value:
    """Self-attention over slices of one buffer, as merged linear layers leave them; the result as one row per token."""
    parts = []
    for start in (0, 24, 48):
        part = emit("slice.Tensor", self=qkv, dim=-1, start=start, end=start + 24)
        part = emit("view.default", self=part, size=(2, 19, 3, 8))
        parts.append(emit("transpose.int", self=part, dim0=1, dim1=2))
    return joined(emit, attend(emit, *parts, **({"is_causal": True} if causal else {})), (2, 19, 24))


def repeated_heads(emit: Emit, q: Value, *pair: Value) -> Value:
    """Heads of K and V repeated by views, as transformers' repeat_kv writes it."""
    wide = []
    for tensor in pair:
        tensor = emit("unsqueeze.default", self=tensor, dim=2)
        tensor = emit("expand.default", self=tensor, size=(2, 2, 3, 21, 16))
        tensor = emit("clone.default", self=tensor, memory_format="contiguous_format")
        wide.append(emit("view.default", self=tensor, size=(2, 6, 21, 16)))
    return attend(emit, q, *wide)


def computed_mask(emit: Emit, q: Value, k: Value, v: Value, padding: Value) -> Value:
    """`key <= query` and a padding of keys."""
    rows = emit("unsqueeze.default", self=emit("arange.default", end=20, device="main"), dim=1)
    columns = emit("arange.default", end=20, device="main")
    seen = emit("le.Tensor", self=columns, other=rows)
    real = emit("view.default", self=padding, size=(2, 1, 1, 20))
    return attend(emit, q, k, v, emit("bitwise_and.Tensor", self=seen, other=real))


def least_mask(emit: Emit, q: Value, k: Value, v: Value, hidden: Value) -> Value:
    """The least number added where a mask is set: rows that see nothing are a mean over all keys."""
    zero, least = (
        emit("scalar_tensor.default", s=s, dtype="f32", device="main") for s in (0.0, -3.4028234663852886e38)
    )
    return attend(emit, q, k, v, emit("where.self", condition=hidden, self=least, other=zero))


def rotated(emit: Emit, q: Value, k: Value, v: Value, cos: Value) -> Value:
    """Query and key computed from halves of themselves."""
    turned = []
    for tensor in (q, k):
        half = tensor.type.shape[-1] // 2
        low, high = (emit("slice.Tensor", self=tensor, dim=-1, start=s, end=s + half) for s in (0, half))
        swapped = emit("cat.default", tensors=(emit("neg.default", self=high), low), dim=-1)
        turned.append(emit("add.Tensor", self=emit("mul.Tensor", self=tensor, other=cos), other=swapped))
    return attend(emit, *turned, v)


def with_residual(emit: Emit, q: Value, k: Value, v: Value, residual: Value) -> tuple[Value, Value]:
    """Two results: in rows plus a residual, and as it is in another dtype."""
    result = attend(emit, q, k, v, is_causal=True)
    rows = emit("add.Tensor", self=joined(emit, result, residual.type.shape), other=residual)
    return rows, emit("_to_copy.default", self=emit("mul.Tensor", self=result, other=2.0), dtype="f32")


def with_sink(queries: int = 18, shared: int = 2, **args: Attr) -> Case:
    """Written out, with a sink for each of four heads; with a mask unless it is causal, and with what follows it."""
    mask = {} if args.get("is_causal") else {"m": ((2, 1, queries, 21), FLOAT)}
    operands = {"q": ((2, 4, queries, 16),), "k": ((2, shared, 21, 16),), "v": ((2, shared, 21, 16),)}

    def calls(emit: Emit, s: Value, q: Value, k: Value, v: Value, *masks: Value) -> Value:
        given = {**dict(zip(("attn_mask",), masks, strict=False)), "scale": 0.25, "sink": s, **args}
        result = emit("torch_rtx.attention.default", query=q, key=k, value=v, **given)
        return joined(emit, result, (2, queries, 64))

    return Case({"s": ((2, 4, queries, 1), FLOAT, (0, 1, 0, 0)), **operands, **mask}, calls)


def in_band(first: int, last: int, inputs: dict[str, Any], config: AttentionConfig = SMALL, **given: Any) -> Case:
    def calls(emit: Emit, q: Value, k: Value, v: Value, *masks: Value) -> Value:
        more = {**dict(zip(("attn_mask",), masks, strict=False)), "scale": 0.25, "band": (first, last)}
        return emit("torch_rtx.attention.default", query=q, key=k, value=v, **more)

    return Case(inputs, calls, config, **given)


def masked(shape: tuple[Dim, ...], dtype: str = "bool", strides: Any = None, k: int = 21, width: int = 16) -> Case:
    return Case(plain(2, 2, 18, k, width, mask=(shape, dtype, strides)), attend)


def options(**args: Attr) -> Callable[..., Value]:
    return lambda emit, *values: attend(emit, *values, **args)


CASES = {
    "plain": Case(plain(2, 3, 32, 32, 16), attend),
    "odd lengths": Case(plain(1, 2, 19, 45, 16), attend),
    "narrow head, wide values": Case({"q": ((1, 2, 5, 12),), "k": ((1, 2, 7, 12),), "v": ((1, 2, 7, 40),)}, attend),
    "head of 72": Case(plain(1, 1, 17, 33, 72), attend, AttentionConfig(32, 32, 4, 1)),
    "head of 40 in two pieces": Case(plain(1, 2, 17, 33, 40), attend, AttentionConfig(16, 16, 4, 1, min_first=32)),
    "head of 80, epilogue": Case(plain(1, 2, 18, 18, 80, residual=((1, 18, 160),)), with_residual),
    "head of 96, values of 65": Case({"q": ((1, 2, 5, 96),), "k": ((1, 2, 19, 96),), "v": ((1, 2, 19, 65),)}, attend),
    "head of 80, causal": Case(plain(1, 1, 20, 20, 80), options(is_causal=True)),
    "head of 96, computed": Case(plain(1, 1, 9, 21, 96, cos=((1, 1, 1, 96),)), rotated),
    "head of 160, mask": masked((2, 2, 18, 21), width=160),
    "scale": Case(plain(1, 2, 16, 16, 16), options(scale=0.7)),
    "scale below 0": Case(plain(1, 2, 16, 16, 16), options(scale=-0.5)),
    "causal": Case(plain(2, 2, 50, 50, 16), options(is_causal=True)),
    "causal, long rows": Case(plain(1, 2, 50, 50, 16), options(is_causal=True), AttentionConfig(32, 16, 4, 1)),
    "causal, more keys": Case(plain(1, 2, 20, 39, 16), options(is_causal=True)),
    "causal, fewer keys": Case(plain(1, 2, 39, 20, 16), options(is_causal=True)),
    "causal, long blocks": Case(plain(1, 2, 39, 64, 16), options(is_causal=True), AttentionConfig(16, 32, 4, 1)),
    "mask of keys": masked((2, 1, 1, 21)),
    "mask of pairs": masked((18, 21)),
    "mask of pairs, four dimensions": masked((1, 1, 18, 21)),
    "mask of all": masked((2, 2, 18, 21)),
    "mask by strides": masked((2, 1, 18, 21), strides=(21, 0, 0, 1)),
    "mask, no rest": masked((2, 1, 18, 32), k=32),
    "added mask": masked((2, 1, 18, 21), FLOAT),
    "added mask of keys": masked((1, 2, 1, 21), FLOAT),
    "added mask, transposed": masked((2, 2, 18, 21), FLOAT, strides=(756, 1, 42, 2)),
    "added mask, no rest": masked((18, 32), FLOAT, k=32),
    "computed mask": Case(plain(2, 2, 20, 20, 16, padding=((2, 20), "bool")), computed_mask),
    "least mask": Case(plain(1, 2, 20, 24, 16, hidden=((20, 24), "bool")), least_mask),
    "grouped heads": Case(
        {"q": ((2, 6, 33, 16),), "k": ((2, 2, 21, 16),), "v": ((2, 2, 21, 16),)}, options(enable_gqa=True)
    ),
    "grouped heads, packed": Case(
        {"q": ((2, 6, 3, 16),), "k": ((2, 2, 21, 16),), "v": ((2, 2, 21, 16),)}, options(enable_gqa=True)
    ),
    "grouped heads, packed, causal": Case(
        {"q": ((1, 8, 5, 16),), "k": ((1, 2, 21, 16),), "v": ((1, 2, 21, 16),)},
        options(enable_gqa=True, is_causal=True),
    ),
    "grouped heads, packed, mask": Case(
        {"q": ((1, 8, 3, 16),), "k": ((1, 2, 21, 16),), "v": ((1, 2, 21, 16),), "mask": ((1, 8, 3, 21), "bool")},
        options(enable_gqa=True),
    ),
    "heads repeated by views": Case(
        {"q": ((2, 6, 18, 16),), "k": ((2, 2, 21, 16),), "v": ((2, 2, 21, 16),)}, repeated_heads
    ),
    "heads repeated by views, packed": Case(
        {"q": ((2, 6, 1, 16),), "k": ((2, 2, 21, 16),), "v": ((2, 2, 21, 16),)}, repeated_heads
    ),
    "sink": with_sink(shared=4),
    "sink, one query, packed": with_sink(1, enable_gqa=True),
    "sink, causal": with_sink(20, 4, is_causal=True),
    "sink, grouped heads, causal": with_sink(20, enable_gqa=True, is_causal=True),
    "band": in_band(-9, 0, plain(1, 2, 50, 50, 16)),
    "band on both sides, long blocks": in_band(-5, 7, plain(1, 2, 39, 64, 16), AttentionConfig(16, 32, 4, 1)),
    "band, long rows, ahead": in_band(3, 9, plain(2, 1, 40, 45, 16), AttentionConfig(32, 16, 4, 1)),
    "band, rows without a key": in_band(-4, 0, plain(1, 2, 39, 20, 16)),
    "band, mask of keys": in_band(-1, 0, plain(2, 2, 18, 21, 16, mask=((2, 1, 1, 21), "bool"))),
    "band, added mask": in_band(-2, 5, plain(2, 2, 18, 21, 16, mask=((18, 21), FLOAT))),
    "band, open sizes": in_band(-4, 4, plain(BATCH, 2, LENGTH, LENGTH, 16), sizes={"s0": 2, "s1": 37}),
    "band, sink, packed": with_sink(3, enable_gqa=True, band=(-1, 5)),
    "band, sink, mask": with_sink(18, 4, band=(-6, 2)),
    "one query": Case(plain(2, 3, 1, 45, 16), attend, AttentionConfig(16, 32, 4, 1)),
    "one buffer": Case({"qkv": ((2, 19, 72),)}, packed_projection),
    "one buffer, causal": Case({"qkv": ((2, 19, 72),)}, lambda *given: packed_projection(*given, causal=True)),
    "computed operands": Case(plain(1, 2, 9, 21, 12, cos=((1, 1, 1, 12),)), rotated),
    "epilogue": Case(plain(1, 4, 18, 18, 8, residual=((1, 18, 32),)), with_residual),
    "three dimensions": Case({"q": ((4, 9, 16),), "k": ((4, 21, 16),), "v": ((4, 21, 16),)}, attend),
    "two dimensions": Case({"q": ((9, 16),), "k": ((21, 16),), "v": ((21, 16),)}, attend),
    "repeated batch": Case({"q": ((2, 2, 9, 16),), "k": ((1, 2, 21, 16),), "v": ((21, 16),)}, attend),
    "open sizes": Case(plain(BATCH, 2, LENGTH, LENGTH, 16), attend, sizes={"s0": 2, "s1": 21}),
    "open sizes, no rest": Case(plain(BATCH, 2, LENGTH, LENGTH, 16), attend, sizes={"s0": 1, "s1": 32}),
    "open sizes, causal": Case(plain(BATCH, 2, LENGTH, LENGTH, 16), options(is_causal=True), sizes={"s0": 2, "s1": 37}),
    "open sizes, no batch": Case(plain(BATCH, 2, LENGTH, LENGTH, 16), attend, sizes={"s0": 0, "s1": 21}),
    "open sizes, joined": Case(
        plain(BATCH, 2, LENGTH, LENGTH, 16),
        lambda emit, *qkv: joined(emit, attend(emit, *qkv), (BATCH, LENGTH, 32)),
        sizes={"s0": 2, "s1": 21},
    ),
    "no keys": Case(plain(1, 1, 4, Sym("s0", 0, 64), 16), attend, sizes={"s0": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    CASES[name].check("f16")


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", ["causal", "added mask", "mask of keys", "one buffer", "epilogue", "sink"])
def test_other_dtypes(name: str, dtype: str) -> None:
    CASES[name].check(dtype)


def test_keys_outside_of_a_band_are_not_read() -> None:
    case = CASES["band"]
    graph = case.graph("f32")
    q, k, v = case.tensors(graph)
    (expected,) = compile_graph(graph, CPU)([q, k, v], [])
    k[:, :, 32:], v[:, :, 32:], out = torch.nan, torch.nan, torch.full_like(q, torch.nan)
    run(attention_kernel(region(graph), "attention", SMALL), [q, k, v, out])
    torch.testing.assert_close(out[:, :, :32], expected[:, :, :32])
    assert bool(out[:, :, 32:].isnan().all())


@pytest.mark.quick
def test_rows_without_a_key_are_zero() -> None:
    case = masked((2, 2, 18, 21))
    graph = case.graph("f32")
    q, k, v, mask = case.tensors(graph)
    mask[0, 1, 3] = False
    out = torch.full((2, 2, 18, 16), torch.nan)
    run(attention_kernel(region(graph), "attention", SMALL), [q, k, v, mask, out])
    assert torch.equal(out[0, 1, 3], torch.zeros(16))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))


WRITTEN_OUT = """graph import {{
  input q: f32[2, 2, 18, 16]
  input k: f32[2, 2, 21, 16]
  input v: f32[2, 2, 21, 16]
  input m: {mask}
  y: f32[2, 2, 18, 16] = op torch_rtx.attention.default(query=q, key=k, value=v, attn_mask=m, scale=0.5{fill})
  return [y]
}}"""


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("queries", [1, 18])
@pytest.mark.parametrize("fill", [None, -1e4, -3.4028234663852886e38, 0.0, "added"])
def test_as_models_write_it_out(fill: float | str | None, queries: int) -> None:
    """Scores lie on both sides of the number that is filled in; and some queries see no key."""
    added = fill == "added"
    mask = torch.rand(2, 1, queries, 21) < 0.5
    mask[0], mask[1, :, :, :3] = False, True
    text = WRITTEN_OUT.format(
        mask=f"{'f32' if added else 'bool'}[2, 1, {queries}, 21]",
        fill=f", fill={fill}" if isinstance(fill, float) else "",
    )
    torch.manual_seed(0)
    q, k, v = (60 * torch.randn(2, 2, length, 16) for length in (18, 21, 21))
    q[:, :, ::2], k[:, :, ::2] = 10 * q[:, :, ::2].abs(), -10 * k[:, :, ::2].abs()
    number = fill if isinstance(fill, float) else -math.inf
    given = torch.where(mask, 0.0, -math.inf) if added else mask
    expected = (q @ k.mT * 0.5).masked_fill(~mask, number).softmax(-1) @ v
    assert expected[0].isnan().all() == (number == -math.inf)
    out = torch.full_like(q, 7.0)
    run(attention_kernel(region(parse(text)), "attention", SMALL), [q, k, v, given, out])
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(compile_graph(parse(text), CPU)([q, k, v, given], [])[0], expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("number", [0.0, 200.0, -torch.inf])
@pytest.mark.parametrize("more", ["", ", fill=-1e4", ", bias=b"])
def test_sinks_beside_queries_that_see_no_key(more: str, number: float) -> None:
    """They are 0 unless hidden keys count; a sink may outweigh all keys by more than float32 holds, or be none."""
    text = WRITTEN_OUT.format(mask="bool[2, 1, 18, 21]", fill=f"{more}, sink=s")
    text = text.replace("  y:", "  input b: f32[1, 2, 18, 21]\n  input s: f32[1, 2, 1, 1]\n  y:")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 16) for length in (18, 21, 21))
    mask, bias, sink = torch.rand(2, 1, 18, 21) < 0.5, torch.randn(1, 2, 18, 21), torch.tensor([0.5, number])
    mask[0, :, 3] = False
    sink = sink.view(1, 2, 1, 1)
    scores = q @ k.mT * 0.5 + (bias if "bias" in more else 0)
    scores = scores.masked_fill(~mask, -1e4 if "fill" in more else -torch.inf)
    expected = torch.cat([scores, sink.expand(2, 2, 18, 1)], -1).softmax(-1)[..., :-1] @ v
    out = torch.full_like(q, 7.0)
    run(attention_kernel(region(parse(text)), "attention", SMALL), [q, k, v, mask, bias, sink, out])
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(
        compile_graph(parse(text), CPU)([q, k, v, mask, bias, sink], [])[0], expected, equal_nan=True
    )


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("fill", [None, -1e4])
def test_a_bias_is_added_before_scores_are_hidden(fill: float | None) -> None:
    options = "" if fill is None else f", fill={fill}"
    text = WRITTEN_OUT.format(mask="bool[2, 1, 18, 21]\n  input b: f32[1, 2, 18, 21]", fill=f"{options}, bias=b")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 16) for length in (18, 21, 21))
    mask, bias = torch.rand(2, 1, 18, 21) < 0.5, 9 * torch.randn(1, 2, 18, 21)
    mask[0, :, 3], bias[0, 0, 0, 0] = False, -2e4  # a query without keys; a score below the number that is filled in
    scores = (q @ k.mT * 0.5 + bias).masked_fill(~mask, -math.inf if fill is None else fill)
    out, expected = torch.full_like(q, 7.0), scores.softmax(-1) @ v
    run(attention_kernel(region(parse(text)), "attention", SMALL), [q, k, v, mask, bias, out])
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(compile_graph(parse(text), CPU)([q, k, v, mask, bias], [])[0], expected, equal_nan=True)


def a_region(*shape: int, dtype: str = "f16", keys: int | None = None, **args: Attr) -> Region:
    b, h, q, d = shape
    return region(Case(plain(b, h, q, keys or q, d), options(**args)).graph(dtype))


@pytest.mark.parametrize("arch", ARCHES.values(), ids=ARCHES)
@pytest.mark.parametrize("width", [12, 40, 64, 72, 80, 96, 128, 160, 192, 256])
def test_configurations_fit_the_target(width: int, arch: Arch) -> None:
    configs = attention_configs(a_region(2, 12, 512, width), arch)
    assert len(set(configs)) == len(configs)
    for config in configs:
        columns = math.ceil(width / 16) * 16 if width > 64 else 64
        shared = 2 * config.num_stages * config.keys * 2 * min(columns, max(16, 1 << (width - 1).bit_length()))
        assert shared <= arch.shared


def unwritten(cubin: bytes, folder: Path) -> set[str]:
    """The uniform registers that instructions of a binary read and none writes."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = knobs.nvidia.nvdisasm.path
    text = subprocess.run([tool, path], capture_output=True, text=True, check=True).stdout
    read, written = set(), set()
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(.+?) ;", text):
        name, _, operands = line.partition(" ")
        first, *others = operands.split(", ")
        if target := re.fullmatch(r"UR(\d+)", first.strip()):
            number = int(target[1])
            written |= {f"UR{number + step}" for step in range(2 if ".64" in name else 1)}
        else:
            others.append(first)
        read |= set(re.findall(r"UR\d+", " ".join(others)))
    assert {"UR4"} <= read & written  # of any kernel
    return read - written


def test_values_narrower_than_keys_on_hopper(tmp_path: Path) -> None:
    """Where tiles follow each other at one address, ptxas 12.8 read a register there that nothing writes."""
    given = {"q": ((1, 8, 64, 64),), "k": ((1, 8, 64, 64),), "v": ((1, 8, 64, 32),)}
    kernel = attention_kernel(region(Case(given, attend).graph("f16")), "k", AttentionConfig(64, 64, 4, 1))
    (code,) = compile_kernels([(kernel, Target(90))])[kernel, Target(90)].codes
    assert unwritten(code.cubin, tmp_path) == set()


def test_few_rows_get_short_blocks() -> None:
    assert attention_configs(a_region(1, 8, 1, 64, keys=4096), arch_of(90))[0].rows == 16
    assert attention_configs(a_region(8, 12, 384, 64), arch_of(80))[0].rows == 128
    assert attention_configs(a_region(1, 12, 128, 64), arch_of(80))[0].rows < 64


def test_programs_share_a_multiprocessor_of_hopper() -> None:
    for queries, keys in ((384, 384), (512, 512), (1500, 1500)):
        config = attention_configs(a_region(1, 12, queries, 64, keys=keys), arch_of(90))[0]
        assert (config.rows, config.num_warps) == (64, 4)
        assert 3 * 2 * 64 * (config.rows + 2 * config.num_stages * config.keys) <= arch_of(90).shared


def test_wide_heads_have_whole_warpgroups_and_three_blocks_on_hopper() -> None:
    for width in (72, 80, 96, 128, 160, 192, 256):
        config = attention_configs(a_region(1, 24, 2048, width), arch_of(90))[0]
        assert config.rows >= 64
        assert config.num_stages == 3
    assert attention_configs(a_region(1, 2, 64, 160), arch_of(90))[0].rows == 16  # else there are two programs


def test_heads_of_40_are_multiplied_in_two_pieces_but_on_hopper() -> None:
    found = a_region(2, 8, 4096, 40)
    pieces = {
        sm: attention_kernel(found, "k", attention_configs(found, arch_of(sm))[0]).source.count("tl.dot(")
        for sm in (80, 89, 90, 120)
    }
    assert pieces[90] == 2
    assert pieces[80] == pieces[89] == pieces[120] == 4


def test_the_library_is_faster_at_long_rows_of_keys_on_hopper() -> None:
    def rival(length: int, sm: int = 90, **args: Attr) -> str:
        return library(Case(plain(1, 16, length, length, 64), options(**args)).graph("f16"), sm)

    assert rival(4096) == "faster"
    assert rival(1500) == rival(4096, is_causal=True) == rival(4096, sm=89) == "slower"


def test_heads_that_share_keys_are_packed() -> None:
    def packed(name: str) -> int:
        return attention_of(region(CASES[name].graph("f16"))).packed

    assert packed("grouped heads, packed") == packed("heads repeated by views, packed") == 3
    assert packed("one query") == packed("grouped heads") == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "args", "reason"),
    [
        ((1, 1, 4, 16), "f16", {"dropout_p": 0.5}, "dropout"),
        ((1, 1, 4, 300), "f16", {}, "300 elements"),
        ((1, 1, 4, 16), "f64", {}, "f64"),
    ],
)
def test_refused(shape: tuple[int, ...], dtype: str, args: dict[str, Attr], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        attention_configs(a_region(*shape, dtype=dtype, **args), arch_of(80))


def test_an_output_of_other_elements_is_refused() -> None:
    case = Case(plain(1, 2, 18, 18, 16), lambda emit, *qkv: emit("select.int", self=attend(emit, *qkv), dim=2, index=0))
    with pytest.raises(Unsupported, match="no permutation"):
        attention_kernel(region(case.graph("f16")), "attention", SMALL)


@pytest.mark.parametrize("name", ["one buffer, causal", "computed mask"])
def test_source(name: str) -> None:
    kernel = attention_kernel(region(CASES[name].graph("f16")), "attention", AttentionConfig(64, 32, 4, 2))
    assert kernel.source == (Path(__file__).with_name("sources") / f"attention, {name}.txt").read_text()
