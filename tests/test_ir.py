"""The IR: text out and in again, every rule of the verifier, and texts that nobody should trust."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import strategies
from torch_rtx import aten
from torch_rtx.errors import InvalidIR
from torch_rtx.ir import (
    COND,
    COPY,
    DIM_OPS,
    Dim,
    Expr,
    Graph,
    Loc,
    Node,
    Parameter,
    ScalarType,
    Sym,
    TensorType,
    Value,
    Weight,
    contiguous,
    dim_expr,
    dim_syms,
    verify,
)
from torch_rtx.irparse import parse
from torch_rtx.optable import ALLOWED

S = Sym("s", 1, 64)
F2 = TensorType("f32", (2,), (1,))
X, Y, W = Value("x", F2), Value("y", F2), Value("w", F2)
RELU = Node("extern", "aten.relu.default", (("self", X),), (Y,))


def recipe(
    *nodes: Node, inputs: tuple[Value, ...] = (X,), output: Value = X, weights: tuple[Weight, ...] = ()
) -> Graph:
    """A recipe of one parameter."""
    return Graph("import", inputs, (), weights, nodes, (output,))


def evaluate(dim: Dim, sizes: dict[str, int]) -> int:
    """The number that `dim` is."""
    if isinstance(dim, Sym):
        return sizes[dim.name]
    if isinstance(dim, Expr):
        return DIM_OPS[dim.op]([evaluate(arg, sizes) for arg in dim.args])
    return dim


# ---- text ------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["fused", "import"]).flatmap(strategies.graphs))
def test_text_reads_back(graph: Graph) -> None:
    verify(graph, ALLOWED)
    text = str(graph)
    assert parse(text) == graph
    assert str(parse(text)) == text


@pytest.mark.quick
def test_text_of_a_program() -> None:
    text = """\
graph fused {
  dim s = 1, 64, 8
  input x: f32[s, 4]
  input n: int[s]
  constant 'table': i64[4]
  parameter 'lin.weight', 'tied.weight': bf16[4, 4](1, 4)
  weight w: f32[4, 4] = 'lin.weight' graph import {
    input p: bf16[4, 4](1, 4)
    q: f32[4, 4] = op aten._to_copy.default(self=p, dtype='f32')
    return [q]
  }
  weight t: i64[4] = 'table'
  a: f32[s, 4], _ = kernel gemm(a=x, b=w, alpha=-inf, sizes=[(2 * s), None, True]) graph fused {
    return []
  }  # unused
  return [a, (s // 2), 1]
}
"""
    with pytest.raises(InvalidIR, match="line 15"):  # a comment has its place on the line of the node
        parse(text)
    text = text.replace("  # unused", "").replace(") graph fused", ")  # model.lin @ m.py:7 graph fused")
    graph = parse(text)
    assert str(graph) == text
    kernel = graph.nodes[0]
    assert kernel.loc == Loc("model.lin", "m.py", 7)
    assert kernel.outputs == (Value("a", TensorType("f32", (graph.syms["s"], 4), (4, 1))), None)
    assert kernel.arg("sizes") == (dim_expr("*", 2, graph.syms["s"]), None, True)
    assert kernel.inputs == (graph.inputs[0], graph.weights[0].value)
    assert graph.parameters[1].aliases == ("tied.weight",)
    assert graph.parameters[0].constant


def test_nan_and_infinity_keep_their_text() -> None:
    text = "graph fused {\n  return [nan, inf, -inf, -0.0, 1e-300]\n}\n"
    assert str(parse(text)) == text


@given(st.data())
def test_dims_keep_their_value(data: st.DataObject) -> None:
    known = (Sym("a"), Sym("b", 2, 9))
    op = data.draw(st.sampled_from(sorted(DIM_OPS)))
    args = [data.draw(strategies.dims(known)) for _ in range(2)]
    sizes = {sym.name: data.draw(st.integers(1, 9)) for sym in known}
    numbers = [evaluate(arg, sizes) for arg in args]
    if op in ("//", "%") and (args[1] == 0 or numbers[1] == 0):
        return
    made = dim_expr(op, *args)
    assert evaluate(made, sizes) == DIM_OPS[op](numbers)
    assert {sym for arg in args for sym in dim_syms(arg)} >= set(dim_syms(made))
    if op in ("+", "*", "min", "max"):
        assert dim_expr(op, *reversed(args)) == made


def test_dims_have_one_form() -> None:
    a, b = Sym("a"), Sym("b")
    assert dim_expr("+", 1, dim_expr("+", b, a), 2) == dim_expr("+", a, 3, b)
    assert dim_expr("*", a, 1) == a == dim_expr("+", a, 0) == dim_expr("//", a, 1) == dim_expr("max", a, a)
    assert dim_expr("*", a, 0) == 0
    assert contiguous((a, 0, b)) == (b, b, 1)


@pytest.mark.parametrize(("op", "args"), [("-", (1, 2)), ("//", (S, 0)), ("%", (1, 0)), ("//", (S,)), ("+", ())])
def test_dims_that_do_not_exist(op: str, args: tuple[Dim, ...]) -> None:
    with pytest.raises(InvalidIR, match="no dim expression"):
        dim_expr(op, *args)


# ---- the verifier: one broken rule each ------------------------------------------------------------------------------

P = Parameter("p", F2)
G = Graph("fused", (X,), (P,), (Weight(W, ("p",)),), (RELU,), (Y, W, 1, S))


def broken(**changes: object) -> Graph:
    """The valid graph `G` with other fields."""
    return Graph(**{**{name: getattr(G, name) for name in G.__dataclass_fields__}, **changes})  # type: ignore[arg-type]


def typed(type_: object) -> Graph:
    """The valid graph with an input of a type."""
    return broken(inputs=(X, Value("z", type_)))  # type: ignore[arg-type]


def with_node(*args: object, **fields: object) -> Graph:
    """The valid graph with a node."""
    return broken(nodes=(RELU, Node(*args, **fields)))  # type: ignore[arg-type]


def with_weight(*args: object) -> Graph:
    """The valid graph with a weight."""
    return broken(weights=(Weight(*args),))  # type: ignore[arg-type]


UPDATE = "aten.index_copy_.default"
Z, V = Value("z", F2), Value("v", F2)
UPDATED = Node("extern", UPDATE, (("self", X), ("source", Y)), (Z,))
VIEW = Node("view", "aten.alias.default", (("self", X),), (V,))
READ, COPIED = replace(RELU, kind="op", outputs=(V,)), Node("op", COPY, (("self", X), ("src", Y)), ())


def updating(*nodes: Node, outputs: tuple[Value, ...] = (Z,)) -> Graph:
    """The body of a kernel that updates its first input, and does more."""
    return Graph("import", (X, Y), nodes=(replace(UPDATED, kind="op"), *nodes), outputs=outputs)


WRITING, RETURNING = updating(outputs=()), updating()
IN_KERNEL = Node("kernel", "k", (("x", X), ("y", Y)), (Z,), RETURNING)


RULES = {
    "unknown level 'final'": broken(level="final"),
    "two parameters have the same name": broken(parameters=(P, P)),
    "needs unknown parameters q": with_weight(W, ("p", "q"), recipe()),
    "has no recipe and must be one parameter": with_weight(W, ("p", "p")),
    "must take its parameters and return one static tensor": with_weight(W, ("p", "p"), recipe()),
    "(?#its own weights)must take its parameters": with_weight(W, ("p",), recipe(weights=(Weight(W, ("p",)),))),
    "(?#no output)return one static tensor": with_weight(W, ("p",), Graph("import", (X,))),
    "(?#a symbol)return one static tensor": with_weight(
        W, ("p",), recipe(Node("op", "aten.relu.default", (("self", X), ("n", S)), (Y,)), output=Y)
    ),
    "does not return f32": with_weight(W, ("p",), Graph("import", (X,), outputs=(1,))),
    "(?#other type)must take its parameters": with_weight(
        W, ("p",), recipe(inputs=(z := Value("z", ScalarType("int")),), output=z)
    ),
    "(?#type)must be one parameter, of its type": with_weight(Value("w", TensorType("f32", (9,), (1,))), ("p",)),
    "symbol|no static shape": broken(parameters=(Parameter("p", TensorType("f32", (S,), (1,))),)),
    "(?#alias)two parameters have the same name": broken(parameters=(Parameter("p", F2, ("q",)), Parameter("q", F2))),
    "has an empty range": broken(inputs=(X, Value("n", ScalarType("int", Sym("t", 5, 2))))),
    "(?#zero)has an empty range": broken(inputs=(X, Value("n", ScalarType("int", Sym("t", 5, None, 0))))),
    "dim t = 2, 8, 1, 9 has a typical value outside of its range": broken(outputs=(Sym("t", 2, 8, 1, 9),)),
    "(?#multiple)has a typical value outside of its range": broken(outputs=(Sym("t", 2, 64, 8, 12),)),
    "(?#nothing)has a typical value outside of its range": broken(outputs=(Sym("t", 0, 8, 1, 0),)),
    "is on the unknown device": broken(inputs=(X, Value("d", TensorType("f32", (), (), "a:b")))),
    "must have the kernel's input types": with_node("kernel", "k", (), (), Graph("import", (X,))),
    "must have the kernel's output types": with_node(
        "kernel", "k", (("x", X),), (), Graph("import", (X,), outputs=(X,))
    ),
    "(?#recipe)kind 'extern' does not belong in level 'import'": with_weight(W, ("p",), recipe(RELU, output=Y)),
    "kind 'op' does not belong in level 'fused'": with_node("op", "aten.relu.default", (), ()),
    "kind 'extern' does not belong in level 'import'": broken(level="import"),
    "os.system is not on the allow-list": with_node("extern", "os.system", (), ()),
    "(?#view)aten.rm.default is not on the allow-list": with_node("view", "aten.rm.default", (), ()),
    "a kernel must have a body": with_node("kernel", "k", (), ()),
    "and other nodes must not": with_node("extern", "aten.relu.default", (), (), Graph("fused")),
    "an argument is given twice": with_node("fallback", "a.b", (("x", 1), ("x", 2)), ()),
    "value z is used before it is defined": with_node("fallback", "a.b", (("x", ((1, Value("z", F2)),)),), ()),
    "value x is used before it is defined, or with another type": with_node(
        "fallback", "a.b", (("x", Value("x", ScalarType("int"))),), ()
    ),
    "copy_ must write to an input or weight": with_node("extern", "aten.copy_.default", (("self", Y), ("src", X)), ()),
    "(?#no target)copy_ must write to an input or weight": with_node("extern", "aten.copy_.default", (), ()),
    "must not write to its inputs": with_node("fallback", COND, (("x", X),), (), WRITING),
    "(?#a kernel)must return its target": with_node("kernel", "k", (("x", X), ("y", Y)), (), WRITING),
    "(?#a kernel)must write to an input": with_node("kernel", "k", (("x", Y), ("y", X)), (Z,), RETURNING),
    "(?#a kernel)read it in no other argument": with_node("kernel", "k", (("x", X), ("y", X)), (Z,), RETURNING),
    "(?#a kernel)is read after it was written": broken(nodes=(RELU, IN_KERNEL, replace(RELU, outputs=(V,)))),
    "(?#copy)by one update": with_node("kernel", "k", (("x", X), ("y", Y)), (Z,), updating(COPIED)),
    "(?#read)by one update": with_node("kernel", "k", (("x", X), ("y", Y)), (Z,), updating(READ)),
    "index_copy_ must write to an input or weight": with_node("extern", UPDATE, (("self", Y), ("source", X)), ()),
    "must return its target": with_node("extern", UPDATE, (("self", X),), ()),
    "(?#type)must return its target with its type": with_node(
        "extern", UPDATE, (("self", X),), (Value("z", TensorType("f64", (2,), (1,))),)
    ),
    "and read it in no other argument": with_node("extern", UPDATE, (("self", X), ("source", X)), (Z,)),
    "value x is read after it was written to": broken(
        nodes=(RELU, UPDATED, Node("extern", "aten.relu.default", (("self", X),), (V,)))
    ),
    "(?#view)value x is read after it was written to": broken(
        nodes=(RELU, VIEW, UPDATED, Node("extern", "aten.relu.default", (("self", V),), ()))
    ),
    "(?#again)value x is read after it was written to": broken(
        nodes=(RELU, UPDATED, Node("extern", UPDATE, (("self", X),), (V,)))
    ),
    "(?#body)must be a graph of ops": with_node("kernel", "k", (), (), Graph("final")),
    "(?#twice)value x is defined twice": broken(inputs=(X, X)),
    "(?#by a weight)value x is defined twice": with_weight(X, ("p",)),
    "(?#by a node)value x is defined twice": with_node("fallback", "a.b", (), (X,)),
    "'not a name' is not a valid name": broken(inputs=(X, Value("not a name", F2))),
    "'lambda' is not a valid name": broken(inputs=(X, Value("lambda", F2))),
    "'f32' is not a valid name": broken(inputs=(X, Value("f32", F2))),
    "'é' is not a valid name": broken(inputs=(X, Value("é", F2))),
    "unknown dtype 'f33'": typed(TensorType("f33", (), ())),
    "1 sizes and 0 strides": typed(TensorType("f32", (1,), ())),
    "negative size": typed(TensorType("f32", (-1,), (1,))),
    "unknown type complex": typed(ScalarType("complex")),
    "unknown type float": typed(ScalarType("float", S)),
    "(?#output)value z is used before": broken(outputs=((1, Value("z", F2)),)),
    "symbol s has two different ranges": broken(outputs=(S, Sym("s", 2))),
    "x names both a dim and a value": broken(outputs=(Sym("x"),)),
}


def test_the_valid_graph_is_valid() -> None:
    verify(G, ALLOWED)
    verify(with_node("fallback", "anything.goes", (), ()), ALLOWED)
    verify(with_node("extern", "anything.goes", (), ()))
    verify(with_node("extern", "aten.copy_.default", (("self", X), ("src", Y)), ()), ALLOWED)
    verify(with_weight(W, ("p",), recipe()), ALLOWED)


@pytest.mark.quick
def test_updates_follow_each_other() -> None:
    twice = broken(nodes=(RELU, VIEW, UPDATED, Node("extern", UPDATE, (("self", Z),), (None,))), outputs=(X,))
    verify(twice, ALLOWED)
    assert twice.written == {"x"}
    assert with_node("fallback", UPDATE, (("self", X),), (Z,)).written == frozenset()


@pytest.mark.quick
def test_a_kernel_that_updates_an_input() -> None:
    again = Node("kernel", "k", (("x", Z), ("y", Y)), (V,), RETURNING)
    graph = broken(nodes=(RELU, IN_KERNEL, again), outputs=())
    verify(graph, ALLOWED)
    assert (graph.updated, graph.written) == ({"z": "x", "v": "x"}, {"x"})
    assert IN_KERNEL.writes
    assert (IN_KERNEL.targets, IN_KERNEL.updates) == ((X,), {"z": X})
    assert aten.bases(graph)["v"] == "x"


@pytest.mark.quick
@pytest.mark.parametrize(("message", "graph"), RULES.items())
def test_verifier(message: str, graph: Graph) -> None:
    with pytest.raises(InvalidIR, match=message):
        verify(graph, ALLOWED)


def test_errors_show_the_place() -> None:
    loc = Loc("model.head", "m.py", 3)
    with pytest.raises(InvalidIR, match=r"(?s)y: f32\[2\] = extern aten.relu.*no.op.*model.head @ m.py:3"):
        verify(with_node("extern", "no.op", (), (), loc=loc), ALLOWED)
    with pytest.raises(InvalidIR, match=r"(?s)line 2.*input x: f33\[2\]"):
        parse("graph fused {\n  input x: f33[2]\n  return [x]\n}\n")


# ---- texts that nobody should trust ----------------------------------------------------------------------------------

MANY = 3000
HOSTILE = [
    "",
    "graph",
    "graph fused {",
    "graph fused {\n  return []",
    "graph fused {\n  return []\n}\nmore",
    "graph fused {\n  return 1\n}",
    "graph fused {\n" + "  kernel k() graph fused {\n" * 100 + "return []\n}\n" * 101,
    *(
        f"graph fused {{\n  dim s = 0, None, 1\n  {line}\n  return []\n}}\n"
        for line in (
            f"extern a.b(x={'[' * MANY}{']' * MANY})",
            f"extern a.b(x={'(' * MANY}s{')' * MANY})",
            f"extern a.b(x={'-' * MANY}1)",
            f"extern a.b(x=s{' // 3' * 300})",
            f"extern a.b(x=s{' // 3' * MANY})",
            f"extern a{'.b' * MANY}()",
            f"extern a.b(x={'9' * 5000})",
            f"extern a.b(x=0x{'f' * 5000})",
            f"extern a.b(x=({'9' * 4000} * {'9' * 4000}))",
            f"input x: f32[s{' // 3' * 400}]",
            f"fallback a.b()  # m @ f.py:{'9' * 5000}",
            "extern a.b(x=__import__('os').system('exit 1'))",
            "extern a.b(x=(lambda: 1)())",
            "extern a.b(x=[1 for _ in s])",
            "extern a.b(x=f'{s}')",
            "extern a.b(x=b'bytes')",
            "extern a.b(x=1j)",
            "extern a.b(x=...)",
            "extern a.b(x=s ** 2)",
            "extern a.b(x=s - 1)",
            "extern a.b(x=-s)",
            "extern a.b(x=-True)",
            "extern a.b(x={1: 2})",
            "extern a.b(x=min())",
            "extern a.b(x=s // 0)",
            "extern a.b(x=s // (s * 0))",
            "extern a.b(x=undefined)",
            "extern a.b(1)",
            "extern a.b(*s)",
            "extern a[0].b()",
            "extern a.b",
            "extern a.b('\0')",
            "extern a.b('\udc80')",
            "dim s = nan, None, 1",
            "dim s = 1",
            "dim s = True, None, 1",
            "dim s = 0, None, 1, None",
            "dim s = 0, 9, 1, True",
            "dim s = 0, 9, 1, 4, 4",
            "dim f32 = 0, None, 1",
            "dim s",
            "input x: f32[nan]",
            "input x: f32[1.5]",
            "input x: f32[True]",
            "input x: f32[1:2]",
            "input x: f32[]",
            "input x: float[2]",
            "input x: 3",
            "input x",
            "input _",
            "parameter 'p': int",
            "parameter 1: f32[2]",
            "parameter p: f32[2]",
            "parameter : f32[2]",
            "parameter",
            "weight w: f32[2]",
            "weight = 'p'",
            "weight a: f32[2], b: f32[2] = 'p'",
            "weight w: f32[2] = 'p' graph import {",
            "x: f32[2] = ",
            "x = extern a.b()",
            "nonsense",
            "fallback a.b()  # @ f.py",
            "fallback a.b()  # m @ f.py:x",
        )
    ),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text(text: str) -> None:
    with pytest.raises(InvalidIR) as caught:
        verify(parse(text), ALLOWED)
    assert len(str(caught.value)) < 20_000


TOKENS = [
    *"[](){}.,:=*+-%/#'\"\n_ ",
    "  ",
    "graph ",
    "fused",
    "import",
    "return ",
    "dim ",
    "input ",
    "parameter ",
    "weight ",
]
TOKENS += [
    "extern ",
    "kernel ",
    "fallback ",
    "x",
    "s",
    "f32[2]",
    "int",
    "1",
    "-1",
    "nan",
    "None",
    "'p'",
    " = ",
    "//",
    "min(",
]


@given(st.lists(st.sampled_from(TOKENS), max_size=20).map("".join) | st.text(max_size=30))
def test_any_text_is_a_graph_or_an_error(line: str) -> None:
    try:
        graph = parse(f"graph fused {{\n  dim s = 0, None, 1\n  input x: f32[s]\n{line}\n  return []\n}}\n")
    except InvalidIR:
        return
    str(graph)


@given(strategies.graphs(), st.data())
def test_damaged_text_is_a_graph_or_an_error(graph: Graph, data: st.DataObject) -> None:
    text = str(graph)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 12)))
    try:
        damaged = parse(text[:start] + data.draw(st.sampled_from(["", *TOKENS])) + text[stop:])
        verify(damaged, ALLOWED)
    except InvalidIR:
        return
    str(damaged)


def test_types_that_repeat_are_those_of_their_dims() -> None:
    """Texts of types are parsed once, until a dim comes; a value without a type has none, whatever came before."""
    lines = ["dim s = 1, 8, 1", "input x: f32[s]", "input y: f32[s]", "dim s = 2, 4, 2", "input z: f32[s]"]
    graph = parse("graph fused {\n" + "".join(f"  {line}\n" for line in lines) + "  return [x]\n}\n")
    assert [value.type.shape[0].min for value in graph.inputs] == [1, 1, 2]
    with pytest.raises(InvalidIR, match="value z has no type"):
        parse("graph fused {\n  input x:f32[4]\n  z = extern aten.relu.default(self=x)\n  return [z]\n}\n")
