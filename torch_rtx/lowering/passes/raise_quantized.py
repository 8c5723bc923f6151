"""Raises products and convolutions of two quantized operands to products of their integers, or of their 8-bit floats.

    linear((a - z) * s, b * t)  ->  (_int_mm(a, b.t()) - z * sum(b)) * (s * t)

See `lowering.quantized` for which operands are. Scales that are constant along the contraction move behind it. A
product of integers is exact, so that the result has fewer errors than one of floats. What is computed for weights
becomes a recipe, as any: an engine of float weights quantizes them when it is refitted.

Products of 8-bit floats may be summed as tensor cores do it fastest, with an error that is a tenth of what quantization
costs.

A quantized weight of a product that stays one of floats is stored in 8 bits, too, and widened on the way.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from math import ceil, log2, prod

import torch

from torch_rtx import aten
from torch_rtx.dtypes import HALVES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, Value, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.iteration_space import iteration_space_of
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.quantized import Operands, Quantized, Stays, constant_along, minus, offset_of, type_of
from torch_rtx.lowering.ranges import Range
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.op_work import PRODUCTS, SCALES

log = logging.getLogger(__name__)

CAST, SUB = "aten._to_copy.default", "aten.sub.Tensor"
INT_MM, INT_CONV, SCALED_MM = "aten._int_mm.default", "torch_rtx.int_conv.default", "aten._scaled_mm.default"
ADD, MUL, VIEW = "aten.add.Tensor", "aten.mul.Tensor", "aten.view.default"
LINEAR = "aten.linear.default"
MATRICES = (LINEAR, *(f"aten.{name}.default" for name in ("mm", "addmm", "matmul", "bmm", "baddbmm")))
CONVOLUTIONS = tuple(f"aten.conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding"))
CONVOLUTIONS += ("aten.convolution.default",)
# Fewer terms or columns do not fill an instruction of tensor cores; the sum of more terms may not fit in int32.
MIN_TERMS, MAX_TERMS, MIN_COLUMNS = 16, 1 << 15, 8
FLOAT8_MULTIPLE = 16  # of terms and columns in `_scaled_mm`
LEAST_ROWS = 16  # of a product with scales for each
# Of products whose scales are left to what reads them, see `scales_wait`; in FLOP.
MANY_TERMS, SMALL_WORK, LARGE_WORK = 1280, 20e9, 40e9


def raise_quantized(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    raiser = _Raiser()
    raised = rewrite(graph, infer, raiser.visit)
    for node, reason in raiser.kept:
        log.debug("%s at %s stays one of floats: %s", node.op, node.loc, reason)
    if not raiser.count and not raiser.packed:
        return graph
    return dce(_pack(raised, infer, raiser.packed), infer)


def _pack(graph: Graph, infer: Inference, ranges: dict[str, Range]) -> Graph:
    """Whole numbers in floats go through int8, or 4 bits of uint8: that is what an engine stores of a weight."""

    def visit(node: Node, rewriter: Rewriter) -> bool:
        (result,) = node.outputs if len(node.outputs) == 1 else (None,)
        if result is None or result.name not in ranges:
            return False
        rewriter.keep(node)
        low, high, _ = ranges[result.name]
        size = type_of(result).shape
        small = high - low < 16 and isinstance(size[-1], int) and size[-1] % 2 == 0
        offset = int(low) if small else offset_of(low, high)
        whole = rewriter.emit(SUB, self=result, other=offset) if offset else result
        stored = rewriter.emit(CAST, self=whole, dtype="u8" if small else "i8")
        if small:
            stored = _through_4_bits(stored, rewriter)
        whole = rewriter.emit(CAST, self=stored, dtype=type_of(result).dtype)
        rewriter.replace(result, rewriter.emit(ADD, self=whole, other=offset) if offset else whole)
        return True

    return rewrite(graph, infer, visit) if ranges else graph


def _through_4_bits(value: Value, rewriter: Rewriter) -> Value:
    """`value`, of whole numbers below 16, from bytes that hold two neighbours each, the first one in the lower half."""
    size = type_of(value).shape
    pairs = rewriter.emit(VIEW, self=value, size=(*size[:-1], -1, 2))
    low, high = (rewriter.emit("aten.select.int", self=pairs, dim=-1, index=index) for index in (0, 1))
    high = rewriter.emit("aten.__lshift__.Scalar", self=high, other=4)
    packed = rewriter.emit("aten.bitwise_or.Tensor", self=low, other=high)
    low = rewriter.emit("aten.bitwise_and.Scalar", self=packed, other=15)
    high = rewriter.emit("aten.__rshift__.Scalar", self=packed, other=4)
    return rewriter.emit(VIEW, self=rewriter.emit("aten.stack.default", tensors=(low, high), dim=-1), size=size)


def kept_floats(graph: Graph, infer: Inference) -> list[tuple[Node, str]]:
    """The products and convolutions of a quantized operand that stay those of floats, each with the reason."""
    raiser = _Raiser()
    rewrite(graph, infer, raiser.visit)
    return raiser.kept


class _Raiser:
    """Attributes:
    count: of raised nodes.
    kept: products and convolutions with a quantized operand that stay those of floats, each with the reason.
    packed: the whole numbers of their weights, by name, with their range.
    """

    def __init__(self) -> None:
        self.count = 0
        self.packed: dict[str, Range] = {}
        self.kept: list[tuple[Node, str]] = []
        self._operands: Operands | None = None

    def visit(self, node: Node, rewriter: Rewriter) -> bool:
        """Raise a node if it is a product of two quantized operands, or a cast of such a product of integers."""
        if node.op == CAST and self._operands is not None:
            return self._operands.recast(node)
        if node.op not in MATRICES and node.op not in CONVOLUTIONS:
            return False
        self._operands = self._operands or Operands(rewriter)
        try:
            make = _product if node.op in MATRICES else _convolution
            result = make(self._operands, node)
        except (Stays, Unsupported) as error:
            self.kept.append((node, str(error)))
            second = node.arg(PRODUCTS[node.op].second if node.op in MATRICES else "weight")
            assert isinstance(second, Value)
            self.packed.update((value.name, found) for value, found in self._operands.packable(second))
            return False
        if result is None or node.outputs[0] is None or not self._operands.replace(node.outputs[0], result):
            return False
        self.count += 1
        return True


def _both(operands: Operands, first: Attr, second: Attr) -> tuple[Quantized, Quantized] | None:
    """The operands of a product; None if neither is quantized.

    Raises:
        Stays: one is, and the other is not.
    """
    one, two = operands.find(first), operands.find(second)
    if one is None and two is None:
        return None
    if one is None or two is None:
        raise Stays(f"only its {'second' if one is None else 'first'} operand is quantized")
    if (type_of(one.data).dtype == "i8") != (type_of(two.data).dtype == "i8"):
        raise Stays("one operand is of integers, the other one of 8-bit floats")
    return one, two


def _check_sizes(terms: Dim, columns: Dim) -> tuple[int, int]:
    if not isinstance(terms, int) or not isinstance(columns, int):
        raise Stays("the sizes of its second operand are not known")
    if not MIN_TERMS <= terms <= MAX_TERMS or columns < MIN_COLUMNS:
        raise Stays(f"{terms} terms, {columns} columns: at least {MIN_TERMS} and {MIN_COLUMNS} pay, {MAX_TERMS} fit")
    return terms, columns


def _along(operands: Operands, found: Quantized, dims: tuple[int, ...], shape: tuple[Dim, ...] | None) -> Quantized:
    """`found` with a zero point and scales that are constant along `dims`, and broadcast to the product.

    Args:
        shape: of parameters of the second operand in the result; None: as they are.
    """

    def moved(parameter: Value) -> Value:
        value = constant_along(operands, parameter, len(type_of(found.data).shape), dims)
        return operands.emit(VIEW, self=value, size=shape) if shape and type_of(value).shape else value

    zero = moved(found.zero) if isinstance(found.zero, Value) else found.zero
    return Quantized(found.data, zero, tuple(moved(s) if isinstance(s, Value) else s for s in found.scales))


def _product(operands: Operands, node: Node) -> Value | None:
    first, second, added = PRODUCTS[node.op]
    x, w, out = node.arg(first), node.arg(second), node.outputs[0]
    found = _both(operands, x, w)
    if found is None or out is None:
        return None
    assert isinstance(x, Value)
    assert isinstance(w, Value)
    if len(type_of(w).shape) != 2:
        raise Stays("its second operand is not one matrix")
    if node.arg("alpha", 1) != 1 or node.arg("beta", 1) != 1:
        raise Stays("its terms have factors")
    k = 1 if node.op == LINEAR else 0
    sizes = _check_sizes(type_of(w).shape[k], type_of(w).shape[1 - k])
    a = _along(operands, found[0], (len(type_of(x).shape) - 1,), None)
    b = _along(operands, found[1], (k,), (-1,))
    matrix = operands.emit("aten.t.default", self=b.data) if node.op == LINEAR else b.data
    bias = operands.current(node.arg(added)) if added else None
    if type_of(a.data).dtype != "i8":
        return _float8_product(operands, node, (a, replace(b, data=matrix)), bias, sizes)
    total = _shaped(operands, operands.emit(INT_MM, self=_rows(operands, a.data), mat2=matrix), out)
    if a.zero != 0:
        sums = minus(operands, _summed(operands, b.data, (k,)), _times(operands, b.zero, sizes[0]))
        total = _less(operands, total, _times(operands, sums, a.zero))
    if b.zero != 0:
        total = _less(operands, total, _times(operands, _summed(operands, a.data, (-1,)), b.zero))
    return _finished(operands, total, (*a.scales, *b.scales), bias, out)


def _float8_product(
    operands: Operands, node: Node, factors: tuple[Quantized, Quantized], bias: Attr, sizes: tuple[int, int]
) -> Value:
    (a, b), (out,) = factors, node.results
    if any(size % FLOAT8_MULTIPLE for size in sizes) or type_of(out).dtype == "f64":
        raise Stays(f"products of 8-bit floats have a multiple of {FLOAT8_MULTIPLE} terms and of columns")
    if {type_of(one.data).dtype for one in factors} == {"f8e5m2"}:
        raise Stays("there is no product of two operands in float8_e5m2")
    matrix = b.data
    if type_of(matrix).strides[0] != 1:
        columns = operands.emit("aten.t.default", self=matrix)
        columns = operands.emit("aten.clone.default", self=columns, memory_format="contiguous_format")
        matrix = operands.emit("aten.t.default", self=columns)
    each = [one for one in (*a.scales, *b.scales) if isinstance(one, Value) and type_of(one).shape]
    given: dict[str, Attr] = {"self": _rows(operands, a.data), "mat2": matrix}
    dtype = type_of(out).dtype
    is_late = bool(each) and dtype in HALVES and scales_wait(out, sizes)
    by_row = None
    if each and dtype == "bf16" and not (is_late and _is_read_by_loop(operands, node)):
        by_row = _by_row(operands, factors, out)
    if is_late and by_row is None:
        return _half_product(operands, given, factors, bias, out, sizes[0])
    whole = {name: _scale(operands, () if each else one.scales) for name, one in zip(SCALES, factors, strict=True)}
    scales = by_row if each else whole
    fits = bias is None or (isinstance(bias, Value) and type_of(bias).dtype == dtype != "f32")
    if scales and fits:
        given |= {} if bias is None else {"bias": bias}
        total = operands.emit(SCALED_MM, **given, **scales, out_dtype=dtype, use_fast_accum=True)
        return _laid_out(operands, _shaped(operands, total, out), out)
    total = operands.emit(SCALED_MM, **given, **whole, out_dtype="f32", use_fast_accum=True)
    total = _shaped(operands, total, out)
    return _finished(operands, total, (*a.scales, *b.scales) if each else (), bias, out)


def _half_product(
    operands: Operands,
    given: dict[str, Attr],
    factors: tuple[Quantized, Quantized],
    bias: Attr,
    out: Value,
    terms: int,
) -> Value:
    """A product whose sums are written in f16, times a power of two with which the largest one fits. Libraries write
    these faster than sums in f32, and in most sizes than those in bf16 with scales of rows. Scales and the bias are for
    whatever reads the result, see `scales_wait`.

    The sums have the bits of the result, or more. Those below the normal numbers of f16 are from operands whose
    elements all are tiny beside the largest number of their dtype, which is what one element of a row is scaled to.
    """
    most = terms * prod(torch.finfo(aten.DTYPES[type_of(one.data).dtype]).max for one in factors)
    half = max(ceil(log2(most / torch.finfo(torch.float16).max) / 2), 0)
    down = operands.emit("aten.full.default", size=(), fill_value=2.0**-half, dtype="f32", device="main")
    total = operands.emit(SCALED_MM, **given, **dict.fromkeys(SCALES, down), out_dtype="f16", use_fast_accum=True)
    scales = [*factors[0].scales, *factors[1].scales]
    for at, scale in enumerate(scales):  # that of activations is multiplied where a loop quantizes these
        if isinstance(scale, Value) and scale.name not in operands.fixed:
            scales[at] = operands.emit(MUL, self=operands.cast(scale, "f32"), other=4.0**half)
            break
    else:
        scales.append(4.0**half)
    return _finished(operands, _shaped(operands, total, out), tuple(scales), bias, out)


def scales_wait(out: Value, sizes: tuple[int, int]) -> bool:
    """A library saves more by writing sums in f16 than the reader of `out` takes longer for applying scales to each.

    It does where sums have many terms, and with fewer in small products, whose tiles leave multiprocessors of a kernel
    idle. Large products in bf16 it makes faster with scales of rows.

    Args:
        sizes: the terms of a sum, and the columns of the product.
    """
    terms, columns = sizes
    rows = dim_expr("*", 1, *type_of(out).shape[:-1])
    work = 2 * rows * terms * columns if isinstance(rows, int) else None
    pays = terms >= min(columns, MANY_TERMS) or (work is not None and work <= SMALL_WORK)
    return pays and (type_of(out).dtype != "bf16" or work is None or work <= LARGE_WORK)


def _is_read_by_loop(operands: Operands, node: Node) -> bool:
    """One loop reads the result of `node`, also through views, and can apply scales on the way. Several would do so
    again, and also if `node` becomes one product with others of the same factor."""
    factor, readers = node.arg(PRODUCTS[node.op].first), list(operands.readers_of(node.results[0]))
    assert isinstance(factor, Value)
    products = [one for one in operands.readers[factor.name] if one.op == node.op]
    return len(products) == 1 and len(readers) == 1 and all(map(_is_loop, readers))


def _is_loop(node: Node) -> bool:
    return node.kind == "op" and iteration_space_of(node) is not None


def _by_row(operands: Operands, factors: tuple[Quantized, Quantized], out: Value) -> dict[str, Value] | None:
    """The scales of rows and columns as `_scaled_mm` takes them, for libraries that apply them before they round and
    write the result, as they do in bf16 alone. None: they are of another form, sizes are not known, or rows are so few
    that the sums are no more to write than the weight is to read, and libraries are faster without such scales."""
    *lead, columns = type_of(out).shape
    rows = dim_expr("*", 1, *lead)
    if not isinstance(rows, int) or rows < LEAST_ROWS:
        return None
    found: dict[str, Value] = {}
    for name, one, shape in zip(SCALES, factors, ((rows, 1), (1, columns)), strict=True):
        each = [scale for scale in one.scales if isinstance(scale, Value) and type_of(scale).shape]
        if any(prod(type_of(scale).shape) != prod(shape) for scale in each):  # type: ignore[arg-type]
            return None
        whole = tuple(scale for scale in one.scales if scale not in each)
        parts = [operands.emit(VIEW, self=operands.cast(scale, "f32"), size=shape) for scale in each]
        if not parts:
            same = operands.emit("aten.expand.default", self=_scale(operands, whole), size=shape)
            parts = [operands.emit("aten.clone.default", self=same, memory_format="contiguous_format")]
        elif whole:
            parts.append(_scale(operands, whole))
        found[name] = reduce(lambda total, part: operands.emit(MUL, self=total, other=part), parts)
    return found


def _scale(operands: Operands, scales: tuple[Value | float, ...]) -> Value:
    """The product of scales without dimensions, as `_scaled_mm` takes it."""
    number = prod(scale for scale in scales if not isinstance(scale, Value))
    found: Value | None = None
    for scale in scales:
        if isinstance(scale, Value):
            wide = operands.cast(scale, "f32")
            found = wide if found is None else operands.emit(MUL, self=found, other=wide)
    if found is None:
        return operands.emit("aten.full.default", size=(), fill_value=float(number), dtype="f32", device="main")
    return found if number == 1 else operands.emit(MUL, self=found, other=number)


def _convolution(operands: Operands, node: Node) -> Value | None:
    x, w, out = node.arg("input"), node.arg("weight"), node.outputs[0]
    found = _both(operands, x, w)
    if found is None or out is None:
        return None
    assert isinstance(x, Value)
    assert isinstance(w, Value)
    rank = len(type_of(w).shape)
    if node.arg("transposed", False) or len(type_of(x).shape) != rank:
        raise Stays("transposed convolutions, and those of one image without a batch, have no form for integers")
    groups = node.arg("groups", 1)
    assert isinstance(groups, int)
    filters = type_of(w).shape
    if not all(isinstance(size, int) for size in filters):
        raise Stays("the sizes of its filters are not known")
    _check_sizes(prod(filters[1:]), filters[0] // groups)  # type: ignore[arg-type,operator]
    a = _along(operands, found[0], tuple(range(1, rank)), None)
    each = (-1,) + (1,) * (rank - 2)  # of parameters of each filter, in the result
    b = _along(operands, found[1], tuple(range(1, rank)), each)
    if type_of(a.data).dtype == "i8":
        total = _integer_convolution(operands, node, a, b)
    else:  # numbers of 8 bits are multiplied as they are stored, by kernels that sum in float32
        images, weights = (operands.cast(one.data, "f32") for one in (a, b))
        given = {**dict(node.args), "input": images, "weight": weights, "bias": None}
        total = operands.emit(node.op, **given)
    bias = operands.current(node.arg("bias"))
    if isinstance(bias, Value):
        bias = operands.emit(VIEW, self=bias, size=each)
    return _finished(operands, total, (*a.scales, *b.scales), bias, out)


def _integer_convolution(operands: Operands, node: Node, a: Quantized, b: Quantized) -> Value:
    if b.zero != 0:
        raise Stays("its filters may have zero points other than 0")
    args = {name: node.arg(name) for name in ("stride", "dilation", "groups") if node.arg(name) is not None}
    args["padding"] = _padding(node, type_of(b.data).shape[2:])  # type: ignore[arg-type]
    total = operands.emit(INT_CONV, input=a.data, weight=b.data, **args)
    if a.zero != 0:
        total = _less(operands, total, _times(operands, _filter_sums(operands, a, b, args), a.zero))
    return total


def _padding(node: Node, kernel: tuple[int, ...]) -> Attr:
    """Zeros on each side of an image."""
    given = node.arg("padding", (0,))
    if not isinstance(given, str):
        return given
    steps = node.arg("dilation", (1,))
    assert isinstance(steps, tuple)
    spans = [(size - 1) * int(steps[i % len(steps)]) for i, size in enumerate(kernel)]  # type: ignore[arg-type]
    if given == "same" and any(span % 2 for span in spans):
        raise Stays("it pads one side more than the other one")
    return tuple(span // 2 for span in spans) if given == "same" else (0,)


def _filter_sums(operands: Operands, a: Quantized, b: Quantized, args: dict[str, Attr]) -> Value:
    """The sums of the elements of each filter that meet the image: at its borders, some are beyond it."""
    rank = len(type_of(b.data).shape)
    padding = args["padding"]
    if not any(padding if isinstance(padding, tuple) else (padding,)):
        sums = _summed(operands, b.data, tuple(range(1, rank)))
        return operands.emit(VIEW, self=sums, size=(-1,) + (1,) * (rank - 2))
    size = type_of(a.data).shape[1:]
    if b.data.name not in operands.fixed or not all(isinstance(one, int) for one in size):
        raise Stays("it pads images of unknown sizes, or by filters that are no weights, with a zero point")
    image = operands.emit("aten.new_ones.default", self=b.data, size=(1, *size))
    return operands.emit(INT_CONV, input=image, weight=b.data, **args)


def _rows(operands: Operands, data: Value) -> Value:
    """A tensor as a matrix with its last dimension."""
    size = (-1, type_of(data).shape[-1])
    if len(type_of(data).shape) == 2:
        return data
    try:
        return operands.emit(VIEW, self=data, size=size)
    except Unsupported:
        data = operands.emit("aten.clone.default", self=data, memory_format="contiguous_format")
        return operands.emit(VIEW, self=data, size=size)


def _shaped(operands: Operands, total: Value, out: Value) -> Value:
    """The product of `_rows` in the shape of the result."""
    shape = type_of(out).shape
    return total if len(shape) == 2 else operands.emit(VIEW, self=total, size=shape)


def _summed(operands: Operands, data: Value, dims: tuple[int, ...]) -> Value:
    keep = {"keepdim": True} if dims == (-1,) else {}
    return operands.emit("aten.sum.dim_IntList", self=data, dim=dims, **keep, dtype="i32")


def _times(operands: Operands, one: Value | int, other: Value | int) -> Value | int:
    if not isinstance(one, Value):
        one, other = other, one
    if not isinstance(one, Value):
        return one * other  # type: ignore[operator]
    return one if other == 1 else operands.emit(MUL, self=one, other=other) if other != 0 else 0


def _less(operands: Operands, total: Value, other: Value | int) -> Value:
    result = minus(operands, total, other)
    assert isinstance(result, Value)
    return result


def _finished(operands: Operands, total: Value, scales: tuple[Value | float, ...], bias: Attr, out: Value) -> Value:
    """`total` times the scales plus the bias, in the type of `out`. What weights decide is multiplied first."""
    wide = "f64" if type_of(out).dtype == "f64" else "f32"
    total = operands.cast(total, wide)
    number: Value | float = float(prod(scale for scale in scales if not isinstance(scale, Value)))
    factors = [operands.cast(scale, wide) for scale in scales if isinstance(scale, Value)]
    for factor in (one for one in factors if one.name in operands.fixed):
        number = factor if number == 1 else operands.emit(MUL, self=factor, other=number)
    for one in (number, *(factor for factor in factors if factor.name not in operands.fixed)):
        total = total if one == 1 else operands.emit(MUL, self=total, other=one)
    if bias is not None:
        assert isinstance(bias, Value)
        total = operands.emit(ADD, self=total, other=bias)  # widened by the sum: it is read in each call
    return _laid_out(operands, operands.cast(total, type_of(out).dtype), out)


def _laid_out(operands: Operands, total: Value, out: Value) -> Value:
    """`total` with the strides of `out`."""
    forms = () if total.type == out.type else ("contiguous_format", "channels_last", "channels_last_3d")
    for form in forms:
        with suppress(Unsupported):
            copied = operands.emit("aten.clone.default", self=total, memory_format=form)
            if copied.type == out.type:
                return copied
    if forms:
        raise Stays(f"its result is {out.type}, and that of integers {total.type}")
    return total
