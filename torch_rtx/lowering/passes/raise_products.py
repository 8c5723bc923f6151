"""Raises products of matrices written as a broadcast multiplication and a sum to one call, which has kernels.

    (a[..., :, None, :] * b[..., None, :, :]).sum(-1)    is    a @ b.mT

State-space models and linear attention are written so, with their dimensions in any order. Summed one by one, as many
elements are read as there are multiplications; a product reads each operand a few times, on tensor cores. The raised
call rounds fewer times. In float32 a sum stays one where matrices are multiplied in TF32, which the sum is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch_rtx.dtypes import HALVES
from torch_rtx.ir import Attr, Graph, Loc, Node, TensorType, Value, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, escaping, rewrite, users

MUL, SUM = "aten.mul.Tensor", "aten.sum.dim_IntList"
LEAST = 16  # rows, columns and terms of a product: fewer fill no tile
Axes = tuple[int, ...]


def raise_products(graph: Graph, infer: Inference, exact_products: bool) -> Graph:
    """Level import to level import. A multiplication stays if anything else reads its result."""
    dtypes = {*HALVES, "f32"} if exact_products else HALVES
    readers, kept = users(graph), escaping(graph)
    made = {value.name: node for node in graph.nodes for value in node.results}

    def visit(node: Node, rewriter: Rewriter) -> bool:
        terms = node.arg("self")
        if node.op != SUM or not isinstance(terms, Value) or terms.name in kept:
            return False
        product = made.get(terms.name)
        if product is None or product.op != MUL or len(readers[terms.name]) != 1:
            return False
        found = _matched(node, product)
        return (
            found is not None
            and found.result.dtype in dtypes
            and rewriter.expand(node, lambda: found.emit(rewriter, node.loc))
        )

    return rewrite(graph, infer, visit)


@dataclass(frozen=True)
class _Product:
    """A product of matrices.

    Attributes:
        result: the type of the sum.
        shape: of the terms; the axes below are dimensions of more than one element of these.
        batch, rows, columns, summed: the axes that both operands have, the first one alone, the second one alone, and
            those that are summed, which both have.
    """

    first: Value
    second: Value
    result: TensorType
    shape: tuple[int, ...]
    batch: Axes
    rows: Axes
    columns: Axes
    summed: Axes

    def emit(self, rewriter: Rewriter, loc: Loc | None) -> Value:
        """The calls in place of the sum; returns its result."""

        def emit(op: str, /, **args: Attr) -> Value:
            return rewriter.emit(f"aten.{op}", loc, **args)

        def matrix(operand: Value, *parts: Axes) -> Value:
            """[*batch, elements of the first part, elements of the second one]."""
            value, used = rewriter.current(operand), (*self.batch, *parts[0], *parts[1])
            assert isinstance(value, Value)
            skipped = len(self.shape) - len(_type(operand).shape)
            rest = [axis for axis in range(skipped, len(self.shape)) if axis not in used]
            for axis in rest:
                if _type(operand).shape[axis - skipped] != 1:  # the same elements again and again
                    value = emit("slice.Tensor", self=value, dim=axis - skipped, start=0, end=1)
            value = emit("permute.default", self=value, dims=tuple(axis - skipped for axis in (*rest, *used)))
            return emit("view.default", self=value, size=(*self._sizes(self.batch), *map(self._count, parts)))

        left, right = matrix(self.first, self.rows, self.summed), matrix(self.second, self.summed, self.columns)
        found = emit("matmul.default", self=left, other=right)
        order = (*self.batch, *self.rows, *self.columns)
        found = emit("view.default", self=found, size=self._sizes(order))
        found = emit("permute.default", self=found, dims=tuple(map(order.index, sorted(order))))
        if _type(found).strides != contiguous(_type(found).shape):
            found = emit("clone.default", self=found, memory_format="contiguous_format")
        return emit("view.default", self=found, size=self.result.shape)

    def _sizes(self, axes: Axes) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    def _count(self, axes: Axes) -> int:
        return prod(self._sizes(axes))


def _matched(node: Node, product: Node) -> _Product | None:
    """The product of matrices that `node` is, a sum of what `product` multiplies; None if it is none."""
    terms, first, second = node.arg("self"), product.arg("self"), product.arg("other")
    (result,) = node.outputs
    values = [value for value in (terms, result, first, second) if isinstance(value, Value)]
    types = [value.type for value in values if isinstance(value.type, TensorType)]
    if len(types) < 4 or len({(one.dtype, one.device) for one in types}) > 1:
        return None
    shape = tuple(size for size in types[0].shape if isinstance(size, int))
    dims = node.arg("dim")
    summed = [dim % len(shape) for dim in dims if isinstance(dim, int)] if isinstance(dims, tuple) and shape else []
    if len(shape) < len(types[0].shape) or not summed:
        return None
    found: dict[tuple[bool, bool, bool], Axes] = {}
    for axis, size in enumerate(shape):
        if size != 1:
            kind = _has(types[2], axis - len(shape)), _has(types[3], axis - len(shape)), axis in summed
            found[kind] = (*found.get(kind, ()), axis)
    kinds = (True, True, False), (True, False, False), (False, True, False), (True, True, True)
    axes = [found.pop(kind, ()) for kind in kinds]
    if found or min(prod(shape[axis] for axis in part) for part in axes[1:]) < LEAST:
        return None
    return _Product(values[2], values[3], types[1], shape, *axes)


def _has(type_: TensorType, axis: int) -> bool:
    """The elements of a tensor differ along an axis, counted from the last one."""
    return -axis <= len(type_.shape) and type_.shape[axis] != 1 and type_.strides[axis] != 0


def _type(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type
