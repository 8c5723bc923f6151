"""Removes calls that change nothing: aliases, views and casts to the same type, copies that no one can tell apart."""

from __future__ import annotations

from torch_rtx import aten
from torch_rtx.ir import Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite

ALIASES = frozenset(f"aten.{name}.default" for name in ("alias", "detach", "lift_fresh", "lift_fresh_copy", "view", "expand"))
SAME_TYPE = ALIASES | {"aten.permute.default", "aten.slice.Tensor", "aten._to_copy.default", "aten.squeeze.dims", "aten.transpose.int"}
COPIES = frozenset(("aten._to_copy.default", "aten.clone.default", "aten.lift_fresh_copy.default", "aten.alias_copy.default"))


def simplify(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import; the graph computes the same values with fewer nodes."""
    fresh = _seen_outside(graph)
    reshaped: dict[str, Value] = {}  # what a view was made from

    def visit(node: Node, rewriter: Rewriter) -> bool:
        source = node.arg("self", node.arg("input"))
        if len(node.outputs) != 1 or not isinstance(source, Value) or node.outputs[0] is None:
            return False
        now = rewriter.now(source)
        if not isinstance(now, Value):
            return False
        output = node.outputs[0]
        if _changes_nothing(node, now) and not (node.op in COPIES and output.name in fresh):
            rewriter.replace(output, now)
            return True
        if node.op == "aten.view.default" and now.name in reshaped:
            first = reshaped[now.name]
            rewriter.nodes.append(Node("op", node.op, (("self", first), ("size", node.arg("size"))), node.outputs, None, node.loc))
            reshaped[output.name] = first
            return True
        if node.op == "aten.view.default":
            reshaped[output.name] = now
        return False

    return rewrite(graph, infer, visit)


def _changes_nothing(node: Node, source: Value) -> bool:
    """Whether the result is the same tensor as the `source`: same type, and the same elements in the same places."""
    if node.outputs[0] is None or node.outputs[0].type != source.type or not isinstance(source.type, TensorType):
        return False
    if node.op in ("aten.permute.default", "aten.transpose.int"):
        # Equal types alone do not do: a square matrix transposed twice over has them, a symmetric stride too.
        dims = node.arg("dims", (node.arg("dim0"), node.arg("dim1")))
        moved = dims[0] != dims[1] if node.op == "aten.transpose.int" else tuple(dims) != tuple(range(len(dims)))  # type: ignore[index,arg-type]
        return not moved
    if node.op == "aten.slice.Tensor":
        return node.arg("start", None) in (None, 0) and node.arg("step", 1) == 1
    return node.op in SAME_TYPE or node.op in COPIES


def _seen_outside(graph: Graph) -> set[str]:
    """The values whose memory the caller gets, through views as well: a copy among them is no needless copy."""
    seen = returned(graph)
    for node in reversed(graph.nodes):
        leaves = any(value is not None and value.name in seen for value in node.outputs)
        if leaves and (node.kind == "fallback" or node.op in COPIES or aten.is_view(aten.overload(node.op))):
            seen.update(value.name for value in node.inputs)
        if node.kind == "fallback":  # it may keep what it gets, or write to it
            seen.update(value.name for value in node.inputs)
    return seen
