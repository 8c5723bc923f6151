"""Merges linear layers that read the same input into one, over concatenated weights: query, key and value above all.

One large product uses the GPU better than three small ones. The concatenation is a recipe (`hoist_weights` moves it),
the results are slices of the one product.
"""

from __future__ import annotations

from contextlib import suppress

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, behind_views, returned, rewrite

LINEAR = "aten.linear.default"


def merge_linears(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import.

    Layers merge if their weights are parameters of one dtype, all or none has a bias, and nobody relies on the strides
    of the result: a slice has others.
    """
    weights = {weight.value.name for weight in graph.weights} - graph.written
    fixed = returned(graph) | {v.name for n in graph.nodes if n.kind == "fallback" for v in n.inputs}
    fixed |= behind_views(graph, {v.name for n in graph.nodes if n.op in aten.STRIDED for v in n.inputs})
    groups: dict[object, list[Node]] = {}
    for node in graph.nodes:
        key = _group(node, weights)
        if key is not None and not any(value is not None and value.name in fixed for value in node.outputs):
            groups.setdefault(key, []).append(node)
    group_of = {id(node): group for group in groups.values() if len(group) > 1 for node in group}
    merged: dict[int, Value] = {}

    def visit(node: Node, rewriter: Rewriter) -> bool:
        group = group_of.get(id(node))
        if group is None:
            return False
        if node is group[0]:
            with suppress(Unsupported):
                merged[id(group)] = _product(group, rewriter)
        if id(group) not in merged:
            return False
        start = sum(_rows(other) for other in group[: next(i for i, n in enumerate(group) if n is node)])
        piece = rewriter.emit(
            "aten.slice.Tensor", node.loc, self=merged[id(group)], dim=-1, start=start, end=start + _rows(node)
        )
        rewriter.replace(node.outputs[0], piece)
        return True

    return rewrite(graph, infer, visit)


def _group(node: Node, weights: set[str]) -> object:
    """What linear layers must share to be merged; None for every other node."""
    if node.op != LINEAR or node.kind != "op":
        return None
    source, weight, bias = node.arg("input"), node.arg("weight"), node.arg("bias")
    if not isinstance(source, Value) or not isinstance(weight, Value) or not isinstance(weight.type, TensorType):
        return None
    if weight.name not in weights or (isinstance(bias, Value) and bias.name not in weights):
        return None
    return source.name, weight.type.dtype, weight.type.device, bias is None


def _rows(node: Node) -> int:
    weight = node.arg("weight")
    assert isinstance(weight, Value)
    assert isinstance(weight.type, TensorType)
    return weight.type.shape[0]  # type: ignore[return-value]  # parameters have no symbolic sizes


def _product(group: list[Node], rewriter: Rewriter) -> Value:
    def stacked(name: str) -> Attr:
        if group[0].arg(name) is None:
            return None
        return rewriter.emit("aten.cat.default", group[0].loc, tensors=tuple(node.arg(name) for node in group))

    source = group[0].arg("input")
    assert isinstance(source, Value)
    args = {"input": rewriter.now(source), "weight": stacked("weight"), "bias": stacked("bias")}
    return rewriter.emit(LINEAR, group[0].loc, **{key: value for key, value in args.items() if value is not None})
