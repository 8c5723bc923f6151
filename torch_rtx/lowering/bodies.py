"""Lowers the bodies of control flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch_rtx import aten
from torch_rtx.control import given, with_bodies
from torch_rtx.ir import COPY, LOOP, Graph, Node, TensorType, Value, typical_size
from torch_rtx.lowering.passes.write_in_place import has_in_place_form

LARGE = 1 << 16  # bytes: a copy of less takes less time than a call of its own for the part that changes
LENGTH = 1024  # of a size that nobody knows


def lowered_control(node: Node, lower: Callable[[Graph], Graph]) -> Node:
    """Control flow with its bodies lowered by `lower`; other nodes as they are.

    A pass of a loop that replaces a part of a large tensor of its state, such as a KV cache, writes to it instead, if
    nothing in the pass needs the old contents afterwards.
    """
    if node.op == LOOP and node.body is not None and not node.arg("stacked"):
        writing = _writing(node.body, len(given(node, "state")))
        body = None if writing is node.body else lower(writing)
        if body is not None and all(inner.op != COPY for inner in body.nodes):
            return replace(node, body=body)
    return with_bodies(node, lower)


def _writing(body: Graph, count: int) -> Graph:
    """`body`, which copies what it makes of large parts of its state to where these are."""
    makers = {value.name: node for node in body.nodes for value in node.results}
    nodes, outputs = list(body.nodes), list(body.outputs)
    for place, (old, new) in enumerate(zip(body.inputs[:count], body.outputs[:count], strict=True)):
        maker = makers.get(new.name) if isinstance(new, Value) else None
        if maker is not None and has_in_place_form(maker) and maker.arg("self") == old and _is_large(old):
            nodes.append(Node("op", COPY, (("self", old), ("src", new)), (), None, maker.loc))
            outputs[place] = old
    return replace(body, nodes=tuple(nodes), outputs=tuple(outputs)) if len(nodes) > len(body.nodes) else body


def _is_large(value: Value) -> bool:
    if not isinstance(value.type, TensorType):
        return False
    size = aten.DTYPES[value.type.dtype].itemsize
    for dim in value.type.shape:
        size *= typical_size(dim, LENGTH)
    return size >= LARGE
