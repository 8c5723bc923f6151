"""The last pass: marks the ops that are not in kernels as views or library calls."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx import aten
from torch_rtx.ir import Graph, Node
from torch_rtx.lowering.infer import Inference


def finish(graph: Graph, infer: Inference) -> Graph:
    """Level import to level fused. An op that only returns an alias becomes a `view`, others become `extern` calls.
    Recipes keep level import: refit runs them call by call."""
    return replace(graph, level="fused", nodes=tuple(map(_kind, graph.nodes)))


def _kind(node: Node) -> Node:
    if node.kind != "op":
        return node
    return replace(node, kind="view" if aten.is_view(aten.overload(node.op)) else "extern")
