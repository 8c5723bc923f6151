"""Pads matrix products in half precision whose sizes are not multiples of 16 bytes, such as those of a vocabulary.

Tensor cores are fed by loads of 16 bytes. Where rows of an operand start in between, a kernel loads element by element,
and libraries are several times slower still. So the operands are padded by zeros, and the result is cut. The pass pays
for a copy of each operand that no recipe and no producer pads.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from torch_rtx.dtypes import HALVES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.memory_model import bytes_of, typical
from torch_rtx.lowering.rewrite import Rewriter, escaping, from_weights, rewrite
from torch_rtx.op_work import ANCHORS, PRODUCTS, flops

MULTIPLE = 8  # halves in 16 bytes
TRANSPOSES = frozenset(("aten.t.default", "aten.permute.default", "aten.transpose.int", "aten.numpy_T.default"))
Pads = dict[str, dict[int, int]]  # by operand: elements after the end of each of the last two dimensions
# Padding saves half of the time of a product, at least. GPUs do 80 to 190 FLOPs on tensor cores per byte of bandwidth.
MIN_FLOPS, MIN_FLOPS_PER_BYTE = 1 << 30, 256


def pad_products(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Changes no value and no stride but those of operands."""
    products = [node for node in graph.nodes if node.kind == "op" and ANCHORS.get(node.op) == "gemm"]
    if not any(_sizes(node) for node in products):
        return graph
    padder = _Padder(graph)
    return rewrite(graph, infer, padder.visit)


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
    return rewriter.emit("aten.constant_pad_nd.default", None, types, self=attr, pad=pad)


def _is_matrix(value: Value) -> bool:
    return isinstance(value.type, TensorType) and len(value.type.shape) == 2


def _missing(size: Dim) -> int:
    """Elements to the next multiple; 0 for a symbolic size, of which nothing is known."""
    return -size % MULTIPLE if isinstance(size, int) else 0
