"""Finds what quantized tensors are made of: integers of 8 bits or 8-bit floats, a zero point, and scales.

A tensor is quantized if the graph shows that its elements are (whole number - zero point) * scale: integers that are
cast to floats, or floats that were rounded and clamped, as fake quantization does; or if they are 8-bit floats * scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

from torch_rtx import aten
from torch_rtx.dtypes import BOOL, DTYPES, FLOAT, INT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Node, TensorType, Value, attr_text
from torch_rtx.lowering.ranges import Range, Ranges
from torch_rtx.lowering.rewrite import COPIES, Rewriter, from_weights

FLOATS8 = ("f8e4m3fn", "f8e5m2")
EXACT = 256  # whole numbers up to this one are numbers of every dtype that is not of 8 bits
CAST, SUB, VIEW = "aten._to_copy.default", "aten.sub.Tensor", "aten.view.default"
MUL = ("aten.mul.Tensor", "aten.mul.Scalar")
DIV = ("aten.div.Tensor", "aten.div.Scalar")
TO_INT8 = "torch_rtx.to_int8.default"
CAT = "aten.cat.default"
# Each element of the result is one of the operand's.
POOLS = frozenset(f"aten.{name}" for name in ("max_pool1d.default", "max_pool2d.default", "max_pool3d.default"))
POOLS |= {"aten.max_pool2d_with_indices.default"}


Number = TypeVar("Number", int, float)


class Stays(Exception):
    """A product of quantized operands stays one of floats. The message is the reason, for the user."""


@dataclass(frozen=True)
class Quantized:
    """A tensor that is (`data` - `zero`) * the product of `scales`, which broadcast to it.

    Attributes:
        data: i8, or 8-bit floats.
        zero: whole numbers; of 8-bit floats 0.
    """

    data: Value
    zero: Value | int
    scales: tuple[Value | float, ...]


class Operands:
    """The quantized tensors of the graph that `rewriter` rewrites. Their parts are new calls at its current end.

    Attributes:
        fixed: the names of what depends on weights alone.
        readers: by the name of a value, the nodes that read it.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter, self.fixed = rewriter, from_weights(rewriter.graph)
        self._producer = {value.name: node for node in rewriter.graph.nodes for value in node.results}
        self.readers: dict[str, list[Node]] = {}
        for node in rewriter.graph.nodes:
            for name in dict.fromkeys(value.name for value in node.inputs):
                self.readers.setdefault(name, []).append(node)
        self._ranges = Ranges(rewriter.graph)
        self._found: dict[str, Quantized | None] = {}
        self._given: set[str] = set()  # new values that stand for old ones
        self._made: dict[object, Value] = {}  # new calls, by their text
        self._wide: dict[str, Value] = {}  # integers, by the name of the floats that they are cast to

    def readers_of(self, value: Value) -> Iterator[Node]:
        """The nodes of the old graph that read a value of it, also through views."""
        for node in self.readers.get(value.name, ()):
            if node.kind == "op" and aten.is_view(aten.overload(node.op)):
                for result in node.results:
                    yield from self.readers_of(result)
            else:
                yield node

    def emit(self, op: str, /, **args: Attr) -> Value:
        """A call, which is new if there was no equal one."""
        key = op, *((name, attr_text(attr)) for name, attr in args.items())
        if key in self._made:
            return self._made[key]
        result = self._made[key] = self.rewriter.emit(op, **args)
        node = self.rewriter.nodes[-1]
        if node.inputs and all(value.name in self.fixed for value in node.inputs):
            self.fixed.add(result.name)
        return result

    def cast(self, value: Value, dtype: str) -> Value:
        """`value` in another dtype."""
        if type_of(value).dtype == dtype:
            return value
        result = self.emit(CAST, self=value, dtype=dtype)
        if type_of(value).dtype == "i32":
            self._wide[result.name] = value
        return result

    def recast(self, node: Node) -> bool:
        """Make a cast of integers that `cast` has made floats one of the integers, and say whether it is one."""
        source, (result,) = self.current(node.arg("self")), node.outputs
        whole = self._wide.get(source.name) if isinstance(source, Value) else None
        if whole is None or result is None or len(node.args) != 2:
            return False
        return self.replace(result, self.cast(whole, type_of(result).dtype))

    def replace(self, old: Value, new: Value) -> bool:
        """Make later nodes read `new`, and say whether they do: not where it has another type, or stands for another
        value, with which a result of the graph must not share memory."""
        fits = new.type == old.type and new.name not in self._given
        if fits:
            self._given.add(new.name)
            self.rewriter.replace(old, new)
        return fits

    def current(self, attr: Attr) -> Attr:
        """What later nodes read in place of a value of the old graph."""
        return self.rewriter.current(attr) if isinstance(attr, Value) else attr

    def find(self, value: Attr) -> Quantized | None:
        """What a value of the old graph is made of; None: it is not quantized.

        Raises:
            Stays: it is, but its scale can't be followed to here.
        """
        if not isinstance(value, Value) or not isinstance(value.type, TensorType):
            return None
        if value.name not in self._found:
            node = self._producer.get(value.name)
            found = self._stored(value)
            if found is None and node is not None and node.kind == "op" and node.outputs[0] == value:
                found = self._computed(node, value)
            self._found[value.name] = found
        return self._found[value.name]

    def packable(self, value: Value) -> Iterator[tuple[Value, Range]]:
        """The floats that a weight is computed from and that are rounded to whole numbers in a range of 8 bits."""
        node = self._producer.get(value.name)
        if value.name not in self.fixed or node is None or DTYPES[type_of(value).dtype].kind != FLOAT:
            return
        if self._is_narrow(value):
            yield from [(value, self._ranges.of(value))] if self._is_rounded(value) else []
        elif node.op in (CAST, SUB, CAT, *MUL, *DIV) or is_move(node):
            for source in node.inputs:
                if node.op == CAT or prod(type_of(source).shape) == prod(type_of(value).shape):  # type: ignore[arg-type]
                    yield from self.packable(source)

    def _is_rounded(self, value: Value) -> bool:
        """Whether whole numbers were made from others in the graph."""
        node = self._producer.get(value.name)
        if not self._ranges.of(value).whole:
            return True
        return node is not None and any(map(self._is_rounded, node.inputs))

    def _stored(self, value: Value) -> Quantized | None:
        """8-bit floats; or whole numbers in a range of 8 bits, in any dtype."""
        if type_of(value).dtype in FLOATS8:
            return Quantized(self._current(value), 0, ())
        if not self._is_narrow(value):
            return None
        value, zero = self._less(value) or (value, 0)
        while (source := self._cast_from(value)) is not None and self._is_narrow(source):
            value = source
        source, dtype = self._cast_from(value), DTYPES[type_of(value).dtype]
        if source is not None and type_of(source).dtype == "bool":
            return None  # a mask
        if not (dtype.kind == INT and dtype.bits == 8) and not self._is_rounded(value):
            return None  # such as positions
        low, high, _ = self._ranges.of(value)
        offset = zero + offset_of(low - zero, high - zero)
        data = self._current(value)
        if offset:
            wide = data if DTYPES[type_of(data).dtype].kind == FLOAT else self.cast(data, "i16")
            data = self.emit(SUB, self=wide, other=offset)
        return Quantized(self.cast(data, "i8"), zero - offset, ())

    def _less(self, value: Value) -> tuple[Value, int] | None:
        """The whole numbers that `value` is less than by a number, and the number."""
        node = self._producer.get(value.name)
        if node is None or node.op != SUB or node.arg("alpha", 1) != 1:
            return None
        source, zero = node.arg("self"), node.arg("other")
        narrow = isinstance(source, Value) and self._is_narrow(source) and _is_like(source, value)
        return (source, int(zero)) if narrow and isinstance(zero, int | float) else None  # type: ignore[return-value]

    def _is_narrow(self, value: Value) -> bool:
        found = self._ranges.of(value)
        fits = found.whole and found.high - found.low <= 255 and found.low >= -EXACT and found.high <= EXACT
        return fits and DTYPES[type_of(value).dtype].kind != BOOL

    def _cast_from(self, value: Value) -> Value | None:
        node = self._producer.get(value.name)
        source = node.arg("self") if node is not None and node.op == CAST else None
        return source if isinstance(source, Value) and type_of(source).device == type_of(value).device else None

    def _computed(self, node: Node, value: Value) -> Quantized | None:
        if node.op == CAST:
            source = self._cast_from(value)
            wide = [DTYPES[type_of(one).dtype].kind in (INT, FLOAT) for one in (source, value) if one is not None]
            return self.find(source) if all(wide) and DTYPES[type_of(value).dtype].bits > 8 else None
        if node.op in (*MUL, *DIV):
            return self._scaled(node, value)
        if node.op == SUB and node.arg("alpha", 1) == 1:
            return self._shifted(node, value)
        if node.op == CAT:
            return self._joined(node)
        if node.op in POOLS:
            return self._pooled(node, value)
        return self._moved(node) if is_move(node) else None

    def _scaled(self, node: Node, value: Value) -> Quantized | None:
        one, two = node.arg("self"), node.arg("other")
        for source, factor in ((one, two), (two, one)) if node.op in MUL else ((one, two),):
            found = self.find(source) if _is_like(source, value) else None
            if found is None:
                continue
            if isinstance(factor, Value):
                factor = self._parameter(factor)
                if node.op in DIV:
                    wide = "f64" if type_of(factor).dtype == "f64" else "f32"
                    factor = self.emit("aten.reciprocal.default", self=self.cast(factor, wide))
            elif node.op in DIV:
                factor = 1 / factor if factor else None  # type: ignore[operator]
            if isinstance(factor, Value | int | float):
                return replace(found, scales=(*found.scales, factor))
        return None

    def _shifted(self, node: Node, value: Value) -> Quantized | None:
        source, zero = node.arg("self"), node.arg("other")
        found = self.find(source) if _is_like(source, value) else None
        if found is None or found.scales or type_of(found.data).dtype != "i8" or not self._ranges.of(zero).whole:
            return None
        if isinstance(found.zero, Value):
            return None
        # q - z = (data - found.zero) - z
        if not isinstance(zero, Value):
            return replace(found, zero=int(zero) + found.zero)  # type: ignore[arg-type]
        own = self.cast(self._parameter(zero), "i32")
        if found.zero == 0 and {found.data.name, own.name} <= self.fixed and not self._is_rounded(zero):
            # Tools store zero points of signed weights, which are 0, or small; recipes check that they are.
            wide = self.emit(SUB, self=self.cast(found.data, "i32"), other=own)
            return replace(found, data=self.emit(TO_INT8, self=wide))
        return replace(found, zero=minus(self, own, -found.zero))

    def _parameter(self, value: Value) -> Value:
        """A scale or a zero point; without dimensions, if it is a single number."""
        value = self._current(value)
        return self.emit(VIEW, self=value, size=()) if set(type_of(value).shape) == {1} else value

    def _moved(self, node: Node) -> Quantized | None:
        """Views and copies."""
        source = node.arg("self")
        found = self.find(source)
        if found is None:
            return None
        assert isinstance(source, Value)
        data = self.emit(node.op, **{**dict(node.args), "self": found.data})
        try:
            scales = tuple(self._move(node, scale, source) for scale in found.scales)
            zero = self._move(node, found.zero, source)
        except Unsupported:
            raise Stays("a view mixes the axes of its scales with others, as it does for groups of terms") from None
        return replace(found, data=data, zero=zero, scales=scales)

    def _move(self, node: Node, parameter: Value | Number, source: Value) -> Value | Number:
        """What a view makes of a scale or a zero point of `source`: strides of 0 show where it is constant."""
        if not isinstance(parameter, Value) or not type_of(parameter).shape or node.op in COPIES:
            return parameter
        shape = type_of(source).shape
        if type_of(parameter).shape != shape:
            parameter = self.emit("aten.expand.default", self=parameter, size=shape)
        return self.emit(node.op, **{**dict(node.args), "self": parameter})

    def _joined(self, node: Node) -> Quantized | None:
        """Tensors one after another: parameters that differ are joined, too."""
        parts = [part for value in node.inputs if (part := self.find(value)) is not None]
        if len(parts) < len(node.inputs) or len({type_of(part.data).dtype for part in parts}) > 1:
            return None
        along = node.arg("dim", 0)
        assert isinstance(along, int)
        data = self.emit(CAT, tensors=tuple(part.data for part in parts), dim=along)
        wide = "f64" if type_of(node.results[0]).dtype == "f64" else "f32"
        try:
            zero = self._join([part.zero for part in parts], parts, along, "i32")
            each = zip(*(part.scales for part in parts), strict=True)
            return Quantized(data, zero, tuple(self._join(list(one), parts, along, wide) for one in each))
        except (Unsupported, ValueError):  # of other axes; more scales
            raise Stays("parts of an operand have scales of different kinds") from None

    def _join(self, parameters: list[Value | Number], parts: list[Quantized], along: int, dtype: str) -> Value | Number:
        """A scale or a zero point of tensors one after another, by those of the tensors."""
        rank, first = len(type_of(parts[0].data).shape), parameters[0]
        spread = []
        for parameter, part in zip(parameters, parts, strict=True):
            if isinstance(parameter, Value):
                value = aligned(self, compact(self, parameter, rank), rank)
            else:
                number: Attr = parameter
                value = self.emit("aten.full.default", size=(1,) * rank, fill_value=number, dtype=dtype, device="main")
            size = list(type_of(value).shape)
            if size[along] == 1 and all(one == first for one in parameters):
                return first
            size[along] = type_of(part.data).shape[along]
            spread.append(self.emit("aten.expand.default", self=self.cast(value, dtype), size=tuple(size)))
        return self.emit(CAT, tensors=tuple(spread), dim=along)

    def _pooled(self, node: Node, value: Value) -> Quantized | None:
        """Each element is one of the operand's, whatever the sign of the scale; so it is found again by division."""
        found = self.find(node.arg("self"))
        if found is None or type_of(found.data).dtype != "i8" or type_of(value).dtype not in ("f16", "f32", "f64"):
            return None
        if any(isinstance(one, Value) and type_of(one).shape for one in (found.zero, *found.scales)):
            raise Stays("max pooling over elements of different scales")
        whole = self.cast(self._current(value), "f32")
        for scale in found.scales:
            other = self.cast(scale, "f32") if isinstance(scale, Value) else scale
            whole = self.emit("aten.div.Tensor", self=whole, other=other)
        whole = self.emit("aten.round.default", self=whole)
        if found.zero != 0:
            whole = self.emit("aten.add.Tensor", self=whole, other=found.zero)
        return replace(found, data=self.cast(whole, "i8"))

    def _current(self, value: Value) -> Value:
        current = self.rewriter.current(value)
        assert isinstance(current, Value)
        return current


def offset_of(low: float, high: float) -> int:
    """What whole numbers in a range of 8 bits have to be lowered by to be int8."""
    return 0 if low >= -128 and high <= 127 else int(low) + 128


def is_move(node: Node) -> bool:
    """Whether a call with one result moves the elements of its operand, and changes none."""
    if len(node.outputs) != 1 or node.op in ("aten.view.dtype", "aten.view_as_real.default", CAST):
        return False
    kept = node.op in COPIES or node.op == "aten._unsafe_view.default" or aten.is_view(aten.overload(node.op))
    return kept and isinstance(node.arg("self"), Value) and len(node.inputs) == 1


def minus(operands: Operands, one: Value | int, other: Value | int) -> Value | int:
    """`one` - `other`, without a call where numbers say what it is."""
    if isinstance(one, Value):
        return one if other == 0 else operands.emit(SUB, self=one, other=other)
    return operands.emit("aten.rsub.Scalar", self=other, other=one) if isinstance(other, Value) else one - other


def aligned(operands: Operands, value: Value, rank: int) -> Value:
    """`value` with further dimensions of size 1 in front."""
    shape = type_of(value).shape
    return value if len(shape) == rank else operands.emit(VIEW, self=value, size=(1,) * (rank - len(shape)) + shape)


def compact(operands: Operands, parameter: Value, rank: int) -> Value:
    """A scale or a zero point of a tensor of `rank`, of size 1 where it is constant."""
    if not type_of(parameter).shape:
        return parameter
    value = aligned(operands, parameter, rank)
    for dim, stride in enumerate(type_of(value).strides):
        if stride == 0 and type_of(value).shape[dim] != 1:
            value = operands.emit("aten.slice.Tensor", self=value, dim=dim, start=0, end=1)
    return value


def constant_along(operands: Operands, parameter: Value, rank: int, dims: tuple[int, ...]) -> Value:
    """`compact`, of a parameter that has to be constant along `dims`.

    Raises:
        Stays: it is not.
    """
    value = compact(operands, parameter, rank)
    if type_of(value).shape and any(type_of(value).shape[dim] != 1 for dim in dims):
        raise Stays("its scales or zero points vary along the contraction")
    return value


def _is_like(source: Attr, value: Value) -> bool:
    return (
        isinstance(source, Value)
        and isinstance(source.type, TensorType)
        and (source.type.shape == type_of(value).shape)
    )


def type_of(value: Value) -> TensorType:
    """The type of a tensor."""
    assert isinstance(value.type, TensorType)
    return value.type
