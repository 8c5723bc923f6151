"""Fusion: random graphs compute the same with kernels, in Triton's interpreter, as call by call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import begin, run
from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import (
    Attr,
    Expr,
    Graph,
    Node,
    Sym,
    TensorType,
    Value,
    attr_map,
    contiguous,
    dim_expr,
    evaluate,
    verify,
)
from torch_rtx.irparse import parse
from torch_rtx.lowering import fusion
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.emit import MAX_VALUES
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.passes.fuse import fuse
from torch_rtx.lowering.passes.fuse_horizontally import fuse_horizontally
from torch_rtx.lowering.rewrite import Rewriter
from torch_rtx.targets import Target, arch_of

SHAPES = [(2, 3, 4), (3, 4), (4,), (2, 1, 4), (2, 3, 1), (6, 4), (1,)]
BATCH = Sym("s0", 2, 64)
SYMBOLIC = [(BATCH, 3, 4), (3, 4), (4,), (BATCH, 1, 4), (BATCH, 3, 1), (BATCH, 12), (1,)]
UNARY = ["relu", "neg", "exp", "sigmoid", "clone", "abs"]
TARGETS = (Target(80),)  # what kernels are formed for, and interpreted as
BINARY = ["add.Tensor", "mul.Tensor", "sub.Tensor", "maximum.default"]


class Drawn:
    """A graph of operations on what there already is, with types from the calls themselves."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.shapes = draw(st.sampled_from([SHAPES, SHAPES, SYMBOLIC]))
        shapes = draw(st.lists(st.sampled_from(self.shapes), min_size=1, max_size=3))
        dtypes = st.sampled_from(["f32", "f16"])
        types = [TensorType(draw(dtypes), shape, contiguous(shape)) for shape in shapes]
        self.inputs = tuple(Value(f"x{i}", type_) for i, type_ in enumerate(types))
        self.values = list(self.inputs)
        self.rewriter = Rewriter(Graph("import", self.inputs), Inference())

    def graph(self) -> Graph:
        for _ in range(self.draw(st.integers(1, 12))):
            try:
                self.step(self.draw(st.sampled_from(self.values)))
            except Unsupported:
                continue
        made = self.values[len(self.inputs) :]
        outputs = self.draw(st.lists(st.sampled_from(made), min_size=1, max_size=3)) if made else []
        return Graph("import", self.inputs, nodes=tuple(self.rewriter.nodes), outputs=tuple(dict.fromkeys(outputs)))

    def step(self, x: Value) -> None:
        draw, rank = self.draw, len(x.type.shape)
        kind = draw(st.integers(0, 10))
        if kind < 2:
            self.add(f"aten.{draw(st.sampled_from(UNARY))}.default", self=x)
        elif kind < 5:
            self.add(f"aten.{draw(st.sampled_from(BINARY))}", self=x, other=draw(st.sampled_from(self.values)))
        elif kind == 5 and rank:
            op = draw(st.sampled_from(["sum.dim_IntList", "mean.dim", "amax.default"]))
            self.add(f"aten.{op}", self=x, dim=(draw(st.integers(-rank, rank - 1)),), keepdim=draw(st.booleans()))
        elif kind == 6 and rank:
            op = draw(
                st.sampled_from(
                    ["softmax.int", "cumsum.default", "argmax.default", "layer_norm.default", "rms_norm.default"]
                )
            )
            if op == "argmax.default":  # of numbers that nobody has rounded: the nearest ones may change places
                given = self.draw(st.sampled_from(self.inputs))
                found = self.rewriter.emit("aten.argmax.default", None, self=given, dim=draw(st.integers(-1, 0)))
                self.add("aten._to_copy.default", self=found, dtype="f32")
            elif op in ("softmax.int", "cumsum.default"):
                self.add(f"aten.{op}", self=x, dim=draw(st.integers(-rank, rank - 1)))
            else:
                self.add(f"aten.{op}", input=x, normalized_shape=x.type.shape[-1:])
        elif kind == 7:
            self.add("aten.permute.default", self=x, dims=tuple(draw(st.permutations(range(rank)))))
        elif kind == 8:
            same = [shape for shape in self.shapes if dim_expr("*", 1, *shape) == dim_expr("*", 1, *x.type.shape)]
            self.add("aten.view.default", self=x, size=draw(st.sampled_from(same or [(-1,)])))
        elif kind == 9 and rank:
            self.move(x, rank)
        elif rank:
            self.accumulate(x, draw(st.integers(0, rank - 1)))

    def move(self, x: Value, rank: int) -> None:
        kind, axis = self.draw(st.integers(0, 5)), self.draw(st.integers(0, rank - 1))
        size = x.type.shape[axis]
        if kind == 0:
            first = self.draw(st.integers(0, size - 1 if isinstance(size, int) else 1))
            self.add("aten.slice.Tensor", self=x, dim=axis, start=first, end=2**63 - 1)
        elif kind == 4:
            self.add("aten.flip.default", self=x, dims=(axis,))
        elif kind == 5:  # a roll
            first = dim_expr("%", dim_expr("+", size, self.draw(st.sampled_from([1, -1, -5]))), size)
            index = self.rewriter.emit("aten.arange.default", None, end=size, device="main")
            index = self.rewriter.emit("aten.add.Tensor", None, self=index, other=first)
            index = self.rewriter.emit("aten.fmod.Scalar", None, self=index, other=size)
            self.add("aten.index_select.default", self=x, dim=axis, index=index)
        elif kind == 1:
            self.add("aten.cat.default", tensors=(x, self.draw(st.sampled_from(self.values))), dim=axis)
        elif kind == 2:
            self.add("aten.unsqueeze.default", self=x, dim=axis)
        else:
            self.add("aten._to_copy.default", self=x, dtype=self.draw(st.sampled_from(["f32", "f16"])))

    def accumulate(self, x: Value, axis: int) -> None:
        """Adds slices of a tensor to some of another one of its type."""
        size = x.type.shape[axis] if isinstance(x.type.shape[axis], int) else 2
        index = self.rewriter.emit("aten.arange.default", None, end=x.type.shape[axis], device="main")
        index = self.rewriter.emit("aten.mul.Scalar", None, self=index, other=self.draw(st.integers(0, 3)))
        index = self.rewriter.emit("aten.remainder.Scalar", None, self=index, other=size)
        source = self.rewriter.emit("aten.sigmoid.default", None, self=x)
        like = [y for y in self.values if (y.type.shape, y.type.dtype) == (x.type.shape, x.type.dtype)]
        source = self.draw(st.sampled_from([source, *like]))
        start = self.draw(st.sampled_from([self.rewriter.emit("aten.zeros_like.default", None, self=x), x]))
        self.add("aten.index_add.default", self=start, dim=axis, index=index, source=source)

    def add(self, op: str, /, **args: Attr) -> None:
        self.values.append(self.rewriter.emit(op, **args))


def numbers(dims, sizes):
    """Dims as numbers."""
    return tuple(evaluate(dim, sizes) for dim in dims)


def call(node, values, sizes):
    """One ATen call."""
    op = aten.overload(node.op)
    schema = aten.schema(op)

    def concrete(attr):
        if isinstance(attr, Value):
            return values[attr.name]
        if isinstance(attr, Sym | Expr):
            return evaluate(attr, sizes)
        return [concrete(item) for item in attr] if isinstance(attr, tuple) else attr

    given = {key: aten.to_torch(schema[key][0], concrete(attr), torch.device("cpu")) for key, attr in node.args}
    found = op(**given)
    return found if isinstance(found, tuple | list) else [found]


def execute(graph: Graph, inputs, sizes, wide: bool = False):
    """The outputs of a graph; kernels run in the interpreter. `wide`: in float64."""
    values = dict(zip([value.name for value in graph.inputs], inputs, strict=True))
    arch = arch_of(80)
    if wide:  # parts of float32 are no parts of float64
        arch = replace(arch, features=arch.features - {"tf32"})
    for node in graph.nodes:
        if node.kind == "kernel":
            kernel = generate(node.body, node.op, arch, 0)
            types = [
                (numbers(v.type.shape, sizes), numbers(v.type.strides, sizes), aten.DTYPES[v.type.dtype])
                for v in node.outputs
            ]
            results = [
                torch.empty_strided(shape, strides, dtype=dtype).fill_(math.nan if dtype.is_floating_point else 1)
                for shape, strides, dtype in types
            ]
            given = [values[value.name] for value in node.inputs]
            begin(node.body, given, results)
            run(kernel, [*given, *results], sizes)
            results = [x.double() if wide and x.is_floating_point() else x for x in results]
        else:
            node = widened(node) if wide else node
            results = call(node, values, sizes)
        for value, result in zip(node.outputs, results, strict=True):
            assert (
                wide or result.stride() == numbers(value.type.strides, sizes) or 1 in result.shape or 0 in result.shape
            )
            values[value.name] = result
    return [attr_map(value, lambda v: values[v.name]) for value in graph.outputs]


def widened(node):
    args = tuple((key, "f64" if key == "dtype" else attr) for key, attr in node.args)
    return type(node)(node.kind, node.op, args, node.outputs)


@st.composite
def programs(draw: st.DrawFn) -> Graph:
    return dce(Drawn(draw).graph(), Inference())


@given(programs(), st.integers(0, 100))
def test_fused_is_unfused(graph: Graph, seed: int) -> None:
    verify(graph, aten.ALLOWED)
    fused = fuse_horizontally(fuse(graph, Inference(), TARGETS), Inference(), TARGETS)
    verify(fused, aten.ALLOWED)
    torch.manual_seed(seed)
    sizes = dict.fromkeys(graph.syms, 2 + seed % 5)
    inputs = [torch.randn(numbers(x.type.shape, sizes)).to(aten.DTYPES[x.type.dtype]) for x in graph.inputs]
    exact = execute(graph, [x.double() for x in inputs], sizes, wide=True)
    assert_right(execute(fused, inputs, sizes), execute(graph, inputs, sizes), exact)


@pytest.mark.parametrize("count", [4, 1000])
def test_groups_that_would_depend_on_each_other(count: int) -> None:
    """Two loops that read the same input, of which one needs the other by a way through a unit of scattered nodes."""
    shapes = {"y": (count, 16), "x": (count, 8), "a": (16, 8), "b": (8, 16)}
    y, x, a, b = (Value(name, TensorType("f32", shape, contiguous(shape))) for name, shape in shapes.items())
    rewriter = Rewriter(Graph("import", (y, x, a, b)), Inference())

    def emit(name: str, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{name}", None, **args)

    wide, narrow = emit("cos.default", self=y), emit("sin.default", self=x)
    first = emit("mm.default", self=wide, mat2=a)
    last = emit("mul.Tensor", self=first, other=x)
    second = emit("mm.default", self=narrow, mat2=b)
    results = emit("add.Tensor", self=second, other=y), last
    graph = Graph("import", (y, x, a, b), nodes=tuple(rewriter.nodes), outputs=(*results, first, second))
    fused = fuse(graph, Inference(), TARGETS)
    verify(fused, aten.ALLOWED)
    assert {node.kind for node in fused.nodes} == {"kernel"}


@pytest.mark.quick
def test_a_sum_over_several_dims_is_a_kernel() -> None:
    """The row of such a sum is a place in a shape of symbols alone."""
    length = Sym("s1", 2, 64)
    x = Value("x", TensorType("f32", (BATCH, length, 12), contiguous((BATCH, length, 12))))
    rewriter = Rewriter(Graph("import", (x,)), Inference())
    total = rewriter.emit("aten.sum.dim_IntList", None, self=x, dim=(0, 1))
    (node,) = fuse(Graph("import", (x,), nodes=tuple(rewriter.nodes), outputs=(total,)), Inference(), TARGETS).nodes
    assert node.kind == "kernel"
    assert generate(node.body, node.op, arch_of(80), 0) is not None


def test_a_loop_without_code_is_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Value("x", TensorType("f32", (6, 4), contiguous((6, 4))))
    rewriter = Rewriter(Graph("import", (x,)), Inference())
    total = rewriter.emit("aten.sum.dim_IntList", None, self=x, dim=(0,))
    graph = Graph("import", (x,), nodes=tuple(rewriter.nodes), outputs=(total,))

    monkeypatch.setattr(fusion, "_loop_us", lambda body, arches: math.inf)
    assert fuse(graph, Inference(), TARGETS).nodes == graph.nodes


def test_results_that_nobody_reads_have_no_names_in_a_body() -> None:
    x = Value("x", TensorType("f32", (6, 4), contiguous((6, 4))))
    extreme, place = Value("m", TensorType("f32", (6,), (1,))), Value("p", TensorType("i64", (6,), (1,)))
    shifted = Value("s", TensorType("i64", (6,), (1,)))
    nodes = (
        Node("op", "aten.max.dim", (("self", x), ("dim", 1)), (None, place)),
        Node("op", "aten.add.Scalar", (("self", place), ("other", 1)), (shifted,)),
        Node("op", "aten.amax.default", (("self", x), ("dim", (1,))), (extreme,)),
    )
    fused = fuse(Graph("import", (x,), nodes=nodes, outputs=(shifted, extreme)), Inference(), TARGETS)
    verify(fused, aten.ALLOWED)
    assert [node.kind for node in fused.nodes] == ["kernel"]


IMAGE = TensorType("f32", (1, 2, 64, 64), contiguous((1, 2, 64, 64)))
END = 2**63 - 1


def shifted(emit: Rewriter, x: Value, *ranges: tuple[int, int]) -> tuple[Value, ...]:
    """Ranges of the columns of `x`."""
    cut = (emit.emit("aten.slice.Tensor", None, self=x, dim=-1, start=start, end=end) for start, end in ranges)
    return tuple(cut)


def pieces(emit: Rewriter, x: Value) -> Value:
    """A sum with its columns in another order, 4 at a time."""
    parts = shifted(emit, x, *((at, at + 4) for at in range(60, -1, -4)))
    return emit.emit("aten.add.Tensor", None, self=x, other=emit.emit("aten.cat.default", None, tensors=parts, dim=-1))


def written(emit: Rewriter, x: Value) -> Value:
    """A sum with a copy that is changed in places."""
    (part,) = shifted(emit, x, (0, 8))
    changed = emit.emit("aten.slice_scatter.default", None, self=x, src=part, dim=-1, start=4, end=12)
    return emit.emit("aten.add.Tensor", None, self=changed, other=x)


def with_itself(op: str) -> Callable[[Rewriter, Value], Value]:
    """A product with itself after `op`."""
    return lambda emit, x: emit.emit("aten.mul.Tensor", None, self=x, other=emit.emit(f"aten.{op}", None, self=x))


DEEP: dict[str, Callable[[Rewriter, Value], Value]] = {
    "max_pool2d": lambda emit, x: emit.emit(
        "aten.max_pool2d.default", None, self=x, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2)
    ),
    "avg_pool2d": lambda emit, x: emit.emit(
        "aten.avg_pool2d.default", None, self=x, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)
    ),
    "stencil": lambda emit, x: emit.emit(
        "aten.add.Tensor", None, self=(p := shifted(emit, x, (0, -1), (1, END)))[0], other=p[1]
    ),
    "turned by one": lambda emit, x: emit.emit(
        "aten.mul.Tensor",
        None,
        self=x,
        other=emit.emit("aten.cat.default", None, tensors=shifted(emit, x, (1, END), (0, 1)), dim=-1),
    ),
    "pieces": pieces,
    "written": written,
    "read twice": with_itself("sigmoid.default"),
    "read twice, in steps": with_itself("mish.default"),
    "gelu": lambda emit, x: emit.emit("aten.gelu.default", None, self=x),
    "softmax": lambda emit, x: emit.emit("aten.softmax.int", None, self=x, dim=-1),
}


SHALLOW = ("read twice", "read twice, in steps", "gelu", "softmax")  # by one operation more the work grows by one


@pytest.mark.parametrize("kind", DEEP)
def test_chains_have_kernels_of_bounded_size(kind: str) -> None:
    """Operations of a kind, one after the other, that read their operand once, twice or often: what a kernel computes
    again at each position must not grow with their number."""
    x = Value("x", IMAGE)
    rewriter, value, count = Rewriter(Graph("import", (x,)), Inference()), x, 30 if kind in SHALLOW else 7
    for _ in range(count):
        value = DEEP[kind](rewriter, value)
    graph = Graph("import", (x,), nodes=tuple(rewriter.nodes), outputs=(value,))
    start = time.process_time()
    fused = fuse(graph, Inference(), TARGETS)
    kernels = [generate(node.body, node.op, arch_of(80), 0) for node in fused.nodes if node.body is not None]
    assert time.process_time() - start < 10
    assert max(kernel.source.count("\n") for kernel in kernels if kernel is not None) < MAX_VALUES
    if kind in SHALLOW:
        assert len(kernels) <= 2, "nothing is computed twice there"
    if kind == "max_pool2d":
        assert len(kernels) == count, "each would be computed 25 times"


def test_what_may_share_memory_alone_is_no_kernel() -> None:
    """Results would not share it any more; what moves elements alone, without sharing, is one."""
    text = "input x: f32[6, 3]\ny: f32[6, 3] = op aten.CALL\nreturn [y]"
    calls = {"_unsafe_view.default(self=x, size=[-1, 3])": "op", "flip.default(self=x, dims=[0])": "kernel"}
    for call, kind in calls.items():
        assert [node.kind for node in fused(text.replace("CALL", call)).nodes] == [kind], call


def test_kernels_that_read_inputs_alone_come_just_before_their_readers() -> None:
    """Casts of parameters, for one: the model has them first, and until the products are made they only take memory."""
    graph = parse("""graph import {
        input x: f16[256, 256]
        input w: f32[256, 256]
        input u: f32[256, 256]
        a: f16[256, 256] = op aten._to_copy.default(self=w, dtype='f16')
        b: f16[256, 256] = op aten._to_copy.default(self=u, dtype='f16')
        c: f16[256, 256] = op aten.mm.default(self=x, mat2=b)
        d: f16[256, 256] = op aten.mm.default(self=c, mat2=a)
        return [d]
    }""")
    names = [node.outputs[0].name for node in fuse(graph, Inference(), TARGETS).nodes if node.outputs[0] is not None]
    assert names == ["b", "c", "a", "d"]


def fused(text: str) -> Graph:
    """What becomes of a graph of calls."""
    lines = "\n".join(map(str.strip, text.strip().splitlines()))
    return fuse(parse(f"graph import {{\n{lines}\n}}"), Inference(), TARGETS)


@pytest.mark.parametrize(("rows", "kernels"), [(16, 1), (4096, 2)])
def test_independent_loops_fuse_where_they_are_short(rows: int, kernels: int) -> None:
    """Both read `b`, and one launch less is nothing for long loops, whose operands would be in memory together."""
    graph = fused(f"""
        input x: f16[{rows}, 4096]
        input y: f16[{rows}, 4096]
        input b: f16[4096]
        c: f16[{rows}, 4096] = op aten.add.Tensor(self=x, other=b)
        d: f16[{rows}, 4096] = op aten.sub.Tensor(self=y, other=b)
        return [c, d]""")
    assert sum(node.kind == "kernel" for node in graph.nodes) == kernels


@pytest.mark.parametrize(("size", "kernels"), [("()", 1), ("64", 2)])
def test_the_counters_of_many_layers_are_one_kernel(size: str, kernels: int) -> None:
    """Of one element each; loops over more would need registers for all of them."""
    inputs = "\n".join(f"input c{at}: i64[{size}]" for at in range(16))
    calls = "\n".join(f"n{at}: i64[{size}] = op aten.add.Tensor(self=c{at}, other=1)" for at in range(16))
    graph = fused(f"{inputs}\n{calls}\nreturn [{', '.join(f'n{at}' for at in range(16))}]")
    assert sum(node.kind == "kernel" for node in graph.nodes) == kernels


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize(("operand", "kernels"), [("x", 1), ("y", 2)])
def test_independent_loops_over_elements_and_rows_fuse_where_they_read_the_same(
    operand: str, kernels: int, rows_first: bool
) -> None:
    """An activation that the backward computes again, and its gradient with the sum of that."""
    elements = f"a: f16[4096, 4096] = op aten.gelu.default(self={operand})"
    rows = """b: f16[4096, 4096] = op aten.gelu_backward.default(grad_output=g, self=x)
        c: f16[4096] = op aten.sum.dim_IntList(self=b, dim=[0])"""
    loops = "\n".join([rows, elements] if rows_first else [elements, rows])
    graph = fused(f"""
        input x: f16[4096, 4096]
        input y: f16[4096, 4096]
        input g: f16[4096, 4096]
        {loops}
        return [a, b, c]""")
    assert sum(node.kind == "kernel" for node in graph.nodes) == kernels


def test_a_loop_over_two_products_belongs_to_the_last() -> None:
    graph = fused("""
        input x: f16[64, 64]
        input w: f16[64, 64]
        a: f16[64, 64] = op aten.mm.default(self=x, mat2=w)
        b: f16[64, 64] = op aten.relu.default(self=x)
        c: f16[64, 64] = op aten.mm.default(self=b, mat2=w)
        d: f16[64, 64] = op aten.add.Tensor(self=a, other=c)
        return [d]""")
    *_, last = graph.nodes
    assert last.op.startswith("mm_add_")
    assert "b" in {value.name for value in last.inputs}


def test_an_anchor_with_several_results_has_no_epilogue() -> None:
    given = "query=x, key=x, value=x, library='flash'"
    graph = fused(f"""
        input x: f16[2, 4, 64, 32]
        y: f16[2, 4, 64, 32], s: f32[2, 4, 64] = op torch_rtx.attention_forward.default({given})
        a: f16[2, 4, 64, 32] = op aten.relu.default(self=y)
        b: f16[2, 4, 64, 32] = op aten.neg.default(self=a)
        return [b]""")
    assert [node.kind for node in graph.nodes] == ["kernel", "kernel"]


def test_products_read_halves_that_are_cast_to_float32() -> None:
    """As halves, also where a loop computes them; unless something else reads the wide ones."""
    text = """
        input x: f16[64, 64]
        input y: f16[64, 64]
        a: f16[64, 64] = op aten.exp.default(self=x)
        b: f32[64, 64] = op aten._to_copy.default(self=a, dtype='f32')
        c: f32[64, 64] = op aten._to_copy.default(self=y, dtype='f32')
        d: f32[64, 64](1, 64) = op aten.t.default(self=c)
        e: f32[64, 64] = op aten.mm.default(self=b, mat2=d)
        return [e]"""
    assert [node.results[0].type.dtype for node in fused(text).nodes] == ["f16", "f32"]
    both = fused(text.replace("return [e]", "return [b, e]"))
    assert [str(value.type) for value in both.nodes[-1].inputs] == ["f32[64, 64]", "f16[64, 64]"]


@pytest.mark.parametrize(("width", "outside"), [(1024, True), (1023, False)])
def test_ranges_of_rows_are_outside_of_kernels(width: int, outside: bool) -> None:
    """So these are equal, where the addresses are multiples of what kernels expect."""
    graph = fused(f"""
        input x: f16[10, {width}]
        a: f16[5, {width}] = op aten.slice.Tensor(self=x, start=0, end=5)
        b: f16[5, {width}] = op aten.slice.Tensor(self=x, start=5, end=10)
        c: f16[5, {width}] = op aten.exp.default(self=a)
        d: f16[5, {width}], i: i64[5, {width}] = op aten.sort.default(self=c)
        e: f16[5, {width}] = op aten.exp.default(self=b)
        return [d, e]""")
    assert any(node.op == "aten.slice.Tensor" for node in graph.nodes) == outside
    names = [node.op for node in graph.nodes if node.kind == "kernel"]
    assert not outside or (len(names), len(set(names))) == (2, 1)


RANDOM = """\
graph import {
  input x: f32[8]
  a: f32[8] = op aten.sigmoid.default(self=x)
  b: f32[8] = op aten.bernoulli.default(self=a)
  c: f32[8] = op aten.rand_like.default(self=x)
  d: f32[8] = op aten.log.default(self=c)
  e: f32[8] = op aten.add.Tensor(self=a, other=d)
  return [b, e]
}
"""


def test_random_numbers_are_drawn_in_their_order() -> None:
    """The loops before and after the first draw would be one kernel, which waits for the second."""
    graph = fuse(parse(RANDOM), Inference(), TARGETS)
    assert [node.op.split(".")[1] for node in graph.nodes if node.kind == "op"] == ["bernoulli", "rand_like"]
    assert len([node for node in graph.nodes if node.kind == "kernel"]) == 2


def test_loops_do_not_fuse_if_one_had_to_wait_out_of_turn() -> None:
    """Two layers of a checkpoint, of which each is computed again from what it got: both rotate by the same angles."""
    tensor = TensorType("f16", (256, 256), contiguous((256, 256)))
    inputs = x, y, w, angles = tuple(Value(name, tensor) for name in ("x", "y", "w", "angles"))
    rewriter = Rewriter(Graph("import", inputs), Inference())

    def layer(value: Value) -> Value:
        value = rewriter.emit("aten.mm.default", None, self=value, mat2=w)
        value = rewriter.emit("aten.mul.Tensor", None, self=value, other=angles)
        value = rewriter.emit("aten.cumprod.default", None, self=value, dim=0)
        for _ in range(fusion.NEAR_NODES):
            value = rewriter.emit("aten.mm.default", None, self=value, mat2=w)
        return value

    results = layer(x), layer(y)
    nodes = fuse(Graph("import", inputs, nodes=tuple(rewriter.nodes), outputs=results), Inference(), TARGETS).nodes
    order = [value for node in nodes for value in node.outputs]
    assert order.index(results[0]) == len(nodes) // 2 - 1


@pytest.mark.parametrize("width", [50, 9001])
def test_a_padding_is_part_of_what_it_pads(width: int) -> None:
    """Of element-wise operations, and of long rows, which are read in steps."""
    reduced = "exp.default(self=x)" if width == 50 else "softmax.int(self=x, dim=1)"
    graph = fused(f"""
        input x: f16[700, {width}]
        a: f16[700, {width}] = op aten.{reduced}
        b: f16[700, {width}] = op aten.sigmoid.default(self=a)
        c: f16[700, {width}] = op aten.mul.Tensor(self=b, other=a)
        d: f16[700, {width}] = op aten.tanh.default(self=c)
        e: f16[700, {width}] = op aten.add.Tensor(self=d, other=a)
        p: f16[700, {width + 6}] = op aten.constant_pad_nd.default(self=e, pad=[0, 6])
        return [p]""")
    assert [node.kind for node in graph.nodes] == ["kernel"]


@pytest.mark.parametrize("joined", [False, True])
def test_a_norm_and_a_concatenation_are_part_of_a_rotation(joined: bool) -> None:
    """The halves that a rotation computes have other sizes than what they are taken from; its result has the same."""
    before = {
        False: "t: f16[64, 512, 128] = op aten.rms_norm.default(input=x, normalized_shape=[128], eps=1e-6)",
        True: "t: f16[64, 512, 128] = op aten.cat.default(tensors=[y, z], dim=1)",
    }
    graph = fused(f"""
      input x: f16[64, 512, 128]
      input y: f16[64, 100, 128]
      input z: f16[64, 412, 128]
      input cos: f32[512, 64]
      input sin: f32[512, 64]
      {before[joined]}
      v: f32[64, 512, 128] = op aten._to_copy.default(self=t, dtype='f32')
      p: f32[64, 512, 64, 2] = op aten.view.default(self=v, size=[64, 512, 64, 2])
      e: f32[64, 512, 64](65536, 128, 2) = op aten.select.int(self=p, dim=-1, index=0)
      o: f32[64, 512, 64](65536, 128, 2) = op aten.select.int(self=p, dim=-1, index=1)
      a: f32[64, 512, 64] = op aten.mul.Tensor(self=e, other=cos)
      b: f32[64, 512, 64] = op aten.mul.Tensor(self=o, other=sin)
      c: f32[64, 512, 64] = op aten.mul.Tensor(self=e, other=sin)
      d: f32[64, 512, 64] = op aten.mul.Tensor(self=o, other=cos)
      f: f32[64, 512, 64] = op aten.sub.Tensor(self=a, other=b)
      g: f32[64, 512, 64] = op aten.add.Tensor(self=c, other=d)
      s: f32[64, 512, 64, 2] = op aten.stack.default(tensors=[f, g], dim=-1)
      w: f32[64, 512, 128] = op aten.view.default(self=s, size=[64, 512, 128])
      r: f16[64, 512, 128] = op aten._to_copy.default(self=w, dtype='f16')
      return [r]""")
    assert [node.kind for node in graph.nodes] == ["kernel"]
