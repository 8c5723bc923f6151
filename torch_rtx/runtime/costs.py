"""What a node costs for given sizes, by its types alone: bytes of memory traffic, and operations of its products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch_rtx import aten
from torch_rtx.ir import COPY, Dim, Node, ScalarType, TensorType, Value, evaluate

# By operator: the argument whose last dimension a matrix product sums over.
PRODUCTS = {"mm": "self", "bmm": "self", "mv": "self", "dot": "self", "_int_mm": "self", "_scaled_mm": "self"}
PRODUCTS |= {"linear": "input", "addmm": "mat1", "baddbmm": "batch1"}
# By operator: the argument that is a table, of which a call reads as many elements as it returns.
GATHERS = {"embedding": "weight", "index_select": "self", "gather": "self", "index": "self"}


@dataclass(frozen=True)
class Cost:
    """What a node has to do at least.

    Attributes:
        read, written: bytes; each tensor counts once, and a table only with the rows that are taken from it.
        flops: additions and multiplications of matrix products, convolutions and attention (masked or not); 0 for all
            other operations.
    """

    read: int
    written: int
    flops: int


def cost(node: Node, sizes: dict[str, int]) -> Cost | None:
    """What `node` costs where the symbols are `sizes`; None where a size depends on data."""
    try:
        read, written = _traffic(node, sizes)
        return Cost(read, written, sum(_flops(step, sizes) for step in steps(node)))
    except LookupError:
        return None


def steps(node: Node) -> Iterator[Node]:
    """The operations inside of a kernel, and inside of kernels in it; of any other node, itself."""
    for step in node.body.nodes if node.body is not None else ():
        yield from steps(step)
    if node.body is None:
        yield node


def is_view(node: Node) -> bool:
    """Whether the node moves no data."""
    return node.kind == "view" or (node.kind == "op" and aten.is_view(aten.overload(node.op)))


def _traffic(node: Node, sizes: dict[str, int]) -> tuple[int, int]:
    if is_view(node):
        return 0, 0
    if node.writes:
        target, *rest = node.inputs
        part = node.arg(
            "source", node.arg("values", node.arg("src"))
        )  # of an update; a single number counts as nothing
        written = target if node.op == COPY else part if isinstance(part, Value) else None
        return sum(_bytes(value, sizes) for value in rest), _bytes(written, sizes)
    body, given = ((node,), node.inputs) if node.body is None else (node.body.nodes, node.body.inputs)
    read = 0
    for value in dict.fromkeys(given):
        users = [step for step in body if value in step.inputs]
        gathers = [step for step in users if step.arg(GATHERS.get(operator(step.op), "")) == value]
        whole = _bytes(value, sizes)
        taken = [_bytes(step.outputs[0], sizes) for step in gathers]
        read += min(whole, sum(taken)) if users and len(gathers) == len(users) else whole
    return read, sum(_bytes(value, sizes) for value in node.outputs)


def _flops(node: Node, sizes: dict[str, int]) -> int:
    """Twice the multiplications of a product, a convolution or an attention."""
    name = operator(node.op)
    out = node.outputs[0] if node.outputs else None
    if out is None or node.kind == "fallback":
        return 0
    if name in PRODUCTS:
        return 2 * _numel(out, sizes) * _shape(node.arg(PRODUCTS[name]), sizes)[-1]
    if name.startswith("conv") and "backward" not in name:
        swapped = "transpose" in name or node.arg("transposed") is True
        weight = _shape(node.arg("weight"), sizes)
        return 2 * _numel(node.arg("input") if swapped else out, sizes) * math.prod(weight[1:])
    if "scaled_dot_product" in name and "backward" not in name:
        keys = _shape(node.arg("key"), sizes)[-2]
        return 2 * keys * (_numel(node.arg("query"), sizes) + _numel(out, sizes))
    return 0


def operator(op: str) -> str:
    """`linear` of `aten.linear.default`; names of kernels and of Python functions as they are."""
    parts = op.split(".")
    return parts[1] if len(parts) == 3 else op


def _shape(value: object, sizes: dict[str, int]) -> list[int]:
    assert isinstance(value, Value)
    assert isinstance(value.type, TensorType)
    return [_number(dim, sizes) for dim in value.type.shape]


def _numel(value: object, sizes: dict[str, int]) -> int:
    return math.prod(_shape(value, sizes))


def _bytes(value: Value | None, sizes: dict[str, int]) -> int:
    """Of the tensor in memory, where what is expanded is one element."""
    if value is None or isinstance(value.type, ScalarType):
        return 0
    pairs = zip(_shape(value, sizes), value.type.strides, strict=True)
    return math.prod(size for size, stride in pairs if stride != 0) * aten.DTYPES[value.type.dtype].itemsize


def _number(dim: Dim, sizes: dict[str, int]) -> int:
    number = evaluate(dim, sizes)
    if number is None:
        raise LookupError(f"no input determines {dim}")
    return number
