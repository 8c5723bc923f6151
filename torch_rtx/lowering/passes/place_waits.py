"""Moves each wait for a collective to its first reader: what does not need the result runs meanwhile."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.accumulation import continued
from torch_rtx.collectives import waited
from torch_rtx.ir import Graph, Node
from torch_rtx.lowering.infer import Inference


def place_waits(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import, when nothing else moves nodes. No wait moves across a write, or a call that may be
    one: a collective reads its operand until it is waited for. Waits keep their order, and collectives their places."""
    if all(waited(node) is None for node in graph.nodes):
        return graph
    nodes: list[Node] = []
    left: list[Node] = []  # waits that have not come yet
    for node in graph.nodes:
        if waited(node) is not None:
            left.append(node)
            continue
        needed = {value.name for value in node.inputs}
        last = len(left) if _may_write(node) else _needed(left, needed)
        nodes += [*left[:last], node]
        del left[:last]
    return replace(graph, nodes=(*nodes, *left))


def _needed(waits: list[Node], names: set[str]) -> int:
    """How many of the waits come before a reader of `names`."""
    found = [at for at, wait in enumerate(waits, 1) if any(value.name in names for value in wait.results)]
    return max(found, default=0)


def _may_write(node: Node) -> bool:
    return node.kind == "fallback" or node.writes or not node.outputs or bool(continued(node))
