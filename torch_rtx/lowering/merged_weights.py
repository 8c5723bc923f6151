"""Equal computations of several weights, each row for itself, as one computation of weights that lie side by side.

    f(a), f(b)  ->  f(cat(a, b))        f: casts, scales of rows or of blocks in them, rounding, unpacking

So layers with quantized weights become one layer with quantized weights, and not one with a sum of their parts, which
nothing would recognize.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_rtx import aten
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, attr_map
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.kernels.index import Index, from_dim, product
from torch_rtx.lowering.rewrite import Rewriter, from_weights
from torch_rtx.lowering.widening import quantizes

SIZED = frozenset(f"aten.{name}.default" for name in ("view", "_unsafe_view", "reshape", "expand"))
RESHAPES = SIZED - {"aten.expand.default"} | {f"aten.{name}" for name in ("unsqueeze.default", "squeeze.dims")}
REDUCTIONS = frozenset(f"aten.{name}" for name in ("amax.default", "amin.default", "sum.dim_IntList", "mean.dim"))
Axis = int | None  # the dimension of the rows; None: all rows have the same


def is_pointwise(node: Node) -> bool:
    """Whether a call computes each element of its only result from elements at the same position."""
    if node.kind != "op" or len(node.outputs) != 1:
        return False
    op = aten.overload(node.op)
    return (torch.Tag.pointwise in op.tags or node.op == "aten._to_copy.default") and not aten.is_random(op)


class MergedWeights:
    """Finds such computations in `graph`, and writes them as one."""

    def __init__(self, graph: Graph) -> None:
        self._weights = {weight.value.name for weight in graph.weights} - graph.written
        self._fixed = from_weights(graph)
        self._producer = {value.name: node for node in graph.nodes for value in node.results}
        self._quantized: dict[str, bool] = {}
        self._ids: dict[object, int] = {}
        self._keys: dict[tuple[str, Axis], int | None] = {}
        self._made: dict[tuple[tuple[str, ...], Axis], Value] = {}

    def key(self, value: Value, axis: Axis) -> int | None:
        """Equal for values whose rows are computed from those of weights by equal calls; None for other values."""
        at = value.name, axis
        if at not in self._keys:
            found = self._key(value, axis)
            self._keys[at] = None if found is None else self._ids.setdefault(found, len(self._ids))
        return self._keys[at]

    def are_equal(self, values: Sequence[Value], axis: int) -> bool:
        """Whether `merged` takes these values."""
        keys = {self.key(value, axis) for value in values}
        return len(keys) == 1 and None not in keys

    def merged(self, values: Sequence[Value], axis: Axis, rewriter: Rewriter) -> Value:
        """Values of equal keys, one after the other along `axis`."""
        at = tuple(value.name for value in values), axis
        if at not in self._made:
            self._made[at] = self._merged(values, axis, rewriter)
        return self._made[at]

    def is_quantized(self, value: Value) -> bool:
        """Whether the computation rounds wider numbers: what it makes has memory of its own, merged or not."""
        if value.name not in self._quantized:
            node = self._producer.get(value.name) if value.name in self._fixed else None
            self._quantized[value.name] = node is not None and (
                quantizes(node) or any(map(self.is_quantized, node.inputs))
            )
        return self._quantized[value.name]

    def _key(self, value: Value, axis: Axis) -> object | None:
        if axis is None:
            return "same", value.name
        type_ = value.type
        if value.name not in self._fixed or not isinstance(type_, TensorType) or type_.shape[axis] == 1:
            return None
        rest = *type_.shape[:axis], *type_.shape[axis + 1 :]
        if value.name in self._weights:
            return "weight", type_.dtype, type_.device, rest, axis
        node = self._producer[value.name]
        axes = _axes(node, axis)
        if axes is None:
            return None
        keys = [self.key(one, own) for one, own in zip(node.inputs, axes, strict=True)]
        if None in keys:
            return None
        # What is written in the call beside its operands: numbers of rows differ.
        attrs = tuple((name, _without(attr, axis if _is_size(node, name) else None)) for name, attr in node.args)
        return node.op, attrs, tuple(keys), rest, axis

    def _merged(self, values: Sequence[Value], axis: Axis, rewriter: Rewriter) -> Value:
        if axis is None:
            found = rewriter.current(values[0])
            assert isinstance(found, Value)
            return found
        if values[0].name in self._weights:
            tensors = tuple(rewriter.current(value) for value in values)
            return rewriter.emit("aten.cat.default", None, tensors=tensors, dim=axis)
        nodes = [self._producer[value.name] for value in values]
        axes = _axes(nodes[0], axis)
        assert axes is not None
        operands = [
            self.merged(each, own, rewriter)
            for each, own in zip(zip(*(node.inputs for node in nodes), strict=True), axes, strict=True)
        ]
        rows = sum(type_of(value).shape[axis] for value in values)  # type: ignore[misc]  # parameters' sizes are known
        args: dict[str, Attr] = {}
        left = iter(operands)
        for name, attr in nodes[0].args:
            args[name] = attr_map(attr, lambda _: next(left))
            if _is_size(nodes[0], name) and isinstance(attr, tuple) and attr[axis] != -1:  # what follows from the rest
                args[name] = *attr[:axis], rows, *attr[axis + 1 :]
        return rewriter.emit(nodes[0].op, nodes[0].loc, **args)


def _is_size(node: Node, name: str) -> bool:
    return name == "size" and node.op in SIZED


def _without(attr: Attr, axis: Axis) -> object:
    """What is written of an argument, with its type: operands are left out, and the number of rows."""
    if isinstance(attr, Value):
        return Value
    if isinstance(attr, tuple):
        return tuple(None if index == axis else _without(one, None) for index, one in enumerate(attr))
    return type(attr), attr


def _axes(node: Node, axis: int) -> list[Axis] | None:
    """For each operand of a call the dimension of its rows, where `axis` is that of the result; None if the rows of the
    result depend on others, or nothing is known of the call."""
    if node.kind != "op" or len(node.outputs) != 1 or not all(isinstance(one.type, TensorType) for one in node.inputs):
        return None
    if is_pointwise(node) or node.op == "aten.expand.default":
        found = [_broadcast(one, node.outputs[0], axis) for one in node.inputs]
    else:
        own = _moved(node, axis)
        found = [own] * len(node.inputs)
    return None if -1 in found else found


def _broadcast(operand: Value, result: Value | None, axis: int) -> Axis:
    """-1 if there is none."""
    assert result is not None
    shape, whole = type_of(operand).shape, type_of(result).shape
    own = axis - (len(whole) - len(shape))
    if own < 0 or shape[own] == 1:
        return None
    return own if shape[own] == whole[axis] else -1


def _moved(node: Node, axis: int) -> int:
    """Of calls whose operands all have the same rows; -1 if there is no such dimension."""
    shapes = [type_of(value).shape for value in (*node.inputs, *node.results)]
    rank = len(shapes[0])
    given = node.arg("dims") or node.arg("dim", 0)
    dims = [dim % rank for dim in (given if isinstance(given, tuple) else (given,)) if isinstance(dim, int)]
    if node.op in RESHAPES:
        return _same_place(shapes[0], shapes[-1], axis)
    if node.op == "aten.t.default" and rank == 2:
        return 1 - axis
    if node.op == "aten.permute.default":
        return dims[axis]
    if node.op in REDUCTIONS and dims:
        kept = [dim for dim in range(rank) if node.arg("keepdim") is True or dim not in dims]
        return kept[axis] if kept[axis] not in dims else -1
    if node.op in ("aten.slice.Tensor", "aten.cat.default"):
        return axis if axis not in dims else -1
    if node.op == "aten.select.int":
        return axis + (axis >= dims[0])
    if node.op == "aten.stack.default":
        at = given % (rank + 1) if isinstance(given, int) else 0
        return axis - (axis > at) if axis != at else -1
    if node.op == "aten.clone.default" or (node.op == "aten.view.dtype" and axis != rank - 1):
        return axis
    return -1


def _same_place(before: tuple[Dim, ...], after: tuple[Dim, ...], axis: int) -> int:
    """The dimension that a reshape leaves as it is, and so the elements of each of its indices; -1 without one."""

    def count(shape: tuple[Dim, ...]) -> Index:
        return product(map(from_dim, shape))

    places = (at for at, size in enumerate(before) if size == after[axis] and count(before[:at]) == count(after[:axis]))
    return next(places, -1)
