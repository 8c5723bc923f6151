"""Tensors as functions of a position: what a region computes, before anything is said of loops.

A region's body becomes a graph of these. Views are position arithmetic, pointwise operators a text with holes, and what
is left are loads, reductions and choices between positions. `emit` turns them into Triton for a position.

A value of dtype f16 or bf16 is held as f32 in registers, and is rounded where it is stored or cast on purpose: the
kernel is then no less precise than the calls that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch_rtx.errors import Unsupported
from torch_rtx.ir import TensorType
from torch_rtx.lowering.kernels.index import Index, constant, from_dim

Position = tuple[Index, ...]
Shape = tuple[Index, ...]
Scalar = bool | int | float | Index

TRITON = {
    "f64": "tl.float64",
    "f32": "tl.float32",
    "f16": "tl.float16",
    "bf16": "tl.bfloat16",
    "i64": "tl.int64",
    "i32": "tl.int32",
    "i16": "tl.int16",
    "i8": "tl.int8",
    "u8": "tl.uint8",
    "bool": "tl.int1",
}
FLOATS = ("f64", "f32", "f16", "bf16")
INTS = ("i64", "i32", "i16", "i8", "u8")
ZERO = constant(0)
ONE = constant(1)


def register(dtype: str) -> str:
    """The dtype that a value is held in."""
    return "f32" if dtype in ("f16", "bf16") else dtype


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of `shape` and `dtype`; two are the same only if they are one object."""

    shape: Shape
    dtype: str


@dataclass(frozen=True, eq=False)
class Load(Tensor):
    """What is in memory at `name`, or, where `anchor` is set, what the kernel's matrix product has in registers."""

    name: str
    strides: Shape
    anchor: bool = False


@dataclass(frozen=True, eq=False)
class Number(Tensor):
    """One number, the same everywhere; a dim is an Index."""

    value: Scalar


@dataclass(frozen=True, eq=False)
class Iota(Tensor):
    """At each position an integer that `at` says."""

    at: Callable[[Position], Index]


@dataclass(frozen=True, eq=False)
class Map(Tensor):
    """`text` with its holes `{0}`, `{1}`, ... filled by the elements of `args`, which have the same shape."""

    text: str
    args: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Move(Tensor):
    """The element of `source` at another position."""

    source: Tensor
    at: Callable[[Position], Position]


@dataclass(frozen=True, eq=False)
class Within(Tensor):
    """`inner` moved by `starts`, wherever that is inside its shape; `outer` elsewhere."""

    inner: Tensor
    outer: Tensor
    starts: Shape


@dataclass(frozen=True, eq=False)
class Gather(Tensor):
    """`source` at the position that `at` says, with the elements of `indices` as one more argument each. An index
    that is out of the range of `sizes` gives 0; where `wrap` is set, negative ones count from the end."""

    source: Tensor
    indices: tuple[Tensor, ...]
    sizes: Shape
    at: Callable[[Position, Position], Position]
    wrap: bool = False


@dataclass(frozen=True, eq=False)
class Reduce(Tensor):
    """`source` reduced over `axes`, whose sizes become 1. `kind` is one of REDUCTIONS."""

    kind: str
    source: Tensor
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scan(Reduce):
    """At each position what `source` is reduced to over the elements of the row up to there; `kind` is sum or prod."""


# Kind: the neutral element, and how the parts of two halves combine.
REDUCTIONS = {
    "sum": ("0", "{0} + {1}"),
    "prod": ("1", "{0} * {1}"),
    "max": ("least", "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "min": ("greatest", "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "any": ("False", "{0} | {1}"),
    "all": ("True", "{0} & {1}"),
}


def load(name: str, type_: TensorType, anchor: bool = False) -> Load:
    """The tensor that the parameter `name` of the kernel points to.

    Raises:
        Unsupported: a dtype that kernels do not have.
    """
    if type_.dtype not in TRITON:
        raise Unsupported(f"dtype {type_.dtype} in a kernel")
    shape, strides = (tuple(map(from_dim, dims)) for dims in (type_.shape, type_.strides))
    return Load(shape, type_.dtype, name, strides, anchor)


def number(value: Scalar, dtype: str) -> Number:
    """`value` as a tensor without dimensions."""
    return Number((), dtype, value)


def broadcast(tensors: Sequence[Tensor]) -> Shape:
    """The shape that `tensors` have together."""
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
    """`tensor` repeated to `shape`."""
    if tensor.shape == shape or isinstance(tensor, Number):
        return tensor
    skip = len(shape) - len(tensor.shape)
    fixed = [size == ONE and shape[axis] != ONE for axis, size in enumerate(tensor.shape, skip)]

    def at(position: Position) -> Position:
        return tuple(ZERO if one else p for p, one in zip(position[skip:], fixed, strict=True))

    return Move(shape, tensor.dtype, tensor, at)


def pointwise(text: str, dtype: str, *args: Tensor) -> Tensor:
    """`text` of the elements of `args`, broadcast to one shape."""
    shape = broadcast(args)
    return Map(shape, dtype, text, tuple(expand(arg, shape) for arg in args))


def cast(tensor: Tensor, dtype: str, rounded: bool = False) -> Tensor:
    """`tensor` in `dtype`; `rounded` means that the result has the precision of dtype, and not that of its register."""
    if isinstance(tensor, Number) and not isinstance(tensor.value, Index):
        if dtype in INTS:
            return number(_wrapped(int(tensor.value), dtype), dtype)
        return number(bool(tensor.value) if dtype == "bool" else float(tensor.value), dtype)
    if tensor.dtype == dtype:
        return tensor
    source, target = register(tensor.dtype), register(dtype)
    if dtype == "bool":
        return Map(tensor.shape, dtype, "({0} != 0)", (tensor,))
    if target != dtype and rounded:
        single = "" if source == "f32" else ".to(tl.float32)"  # PyTorch goes by way of f32 as well
        return Map(tensor.shape, dtype, f"{{0}}{single}.to({TRITON[dtype]}).to(tl.float32)", (tensor,))
    text = "{0}" if source == target else f"{{0}}.to({TRITON[target]})"
    return Map(tensor.shape, dtype, text, (tensor,))


def _wrapped(value: int, dtype: str) -> int:
    """`value` as an integer of `dtype`, as PyTorch makes it: what does not fit loses its higher bits."""
    least = 0 if dtype.startswith("u") else -(1 << int(dtype[1:]) - 1)
    return (value - least) % (1 << int(dtype[1:])) + least


def reduce(kind: str, tensor: Tensor, axes: Sequence[int], keep: bool = True) -> Tensor:
    """`tensor` reduced over `axes` (all, if there are none)."""
    rank = len(tensor.shape)
    if not rank:
        return tensor
    wanted = {axis % rank for axis in axes} if axes else set(range(rank))
    shape = tuple(ONE if axis in wanted else size for axis, size in enumerate(tensor.shape))
    one = shape == tensor.shape  # rows of one element
    found = tensor if one else Reduce(shape, tensor.dtype, kind, tensor, tuple(sorted(wanted)))
    return found if keep else squeeze(found, wanted)


def scan(kind: str, tensor: Tensor, axis: int) -> Tensor:
    """The reductions of all beginnings of a row, along `axis`."""
    if not tensor.shape or tensor.shape[axis] == ONE or ZERO in tensor.shape:
        return tensor
    return Scan(tensor.shape, tensor.dtype, kind, tensor, (axis % len(tensor.shape),))


def squeeze(tensor: Tensor, axes: set[int]) -> Tensor:
    """`tensor` without the dimensions `axes`, which have size 1."""
    shape = tuple(size for axis, size in enumerate(tensor.shape) if axis not in axes)

    def at(position: Position) -> Position:
        rest = iter(position)
        return tuple(ZERO if axis in axes else next(rest) for axis in range(len(tensor.shape)))

    return Move(shape, tensor.dtype, tensor, at)


def children(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that `tensor` is made of."""
    match tensor:
        case Map():
            return tensor.args
        case Move() | Reduce():
            return (tensor.source,)
        case Within():
            return (tensor.inner, tensor.outer)
        case Gather():
            return (tensor.source, *tensor.indices)
    return ()


def everything(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """All that `tensors` are made of, each once, what is needed first."""
    seen: set[Tensor] = set()

    def visit(tensor: Tensor) -> Iterator[Tensor]:
        if tensor not in seen:
            seen.add(tensor)
            for child in children(tensor):
                yield from visit(child)
            yield tensor

    for tensor in tensors:
        yield from visit(tensor)
