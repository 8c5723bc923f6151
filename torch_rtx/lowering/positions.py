"""Symbolic evaluation of tensors that depend on positions and sizes alone: `constants` for dynamic sizes.

The declarations of kernel ops give an element as a function of its position. Evaluated with symbolic positions, they
prove for all sizes at once that a mask is causal or hides no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, Value
from torch_rtx.lowering.kernels.expressions import Apply, Arg, Expression, Literal
from torch_rtx.lowering.kernels.index import Index, constant, is_natural, variable, within
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Const,
    Gather,
    Iota,
    Pointwise,
    Position,
    Scan,
    Select,
    Shape,
    Tensor,
    View,
    load,
)
from torch_rtx.lowering.kernels.region import express, tensor_type

EXACT = ("bool", "i64")  # dtypes that represent positions, and arithmetic on them, exactly


@dataclass(frozen=True)
class AtLeastZero:
    """A boolean element that is true where `index` is at least 0."""

    index: Index


Element = Index | AtLeastZero  # True and False are 1 and 0


class Positions:
    """The values of a graph that depend on positions and sizes alone."""

    def __init__(self, graph: Graph) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Tensor, Position], Element | None] = {}
        for node in graph.nodes:
            if node.kind == "op" and all(value.name in self._tensors for value in node.inputs):
                try:
                    self._tensors.update(express(node, self._tensors))
                except Unsupported:
                    continue

    def element(self, value: Value) -> tuple[Position, Element | None]:
        """A symbolic position in `value`, one variable per dimension, and the element there; None if unknown."""
        tensor = self._tensors.get(value.name)
        if tensor is None:
            return (), None
        position = everywhere(tensor.shape)
        return position, self.at(tensor, position)

    def row_start(self, value: Value) -> Element | None:
        """The element at the start of every row of `value`, at a symbolic position; None if unknown."""
        tensor = self._tensors.get(value.name)
        return None if tensor is None or not tensor.shape else self.at(tensor, (*everywhere(tensor.shape)[:-1], ZERO))

    def taken(self, node: Node) -> tuple[Position, Position | None]:
        """A symbolic position in the result of `node`, and the position in its first input from which the element there
        is gathered; None if unknown."""
        source, (output,) = node.inputs[0], node.outputs
        assert output is not None
        if any(value.name not in self._tensors for value in node.inputs[1:]):
            return (), None
        try:
            values = self._tensors | {source.name: load(source.name, tensor_type(source))}
            tensor = express(node, values)[output.name]
        except Unsupported:
            return (), None
        position = everywhere(tensor.shape)
        return position, self._source(tensor, position) if isinstance(tensor, Gather) else None

    def at(self, tensor: Tensor, position: Position) -> Element | None:
        """The element at a position."""
        key = tensor, position
        if key not in self._known:
            self._known[key] = self._at(tensor, position) if tensor.dtype in EXACT else None
        return self._known[key]

    def _at(self, tensor: Tensor, position: Position) -> Element | None:
        match tensor:
            case Const(value=value):
                return value if isinstance(value, Index) else constant(int(value))
            case Iota(at=at):
                return at(position)
            case View(source=source, at=moved):
                return self.at(source, moved(position))
            case Pointwise():
                args = [self.at(arg, () if isinstance(arg, Const) else position) for arg in tensor.args]
                return _evaluated(tensor.expression, args, tensor.dtype == "bool")
            case Select():
                return self._select(tensor, position)
            case Gather():
                there = self._source(tensor, position)
                return None if there is None else self.at(tensor.source, there)
            case Scan(kind="sum", source=source):
                return ZERO if self.at(source, everywhere(source.shape)) == ZERO else None
        return None

    def _select(self, tensor: Select, position: Position) -> Element | None:
        inner = tuple(p - start for p, start in zip(position, tensor.starts, strict=True))
        sides = list(zip(inner, tensor.inner.shape, strict=True))
        if any(is_natural(p - size) or is_natural(ZERO - p - ONE) for p, size in sides):
            return self.at(tensor.outer, position)
        found = self.at(tensor.inner, inner)
        if all(within(p, size) for p, size in sides) or found == self.at(tensor.outer, position):
            return found
        return None

    def _source(self, tensor: Gather, position: Position) -> Position | None:
        """The position of an element's source; assumes indices in range, since the call fails for others."""
        found = [self.at(index, position) for index in tensor.indices]
        chosen = [index for index in found if isinstance(index, Index) and is_natural(index)]
        return tensor.at(position, tuple(chosen)) if len(chosen) == len(found) else None


def everywhere(shape: Shape) -> Position:
    """A symbolic position in a tensor of `shape`: a variable per dimension."""
    return tuple(ZERO if size == ONE else variable(f"@{axis}", size) for axis, size in enumerate(shape))


def _evaluated(expression: Expression, args: Sequence[Element | None], truth: bool) -> Element | None:
    """What `expression` makes of `args`, as a truth or as a number."""
    match expression:
        case Arg(index):
            return args[index]
        case Literal(int(number)):
            return constant(number)
        case Apply("cast" | "cast_like", (inner, *_)):
            return _evaluated(inner, args, truth)
        case Apply("to_bool", (inner,)):
            return _compared("ne", _evaluated(inner, args, False), ZERO)
        case Apply("eq" | "ne" | "lt" | "le" | "gt" | "ge" as op, (left, right)):
            return _compared(op, _evaluated(left, args, False), _evaluated(right, args, False))
        case Apply("where", (condition, one, two)):
            chosen = _evaluated(condition, args, True)
            first, second = _evaluated(one, args, truth), _evaluated(two, args, truth)
            if isinstance(chosen, Index):
                return (first if chosen == ONE else second) if chosen in (ONE, ZERO) else None
            return chosen if truth and (first, second) == (ONE, ZERO) else first if first == second else None
        case Apply(op, (left, right)):
            first, second = _evaluated(left, args, truth), _evaluated(right, args, truth)
            return _logic(op, first, second) if truth else _sum(op, first, second)
    return None


def _sum(op: str, one: Element | None, two: Element | None) -> Element | None:
    if not isinstance(one, Index) or not isinstance(two, Index):
        return None
    match op:
        case "add":
            return one + two
        case "sub":
            return one - two
        case "mul":
            return one * two
    return None


def _logic(op: str, one: Element | None, two: Element | None) -> Element | None:
    """Of truths."""
    if op == "xor":
        return one if two == ZERO else _negated(one) if two == ONE else None
    if op not in ("and", "or"):
        return None
    neutral, decisive = (ONE, ZERO) if op == "and" else (ZERO, ONE)
    if decisive in (one, two):
        return decisive
    return two if one in (neutral, two) else one if two == neutral else None


def _negated(one: Element | None) -> Element | None:
    return AtLeastZero(ZERO - one.index - ONE) if isinstance(one, AtLeastZero) else _sum("sub", ONE, one)


def _compared(op: str, one: Element | None, two: Element | None) -> Element | None:
    if not isinstance(one, Index) or not isinstance(two, Index):
        return None
    match op:
        case "ge":
            return _at_least_zero(one - two)
        case "le":
            return _at_least_zero(two - one)
        case "gt":
            return _at_least_zero(one - two - ONE)
        case "lt":
            return _at_least_zero(two - one - ONE)
    below, above = (is_natural(difference - ONE) for difference in (two - one, one - two))
    if one != two and not below and not above:
        return None
    return constant(int((one == two) == (op == "eq")))


def _at_least_zero(index: Index) -> Element:
    if is_natural(index):
        return ONE
    return ZERO if is_natural(ZERO - index - ONE) else AtLeastZero(index)
