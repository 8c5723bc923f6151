"""Merges calls that compute the same thing: same op, same arguments."""

from __future__ import annotations

from torch_rtx import aten
from torch_rtx.ir import Graph, Node, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, rewrite, seen_outside


def cse(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Random draws, effects and copies that the caller gets stay apart."""
    first: dict[object, tuple[Value | None, ...]] = {}
    fresh = seen_outside(graph, writes=False)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if not node.outputs or node.writes or aten.is_random(aten.overload(node.op)):
            return False
        if any(value is not None and value.name in fresh for value in node.outputs):
            return False
        # bool is int to a dict: True and 1 must not meet, nor 0.0 and -0.0
        key = (node.op, repr(node.map_inputs(rewriter.now)))
        twin = first.setdefault(key, node.outputs)
        if twin is node.outputs or any(a is None and b is not None for a, b in zip(twin, node.outputs, strict=True)):
            return False
        for mine, theirs in zip(node.outputs, twin, strict=True):
            rewriter.replace(mine, theirs)
        return True

    return rewrite(graph, infer, visit)
