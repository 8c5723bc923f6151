"""Accumulation: calls that add values to elements of a tensor at positions that data decide, or put values there.
Gradients of look-ups add; caches, permutations and sorting put.

A kernel of one writes to its result in memory, which must hold the tensor that the call starts from: the result lies in
that operand's own memory, see `continued`. If the call makes a new tensor, the memory must be one that nobody else
needs; if it is one of `ir.UPDATES`, the operand is an input or weight of the graph, which the kernel writes to.
"""

from __future__ import annotations

from torch_rtx.foreign import starts_of
from torch_rtx.ir import UPDATES, Attr, Graph, Node, TensorType, Value, attr_values

CAPTURED = "torch_rtx.flex_attention_grad_captured.default"  # adds gradients at places that a text computes
ALWAYS = frozenset(("aten.index_add.default", "aten.scatter_add.default", CAPTURED))
PUTS = frozenset(("aten.index_put.default", "aten._unsafe_index_put.default"))
SCATTERS = frozenset(("aten.scatter.src", "aten.scatter.value"))
COPIES = frozenset(f"aten.{name}" for name in ("index_copy.default", "index_fill.int_Scalar", "index_fill.int_Tensor"))


def call_of(node: Node) -> str:
    """The operator of a call; of an update, the one that makes a new tensor instead."""
    return UPDATES.get(node.op, node.op)


def accumulates(node: Node) -> bool:
    """Whether a call returns its argument `self` with values added to elements, several to one where positions
    recur."""
    if call_of(node) in PUTS:
        return node.arg("accumulate", False) is True
    if node.op == "aten.scatter_reduce.two":
        return node.arg("reduce") == "sum" and node.arg("include_self", True) is True
    return node.op in ALWAYS


def replaces(node: Node) -> bool:
    """Whether a call returns its argument `self` with elements replaced at positions that data decide; where positions
    recur, any of the values may stay. Where a mask decides, or one index for each row of a new tensor, an element is
    chosen instead."""
    call = call_of(node)
    if call in PUTS:
        return not node.arg("accumulate", False) and not _has_mask(node)
    chosen = node.op in SCATTERS and _is_one_of_each_row(node)
    return (call in COPIES or call in SCATTERS) and not chosen


def scatters(node: Node) -> bool:
    """Whether a call writes to elements of its argument `self` at positions that data decide, and leaves all others."""
    return accumulates(node) or replaces(node)


def _has_mask(node: Node) -> bool:
    types = [value.type for value in attr_values(node.arg("indices"))]
    return any(isinstance(type_, TensorType) and type_.dtype in ("bool", "u8") for type_ in types)


def _is_one_of_each_row(node: Node) -> bool:
    """A scatter has one index for each row along its dimension."""
    given, dim = [node.arg(name) for name in ("self", "index")], node.arg("dim")
    types = [value.type for value in given if isinstance(value, Value) and isinstance(value.type, TensorType)]
    if len(types) < 2 or not isinstance(dim, int) or not types[0].shape:
        return False
    rows = list(types[0].shape)
    rows[dim] = 1
    return types[1].shape == tuple(rows)


def starts(body: Graph) -> dict[str, Value]:
    """By the name of each result of a body that `scatters`, or launches a kernel that others wrote, or of a part that
    does: the input of the body that it starts from."""
    results = {value.name for value in attr_values(body.outputs)}
    found = (pair for node in body.nodes for pair in _starts(node).items() if pair[0] in results)
    return {name: start for name, start in found if isinstance(start, Value) and start in body.inputs}


def _starts(node: Node) -> dict[str, Attr]:
    if node.kind == "kernel":  # a part of a horizontal kernel
        return {**continued(node)}
    return {value.name: node.arg("self") for value in node.results} if scatters(node) else {**starts_of(node)}


def continued(node: Node) -> dict[str, Value]:
    """By the name of each result that the kernel `node` writes in part: the operand in whose memory it lies."""
    if node.kind != "kernel" or node.body is None:
        return {}
    given = {own.name: value for own, value in zip(node.body.inputs, node.inputs, strict=True)}
    named = {own.name: value for own, value in zip(attr_values(node.body.outputs), node.outputs, strict=True) if value}
    return {named[name].name: given[start.name] for name, start in starts(node.body).items()}
