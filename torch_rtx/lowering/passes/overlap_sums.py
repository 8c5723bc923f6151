"""Computes a product whose result is summed over ranks in two halves: the sum of one overlaps the product of the other.

Both are of the rows of the result, so that every element is the same sum of the same numbers. A link moves the first
half while the second one is computed, where otherwise it waits for all of the product, and all of the GPU for the link.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch_rtx.collectives import REDUCE, waited
from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, Users, rewrite, users

# The operand that has the rows of the result.
ROWS = {
    "aten.linear.default": "input",
    "aten.matmul.default": "self",
    "aten.mm.default": "self",
    "aten.addmm.default": "mat1",
}
VIEWS = frozenset(f"aten.{name}.default" for name in ("view", "_unsafe_view"))
PARTS = 2
LEAST_ROWS = 1024  # in all: the parts should still fill a GPU
LEAST_BYTES = 8 << 20  # below, a sum takes no longer than the start of another one, and of another product


@dataclass(frozen=True)
class _Sum:
    """A product, the axis of its rows, and the types of its result and of the tensor that is summed."""

    product: Node
    axis: int
    type: TensorType
    summed: TensorType


def overlap_sums(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import, before `dce`, which removes the whole products. Sizes are numbers: ranks have to
    agree on which sums there are. The products and their views are read by nothing but the sums."""
    if not any(node.op == REDUCE for node in graph.nodes):
        return graph
    found = _sums(graph)
    started: dict[str, tuple[_Sum, list[Value]]] = {}  # by result of the sum in the old graph: sums of the parts

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if id(node) in found:
            (result,) = node.results
            started[result.name] = found[id(node)], _start(node, found[id(node)], rewriter)
            return True
        tensor = waited(node)
        if tensor is None or tensor.name not in started:
            return False
        rewriter.replace(node.results[0], _finish(node, *started[tensor.name], rewriter))
        return True

    return rewrite(graph, infer, visit)


def _sums(graph: Graph) -> dict[int, _Sum]:
    """By `id` of a node that sums over ranks, what it sums, if that is done in parts."""
    readers, makers = users(graph), {value.name: node for node in graph.nodes for value in node.results}
    returned = {value.name for value in attr_values(graph.outputs)}
    found = {}
    for node in graph.nodes:
        if node.op != REDUCE or node.kind != "op":
            continue
        product = _maker(node.arg("input"), makers, readers, returned)
        if product is not None and product.op in VIEWS:
            product = _maker(product.arg("self"), makers, readers, returned)
        one = None if product is None else _sum(node, product)
        if one is not None:
            found[id(node)] = one
    return found


def _maker(value: object, makers: dict[str, Node], readers: Users, returned: set[str]) -> Node | None:
    """The node that makes `value`, which one node reads; None if others do, or nothing makes it."""
    if not isinstance(value, Value) or value.name in returned or len(readers[value.name]) != 1:
        return None
    node = makers.get(value.name)
    return node if node is not None and node.kind == "op" else None


def _sum(node: Node, product: Node) -> _Sum | None:
    """What is summed in parts; None if it is better summed as a whole."""
    summed = node.inputs[0].type
    if product.op not in ROWS or not isinstance(summed, TensorType) or not _by_rows(product):
        return None
    type_ = product.results[0].type
    if not isinstance(type_, TensorType) or not all(isinstance(size, int) for size in type_.shape):
        return None
    dense = type_.strides == contiguous(type_.shape) and summed.strides == contiguous(summed.shape)
    axis = next((at for at, size in enumerate(type_.shape[:-1]) if size != 1), None)
    if axis is None or not dense:
        return None
    rows, bytes_ = type_.shape[axis], prod(type_.shape) * DTYPES[type_.dtype].bytes  # type: ignore[arg-type]
    if rows % PARTS or rows < LEAST_ROWS or bytes_ < LEAST_BYTES:  # type: ignore[operator]
        return None
    return _Sum(product, axis, type_, summed)


def _by_rows(product: Node) -> bool:
    """Each row is multiplied by the same matrix, and the same vector is added to it."""
    ranks = {"other": 2, "self": 1}
    ranks.pop(ROWS[product.op], None)
    operands = ((product.arg(name), rank) for name, rank in ranks.items())
    return all(_rank(operand) == rank for operand, rank in operands if isinstance(operand, Value))


def _rank(value: Value) -> int:
    return len(value.type.shape) if isinstance(value.type, TensorType) else -1


def _start(node: Node, one: _Sum, rewriter: Rewriter) -> list[Value]:
    """The products of the parts, and the sum of each after it."""
    rows, name = one.type.shape[one.axis] // PARTS, ROWS[one.product.op]  # type: ignore[operator]
    args = dict(one.product.args)
    args = {key: rewriter.current(attr) if isinstance(attr, Value) else attr for key, attr in args.items()}
    options = {key: attr for key, attr in node.args if key != "input"}
    sums = []
    for part in range(PARTS):
        some = {"dim": one.axis, "start": part * rows, "end": (part + 1) * rows}
        given = rewriter.emit("aten.slice.Tensor", one.product.loc, self=args[name], **some)
        product = rewriter.emit(one.product.op, one.product.loc, **{**args, name: given})
        sums.append(rewriter.emit(node.op, node.loc, (product.type,), input=product, **options))
    return sums


def _finish(node: Node, one: _Sum, sums: list[Value], rewriter: Rewriter) -> Value:
    """The sums of all parts, when they are there, as one tensor."""
    ready = tuple(rewriter.emit(node.op, node.loc, (value.type,), tensor=value) for value in sums)
    whole = rewriter.emit("aten.cat.default", node.loc, tensors=ready, dim=one.axis)
    if one.summed == one.type:
        return whole
    return rewriter.emit("aten.view.default", node.loc, self=whole, size=one.summed.shape)
