"""Passes: text in, text out, equal numbers before and after.

Each file passes/PASS.txt holds graphs and what PASS makes of them. In these texts `param w: TYPE` is short for a
parameter and the weight that is that parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import torch_rtx
from torch_rtx import aten, foreign
from torch_rtx.errors import LoweringError, Unsupported
from torch_rtx.ir import (
    COPY,
    Graph,
    Node,
    Parameter,
    Sym,
    TensorType,
    Value,
    Weight,
    contiguous,
    dim_expr,
    verify,
)
from torch_rtx.irparse import parse
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes import hoist_weights
from torch_rtx.lowering.pipeline import PASSES, Context, Pass, lower
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import PORTABLE

CPU = torch.device("cpu")


class Doubled:
    """The kernel that texts launch: writes twice its first operand to the second."""

    key, loc = "doubled_0123456789abcdef", None

    def run(self, tensors: Any, sizes: Any) -> None:
        tensors[1].copy_(2 * tensors[0])

    def offers(self, body: Graph, arch: Any) -> list[Any]:
        return []


foreign.register(Doubled())


def cases() -> list[Any]:
    found = []
    for file in sorted(Path(__file__).with_name("passes").glob("*.txt")):
        for block in file.read_text().split("=== ")[1:]:
            name, _, text = block.partition("\n")
            before, _, after = text.partition("--- becomes\n")
            found.append(pytest.param(file.stem, before, after, id=f"{file.stem}: {name}"))
    return found


def graph(text: str, level: str = "import") -> Graph:
    """The graph of a text without its first and last line; `param` lines are written out."""
    lines = [line for line in text.splitlines() if line]
    owned = [line.removeprefix("param ").split(": ") for line in lines if line.startswith("param ")]
    inputs = [line for line in lines if line.startswith(("input ", "dim "))]
    rest = [line for line in lines if line not in inputs and not line.startswith("param ")]
    parameters = [f"parameter '{name}': {type_}" for name, type_ in owned]
    weights = [f"weight {name}: {type_} = '{name}'" for name, type_ in owned]
    return parse("\n".join([f"graph {level} {{", *inputs, *parameters, *weights, *rest, "}"]))


def random(type_: Any, sizes: dict[str, int]) -> torch.Tensor:
    """A tensor of the type: floats between 0.1 and 1.1, as variances must be positive."""
    shape, strides = ([evaluated(dim, sizes) for dim in dims] for dims in (type_.shape, type_.strides))
    dtype = aten.DTYPES[type_.dtype]
    values = torch.rand(shape) + 0.1 if dtype.is_floating_point else torch.randint(0, 5, shape)
    return torch.empty_strided(shape, strides, dtype=dtype).copy_(values)


@contextmanager
def alone() -> Iterator[None]:
    """This process is the only rank of a process group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def evaluated(dim: Any, sizes: dict[str, int]) -> int:
    return dim if isinstance(dim, int) else int(eval(str(dim), {}, sizes))


def numbers(program: Graph, sizes: dict[str, int] | None = None) -> tuple[list[Any], list[torch.Tensor]]:
    """What `program` returns for random inputs and parameters, and what these hold afterwards."""
    torch.manual_seed(0)
    inputs = [random(value.type, sizes or {}) for value in program.inputs]
    tensors = {}
    for parameter in program.parameters:
        torch.manual_seed(sum(map(ord, parameter.name)))  # not by position: a pass may drop parameters
        tensors[parameter.name] = random(parameter.type, {})
    store = WeightStore(program, CPU, {})
    store.attach(tensors)
    torch.manual_seed(1)
    outputs = compile_graph(program, CPU)(inputs, store.values)
    written = {w.names[0] for w in program.weights if w.value.name in program.written}
    return outputs, [*inputs, *(tensor for name, tensor in sorted(tensors.items()) if name in written)]


def assert_same_numbers(before: Graph, after: Graph, sizes: dict[str, int] | None = None) -> None:
    (expected, expected_inputs), (outputs, inputs) = numbers(before, sizes), numbers(after, sizes)
    for wanted, given_ in zip([*expected, *expected_inputs], [*outputs, *inputs], strict=True):
        torch.testing.assert_close(given_, wanted, equal_nan=True)
        assert given_.stride() == wanted.stride()
    assert shared_memory([*inputs, *outputs]) == shared_memory([*expected_inputs, *expected])


def shared_memory(tensors: list[Any]) -> list[int]:
    """By tensor, the first one that lies in the same memory."""
    addresses = [tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor) for tensor in tensors]
    return [addresses.index(address) for address in addresses]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "before", "after"), cases())
def test_text(name, before, after, monkeypatch):
    monkeypatch.setattr(hoist_weights, "GROWTH_BYTES", 64)
    program = graph(before)
    verify(program, aten.ALLOWED)
    result = PASSES[name](program, Inference(), Context(CompilationSettings(), PORTABLE))
    expected = program if after.strip() == "the same" else graph(after, result.level)
    assert str(result) == str(expected)
    with alone() if "group_name" in before else nullcontext():
        assert_same_numbers(program, result, {"s0": 3, "s1": 5})


def test_sums_in_float32_do_not_become_products_in_tf32() -> None:
    texts = next(case.values for case in cases() if case.values[0] == "raise_products")
    program, context = graph(texts[1]), Context(CompilationSettings(float32_precision="high"), PORTABLE)
    assert PASSES["raise_products"](program, Inference(), context) is program


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("fill", ["-10000.0", "-65504.0", "-inf"])
def test_raised_attention_hides_what_the_model_hides(fill, dtype):
    """Scores of visible keys below the number that is filled in, and a query that sees no key."""
    program = graph(f"""
        input q: {dtype}[1, 9, 16]
        input k: {dtype}[1, 16, 9]
        input v: {dtype}[1, 9, 16]
        input z: bool[9, 9]
        a: {dtype}[1, 9, 9] = op aten.matmul.default(self=q, other=k)
        b: {dtype}[1, 9, 9] = op aten.masked_fill.Scalar(self=a, mask=z, value={fill})
        c: {dtype}[1, 9, 9] = op aten.softmax.int(self=b, dim=-1)
        d: {dtype}[1, 9, 16] = op aten.matmul.default(self=c, other=v)
        return [d]""")
    raised = PASSES["raise_attention"](program, Inference(), Context(CompilationSettings(), PORTABLE))
    raised = PASSES["dce"](raised, Inference(), Context(CompilationSettings(), PORTABLE))
    assert [node.op for node in raised.nodes][-1] == "torch_rtx.attention.default"
    torch.manual_seed(0)
    held = aten.DTYPES[dtype]
    q, k, v = (x.abs().to(held) for x in torch.randn(3, 1, 9, 16))
    hidden = torch.arange(9).expand(9, 9) >= torch.tensor(6)
    hidden = hidden.clone()
    hidden[2] = True
    for scale in (1, 30 if dtype == "f16" else 100):
        given_ = [scale * q, -scale * k.mT, v, hidden]
        (wanted,), (found,) = (compile_graph(one, CPU)(given_, []) for one in (program, raised))
        torch.testing.assert_close(found, wanted, equal_nan=True, atol=2e-3, rtol=2e-3)
        assert wanted[0, 2].isnan().all() == (fill == "-inf")


def test_softmax_of_halves_with_a_float_result_names_the_dtype():
    """The form that CUDA has of it can't run on a CPU, nor in float64."""
    program = graph("""
        input x: f16[2, 3]
        a: f32[2, 3] = op aten._softmax.default(self=x, dim=1, half_to_float=True)
        b: f32[2, 3] = op aten._log_softmax.default(self=x, dim=1, half_to_float=True)
        c: f32[2, 3] = op aten._softmax.default(self=b, dim=1, half_to_float=False)
        return [a, b, c]""")
    result = PASSES["simplify"](program, Inference(), Context(CompilationSettings(), PORTABLE))
    assert [node.op for node in result.nodes] == ["aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default"]
    x = torch.randn(2, 3).half()
    softmax, logarithm, again = compile_graph(result, CPU)([x], [])
    assert torch.equal(softmax, x.softmax(1, torch.float32))
    assert torch.equal(logarithm, x.log_softmax(1, torch.float32))
    assert torch.equal(again, logarithm.softmax(1))


def test_every_pass_has_texts():
    assert {case.values[0] for case in cases()} == PASSES.keys()


# ---- drawn graphs ----

BATCH = Sym("s0", 2, 64)
UNARY = [f"aten.{name}.default" for name in ("relu", "neg", "tanh", "sigmoid", "abs", "clone", "alias")]
BINARY = [f"aten.{name}" for name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "maximum.default")]
REDUCTIONS = ["aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default"]
PARAMETERS = {"w": (4, 3), "v": (2, 3), "bias_w": (4,), "bias_v": (2,), "u": (3,)}


def base(batch: Any) -> Graph:
    """Inputs and parameters, nothing else."""
    shapes = {"x": (batch, 3), "y": (batch, 2, 3), "z": (3, 3)}
    inputs = tuple(Value(name, TensorType("f32", shape, contiguous(shape))) for name, shape in shapes.items())
    types = {name: TensorType("f32", shape, contiguous(shape)) for name, shape in PARAMETERS.items()}
    parameters = tuple(Parameter(name, type_) for name, type_ in types.items())
    weights = tuple(Weight(Value(name, type_), (name,)) for name, type_ in types.items())
    return Graph("import", inputs, parameters, weights)


def arguments(draw: Any, kind: str, value: Value, pool: list[Value]) -> tuple[str, dict[str, Any]]:
    """An op of the kind and its arguments, which need not fit `value`."""
    dim = st.integers(-2, 2)
    pick = st.sampled_from
    if kind == "unary":
        return draw(pick(UNARY)), {"self": value}
    if kind == "binary":
        return draw(pick(BINARY)), {"self": value, "other": draw(pick(pool))}
    if kind == "scalar":
        op = draw(pick(["aten.add.Scalar", "aten.mul.Scalar"]))
        return op, {"self": value, "other": draw(pick([0, 1, True, 1.0, -0.0, 0.5]))}
    if kind == "cast":
        return "aten._to_copy.default", {"self": value, "dtype": draw(pick(["f32", "f64"]))}
    if kind == "linear" and value.type.dtype == "f32":  # fake tensors let other dtypes pass
        name = draw(pick(["w", "v"]))
        named = {weight.name: weight for weight in pool[:8]}
        bias = {"bias": named[f"bias_{name}"]} if draw(st.booleans()) else {}
        return "aten.linear.default", {"input": value, "weight": named[name], **bias}
    if kind == "reduction":
        keep = {"keepdim": True} if draw(st.booleans()) else {}
        return draw(pick(REDUCTIONS)), {"self": value, "dim": (draw(dim),), **keep}
    rank = len(value.type.shape)
    views: list[tuple[str, dict[str, Any]]] = [
        ("aten.view.default", {"size": draw(pick([(-1,), (-1, 3), (3, -1), (1, -1), (-1, 2, 3), value.type.shape]))}),
        ("aten.permute.default", {"dims": tuple(draw(st.permutations(range(rank))))}),
        ("aten.transpose.int", {"dim0": draw(dim), "dim1": draw(dim)}),
        ("aten.slice.Tensor", {"dim": draw(dim), "start": draw(pick([0, 1, -1])), "end": draw(pick([2, 2**63 - 1]))}),
        ("aten.unsqueeze.default", {"dim": draw(dim)}),
        ("aten.expand.default", {"size": (draw(pick([1, 2])), *value.type.shape)}),
    ]
    op, rest = draw(pick(views))
    return op, {"self": value, **rest}


def test_new_names_are_in_no_recipe():
    recipe = "graph import {\n  input w: f32[4]\n  n0: f32[4] = op aten.neg.default(self=w)\n  return [n0]\n}"
    program = parse(f"graph import {{\n  parameter 'w': f32[4]\n  weight a: f32[4] = 'w' {recipe}\n  return [a]\n}}")
    made = Rewriter(program, Inference()).emit("aten.abs.default", self=program.weights[0].value)
    assert made.name == "n1"


@st.composite
def programs(draw: st.DrawFn) -> Graph:
    """A graph of level import that can be run: up to ten calls, some of them the same, results, writes to inputs."""
    rewriter = Rewriter(base(draw(st.sampled_from([5, BATCH]))), Inference())
    pool = [*rewriter.graph.values()]
    # Those that passes look at come more often.
    kinds = st.sampled_from(["unary", "binary", "scalar", "cast", "reduction", *["linear"] * 2, *["view"] * 3])
    for _ in range(draw(st.integers(1, 10))):
        op, given_ = arguments(draw, draw(kinds), draw(st.sampled_from(pool)), pool)
        try:
            pool.append(rewriter.emit(op, **given_))
        except Unsupported:
            continue
        if draw(st.integers(0, 3)) == 0:  # once more: common subexpressions
            pool.append(rewriter.emit(op, **given_))
    program = rewriter.finish()
    made = pool[len([*program.values()]) - sum(len(node.outputs) for node in program.nodes) :]
    copies = []
    for target in pool[:8]:
        fitting = [value for value in made if value.type == target.type]
        if fitting and draw(st.integers(0, 3)) == 0:
            copies.append(Node("op", COPY, (("self", target), ("src", draw(st.sampled_from(fitting)))), ()))
    outputs = tuple(draw(st.lists(st.sampled_from(made), max_size=3))) if made else ()
    return replace(program, nodes=(*program.nodes, *copies), outputs=outputs)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(programs())
def test_pipeline_keeps_the_numbers(program):
    note(str(program))
    verify(program, aten.ALLOWED)
    lowered, _ = lower(program, CompilationSettings())
    assert parse(str(lowered)) == lowered
    assert_same_numbers(program, lowered, {"s0": 5})


# ---- graphs without tensors to read, of single elements, of none ----


def spare(op: str) -> Graph:
    """Calls of `op` on numbers, 0-d tensors, constants, parameters and empty tensors, and calls that read their results
    as activations do."""
    types = {name: TensorType("f32", shape, contiguous(shape)) for name, shape in (("x", ()), ("e", (0, 3)))}
    inputs = tuple(Value(name, type_) for name, type_ in types.items())
    parameter = Parameter("w", types["x"])
    weight = Weight(Value("w", types["x"]), ("w",))
    rewriter = Rewriter(Graph("import", inputs, (parameter,), (weight,)), Inference())
    operands = (4, 3.3, *inputs, weight.value, rewriter.emit("aten.full.default", size=(), fill_value=2.0))
    outputs = []
    for one, two in itertools.product(operands, repeat=2):
        made = rewriter.emit(op, self=one, other=two)
        half = rewriter.emit("aten.mul.Tensor", self=rewriter.emit("aten.tanh.default", self=made), other=0.5)
        outputs += [
            rewriter.emit("aten.mul.Tensor", self=half, other=made),
            rewriter.emit("aten.sum.default", self=half),
        ]
    return replace(rewriter.finish(), outputs=tuple(outputs))


@pytest.mark.parametrize("op", ["aten.mul.Tensor", "aten.div.Tensor"])
def test_passes_take_graphs_with_nothing_in_them(op):
    program = after = spare(op)
    context = Context(CompilationSettings(), PORTABLE[-1:])
    for step in PASSES.values():
        after = step(after, Inference(), context)
    assert_same_numbers(program, after)


# ---- what the driver checks ----

ADD = """
graph import {
  input x: f32[2, 3]
  y: f32[2, 3] = op aten.neg.default(self=x)
  return [y]
}
"""


def one_pass(run, **declared):
    """What a pipeline of one pass makes of a graph."""
    context = Context(CompilationSettings(), PORTABLE)
    return Pass(run, **declared)(parse(ADD.strip()), Inference(), context)


def narrower(graph, infer):
    (node,) = graph.nodes
    y = value("f16", 2, 3)
    return replace(graph, nodes=(replace(node, outputs=(replace(y, name="y"),)),), outputs=(replace(y, name="y"),))


def no_input(graph, infer):
    return replace(graph, inputs=(), nodes=(), outputs=())


def no_result(graph, infer):
    return replace(graph, outputs=())


def other_memory(graph, infer):
    (node,) = graph.nodes
    return replace(graph, nodes=(replace(node, op="aten.detach.default"),))


def undefined(graph, infer):
    return replace(graph, nodes=())


def off_by_one(graph, infer):
    return graph.nodes[1]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (narrower, r"pass narrower changed the types of the results: expected f32\[2, 3\], found f16\[2, 3\]"),
        (no_result, r"pass no_result changed the types of the results: expected f32\[2, 3\], found none"),
        (no_input, r"pass no_input changed the inputs: expected x: f32\[2, 3\], found none"),
        (other_memory, "pass other_memory changed the memory that results share: expected result 0, found x"),
        (undefined, "pass undefined left a graph that does not verify"),
        (off_by_one, "pass off_by_one failed with IndexError"),
    ],
)
def test_broken_passes_are_named(run, message):
    with pytest.raises(LoweringError, match=message):
        one_pass(run)


def test_a_pass_leaves_the_level_that_it_ensures():
    assert one_pass(lambda graph, infer: replace(graph, nodes=graph.nodes)).level == "import"
    with pytest.raises(LoweringError, match="changed the level: expected fused, found import"):
        one_pass(lambda graph, infer: graph, ensures="fused")


def test_a_pass_gets_what_it_takes():
    def inspect(graph, infer, targets, settings):
        assert targets == PORTABLE
        assert settings == CompilationSettings()
        return graph

    assert one_pass(inspect, takes=("targets", "settings"))


@pytest.mark.parametrize("name", ["fuse", "unroll_recurrences"])
def test_a_pass_is_left_out_without_what_it_needs(name):
    needy = CompilationSettings(copy_weights=False)
    assert PASSES[name].applies(Context(CompilationSettings(), PORTABLE))
    assert not PASSES[name].applies(Context(needy, ()))


# ---- types of new calls ----


def value(dtype: str, *shape: Any) -> Value:
    return Value("x", TensorType(dtype, shape, contiguous(shape)))


def test_equal_numbers_of_different_kinds_give_different_types():
    infer, x = Inference(), value("i64", 2)
    found = [infer("aten.add.Scalar", (("self", x), ("other", other)))[0].dtype for other in (True, 1, 1.0)]
    assert found == ["i64", "i64", "f32"]


def test_calls_that_hold_for_some_sizes_only_are_refused():
    infer, x = Inference(), value("f32", BATCH, 2)
    for _ in range(2):
        with pytest.raises(Unsupported):
            infer("aten.view.default", (("self", x), ("size", (-1, 3))))
    (kept,) = infer("aten.view.default", (("self", x), ("size", (-1,))))
    assert kept.shape == (dim_expr("*", 2, BATCH),)


def test_sizes_that_may_be_equal_are_not_taken_as_equal():
    infer = Inference()
    tight = [value("f32", Sym(name, 2, 3)) for name in ("s0", "s1")]
    with pytest.raises(Unsupported, match="only if"):
        infer("aten.add.Tensor", (("self", tight[0]), ("other", tight[1])))


def test_unbatched_convolution_is_not_folded() -> None:
    """Its batch norm takes the channels for a batch, which may be of the same size."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(2, 4, 1), torch.nn.BatchNorm1d(4)
            self.norm.running_var.copy_(torch.arange(1.0, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x))

    model, x = Model().eval(), torch.randn(2, 4, 5)
    torch.testing.assert_close(torch_rtx.compile(model, (x,))(x), model(x).detach())


def test_what_addresses_memory_gets_memory_of_its_own() -> None:
    """`as_strided` counts from the start of the storage, so that a copy of a slice is not the slice."""

    def read(x: torch.Tensor) -> torch.Tensor:
        return x[2:].clone().as_strided((2,), (1,), 0) + 0

    def write(x: torch.Tensor) -> torch.Tensor:
        y = x[2:].clone()
        y.as_strided((2,), (1,), 0).fill_(9)
        return y

    class Merged(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.q(x).sin(), self.k(x).view(6).as_strided((3,), (2,), 0) + 0

    x = torch.arange(1.0, 7)
    with torch.no_grad():
        for function in (read, write):
            torch._dynamo.reset()
            assert torch.equal(torch.compile(function, backend="rtx")(x), function(x))
        model, x = Merged(), torch.randn(1, 4)
        torch.testing.assert_close(torch_rtx.compile(model, (x,))(x), model(x))


@pytest.mark.parametrize("visit", [lambda node, rewriter: False, lambda node, rewriter: rewriter.keep(node) or True])
def test_a_rewrite_without_changes_is_the_graph_itself(visit) -> None:
    """So that nothing is checked again."""
    before = graph("input in0: f32[4]\nv1: f32[4] = op aten.relu.default(self=in0)\nreturn [v1]")
    assert rewrite(before, Inference(), visit) is before


def test_a_rewrite_of_results_alone_is_another_graph() -> None:
    before = graph("input in0: f32[4]\nv1: f32[4] = op aten.relu.default(self=in0)\nreturn [v1]")

    def visit(node: Node, rewriter: Rewriter) -> bool:
        rewriter.replace(node.outputs[0], node.inputs[0])
        return False

    assert rewrite(before, Inference(), visit).outputs == before.inputs
