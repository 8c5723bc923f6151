"""Merges linear layers that read the same input into one, over concatenated weights: query, key and value above all.

One large product uses the GPU better than three small ones. The concatenation is a recipe (`hoist_weights` moves it),
the results are slices of the one product. Layers whose results are not needed at once merge only where that takes
little memory: keys and values that all layers of a decoder take from one encoder would be there until the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.index import from_dim, product
from torch_rtx.lowering.kernels.region import ANCHORS
from torch_rtx.lowering.rewrite import Rewriter, behind_views, returned, rewrite

LINEAR = "aten.linear.default"


def merge_linears(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import.

    Layers merge if their weights are parameters of one dtype, nobody relies on the strides of the result (a slice has
    others), and no product or attention between them needs one of them, or all that they give is no larger than
    something that the graph has anyway. A bias that is missing is zero.
    """
    weights = {weight.value.name for weight in graph.weights} - graph.written
    fixed = returned(graph) | {v.name for n in graph.nodes if n.kind == "fallback" for v in n.inputs}
    fixed |= behind_views(graph, {v.name for n in graph.nodes if n.op in aten.STRIDED for v in n.inputs})
    layers = {id(n): _group(n, weights) for n in graph.nodes if not any(v and v.name in fixed for v in n.outputs)}
    groups = _groups(graph, layers)
    group_of = {id(node): group for group in groups if len(group) > 1 for node in group}
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


def _groups(graph: Graph, layers: Mapping[int, object]) -> list[list[Node]]:
    """The nodes of equal keys in `layers`, which has them by id, that are to be merged."""
    most = max((_bytes(node, unknown=0) for node in graph.nodes), default=0)
    found: list[list[Node]] = []
    for parts in _at_once(graph, layers).values():
        whole = [node for part in parts for node in part]
        found += [whole] if sum(_bytes(node, unknown=inf) for node in whole) <= most else parts
    return found


def _bytes(node: Node, unknown: float) -> float:
    """Of the largest result whose sizes are numbers; `unknown` where there is none."""
    types = [value.type for value in node.outputs if value is not None and isinstance(value.type, TensorType)]
    counts = [(type_.dtype, product(map(from_dim, type_.shape)).number) for type_ in types]
    known = [count * aten.DTYPES[dtype].itemsize for dtype, count in counts if count is not None]
    return max(known, default=unknown)


def _at_once(graph: Graph, layers: Mapping[int, object]) -> dict[object, list[list[Node]]]:
    """The nodes of each key, in parts: no product needs one node of a part before the last one of it."""
    found: dict[object, list[list[Node]]] = {}
    current: dict[object, list[Node]] = {}  # the part of each key that its next node is for
    needing: dict[str, set[object]] = {}  # keys of those parts that a value is made of without a product
    for node in graph.nodes:
        needed = set[object]().union(*(needing.get(value.name, ()) for value in node.inputs))
        if node.op in ANCHORS:
            for key in needed:
                current.pop(key, None)
            needed = set()
        key = layers.get(id(node))
        if key is not None:
            if key not in current:
                current[key] = []
                found.setdefault(key, []).append(current[key])
            current[key].append(node)
            needed = {key}
        needing.update((value.name, needed) for value in node.outputs if value is not None and needed)
    return found


def _group(node: Node, weights: set[str]) -> object:
    """What linear layers must share to be merged; None for every other node."""
    if node.op != LINEAR or node.kind != "op":
        return None
    source, weight, bias = node.arg("input"), node.arg("weight"), node.arg("bias")
    if not isinstance(source, Value) or not isinstance(weight, Value) or not isinstance(weight.type, TensorType):
        return None
    if weight.name not in weights or (isinstance(bias, Value) and bias.name not in weights):
        return None
    return source.name, weight.type.dtype, weight.type.device


def _rows(node: Node) -> int:
    weight = node.arg("weight")
    assert isinstance(weight, Value)
    assert isinstance(weight.type, TensorType)
    return weight.type.shape[0]  # type: ignore[return-value]  # parameters have no symbolic sizes


def _product(group: list[Node], rewriter: Rewriter) -> Value:
    def bias_of(node: Node) -> Attr:
        if node.arg("bias") is not None:
            return node.arg("bias")
        return rewriter.emit("aten.new_zeros.default", node.loc, self=node.arg("weight"), size=(_rows(node),))

    def stacked(parts: Sequence[Attr]) -> Value:
        return rewriter.emit("aten.cat.default", group[0].loc, tensors=tuple(parts))

    source = group[0].arg("input")
    assert isinstance(source, Value)
    args: dict[str, Attr] = {"input": rewriter.now(source), "weight": stacked([node.arg("weight") for node in group])}
    if any(node.arg("bias") is not None for node in group):
        args["bias"] = stacked([bias_of(node) for node in group])
    return rewriter.emit(LINEAR, group[0].loc, **args)
