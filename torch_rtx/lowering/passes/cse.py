"""Common subexpression elimination: merges calls of the same op with the same arguments."""

from __future__ import annotations

from torch_rtx import aten
from torch_rtx.collectives import is_ordered
from torch_rtx.ir import Graph, Node, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, escaping, rewrite


def cse(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Random draws, effects, collectives, escaping values and memory that a call fills
    are not merged."""
    first: dict[object, tuple[Value | None, ...]] = {}
    escapes = escaping(graph, writes=False)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if not node.outputs or node.writes or is_ordered(node) or node.op in aten.UNINITIALIZED:
            return False
        if aten.is_random(aten.overload(node.op)):
            return False
        if any(value.name in escapes for value in node.results):
            return False
        # repr, since a dict does not distinguish True from 1, nor 0.0 from -0.0
        key = (node.op, repr(node.map_inputs(rewriter.current)))
        equal = first.setdefault(key, node.outputs)
        if equal is node.outputs or any(a is None and b is not None for a, b in zip(equal, node.outputs, strict=True)):
            return False
        for old, new in zip(node.outputs, equal, strict=True):
            rewriter.replace(old, new)
        return True

    return rewrite(graph, infer, visit)
