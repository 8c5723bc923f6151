"""The last step of lowering, level import to level fused: what is no kernel by now is a view or a call."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx import aten
from torch_rtx.ir import Graph, Node
from torch_rtx.lowering.infer import Inference


def finish(graph: Graph, infer: Inference) -> Graph:
    """An op becomes a `view` where it only makes an alias, else an `extern` call. Recipes keep level import: refit runs
    them call by call."""
    return replace(graph, level="fused", nodes=tuple(map(_kind, graph.nodes)))


def _kind(node: Node) -> Node:
    if node.kind != "op":
        return node
    return replace(node, kind="view" if aten.is_view(aten.overload(node.op)) else "extern")
