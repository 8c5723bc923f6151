"""The kernel IR: tensors as functions of a position, before anything is said of loops.

A region's body becomes a DAG of these nodes. Views are position arithmetic, pointwise operators are expressions of
named operations, and what is left are loads, gathers, reductions and selects. `emit` writes Triton for a position of
them; `text` prints the DAG itself.

A value is held in the register dtype of its dtype, see `dtypes`: halves are f32 there and are rounded where they are
stored or cast on purpose, so that a kernel is no less precise than the calls that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch_rtx.dtypes import DTYPES, FLOATS, INTS, PACKED, highest, lowest, register, wrapped
from torch_rtx.errors import Unsupported
from torch_rtx.ir import TensorType
from torch_rtx.lowering.kernels.expressions import (
    A,
    Apply,
    Arg,
    B,
    C,
    Expression,
    absolute,
    apply,
    eq,
    exp,
    log1p,
    maximum,
    minimum,
    to_bool,
    where,
)
from torch_rtx.lowering.kernels.expressions import text as expression_text
from torch_rtx.lowering.kernels.float8 import BITS, BYTE, CONVERTED, FROM_BYTE, LIMITED, PACKINGS, VALUE, WIDE_BITS
from torch_rtx.lowering.kernels.index import Index, Var, constant, from_dim, linear, narrowed, product, variable

Position = tuple[Index, ...]
Shape = tuple[Index, ...]
Scalar = bool | int | float | Index

ZERO = constant(0)
ONE = constant(1)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of `shape` and `dtype`; two are the same only if they are one object."""

    shape: Shape
    dtype: str


@dataclass(frozen=True, eq=False)
class Load(Tensor):
    """The kernel parameter `name` with `strides` in elements; with `anchor`, the anchor's result in registers."""

    name: str
    strides: Shape
    anchor: bool = False


@dataclass(frozen=True, eq=False)
class Const(Tensor):
    """One number for all positions; an Index for a dim."""

    value: Scalar


@dataclass(frozen=True, eq=False)
class Iota(Tensor):
    """At each position the integer `at(position)`."""

    at: Callable[[Position], Index]


@dataclass(frozen=True, eq=False)
class Pointwise(Tensor):
    """`expression` of the elements of `args`, which have the same shape."""

    expression: Expression
    args: tuple[Tensor, ...]

    @property
    def same_register(self) -> Tensor | None:
        """The argument, if its register already holds the result: a cast that takes no code."""
        match self.expression:
            case Arg(0):
                return self.args[0]
            case Apply("cast", (Arg(0),), dtype) if register(dtype) == register(self.args[0].dtype):
                return self.args[0]
        return None


@dataclass(frozen=True, eq=False)
class View(Tensor):
    """The element of `source` at the position `at(position)`."""

    source: Tensor
    at: Callable[[Position], Position]


@dataclass(frozen=True, eq=False)
class Select(Tensor):
    """`inner[position - starts]` where that is in bounds, else `outer[position]`: pad, cat, scatter of a slice."""

    inner: Tensor
    outer: Tensor
    starts: Shape

    def inside(self, position: Position) -> Position:
        """The position in `inner`, where it is in bounds."""
        places = zip(position, self.starts, self.inner.shape, strict=True)
        return tuple(narrowed(at - start, size) for at, start, size in places)


@dataclass(frozen=True, eq=False)
class Gather(Tensor):
    """`source` at the position `at(position, elements of indices)`. An index out of the range of its entry in `sizes`
    gives 0; with `wrap`, negative ones count from the end."""

    source: Tensor
    indices: tuple[Tensor, ...]
    sizes: Shape
    at: Callable[[Position, Position], Position]
    wrap: bool = False


@dataclass(frozen=True, eq=False)
class Scatter(Tensor):
    """The tensor that `target` reads, after each element of `source` is added to the one that `target` is at the
    position, or put in its place; to none, where an index is out of range. Only a result of a kernel is one, and its
    `shape` is that of `source`: the positions that the kernel goes through."""

    target: Gather
    source: Tensor
    adds: bool = True


@dataclass(frozen=True, eq=False)
class Reduce(Tensor):
    """`source` reduced over `axes`, whose sizes become 1. `kind` is a key of REDUCTIONS."""

    kind: str
    source: Tensor
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scan(Reduce):
    """The inclusive prefix reduction along one axis."""


@dataclass(frozen=True)
class Reduction:
    """A kind of reduction.

    Attributes:
        combine: the reduction of two parts (A, B) from the reduction of each.
        neutral: the neutral element of a dtype.
    """

    combine: Expression
    neutral: Callable[[str], bool | int | float]


REDUCTIONS = {
    "sum": Reduction(A + B, lambda dtype: 0),
    "prod": Reduction(A * B, lambda dtype: 1),
    "max": Reduction(maximum(A, B), lowest),
    "min": Reduction(minimum(A, B), highest),
    "logaddexp": Reduction(
        where(eq(absolute(maximum(A, B)), math.inf), maximum(A, B), maximum(A, B) + log1p(exp(-absolute(A - B)))),
        lowest,
    ),
    "any": Reduction(A | B, lambda dtype: False),
    "all": Reduction(A & B, lambda dtype: True),
}


def load(name: str, type_: TensorType, anchor: bool = False, as_bytes: bool = False) -> Tensor:
    """The tensor that the kernel parameter `name` points to.

    Args:
        as_bytes: the kernel gets it as bytes: the target does not have the dtype, a float8.

    Raises:
        Unsupported: generated kernels do not have the dtype.
    """
    if not register(type_.dtype):
        raise Unsupported(f"dtype {type_.dtype} in a kernel")
    shape, strides = (tuple(map(from_dim, dims)) for dims in (type_.shape, type_.strides))
    if as_bytes:
        return _unpacked(Load(shape, "u8", name, strides), type_.dtype)
    return Load(shape, type_.dtype, name, strides, anchor)


def number(value: Scalar, dtype: str) -> Const:
    """`value` as a tensor of shape ()."""
    return Const((), dtype, value)


def broadcast(tensors: Sequence[Tensor]) -> Shape:
    """The broadcast shape of `tensors`; Unsupported where symbolic sizes are not known to agree."""
    rank = max((len(t.shape) for t in tensors), default=0)
    found = [ONE] * rank
    for tensor in tensors:
        for axis, size in enumerate(tensor.shape, rank - len(tensor.shape)):
            if found[axis] == ONE:
                found[axis] = size
            elif size not in (ONE, found[axis]):
                raise Unsupported(f"sizes {found[axis]} and {size} together")
    return tuple(found)


def expand(tensor: Tensor, shape: Shape) -> Tensor:
    """`tensor` broadcast to `shape`."""
    if tensor.shape == shape or isinstance(tensor, Const):
        return tensor
    skip = len(shape) - len(tensor.shape)
    fixed = [size == ONE and shape[axis] != ONE for axis, size in enumerate(tensor.shape, skip)]

    def at(position: Position) -> Position:
        return tuple(ZERO if one else p for p, one in zip(position[skip:], fixed, strict=True))

    return View(shape, tensor.dtype, tensor, at)


def pointwise(expression: Expression, dtype: str, *args: Tensor) -> Tensor:
    """`expression` of the elements of `args`, broadcast to one shape.

    Raises:
        Unsupported: see `broadcast`, or an element is several values.
    """
    if PACKED in (dtype, *(arg.dtype for arg in args)):
        raise Unsupported(f"arithmetic with {PACKED}")
    shape = broadcast(args)
    return Pointwise(shape, dtype, expression, tuple(expand(arg, shape) for arg in args))


def cast(tensor: Tensor, dtype: str, rounded: bool = False) -> Tensor:
    """`tensor` in `dtype`; with `rounded`, to the precision of the dtype instead of that of its register."""
    if isinstance(tensor, Const) and not isinstance(tensor.value, Index):
        if dtype in INTS:
            return number(wrapped(int(tensor.value), dtype), dtype)
        value = float(tensor.value)
        if dtype in PACKINGS:
            value = PACKINGS[dtype].nearest(value)
        return number(bool(value) if dtype == "bool" else value, dtype)
    if tensor.dtype == dtype:
        return tensor
    if dtype == "bool":
        return pointwise(to_bool(A), dtype, tensor)
    if rounded and DTYPES[dtype].bits == 8 and dtype not in INTS:
        return _unpacked(_packed(cast(tensor, register(dtype)), dtype), dtype)
    if rounded and register(dtype) != dtype and tensor.dtype not in PACKINGS:  # by way of f32, as in PyTorch
        return pointwise(apply("round_to", apply("cast", A, dtype=register(dtype)), dtype=dtype), dtype, tensor)
    return pointwise(apply("cast", A, dtype=dtype), dtype, tensor)


def reinterpret(tensor: Tensor, dtype: str) -> Tensor:
    """The bits of each element as an element of `dtype`.

    Raises:
        Unsupported: a dtype of another size, or bool.
    """
    bits = DTYPES[dtype].bits
    if tensor.dtype == dtype:
        return tensor
    if DTYPES[tensor.dtype].bits != bits or "bool" in (tensor.dtype, dtype):
        raise Unsupported(f"{tensor.dtype} as {dtype}")
    if isinstance(tensor, View):
        return replace(tensor, dtype=dtype, source=reinterpret(tensor.source, dtype))
    if tensor.dtype not in INTS:
        tensor = _packed(tensor, tensor.dtype) if bits == 8 else _as_int(tensor)
    if dtype in INTS:
        return cast(tensor, dtype)
    return _unpacked(cast(tensor, "u8"), dtype) if bits == 8 else pointwise(_AS_FLOAT[dtype], dtype, tensor)


_AS_FLOAT = {name: apply("as_float", A, dtype=name) for name in FLOATS if name not in PACKINGS}


def _as_int(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Pointwise) and tensor.expression is _AS_FLOAT[tensor.dtype]:  # what it was made of
        return tensor.args[0]
    return pointwise(apply("as_int", A, dtype=tensor.dtype), f"i{DTYPES[tensor.dtype].bits}", tensor)


def _unpacked(byte: Tensor, dtype: str) -> Tensor:
    """The element of `dtype`, which has 8 bits, of each byte."""
    if dtype in _FROM_BYTE:
        return Pointwise(byte.shape, dtype, _FROM_BYTE[dtype], (byte,))
    return pointwise(VALUE[dtype], dtype, byte, pointwise(WIDE_BITS[dtype], "i32", byte))


_FROM_BYTE = {"f8e8m0fnu": apply("from_e8m0_byte", A), PACKED: apply("cast", A, dtype=PACKED)}


def _packed(value: Tensor, dtype: str) -> Tensor:
    """The byte of each element as `dtype`, which has 8 bits; `value` is held in its register."""
    if value.dtype == dtype and isinstance(value, View):
        source = _packed(value.source, dtype)
        return View(value.shape, source.dtype, source, value.at)
    made = VALUE.get(dtype, _FROM_BYTE.get(dtype))
    if value.dtype == dtype and isinstance(value, Pointwise) and value.expression is made:
        return value.args[0]
    if dtype == PACKED:
        return Pointwise(value.shape, "u8", apply("cast", A, dtype="u8"), (value,))
    if dtype not in PACKINGS:
        return pointwise(apply("e8m0_byte", A), "u8", value)
    size = pointwise(LIMITED[dtype], "f32", value)
    return pointwise(BYTE[dtype], "u8", value, size, pointwise(BITS, "i32", size))


def in_memory(tensor: Tensor, as_bytes: bool) -> Tensor:
    """`tensor` as a kernel stores it. Others than float8 are rounded by the store itself.

    Args:
        as_bytes: see `load`.
    """
    dtype = tensor.dtype
    if not (as_bytes or dtype in PACKINGS):
        return tensor
    if isinstance(tensor, Scatter):
        source, start = in_memory(tensor.source, as_bytes), tensor.target.source
        start = _packed(start, dtype) if as_bytes else start
        target = replace(tensor.target, dtype=source.dtype, source=start)
        return replace(tensor, dtype=source.dtype, target=target, source=source)
    if isinstance(tensor, View):
        source = in_memory(tensor.source, as_bytes)
        return View(tensor.shape, source.dtype, source, tensor.at)
    byte = _packed(tensor, dtype)
    if as_bytes:
        return byte
    if dtype in CONVERTED and isinstance(byte, Pointwise) and byte.expression is BYTE[dtype]:
        byte = pointwise(
            CONVERTED[dtype], "u8", _unlimited(byte.args[0], PACKINGS[dtype].size(PACKINGS[dtype].largest))
        )
    return pointwise(FROM_BYTE[dtype], dtype, byte)


def _unlimited(tensor: Tensor, largest: float) -> Tensor:
    """`tensor` without limits that a conversion has itself: at `largest` or beyond, on either side of 0."""
    match tensor:
        case Pointwise(
            expression=Apply("where", (Apply("lt" | "gt" as way, (Arg(0), Arg(1))), Arg(1), Arg(0))),
            args=(inner, Const(value=int() | float() as limit)),
        ) if (-limit if way == "lt" else limit) >= largest:
            return _unlimited(inner, largest)
    return tensor


def reduce(kind: str, tensor: Tensor, axes: Sequence[int], keep: bool = True) -> Tensor:
    """`tensor` reduced over `axes` (all, if there are none); a sum that is known without one is no reduction."""
    rank = len(tensor.shape)
    if not rank:
        return tensor
    wanted = {axis % rank for axis in axes} if axes else set(range(rank))
    shape = tuple(ONE if axis in wanted else size for axis, size in enumerate(tensor.shape))
    one = shape == tensor.shape  # rows of one element
    known = _known_sum(tensor, wanted) if kind == "sum" and not one else None
    found = known or (tensor if one else Reduce(shape, tensor.dtype, kind, tensor, tuple(sorted(wanted))))
    return found if keep else squeeze(found, wanted)


ONE_HOT = where(eq(A, B), C, 0)  # of the position along an axis, the chosen position, and the value there
IN_RANGE = where((A >= 0) & (A < B), C, 0.0)  # of the chosen position, the size of the axis, and the value there


def _known_sum(tensor: Tensor, axes: set[int]) -> Tensor | None:
    """The sum of `tensor` over `axes` where it has one form for all rows: of one value at a chosen position and zeros
    elsewhere, of equal values, and of sums of these. Gradients of losses are such."""
    position = tuple(variable(f"A{axis}", size) for axis, size in enumerate(tensor.shape))
    moving = {name for axis in axes for name in position[axis].variables()}
    shape = tuple(ONE if axis in axes else size for axis, size in enumerate(tensor.shape))
    count = product(tensor.shape[axis] for axis in axes)

    def row(value: Tensor) -> Tensor:
        return value if isinstance(value, Const) else View(shape, value.dtype, value, lambda position: position)

    def known(tensor: Tensor) -> Tensor | None:
        match tensor:
            case Pointwise(same_register=Tensor() as same):
                found = known(same)
                return found and cast(found, tensor.dtype)
            case Pointwise(expression=Apply("add", (Arg(0), Arg(1)))):
                one, two = map(known, tensor.args)
                return one and two and pointwise(A + B, tensor.dtype, one, two)
            case Pointwise(expression=expression, args=(place, chosen, value)) if expression is ONE_HOT:
                along = [axis for axis in axes if isinstance(place, Iota) and place.at(position) == position[axis]]
                if along == [*axes] and not any(_varies(one, position, moving) for one in (chosen, value)):
                    size = number(tensor.shape[along[0]], "i64")
                    return pointwise(IN_RANGE, tensor.dtype, row(chosen), size, row(value))
        if tensor.dtype not in FLOATS or _varies(tensor, position, moving):
            return None
        size = number(count if count.number is None else count.number, "i64")
        return pointwise(A * B, tensor.dtype, row(tensor), cast(size, tensor.dtype))

    return known(tensor)


def is_zero(tensor: Tensor) -> bool:
    """All elements of `tensor` are known to be 0."""
    match tensor:
        case View() | Pointwise(same_register=Tensor()):
            return is_zero(tensor.source if isinstance(tensor, View) else tensor.args[0])
    return isinstance(tensor, Const) and tensor.value == 0


def _varies(tensor: Tensor, position: Position, moving: set[Var]) -> bool:
    """Whether the element of `tensor` at `position` may change with the variables `moving`."""
    match tensor:
        case Const():
            return False
        case View():
            return _varies(tensor.source, tensor.at(position), moving)
        case Pointwise():
            return any(_varies(arg, position, moving) for arg in tensor.args)
        case Load():
            position = (linear(position, tensor.strides),)
        case Iota():
            position = (tensor.at(position),)
        case Reduce():
            pass
        case _:
            return True
    return any(moving.intersection(index.variables()) for index in position)


def scan(kind: str, tensor: Tensor, axis: int) -> Tensor:
    """The inclusive prefix reductions of `tensor` along `axis`."""
    if not tensor.shape or tensor.shape[axis] == ONE or ZERO in tensor.shape:
        return tensor
    return Scan(tensor.shape, tensor.dtype, kind, tensor, (axis % len(tensor.shape),))


def squeeze(tensor: Tensor, axes: set[int]) -> Tensor:
    """`tensor` without the dimensions `axes`, which have size 1."""
    shape = tuple(size for axis, size in enumerate(tensor.shape) if axis not in axes)

    def at(position: Position) -> Position:
        rest = iter(position)
        return tuple(ZERO if axis in axes else next(rest) for axis in range(len(tensor.shape)))

    return View(shape, tensor.dtype, tensor, at)


def children(tensor: Tensor) -> tuple[Tensor, ...]:
    """The operands of `tensor`."""
    match tensor:
        case Pointwise():
            return tensor.args
        case View() | Reduce():
            return (tensor.source,)
        case Select():
            return (tensor.inner, tensor.outer)
        case Gather():
            return (tensor.source, *tensor.indices)
        case Scatter():
            return (tensor.source, *tensor.target.indices)  # what it adds to is not read
    return ()


def address(tensor: Tensor, position: Position) -> Index | None:
    """Where in memory the element of `tensor` at `position` lies, counted in elements from where the tensor begins that
    it is a view of; None if it is computed."""
    while isinstance(tensor, View):
        position = tensor.at(position)
        tensor = tensor.source
    return linear(position, tensor.strides) if isinstance(tensor, Load) else None


def everything(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The nodes of the DAG below `tensors` in post-order: each once, operands first."""
    seen: set[Tensor] = set()
    for root in tensors:
        found, path = root, list[tuple[Tensor, Iterator[Tensor]]]()  # nodes with the operands that are left to visit
        while found not in seen or path:
            if found not in seen:
                seen.add(found)
                path.append((found, iter(children(found))))
            below = next((child for child in path[-1][1] if child not in seen), None)
            found = path[-1][0] if below is None else below
            if below is None:
                yield path.pop()[0]


# ---- text ------------------------------------------------------------------------------------------------------------


def text(outputs: Sequence[Tensor], op: str = "", args: Mapping[str, object] | None = None) -> str:
    """The DAG below `outputs`, one value a line, arguments first. Numbers stand where they are used; `i0`, `i1`, ...
    are the position. `op` is the anchor's, `args` are its arguments by name, tensors among them."""
    given, names, lines = args or {}, dict[Tensor, str](), list[str]()
    for tensor in everything([*(one for one in given.values() if isinstance(one, Tensor)), *outputs]):
        if isinstance(tensor, Const):
            names[tensor] = str(tensor.value)
            continue
        found = _node_text(tensor, names)
        if isinstance(tensor, Load) and tensor.anchor:
            texts = (f"{key}={names[one] if isinstance(one, Tensor) else one}" for key, one in given.items())
            found = f"{op}({', '.join(texts)})"
        names[tensor] = f"%{len(lines)}"
        lines.append(f"{names[tensor]}: {tensor.dtype}{_list(tensor.shape)} = {found}")
    return "\n".join([*lines, f"return {', '.join(names[output] for output in outputs)}", ""])


def _list(indices: Iterable[Index]) -> str:
    return f"[{', '.join(map(str, indices))}]"


def _chosen(tensor: Gather, position: Position, names: dict[Tensor, str]) -> str:
    """The position in the source of a gather."""
    found = tuple(variable(names[index], size) for index, size in zip(tensor.indices, tensor.sizes, strict=True))
    return f"{_list(tensor.at(position, found))}{', wrap' * tensor.wrap}"


def _node_text(tensor: Tensor, names: dict[Tensor, str]) -> str:
    """The right side of a line."""
    position = tuple(variable(f"i{axis}", size) for axis, size in enumerate(tensor.shape))
    match tensor:
        case Load():
            return f"load {tensor.name}, strides={_list(tensor.strides)}"
        case Iota():
            return f"iota {tensor.at(position)}"
        case Pointwise():
            return expression_text(tensor.expression, tuple(names[arg] for arg in tensor.args))
        case View():
            return f"view {names[tensor.source]}{_list(tensor.at(position))}"
        case Select():
            return f"select {names[tensor.inner]}, {names[tensor.outer]}, starts={_list(tensor.starts)}"
        case Gather():
            return f"gather {names[tensor.source]}{_chosen(tensor, position, names)}"
        case Scatter(target=target) if isinstance(target.source, Load):
            verb = "add" if tensor.adds else "put"
            return f"{verb} {names[tensor.source]} to {target.source.name}{_chosen(target, position, names)}"
        case Reduce():
            word = "scan" if isinstance(tensor, Scan) else "reduce"
            return f"{word} {tensor.kind} {names[tensor.source]}, axes={list(tensor.axes)}"
    raise AssertionError(tensor)
