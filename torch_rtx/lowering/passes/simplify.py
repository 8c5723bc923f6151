"""Removes calls that change nothing: aliases, views and casts to the same type, copies that no one can tell apart."""

from __future__ import annotations

from torch_rtx.ir import Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import COPIES, Rewriter, rewrite, seen_outside

ALIASES = frozenset(f"aten.{name}.default" for name in ("alias", "detach", "lift_fresh", "view", "expand", "permute"))
OVER = "aten.copy.default"  # `src` in the type of `self`, whose elements it does not read
SAME_TYPE = ALIASES | COPIES | {OVER, "aten.slice.Tensor", "aten.squeeze.dims", "aten.transpose.int"}


def simplify(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import; the graph computes the same values with fewer nodes."""
    fresh = seen_outside(graph)
    reshaped: dict[str, Value] = {}  # what a view was made from

    def visit(node: Node, rewriter: Rewriter) -> bool:
        source = node.arg("src" if node.op == OVER else "self", node.arg("input"))
        if len(node.outputs) != 1 or not isinstance(source, Value) or node.outputs[0] is None:
            return False
        now = rewriter.now(source)
        if not isinstance(now, Value):
            return False
        output = node.outputs[0]
        if _changes_nothing(node, now) and not (node.op in (*COPIES, OVER) and output.name in fresh):
            rewriter.replace(output, now)
            return True
        if node.op == "aten.view.default" and now.name in reshaped:
            first = reshaped[now.name]
            args = ("self", first), ("size", node.arg("size"))
            rewriter.nodes.append(Node("op", node.op, args, node.outputs, None, node.loc))
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
    return node.op in SAME_TYPE
