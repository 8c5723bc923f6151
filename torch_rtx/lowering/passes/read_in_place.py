"""Removes layout copies of attention operands, and repeated key and value heads (grouped-query attention): the kernels
read any strides and share heads."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.op_work import ATTENTION, SDPA

CLONE = "aten.clone.default"
RESHAPES = ("aten.view.default", "aten._unsafe_view.default")


def read_in_place(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    producer = {value.name: node for node in graph.nodes for value in node.results if node.kind == "op"}

    def source(value: Attr, *ops: str) -> Attr:
        """The argument `self` of the op that computes `value`, if it is one of `ops`."""
        node = producer.get(value.name) if isinstance(value, Value) else None
        return node.arg("self") if node is not None and node.op in ops else None

    def skip_copies(value: Attr) -> Attr:
        while (before := source(value, CLONE)) is not None:
            value = before
        return value

    def key_value_heads(value: Attr) -> Attr:
        """The distinct heads, each of which `value`, [batch, heads, length, width], repeats for a group of queries."""
        node = producer.get(value.name) if isinstance(value, Value) else None
        if node is not None and node.op == "aten.repeat_interleave.self_int" and node.arg("dim") in (1, -3):
            return node.arg("self")
        expanded = skip_copies(source(value, *RESHAPES))
        unsqueezed = source(expanded, "aten.expand.default")
        heads = source(unsqueezed, "aten.unsqueeze.default")
        steps = (value, expanded, unsqueezed, heads)
        if not all(isinstance(step, Value) for step in steps):
            return None
        flat, repeated, one, shape = map(_shape, steps)
        if len(shape) != 4 or one != (*shape[:2], 1, *shape[2:]) or repeated != (*shape[:2], repeated[2], *shape[2:]):
            return None
        return heads if flat == (shape[0], dim_expr("*", *repeated[1:3]), *shape[2:]) else None

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op not in (SDPA, ATTENTION):
            return False
        operands = {name: skip_copies(node.arg(name)) for name in ("query", "key", "value")}
        shared = {name: skip_copies(key_value_heads(operands[name])) for name in ("key", "value")}
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
