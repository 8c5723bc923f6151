"""Lets attention read its operands where they are: copies into another layout, and heads repeated for the queries that
share them, are left out."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.simplify_masks import ATTENTION
from torch_rtx.lowering.rewrite import Rewriter, rewrite

CLONE = "aten.clone.default"
RESHAPES = ("aten.view.default", "aten._unsafe_view.default")


def read_in_place(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    producer = {v.name: node for node in graph.nodes for v in node.outputs if v is not None and node.kind == "op"}

    def source(value: Attr, *ops: str) -> Attr:
        """What `value` is made from, if it is by one of `ops`."""
        node = producer.get(value.name) if isinstance(value, Value) else None
        return node.arg("self") if node is not None and node.op in ops else None

    def uncopied(value: Attr) -> Attr:
        while (before := source(value, CLONE)) is not None:
            value = before
        return value

    def unrepeated(value: Attr) -> Attr:
        """The heads that `value`, [batch, heads, length, width], repeats one after the other."""
        node = producer.get(value.name) if isinstance(value, Value) else None
        if node is not None and node.op == "aten.repeat_interleave.self_int" and node.arg("dim") in (1, -3):
            return node.arg("self")
        wide = uncopied(source(value, *RESHAPES))
        single = source(wide, "aten.expand.default")
        heads = source(single, "aten.unsqueeze.default")
        if not all(isinstance(part, Value) for part in (value, wide, single, heads)):
            return None
        flat, repeated, one, shape = (_shape(part) for part in (value, wide, single, heads))
        if len(shape) != 4 or one != (*shape[:2], 1, *shape[2:]) or repeated != (*shape[:2], repeated[2], *shape[2:]):
            return None
        return heads if flat == (shape[0], dim_expr("*", *repeated[1:3]), *shape[2:]) else None

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op != ATTENTION:
            return False
        operands = {name: uncopied(node.arg(name)) for name in ("query", "key", "value")}
        shared = {name: uncopied(unrepeated(operands[name])) for name in ("key", "value")}
        groups = {_shape(value)[:2] for value in shared.values() if isinstance(value, Value)}
        grouped = None not in shared.values() and len(groups) == 1 and not node.arg("enable_gqa")
        if grouped:
            operands |= shared
        pairs = tuple((name, operands.get(name, attr)) for name, attr in node.args)
        rewriter.keep(replace(node, args=(*pairs, ("enable_gqa", True)) if grouped else pairs))
        return True

    return rewrite(graph, infer, visit)


def _shape(value: Attr) -> tuple[Dim, ...]:
    assert isinstance(value, Value)
    assert isinstance(value.type, TensorType)
    return value.type.shape
