"""Higher-order operators of PyTorch as control flow of the IR, see `torch_rtx.control`.

A region (`invoke_subgraph`) becomes part of the graph around it. `map` is a scan without state. PyTorch tests before
each pass of a loop; here the test is part of the graph around the loop, for the first pass, and the end of the body,
for the next one, so that a loop has one body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx

from torch_rtx import aten
from torch_rtx.control import check
from torch_rtx.errors import InvalidIR, Unsupported
from torch_rtx.ir import CALL, COND, LOOP, SCAN, Attr, Graph, Loc, Node, TensorType, Type, Value, contiguous


@dataclass(frozen=True)
class Flow:
    """A call of a higher-order operator.

    Attributes:
        op: of the IR; CALL: a region.
        bodies: the graphs that it holds; of a loop the test and the body.
        pred, state, rows, operands: arguments in FX.
        stacked: see `torch_rtx.control`.
    """

    op: str
    bodies: tuple[fx.GraphModule, ...]
    operands: Sequence[Any]
    pred: Any = None
    state: Sequence[Any] = ()
    rows: Sequence[Any] = ()
    stacked: bool = False


def attribute(gm: fx.GraphModule | None, node: fx.Node) -> Any:
    """The object of a `get_attr` node."""
    content: Any = gm
    for part in str(node.target).split("."):
        content = getattr(content, part)
    return content


def flow_of(node: fx.Node) -> Flow | None:
    """The control flow that `node` is; None if it is something else, or has arguments that are not known here."""
    kind = _KINDS.get(getattr(node.target, "__name__", ""))
    if kind is None or not isinstance(node.target, torch._ops.HigherOrderOperator) or node.kwargs:
        return None
    count, made = kind
    held = (attribute(node.graph.owning_module, a) for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
    bodies = tuple(content for content in held if isinstance(content, fx.GraphModule))
    return made(bodies, node.args) if len(bodies) == count else None


_KINDS: Mapping[str, tuple[int, Callable[[tuple[fx.GraphModule, ...], Any], Flow]]] = {
    "invoke_subgraph": (1, lambda bodies, args: Flow(CALL, bodies, args[2:])),
    "cond": (2, lambda bodies, args: Flow(COND, bodies, args[3], pred=args[0])),
    "while_loop": (2, lambda bodies, args: Flow(LOOP, bodies, args[3], state=args[2])),
    "while_loop_stack_output": (2, lambda bodies, args: Flow(LOOP, bodies, args[3], state=args[2], stacked=True)),
    "scan": (1, lambda bodies, args: Flow(SCAN, bodies, args[3], state=args[1], rows=args[2])),
    "map_impl": (1, lambda bodies, args: Flow(SCAN, bodies, args[2], rows=args[1])),
}


def inner_nodes(node: fx.Node, deep: bool = True) -> Iterator[fx.Node]:
    """The nodes of the graphs that control flow holds and, if `deep`, of those in them."""
    flow = flow_of(node)
    for body in () if flow is None else flow.bodies:
        for inner in body.graph.nodes:
            yield inner
            yield from inner_nodes(inner) if deep else ()


class Importer(Protocol):
    """What control flow needs of an importer of a graph."""

    env: dict[fx.Node, Any]
    held: dict[int, Value] | None
    inputs: list[Value]
    nodes: list[Node]

    def attr(self, argument: Any) -> Attr:
        """An argument as an attribute."""

    def value(self, name: str, type_: Type) -> Value:
        """A new value."""

    def next_value(self, type_: Type) -> Value:
        """A new value without a name of its own."""

    def type(self, content: Any, opaque: bool = False) -> Type:
        """The type of a fake tensor or number."""

    def constant(self, content: torch.Tensor) -> Value:
        """A tensor that the model holds."""

    def append(self, made: Node) -> None:
        """Append a node."""

    def inner(self, gm: fx.GraphModule) -> Importer:
        """An importer of a body."""

    def inline(self, gm: fx.GraphModule, given: Sequence[Attr]) -> tuple[Attr, ...]:
        """Import the nodes of `gm`, whose placeholders are `given`; returns its results."""

    def body(self, outputs: Sequence[Attr]) -> Graph:
        """What was imported, as a graph with these results."""


def import_flow(flow: Flow, node: fx.Node, outer: Importer, loc: Loc | None) -> None:
    """Import control flow.

    Raises:
        Unsupported: control flow of the IR can't express it.
    """
    operands = [outer.attr(argument) for argument in flow.operands]
    if flow.op == CALL:
        for placeholder, argument in zip(_placeholders(flow.bodies[0]), flow.operands, strict=True):
            if _shape(outer, placeholder) != _shape(outer, argument):
                raise Unsupported("a region that was traced with other sizes")
        outer.env[node] = outer.inline(flow.bodies[0], operands)
        return
    _Import(flow, node, outer, loc, operands).run()


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


def _shape(outer: Importer, argument: Any) -> Type:
    return outer.type(argument.meta["val"] if isinstance(argument, fx.Node) else argument)


class _Import:
    """The import of a condition, a loop or a scan."""

    def __init__(self, flow: Flow, node: fx.Node, outer: Importer, loc: Loc | None, operands: list[Attr]) -> None:
        self.flow, self.node, self.outer, self.loc, self.operands = flow, node, outer, loc, operands
        content = node.meta["val"]
        self.content = tuple(content) if isinstance(content, tuple | list) else (content,)
        self.kept = [index for index, one in enumerate(self.content) if one is not None]
        held = (attribute(n.graph.owning_module, n) for n in inner_nodes(node) if n.op == "get_attr")
        self.constants = {id(one): one for one in held if isinstance(one, torch.Tensor)}
        if any(not isinstance(self.content[index], torch.Tensor) for index in self.kept):
            raise Unsupported("control flow that returns a number")

    def run(self) -> None:
        """Append the node."""
        {COND: self.condition, LOOP: self.loop, SCAN: self.scan}[self.flow.op]()

    def condition(self) -> None:
        """A predicate that is known decides now."""
        pred = self.outer.attr(self.flow.pred)
        if isinstance(pred, bool | int):
            self.outer.env[self.node] = self.outer.inline(self.flow.bodies[0 if pred else 1], self.operands)
            return
        if not isinstance(pred, Value):
            raise Unsupported("a condition on sizes")
        graphs = []
        for gm in self.flow.bodies:
            inner, inside = self.enter(gm, self.operands)
            graphs.append(inner.body(self.owned(inner, inner.inline(gm, inside), self.kept)))
        given = self.given(self.operands)
        taken = tuple(Value(f"in{index}", value.type) for index, value in enumerate(given))
        types = [self.outer.type(self.content[index]) for index in self.kept]
        parts = [
            Node("fallback", CALL, (("operands", taken),), _results(name, types), graph)
            for name, graph in zip(("then", "otherwise"), graphs, strict=True)
        ]
        body = Graph("import", taken, nodes=tuple(parts), outputs=tuple(v for part in parts for v in part.results))
        self.append((("pred", pred), ("operands", tuple(given))), types, body)

    def loop(self) -> None:
        """The test of the first pass is outside."""
        test, gm = self.flow.bodies
        state = self.values(self.flow.state)
        (going,) = self.outer.inline(test, [*state, *self.operands])
        if not isinstance(going, Value):
            raise Unsupported("a loop whose test is a number")
        inner, (_, *inside) = self.enter(gm, [going, *state, *self.operands], first=(going.type,))
        after = inner.inline(gm, inside)
        (again,) = inner.inline(test, [*after, *inside[len(state) :]])
        body = inner.body(self.owned(inner, (again, *after)))
        types = [going.type, *(self.outer.type(one) for one in self.content)]
        args: list[tuple[str, Attr]] = [("state", (going, *state)), ("operands", tuple(self.given(self.operands)))]
        if self.flow.stacked:
            assert isinstance(types[1], TensorType)
            assert isinstance(going.type, TensorType)
            count = types[1].shape[0]
            types[0], args = replace(going.type, shape=(count,), strides=(1,)), [*args, ("stacked", True)]
        self.append(tuple(args), types, body, hidden=1)

    def scan(self) -> None:
        """Rows that are no tensors have no place in the results."""
        (gm,) = self.flow.bodies
        state, rows = self.values(self.flow.state), self.values(self.flow.rows)
        inner, inside = self.enter(gm, [*state, *rows, *self.operands])
        body = inner.body(self.owned(inner, inner.inline(gm, inside), self.kept))
        args = (("state", tuple(state)), ("rows", tuple(rows)), ("operands", tuple(self.given(self.operands))))
        self.append(args, [self.outer.type(self.content[index]) for index in self.kept], body)

    def values(self, arguments: Sequence[Any]) -> list[Value]:
        """Arguments that must be tensors."""
        found = [self.outer.attr(argument) for argument in arguments]
        values = [attr for attr in found if isinstance(attr, Value) and isinstance(attr.type, TensorType)]
        if len(values) != len(found):
            raise Unsupported("control flow whose state is a number")
        return values

    def given(self, attrs: Sequence[Attr]) -> list[Value]:
        """The operands of the node: sizes and constants of the program are no operands, tensors of the model are."""
        tensors = [self.outer.constant(one) for one in self.constants.values()]
        return [*(attr for attr in attrs if isinstance(attr, Value)), *tensors]

    def enter(
        self, gm: fx.GraphModule, given: Sequence[Attr], first: Sequence[Type] = ()
    ) -> tuple[Importer, list[Attr]]:
        """An importer of a body, and what stands there for `given`. `first`: types of those without placeholders."""
        inner = self.outer.inner(gm)
        placeholders = _placeholders(gm)
        types = [*first, *(inner.type(placeholder.meta["val"]) for placeholder in placeholders)]
        inside: list[Attr] = []
        for index, (attr, type_) in enumerate(zip(given, types, strict=True)):
            if isinstance(attr, Value):
                attr = inner.value(f"in{index}", type_)
                inner.inputs.append(attr)
            inside.append(attr)
        inner.held = {}
        for identity, tensor in self.constants.items():
            inner.held[identity] = inner.value("constant", inner.type(tensor))
            inner.inputs.append(inner.held[identity])
        return inner, inside

    def owned(self, inner: Importer, results: Sequence[Attr], kept: Sequence[int] | None = None) -> list[Value]:
        """Results of a body, each in memory of its own."""
        chosen = results if kept is None else [results[index] for index in kept]
        values = [result for result in chosen if isinstance(result, Value)]
        if len(values) != len(chosen):
            raise Unsupported("control flow that returns a number")
        base = aten.bases(Graph("import", tuple(inner.inputs), nodes=tuple(inner.nodes)))
        taken = {value.name for value in inner.inputs}
        for index, value in enumerate(values):
            owner = base.get(value.name, value.name)
            if owner in taken and isinstance(value.type, TensorType):
                values[index] = inner.next_value(replace(value.type, strides=contiguous(value.type.shape)))
                args = (("self", value), ("memory_format", "contiguous_format"))
                inner.append(Node("op", "aten.clone.default", args, (values[index],), None, self.loc))
            taken.add(owner)
        return values

    def append(self, args: tuple[tuple[str, Attr], ...], types: Sequence[Type], body: Graph, hidden: int = 0) -> None:
        """Append the node, the first results of which are `hidden`."""
        values = [self.outer.next_value(type_) for type_ in types]
        made = Node("fallback", self.flow.op, args, tuple(values), body, self.loc)
        try:
            check(made)
        except InvalidIR as error:
            raise Unsupported(error.message) from None
        self.outer.append(made)
        named = dict(zip(self.kept, values[hidden:], strict=True))
        self.outer.env[self.node] = tuple(named.get(index) for index in range(len(self.content)))


def _results(name: str, types: Sequence[Type]) -> tuple[Value, ...]:
    return tuple(Value(f"{name}{index}", type_) for index, type_ in enumerate(types))
