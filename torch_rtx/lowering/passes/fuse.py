"""Forms regions, the last step of lowering: level import to level fused.

Every operation is a region of its own so far: a `view` where the op only makes an alias, else an `extern` call.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx import aten
from torch_rtx.ir import Graph, Node
from torch_rtx.lowering.infer import Inference


def fuse(graph: Graph, infer: Inference) -> Graph:
    """Recipes keep level import: they are not fused, refit runs them call by call."""
    return replace(graph, level="fused", nodes=tuple(map(_region, graph.nodes)))


def _region(node: Node) -> Node:
    if node.kind != "op":
        return node
    return replace(node, kind="view" if aten.is_view(aten.overload(node.op)) else "extern")
