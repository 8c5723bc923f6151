"""The graph rewriter of the passes, and queries about uses and escaping values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from operator import is_

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Loc, Node, Type, Value, attr_map, attr_values
from torch_rtx.lowering.infer import Inference

Users = dict[str, list[Node]]
COPIES = frozenset(f"aten.{name}.default" for name in ("_to_copy", "clone", "lift_fresh_copy", "alias_copy"))


def users(graph: Graph) -> Users:
    """The nodes that read each value, by its name, in order and without repeats."""
    found: Users = {}
    for node in graph.nodes:
        for name in dict.fromkeys(value.name for value in node.inputs):
            found.setdefault(name, []).append(node)
    return found


def returned(graph: Graph) -> set[str]:
    """The names of the values that the graph returns."""
    return {value.name for value in attr_values(graph.outputs)}


def from_weights(graph: Graph) -> set[str]:
    """The names of the weights that the graph does not write, and of the values that depend on these alone."""
    found = {weight.value.name for weight in graph.weights} - graph.written
    for node in graph.nodes:
        if node.inputs and all(value.name in found for value in node.inputs):
            found.update(value.name for value in node.results)
    return found


def escaping(graph: Graph, writes: bool = True) -> set[str]:
    """The names of the values whose memory escapes, directly or through views: passes must keep their copies.

    Memory escapes to the caller; to fallbacks, which may keep it or write to it; to writes of inputs, since a copy of
    an input must preserve its old contents; and to calls such as `as_strided`, which address memory directly and depend
    on the storage offset, which is not part of a type.

    Args:
        writes: count writes of inputs. They read elements only, so that merging equal values can ignore them.
    """
    sinks = (n for n in graph.nodes if n.kind == "fallback" or (writes and n.writes) or n.op in aten.STRIDED)
    return with_sources(graph, returned(graph) | {value.name for node in sinks for value in node.inputs})


def with_sources(graph: Graph, names: Set[str]) -> set[str]:
    """`names`, and the names of all values of which they are views or copies."""
    found = set(names)
    for node in reversed(graph.nodes):
        leads = any(value.name in found for value in node.results)
        if leads and node.kind != "fallback" and (node.op in COPIES or aten.is_view(aten.overload(node.op))):
            found.update(value.name for value in node.inputs)
    return found


def with_bases(graph: Graph, names: Set[str]) -> set[str]:
    """`names`, and the names of all values of which they may be views, or in whose memory kernels leave them."""
    found = set(names)
    for node in reversed(graph.nodes):
        found.update(start.name for name, start in continued(node).items() if name in found)
        if aten.may_alias(node) and any(value.name in found for value in node.results):
            found.update(value.name for value in node.inputs)
    return found


class Rewriter:
    """Builds the rewritten `graph`, node by node, in order.

    `keep` copies a node, `emit` adds a call with inferred types, `replace` substitutes a value in later nodes.
    """

    def __init__(self, graph: Graph, infer: Inference) -> None:
        self.graph, self.infer = graph, infer
        self.nodes: list[Node] = []
        self._replaced: dict[str, Attr] = {}
        # Later passes move nodes between the graph and the recipes: a name stands for one value in all of them.
        recipes = (weight.recipe for weight in graph.weights if weight.recipe is not None)
        self._names = {value.name for one in (graph, *recipes) for value in one.values()} | set(graph.syms)
        self._count = 0

    def current(self, value: Value) -> Attr:
        """The replacement of `value` of the old graph, or `value` itself."""
        return self._replaced.get(value.name, value)

    def replace(self, value: Value | None, by: Attr) -> None:
        """Make later nodes read `by` instead of `value`."""
        if value is not None:
            self._replaced[value.name] = by

    def keep(self, node: Node) -> None:
        """Add `node`, with its inputs replaced."""
        if any(value.name in self._replaced for value in node.inputs):
            node = replace(node, args=node.map_inputs(self.current))
        self.nodes.append(node)

    def expand(self, node: Node, make: Callable[[], Value | Sequence[Value | None] | None]) -> bool:
        """Replace `node` by what `make` emits, the values of its outputs. Returns whether it did: the node stays, and
        what was emitted goes, if `make` returns None or raises Unsupported, or if a value has another type."""
        before = len(self.nodes)
        try:
            found = make()
        except Unsupported:
            found = None
        found = (found,) if isinstance(found, Value) else found
        pairs = [] if found is None else list(zip(node.outputs, found, strict=True))
        if found is None or any(old is not None and (new is None or old.type != new.type) for old, new in pairs):
            del self.nodes[before:]
            return False
        for old, new in pairs:
            self.replace(old, new)
        return True

    def emit(self, op: str, loc: Loc | None = None, types: tuple[Type, ...] | None = None, /, **args: Attr) -> Value:
        """Add a call; returns its first result.

        Args:
            types: of the results, if known; None: inferred, on MAIN, which takes time.

        Raises:
            Unsupported: the op does not take these arguments.
        """
        pairs = tuple(args.items())
        found = types or self.infer(op, pairs)
        outputs = tuple(None if type_ is None else self.fresh(type_) for type_ in found)
        self.nodes.append(Node("op", op, pairs, outputs, None, loc))
        assert outputs[0] is not None
        return outputs[0]

    def fresh(self, type_: Type) -> Value:
        """A new value."""
        while (name := f"n{self._count}") in self._names:
            self._count += 1
        self._names.add(name)
        return Value(name, type_)

    def finish(self) -> Graph:
        """The new graph; the old one if nothing was changed."""
        same = len(self.nodes) == len(self.graph.nodes) and all(map(is_, self.nodes, self.graph.nodes))
        if same and not self._replaced:
            return self.graph
        outputs = tuple(attr_map(attr, self.current) for attr in self.graph.outputs)
        return replace(self.graph, nodes=tuple(self.nodes), outputs=outputs)


def rewrite(graph: Graph, infer: Inference, visit: Callable[[Node, Rewriter], bool]) -> Graph:
    """Visit all nodes in order. `visit` returns True if it replaced or removed the node; False keeps the node."""
    rewriter = Rewriter(graph, infer)
    for node in graph.nodes:
        if node.kind != "op" or not visit(node, rewriter):
            rewriter.keep(node)
    return rewriter.finish()


def only_user(values: Iterable[Value | None], found: Users, outputs: set[str]) -> Node | None:
    """The single node that reads any of `values`; None if there are several, or if the graph returns a value."""
    readers = [node for value in values if value is not None for node in found.get(value.name, ())]
    if len(readers) != 1 or any(value is not None and value.name in outputs for value in values):
        return None
    return readers[0]
