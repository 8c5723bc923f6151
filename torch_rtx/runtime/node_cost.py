"""The minimal memory traffic and the FLOPs of a node for given sizes, from its types alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch_rtx import aten
from torch_rtx.accumulation import starts
from torch_rtx.ir import COPY, Dim, Node, ScalarType, TensorType, Value, attr_values, evaluate, has_parts
from torch_rtx.op_work import flops

# By operator: the argument that is a table, of which a call reads as many elements as it returns.
GATHERS = {"embedding": "weight", "index_select": "self", "gather": "self", "index": "self"}


@dataclass(frozen=True)
class Cost:
    """The minimal work of a node.

    Attributes:
        read, written: bytes; each tensor counts once, and of a table the rows that are read.
        flops: additions and multiplications of matrix products, convolutions and attention (masked or not); 0 for all
            other operations.
    """

    read: int
    written: int
    flops: int


def cost(node: Node, sizes: dict[str, int]) -> Cost | None:
    """The cost of `node` for these sizes of the symbols; None if a size depends on data."""
    try:
        read, written = _traffic(node, sizes)
        return Cost(read, written, sum(flops(step, lambda dim: _number(dim, sizes)) for step in steps(node)))
    except LookupError:
        return None


def steps(node: Node) -> Iterator[Node]:
    """The operations of a kernel node, nested kernels flattened; of another node, the node itself."""
    for step in node.body.nodes if node.body is not None else ():
        yield from steps(step)
    if node.body is None:
        yield node


def is_view(node: Node) -> bool:
    """The node moves no data."""
    return node.kind == "view" or (node.kind == "op" and aten.is_view(aten.overload(node.op)))


def _traffic(node: Node, sizes: dict[str, int]) -> tuple[int, int]:
    if is_view(node):
        return 0, 0
    if node.writes and node.body is None:
        target, *rest = node.inputs
        written = target if node.op == COPY else _update(node)
        return sum(nbytes(value, sizes) for value in rest), nbytes(written, sizes)
    if node.body is not None and has_parts(node.body) and starts(node.body):
        parts = [_traffic(part, sizes) for part in node.body.nodes]
        return sum(read for read, _ in parts), sum(written for _, written in parts)
    body, given = ((node,), node.inputs) if node.body is None else (node.body.nodes, node.body.inputs)
    made, begun = node.outputs, {} if node.body is None else starts(node.body)
    if node.body is not None and begun:  # reads and writes the elements that it adds to
        given = tuple(value for value in given if value not in begun.values())
        pairs = zip(node.outputs, attr_values(node.body.outputs), strict=True)
        made = tuple(outer for outer, inner in pairs if inner.name not in begun)
    added = [_update(step) for step in body if not begun.keys().isdisjoint(value.name for value in step.results)]
    updated = sum(nbytes(value, sizes) for value in added)
    read = updated
    for value in dict.fromkeys(given):
        users = [step for step in body if value in step.inputs]
        gathers = [step for step in users if step.arg(GATHERS.get(operator(step.op), "")) == value]
        whole = nbytes(value, sizes)
        taken = [nbytes(step.outputs[0], sizes) for step in gathers]
        read += min(whole, sum(taken)) if users and len(gathers) == len(users) else whole
    return read, updated + sum(nbytes(value, sizes) for value in made)


def _update(node: Node) -> Value | None:
    """What a call writes to elements of a tensor, or adds to them; a number counts as nothing."""
    update = node.arg("source", node.arg("values", node.arg("src")))
    return update if isinstance(update, Value) else None


def operator(op: str) -> str:
    """ "linear" for `aten.linear.default`; the names of kernels and Python functions unchanged."""
    parts = op.split(".")
    return parts[1] if len(parts) == 3 else op


def _shape(value: object, sizes: dict[str, int]) -> list[int]:
    assert isinstance(value, Value)
    assert isinstance(value.type, TensorType)
    return [_number(dim, sizes) for dim in value.type.shape]


def nbytes(value: Value | None, sizes: dict[str, int]) -> int:
    """The size in memory, where an expanded dimension has one element."""
    if value is None or isinstance(value.type, ScalarType):
        return 0
    pairs = zip(_shape(value, sizes), value.type.strides, strict=True)
    return math.prod(size for size, stride in pairs if stride != 0) * aten.DTYPES[value.type.dtype].itemsize


def _number(dim: Dim, sizes: dict[str, int]) -> int:
    number = evaluate(dim, sizes)
    if number is None:
        raise LookupError(f"no input determines {dim}")
    return number
