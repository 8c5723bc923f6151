"""Accumulation: calls that add values to elements of a tensor at positions that data decide. Gradients of look-ups are
such calls.

A kernel of one adds to its result in memory, which must hold the tensor that the call starts from: the result lies in
that operand's own memory, see `continued`.
"""

from __future__ import annotations

from torch_rtx.ir import Graph, Node, Value, attr_values

ALWAYS = frozenset(("aten.index_add.default", "aten.scatter_add.default"))
PUTS = frozenset(("aten.index_put.default", "aten._unsafe_index_put.default"))


def accumulates(node: Node) -> bool:
    """Whether a call returns its argument `self` with values added to elements, several to one where positions
    recur."""
    if node.op in PUTS:
        return node.arg("accumulate", False) is True
    if node.op == "aten.scatter_reduce.two":
        return node.arg("reduce") == "sum" and node.arg("include_self", True) is True
    return node.op in ALWAYS


def starts(body: Graph) -> dict[str, Value]:
    """By the name of each result of a body that accumulates: the input of the body that it starts from."""
    results = {value.name for value in attr_values(body.outputs)}
    calls = (node for node in body.nodes if accumulates(node))
    found = ((value.name, node.arg("self")) for node in calls for value in node.results if value.name in results)
    return {name: start for name, start in found if isinstance(start, Value) and start in body.inputs}


def continued(node: Node) -> dict[str, Value]:
    """By the name of each result to which the kernel `node` adds: the operand in whose memory it lies."""
    if node.kind != "kernel" or node.body is None:
        return {}
    given = {own.name: value for own, value in zip(node.body.inputs, node.inputs, strict=True)}
    named = {own.name: value for own, value in zip(attr_values(node.body.outputs), node.outputs, strict=True) if value}
    return {named[name].name: given[start.name] for name, start in starts(node.body).items()}
