"""What passes are made of: walk a graph's nodes, keep, replace or add, and get the new graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import replace

from torch_rtx import aten
from torch_rtx.ir import Attr, Graph, Loc, Node, Type, Value, attr_map, attr_values
from torch_rtx.lowering.infer import Inference

Users = dict[str, list[Node]]
COPIES = frozenset(f"aten.{name}.default" for name in ("_to_copy", "clone", "lift_fresh_copy", "alias_copy"))


def users(graph: Graph) -> Users:
    """Per value name, the nodes that read it, in order; a node that reads it twice stands once."""
    found: Users = {}
    for node in graph.nodes:
        for name in dict.fromkeys(value.name for value in node.inputs):
            found.setdefault(name, []).append(node)
    return found


def returned(graph: Graph) -> set[str]:
    """The names of the values that the graph returns."""
    return {value.name for value in attr_values(graph.outputs)}


def seen_outside(graph: Graph, writes: bool = True) -> set[str]:
    """The values whose memory others than the graph's calls get, through views as well: a copy there has a purpose.

    Others are the caller, fallbacks, which may keep or write to what they get, and writes to inputs: a copy of an input
    that is written later has to hold what was there before. Calls that address memory, as `as_strided` does, count
    as well: what they read depends on where a tensor begins, which no type says.

    Args:
        writes: whether writes count. They take elements, not memory: who merges equal values need not tell those apart.
    """
    final = (n for n in graph.nodes if n.kind == "fallback" or (writes and n.writes) or n.op in aten.STRIDED)
    return behind_views(graph, returned(graph) | {value.name for node in final for value in node.inputs})


def behind_views(graph: Graph, names: Set[str]) -> set[str]:
    """`names`, and the values that they are views or copies of."""
    found = set(names)
    for node in reversed(graph.nodes):
        leads = any(value is not None and value.name in found for value in node.outputs)
        if leads and node.kind != "fallback" and (node.op in COPIES or aten.is_view(aten.overload(node.op))):
            found.update(value.name for value in node.inputs)
    return found


class Rewriter:
    """Builds the successor of `graph`, node by node, in order.

    `keep` takes a node over, `emit` adds a call whose type is inferred, `replace` makes later nodes read something
    else.
    """

    def __init__(self, graph: Graph, infer: Inference) -> None:
        self.graph, self.infer = graph, infer
        self.nodes: list[Node] = []
        self._replaced: dict[str, Attr] = {}
        self._names = {value.name for value in graph.values()} | set(graph.syms)
        self._count = 0

    def now(self, value: Value) -> Attr:
        """What stands for `value` of the old graph by now."""
        return self._replaced.get(value.name, value)

    def replace(self, value: Value | None, by: Attr) -> None:
        """Let nodes that follow read `by` in place of `value`."""
        if value is not None:
            self._replaced[value.name] = by

    def keep(self, node: Node) -> None:
        """Take `node` over, reading the replacements."""
        if any(value.name in self._replaced for value in node.inputs):
            node = replace(node, args=node.map_inputs(self.now))
        self.nodes.append(node)

    def emit(self, op: str, loc: Loc | None = None, types: tuple[Type, ...] | None = None, /, **args: Attr) -> Value:
        """A new call with one result, or the first of its results.

        Args:
            types: those of the results where they are known, as between operands of one type: inference takes time.

        Raises:
            Unsupported: the op does not take these arguments.
        """
        # A recipe is built from the types of the reference device; MAIN or not, weights live where the engine does.
        pairs = tuple(args.items())
        outputs = tuple(self._fresh(type_) for type_ in types or self.infer(op, pairs))
        self.nodes.append(Node("op", op, pairs, outputs, None, loc))
        return outputs[0]

    def _fresh(self, type_: Type) -> Value:
        while (name := f"n{self._count}") in self._names:
            self._count += 1
        self._names.add(name)
        return Value(name, type_)

    def finish(self) -> Graph:
        """The new graph."""
        outputs = tuple(attr_map(attr, self.now) for attr in self.graph.outputs)
        return replace(self.graph, nodes=tuple(self.nodes), outputs=outputs)


def rewrite(graph: Graph, infer: Inference, visit: Callable[[Node, Rewriter], bool]) -> Graph:
    """Walk the nodes; `visit` returns True where it has dealt with the node, else the node is kept."""
    rewriter = Rewriter(graph, infer)
    for node in graph.nodes:
        if node.kind != "op" or not visit(node, rewriter):
            rewriter.keep(node)
    return rewriter.finish()


def only_user(values: Iterable[Value | None], found: Users, outputs: set[str]) -> Node | None:
    """The only node that reads any of `values`, if there is one and the graph returns none of them."""
    readers = [node for value in values if value is not None for node in found.get(value.name, ())]
    if len(readers) != 1 or any(value is not None and value.name in outputs for value in values):
        return None
    return readers[0]
