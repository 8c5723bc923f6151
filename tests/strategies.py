"""Hypothesis strategies that draw graphs of the IR: valid by `verify`, not meant to be run."""

from __future__ import annotations

import string
from dataclasses import replace

from hypothesis import strategies as st

from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import (
    DIM_OPS,
    Attr,
    Dim,
    Graph,
    Loc,
    Node,
    Parameter,
    ScalarType,
    Sym,
    TensorType,
    Type,
    Value,
    Weight,
    contiguous,
    dim_expr,
    is_name,
)

# Marks of the text form, to be put in strings: quotes, comments, separators, ends of lines.
MARKS = ["'", '"', "\\", "  #", " = ", ": ", "': ", '": ', " graph ", "{", "}", "return", " @ ", "\n", "\0", "\u2028"]
texts = st.lists(st.sampled_from(MARKS) | st.characters(exclude_categories=["Cs"]), max_size=5).map("".join)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True).filter(is_name)
# A comment ends at the end of its line, so the places in a model are plainer than strings are.
words = (
    st.text(string.ascii_letters + string.digits + "._-/ :#}='", max_size=12)
    .map(str.strip)
    .filter(lambda text: "  #" not in text and " @ " not in text)
)
paths = words.filter(bool)
locs = st.none() | st.builds(Loc, paths) | st.builds(Loc, words, paths, st.integers(0, 10**6))
STORED = sorted(DTYPES.keys() - {"c128", "c32"})  # the dtypes that a file can hold
OPS = ["aten.add.Tensor", "aten.relu.default", "aten.view.default", "aten.linear.default"]


def syms() -> st.SearchStrategy[tuple[Sym, ...]]:
    """Up to three symbols of different names; some have a typical value, a multiple like all of their values."""
    ranges = st.tuples(st.integers(0, 9), st.none() | st.integers(9, 10**6), st.integers(1, 64), st.integers(0, 10**4))
    entries = st.dictionaries(names.map(lambda name: f"s_{name}"), ranges, max_size=3)
    return entries.map(lambda found: tuple(_sym(name, *fields) for name, fields in found.items()))


def _sym(name: str, low: int, high: int | None, multiple: int, count: int) -> Sym:
    typical = count * multiple
    inside = max(low, 1) <= typical and (high is None or typical <= high)
    return Sym(name, low, high, multiple, typical if inside else None)


@st.composite
def dims(draw: st.DrawFn, known: tuple[Sym, ...], depth: int = 2) -> Dim:
    """A size: a number, one of `known`, or an expression of them in normal form."""
    kind = draw(st.integers(0, 3))
    if kind == 0 or not known:
        return draw(st.integers(0, 5) | st.just(100))  # products of these fit in 64 bits
    if kind < 3 or not depth:
        return draw(st.sampled_from(known))
    op = draw(st.sampled_from(sorted(DIM_OPS)))
    left = draw(dims(known, depth - 1))
    right = draw(st.integers(1, 9) | st.integers(-9, -1)) if op in ("//", "%") else draw(dims(known, depth - 1))
    made = dim_expr(op, left, right)
    return made if not isinstance(made, int) or made >= 0 else 1


@st.composite
def tensor_types(draw: st.DrawFn, known: tuple[Sym, ...] = ()) -> TensorType:
    """A tensor type over `known` symbols, mostly contiguous."""
    shape = tuple(draw(st.lists(dims(known), max_size=3)))
    strides = contiguous(shape)
    if draw(st.integers(0, 3)) == 0:
        strides = tuple(draw(dims(known)) for _ in shape)
    device = draw(st.sampled_from(["main", "main", "cpu"]))
    return TensorType(draw(st.sampled_from(sorted(DTYPES))), shape, strides, device)


@st.composite
def types(draw: st.DrawFn, known: tuple[Sym, ...]) -> Type:
    """Any type."""
    if draw(st.integers(0, 3)):
        return draw(tensor_types(known))
    kind = draw(st.sampled_from(["int", "float", "bool"]))
    return ScalarType(kind, draw(dims(known)) if kind == "int" and draw(st.booleans()) else None)


def attrs(known: tuple[Sym, ...], values: list[Value]) -> st.SearchStrategy[Attr]:
    """Any attribute: constants, strings, dims, values, and nested lists of them."""
    leaf = (
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts | dims(known)
    )
    if values:
        leaf |= st.sampled_from(values)
    return st.recursive(leaf, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Parameter, ...]:
    """Parameters of small static shapes, with names of any characters and aliases, constants among them."""
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    found = []
    drawn = draw(st.lists(texts, max_size=8, unique=True))
    for name in drawn[::2]:
        shape, dtype = draw(shapes), draw(st.sampled_from(STORED))
        strides = contiguous(shape) if draw(st.booleans()) else contiguous(shape[::-1])[::-1]
        aliases = tuple(drawn[1::2]) if name == drawn[0] else ()
        found.append(Parameter(name, TensorType(dtype, shape, strides), aliases, draw(st.booleans())))
    return tuple(found)


class _Names:
    """Fresh names: drawn ones, made unique."""

    def __init__(self) -> None:
        self.count = 0

    def fresh(self, name: str) -> str:
        self.count += 1
        return f"{name}_{self.count}"


@st.composite
def _nodes(
    draw: st.DrawFn, level: str, known: tuple[Sym, ...], values: list[Value], fresh: _Names, depth: int
) -> tuple[Node, ...]:
    """Up to four nodes; what they define is added to `values`."""
    nodes = []
    kinds = ["op", "fallback"] if level == "import" else ["extern", "view", "fallback", "kernel"]
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(kinds))
        if kind == "kernel" and not depth:
            kind = "extern"
        op = draw(st.sampled_from(OPS if kind != "fallback" else [*OPS, "my_lib.op_1.default"]))
        arguments = draw(st.dictionaries(names, attrs(known, values), max_size=3))
        node = Node(kind, op, tuple(arguments.items()), (), None, draw(locs))
        body = draw(_bodies(known, node.inputs)) if kind == "kernel" else None
        results = [value.type for value in body.outputs] if body else draw(st.lists(types(known), max_size=2))  # type: ignore[union-attr]
        outputs = [Value(fresh.fresh(draw(names)), type_) for type_ in results]
        if body is None and draw(st.booleans()):
            outputs.insert(0, None)  # type: ignore[arg-type]
        nodes.append(replace(node, outputs=tuple(outputs), body=body))
        values.extend(value for value in outputs if value is not None)
    return tuple(nodes)


@st.composite
def _bodies(draw: st.DrawFn, known: tuple[Sym, ...], needed: tuple[Value, ...]) -> Graph:
    """The body of a kernel that takes `needed`."""
    fresh = _Names()
    inputs = [Value(fresh.fresh("b"), value.type) for value in needed]
    values = list(inputs)
    nodes = draw(_nodes("import", known, values, fresh, 0))
    outputs = draw(st.lists(st.sampled_from(values), max_size=2)) if values else []
    return Graph("import", tuple(inputs), nodes=nodes, outputs=tuple(outputs))


@st.composite
def _recipes(draw: st.DrawFn, needed: list[Parameter]) -> Graph:
    """A graph that takes `needed` and returns one tensor."""
    fresh = _Names()
    inputs = [Value(fresh.fresh("p"), parameter.type) for parameter in needed]
    values = list(inputs)
    nodes = draw(_nodes("import", (), values, fresh, 0))
    output = draw(st.sampled_from([value for value in values if isinstance(value.type, TensorType)]))
    return Graph("import", tuple(inputs), nodes=nodes, outputs=(output,))


@st.composite
def graphs(draw: st.DrawFn, level: str = "fused", depth: int = 1) -> Graph:
    """A graph that `verify` accepts, with `depth` levels of kernel bodies at most."""
    known, fresh, owned = draw(syms()), _Names(), draw(parameters())
    values = [Value(fresh.fresh(draw(names)), draw(types(known))) for _ in range(draw(st.integers(0, 3)))]
    inputs, weights = tuple(values), []
    for _ in range(draw(st.integers(0, 3)) if owned else 0):
        needed = draw(st.lists(st.sampled_from(owned), min_size=1, max_size=3))
        recipe = draw(st.none() | _recipes(needed))
        needed = needed if recipe else needed[:1]
        type_ = recipe.outputs[0].type if recipe else needed[0].type
        weights.append(Weight(Value(fresh.fresh("w"), type_), tuple(p.name for p in needed), recipe))
    values += [weight.value for weight in weights]
    nodes = draw(_nodes(level, known, values, fresh, depth))
    outputs = tuple(draw(st.lists(attrs(known, values), max_size=3)))
    return Graph(level, inputs, owned, tuple(weights), nodes, outputs)
