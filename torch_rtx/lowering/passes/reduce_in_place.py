"""Reduces over ranks in the memory of the operand, where nothing else reads this: a copy and its memory are saved."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.collectives import REDUCE, REDUCE_IN_PLACE
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values, contiguous
from torch_rtx.lowering.infer import Inference


def reduce_in_place(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import, when nothing else moves nodes. The operand is a new tensor that a call of the graph
    makes, or a contiguous view of one; it, and the views of it, are read by nothing from the reduction on."""
    if not any(node.op == REDUCE for node in graph.nodes):
        return graph
    base = aten.bases(graph)
    last: dict[str, int] = {}
    for at, node in enumerate(graph.nodes):
        last.update((base.get(value.name, value.name), at) for value in node.inputs)
    last.update((base.get(value.name, value.name), len(graph.nodes)) for value in attr_values(graph.outputs))
    continuing = {name for node in graph.nodes for new, old in continued(node).items() for name in (new, old.name)}
    makers = {value.name for node in graph.nodes if _makes(node) for value in node.results} - continuing

    def visit(at: int, node: Node) -> Node:
        operand = node.arg("input")
        if node.op != REDUCE or node.kind == "fallback" or not isinstance(operand, Value):
            return node
        type_ = operand.type
        owner = base.get(operand.name, operand.name)
        own = owner in makers and last[owner] == at
        dense = isinstance(type_, TensorType) and type_.strides == contiguous(type_.shape)
        return replace(node, op=REDUCE_IN_PLACE) if own and dense else node

    return replace(graph, nodes=tuple(visit(at, node) for at, node in enumerate(graph.nodes)))


def _makes(node: Node) -> bool:
    """The results of `node` are in memory of their own, which nobody else keeps."""
    return node.kind != "fallback" and not node.writes and not aten.may_alias(node)
