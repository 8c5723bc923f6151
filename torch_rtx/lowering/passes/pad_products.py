"""Pads matrix products in half precision whose sizes are not multiples of 16 bytes, such as those of a vocabulary.

Tensor cores are fed by loads of 16 bytes. Where rows of an operand start in between, a kernel loads element by element,
and libraries are several times slower still. So the operands are padded by zeros, and the result is cut. The pass pays
for a copy of each operand that no recipe and no producer pads. Where the gradient of a layer's result is padded, its
sums over rows, the gradient of the bias, are those of the padded one: one loop computes the gradient, pads and sums it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TypeGuard

from torch_rtx.dtypes import HALVES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, attr_values, contiguous, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.memory_model import bytes_of, typical
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.rewrite import Rewriter, escaping, from_weights, rewrite
from torch_rtx.op_work import ANCHORS, PRODUCTS, flops

MULTIPLE = 8  # halves in 16 bytes
PAD, SUM = "aten.constant_pad_nd.default", "aten.sum.dim_IntList"
VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
TRANSPOSES = frozenset(("aten.t.default", "aten.permute.default", "aten.transpose.int", "aten.numpy_T.default"))
Pads = dict[str, dict[int, int]]  # by operand: elements after the end of each of the last two dimensions
# Padding saves half of the time of a product, at least. GPUs do 80 to 190 FLOPs on tensor cores per byte of bandwidth.
MIN_FLOPS, MIN_FLOPS_PER_BYTE = 1 << 30, 256


def pad_products(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Changes no value and no stride but those of operands."""
    products = [node for node in graph.nodes if node.kind == "op" and ANCHORS.get(node.op) == "gemm"]
    if not any(_sizes(node) for node in products):
        return graph
    padded = rewrite(graph, infer, _Padder(graph).visit)
    return rewrite(padded, infer, sums.visit) if (sums := _Sums(padded, infer)).pads else padded


def _sizes(node: Node) -> tuple[TensorType, TensorType, TensorType] | None:
    """The types of operands and result of a product in half precision; None if one is a vector."""
    first, second, _ = PRODUCTS[node.op]
    values = node.arg(first), node.arg(second), node.outputs[0]
    types = [value.type for value in values if isinstance(value, Value) and isinstance(value.type, TensorType)]
    fits = len(types) == 3 and all(type_.dtype in HALVES and len(type_.shape) > 1 for type_ in types)
    return (types[0], types[1], types[2]) if fits else None


class _Padder:
    def __init__(self, graph: Graph) -> None:
        self._producer = {value.name: node for node in graph.nodes for value in node.results}
        self._escaping = escaping(graph)
        self._constant = from_weights(graph)
        self._padded: dict[tuple[str, tuple[int, ...]], Value] = {}

    def visit(self, node: Node, rewriter: Rewriter) -> bool:
        types = _sizes(node) if ANCHORS.get(node.op) == "gemm" else None
        if types is None:
            return False
        (first, second, _), (a, b, out) = PRODUCTS[node.op], types
        k, n = (-1, -2) if node.op == "aten.linear.default" else (-2, -1)
        escapes = node.outputs[0] is not None and node.outputs[0].name in self._escaping
        depth = _missing(a.shape[-1]) if a.strides[-1] == 1 or b.strides[k] == 1 else 0
        columns = _missing(b.shape[n]) if b.strides[n] == 1 or not escapes else 0
        rows = _missing(a.shape[-2]) if a.strides[-1] != 1 else 0
        pads = {first: {-2: rows, -1: depth}, second: {k: depth, n: columns}}
        pads = {name: by for name, by in pads.items() if any(by.values())}
        if not pads or not self._pays(node, pads, out if escapes and columns else None):
            return False
        with suppress(Unsupported):  # of symbolic sizes that an operator's rules can't handle
            self._write(node, out, pads, {-2: rows, -1: columns}, rewriter)
            return True
        return False

    def _write(self, node: Node, out: TensorType, pads: Pads, cut: dict[int, int], rewriter: Rewriter) -> None:
        """Add the padded product, and `cut` its result along each axis to the type `out`."""
        added = PRODUCTS[node.op].added
        args = dict(node.args)
        for name, by in pads.items():
            args[name] = self._pad(args[name], by, rewriter)
        if added and isinstance(args.get(added), Value):
            args[added] = _pad_addend(args[added], out.shape, cut, rewriter)
        result = rewriter.emit(node.op, node.loc, **args)
        for axis, missing in cut.items():
            if missing:
                end = out.shape[axis]
                result = rewriter.emit("aten.slice.Tensor", node.loc, self=result, dim=axis, start=0, end=end)
        if result.type != out:
            result = rewriter.emit(
                "aten.clone.default", node.loc, (out,), self=result, memory_format="contiguous_format"
            )
        rewriter.replace(node.outputs[0], result)

    def _pays(self, node: Node, pads: Pads, copied: TensorType | None) -> bool:
        """Whether the product is so large that it gains more than the copies cost."""
        operands = [(value, by) for name, by in pads.items() if isinstance(value := node.arg(name), Value)]
        types = [value.type for value, by in operands if not self._is_padded(value, by)]
        moved = 2 * sum(bytes_of(type_) for type_ in (*types, copied) if isinstance(type_, TensorType))
        return flops(node, typical) >= max(MIN_FLOPS, MIN_FLOPS_PER_BYTE * moved)

    def _is_padded(self, value: Value, by: dict[int, int]) -> bool:
        """A recipe pads the operand, or another product has had it padded."""
        source = self._source(value)
        padded = (value.name, (by[-1], by[-2])) if source is None else (source.name, (by[-2], by[-1]))
        return value.name in self._constant or padded in self._padded

    def _source(self, value: Value) -> Value | None:
        """The matrix of which `value` is the transpose; None if it is none."""
        producer = self._producer.get(value.name)
        source = producer.arg("self") if producer is not None and producer.op in TRANSPOSES else None
        return source if isinstance(source, Value) and _is_matrix(source) and _is_matrix(value) else None

    def _pad(self, attr: Attr, by: dict[int, int], rewriter: Rewriter) -> Value:
        """`attr` with zeros at the end of the last two dimensions; products that read it, or a transpose of it, share
        the padded copy."""
        assert isinstance(attr, Value)
        source = self._source(attr)
        if source is not None:
            swapped = self._pad(source, {-1: by[-2], -2: by[-1]}, rewriter)
            return rewriter.emit("aten.permute.default", None, self=swapped, dims=(1, 0))
        key = attr.name, (by[-1], by[-2])
        if key not in self._padded:
            self._padded[key] = _zeros_after(rewriter.current(attr), by, rewriter)
        return self._padded[key]


class _Sums:
    """Sums over all rows of matrices that are padded, and read by nothing else.

    Attributes:
        pads: by the name of the matrix, the node that pads its rows.
    """

    def __init__(self, graph: Graph, infer: Inference) -> None:
        self._root: dict[str, str] = {}
        readers: dict[str, list[Node]] = {}
        for node in dce(graph, infer).nodes:  # a transpose that was padded is read by nothing any more
            source, result = node.arg("self"), node.outputs[0] if node.outputs else None
            if (
                node.op in VIEWS
                and _has_rows(source)
                and _has_rows(result)
                and _shape(source)[-1] == _shape(result)[-1]
            ):
                self._root[result.name] = self._of(source)
            else:
                for value in node.inputs:
                    readers.setdefault(self._of(value), []).append(node)
        returned = {self._of(value) for value in attr_values(graph.outputs)}
        found = {self._of(node.inputs[0]): node for node in graph.nodes if node.op == PAD and _pads_rows(node)}
        self.pads = {
            name: pad
            for name, pad in found.items()
            if name not in returned
            and any(_sums_all_rows(node) for node in readers[name])
            and all(node is pad or _sums_all_rows(node) for node in readers[name])
        }
        self._padded: dict[str, Value] = {}

    def visit(self, node: Node, rewriter: Rewriter) -> bool:
        """Pad before the first sum."""
        root = self._of(node.inputs[0]) if node.inputs else ""
        if root not in self.pads or not (node is self.pads[root] or _sums_all_rows(node)):
            return False
        pad, source, result = self.pads[root], node.inputs[0], node.outputs[0]
        assert result is not None
        if root not in self._padded:
            (made,) = pad.results
            shape, matrix = _shape(pad.inputs[0]), rewriter.current(source)
            if shape != _shape(source):
                matrix = rewriter.emit(VIEWS[0], node.loc, self=matrix, size=shape)
            self._padded[root] = rewriter.emit(PAD, pad.loc, (made.type,), **{**dict(pad.args), "self": matrix})
        if node is pad:
            rewriter.replace(result, self._padded[root])
            return True
        padded, dtype = self._padded[root], node.arg("dtype")
        total = rewriter.emit(SUM, node.loc, self=padded, dim=(0,), keepdim=False, dtype=dtype)
        part = rewriter.emit("aten.slice.Tensor", node.loc, self=total, dim=0, start=0, end=_shape(result)[-1])
        rewriter.replace(result, rewriter.emit(VIEWS[0], node.loc, self=part, size=_shape(result)))
        return True

    def _of(self, value: Value) -> str:
        """The matrix of which `value` is a view, with the same rows."""
        return self._root.get(value.name, value.name)


def _has_rows(attr: Attr) -> TypeGuard[Value]:
    """Rows of a known size follow each other in memory."""
    type_ = attr.type if isinstance(attr, Value) else None
    known = isinstance(type_, TensorType) and type_.shape and all(isinstance(size, int) for size in type_.shape)
    return isinstance(type_, TensorType) and bool(known) and type_.strides == contiguous(type_.shape)


def _shape(value: Value) -> tuple[Dim, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.shape


def _pads_rows(node: Node) -> bool:
    pad, value = node.arg("pad"), node.arg("value")
    rows = isinstance(pad, tuple) and len(pad) == 2 and pad[0] == 0 and value in (None, 0)
    return rows and _is_matrix(node.inputs[0]) and _has_rows(node.inputs[0])


def _sums_all_rows(node: Node) -> bool:
    """`node` adds up the rows of a tensor, over all dimensions but the last one."""
    if node.op != SUM or not _has_rows(node.inputs[0]) or not _has_rows(node.outputs[0]):
        return False
    rank, dims = len(_shape(node.inputs[0])), node.arg("dim")
    axes = [axis % rank for axis in dims if isinstance(axis, int)] if isinstance(dims, tuple) else []
    return sorted(axes) == [*range(rank - 1)]


def _pad_addend(attr: Attr, shape: tuple[Dim, ...], by: dict[int, int], rewriter: Rewriter) -> Attr:
    """The addend of a product whose result is padded, where it is not broadcast."""
    assert isinstance(attr, Value)
    assert isinstance(attr.type, TensorType)
    own = attr.type.shape
    wanted = {axis: n if len(own) >= -axis and own[axis] == shape[axis] else 0 for axis, n in by.items()}
    current = rewriter.current(attr)
    return _zeros_after(current, wanted, rewriter) if any(wanted.values()) else current


def _zeros_after(attr: Attr, by: dict[int, int], rewriter: Rewriter) -> Value:
    assert isinstance(attr, Value)
    assert isinstance(attr.type, TensorType)
    pad = (0, by[-1], 0, by[-2]) if by[-2] else (0, by[-1])
    types = None
    if len(attr.type.shape) < 4:  # of more, some are in channels-last layout; fewer may be symbolic, unlike inference
        *lead, last = attr.type.shape
        shape = (*lead[:-1], *(dim_expr("+", size, by[-2]) for size in lead[-1:]), dim_expr("+", last, by[-1]))
        types = (replace(attr.type, shape=shape, strides=contiguous(shape)),)
    return rewriter.emit(PAD, None, types, self=attr, pad=pad)


def _is_matrix(value: Value) -> bool:
    return isinstance(value.type, TensorType) and len(value.type.shape) == 2


def _missing(size: Dim) -> int:
    """Elements to the next multiple; 0 for a symbolic size, of which nothing is known."""
    return -size % MULTIPLE if isinstance(size, int) else 0
