"""Epilogue indexing: which position of each output a program computes from its tile of a matrix product.

A program holds a tile of a product: batch Z, rows M, columns N. Its epilogue may reshape or permute it, or take ranges
of columns: the gate and the value of a gated unit are two ranges, which one program computes side by side. A view maps
a position in an output to one in the product; here these maps are inverted. The emitter evaluates each output at the
position found and refuses if that needs the product elsewhere: a wrong inverse can't become a wrong kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.index import (
    Atom,
    Index,
    Var,
    constant,
    product,
    ravel,
    unravel,
    upper,
    variable,
)
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO, Load, Pointwise, Position, Shape, Tensor, View

MARK = "@"  # prefix of the variables that are solved for; no dim has such a name


@dataclass(frozen=True)
class Tile:
    """The result of a product in the coordinates of its programs.

    Attributes:
        out: the result.
        axis: the dimension of `out` that holds columns; all others together are rows.
        row: the row-major index of a row.
        first: the column where N is 0.
        columns: the range of N.
    """

    out: Load
    axis: int
    row: Index
    first: Index
    columns: Index

    def position(self, column: Index) -> Position:
        """The position in `out` of the element of this row in `column`."""
        rest = iter(unravel(self.row, self.lead))
        return tuple(self.first + column if axis == self.axis else next(rest) for axis in range(len(self.out.shape)))

    @property
    def lead(self) -> Shape:
        """The shape of the rows."""
        return tuple(size for axis, size in enumerate(self.out.shape) if axis != self.axis)


@dataclass(frozen=True)
class EpilogueIndexing:
    """What a program computes, in terms of Z, M and N.

    Attributes:
        columns: the column of each accumulator, a function of N.
        width: the range of N.
        positions: the position at which each output is evaluated.
    """

    columns: tuple[Index, ...]
    width: Index
    positions: tuple[Position, ...]


def epilogue_indexing(outputs: Sequence[Tensor], tile: Tile) -> EpilogueIndexing:
    """The indexing of an epilogue with `outputs`.

    Raises:
        Unsupported: the outputs take different parts of the product, or a view can't be inverted.
    """
    whole = product(tile.out.shape)
    if all(product(output.shape) == whole for output in outputs):
        n = ZERO if tile.columns == ONE else variable("N", tile.columns)
        return EpilogueIndexing((n,), tile.columns, tuple(_whole(output, tile, tile.position(n)) for output in outputs))
    parts = [_ColumnRanges(output, tile) for output in outputs]
    widths = {(part.step, part.width) for part in parts}
    if len(widths) > 1 or tile.first.terms or parts[0].width.number is None:
        raise Unsupported("outputs that take different parts of a matrix product")
    n = variable("N", parts[0].width)
    starts = sorted({start for part in parts for start in part.starts})
    columns = tuple(n * constant(parts[0].step) + constant(start) for start in starts)
    return EpilogueIndexing(columns, parts[0].width, tuple(part.position(tile, n) for part in parts))


def _variables(tensor: Tensor) -> Position:
    return tuple(variable(f"{MARK}{axis}", size) for axis, size in enumerate(tensor.shape))


def _whole(output: Tensor, tile: Tile, place: Position) -> Position:
    """The position in an output that has as many elements as the product, for a place in that."""
    variables, flat = _variables(output), ravel(place, tile.out.shape)
    needed = needs(output, variables, tile.out)
    if needed and needed[0] == variables:  # also where sizes are sums, of which no division is known
        return place
    if not needed:
        return unravel(flat, output.shape)
    return _assembled(output.shape, _digits(ravel(needed[0], tile.out.shape), flat, product(tile.out.shape)))


class _ColumnRanges:
    """The columns that an output reads: `step * N + start` for each of `starts`."""

    def __init__(self, output: Tensor, tile: Tile) -> None:
        needed = needs(output, _variables(output), tile.out)
        if not needed:
            raise Unsupported("an output that has nothing to do with the matrix product of its kernel")
        self.output = output
        columns = [position[tile.axis] for position in needed]
        rows = {ravel(position[: tile.axis] + position[tile.axis + 1 :], tile.lead) for position in needed}
        offsets = [Index(tuple(term for term in column.terms if not term[0])) for column in columns]
        varying = {column - offset for column, offset in zip(columns, offsets, strict=True)}
        if len(rows) > 1 or len(varying) > 1:
            raise Unsupported("one output of several rows of a matrix product")
        self.row = rows.pop()
        column = varying.pop()
        self.starts = {offset.number or 0 for offset in offsets}
        self.step = math.gcd(*(count for _, count in column.terms)) or 1
        self.column = column // constant(self.step)
        self.width = (upper(self.column) or column) + ONE
        if product(output.shape) != product(tile.lead) * self.width:
            raise Unsupported("an output that repeats what it takes of a matrix product")

    def position(self, tile: Tile, n: Index) -> Position:
        """The position in the output of row `tile.row` and column `n`."""
        row = ravel(unravel(tile.row, tile.lead), tile.lead)  # 0 for the only row
        rows, columns = _digits(self.row, row, product(tile.lead)), _digits(self.column, n, self.width)
        both = {name: rows.get(name, ZERO) + columns.get(name, ZERO) for name in rows | columns}
        return _assembled(self.output.shape, both)


def needs(tensor: Tensor, position: Position, out: Load) -> list[Position]:
    """The positions of the product that an element reads; those behind selects and gathers are left to the emitter."""
    found: dict[Position, None] = {}
    seen: set[tuple[Tensor, Position]] = set()

    def visit(tensor: Tensor, position: Position) -> None:
        if (tensor, position) in seen:
            return
        seen.add((tensor, position))
        if tensor is out:
            found[position] = None
        elif isinstance(tensor, View):
            visit(tensor.source, tensor.at(position))
        elif isinstance(tensor, Pointwise):
            for arg in tensor.args:
                visit(arg, position)

    visit(tensor, position)
    return list(found)


Digits = dict[str, Index]  # by variable of an output, its value as far as it is solved


def _digits(number: Index, value: Index, total: Index) -> Digits:
    """Solve `number == value` for the digits of variables in `number`, a mixed-radix number below `total`."""
    found: Digits = {}
    for monomial, count in number.terms:
        digits = [atom for atom in monomial if _is_digit(atom)]
        if len(digits) != 1:
            raise Unsupported(f"the inverse of {number}")
        weight = Index(((tuple(atom for atom in monomial if atom is not digits[0]), count),))
        bound = upper(Index((((digits[0],), 1),)))
        if bound is None:
            raise Unsupported(f"the inverse of {number}")
        size = bound + ONE
        here = value // weight
        name, times = _meaning(digits[0])
        digit = here if weight * size == total else here % size
        found[name] = found.get(name, ZERO) + digit * times
    return found


def _is_digit(atom: Atom) -> bool:
    names = Index((((atom,), 1),)).variables()
    return any(var.name.startswith(MARK) for var in names)


def _meaning(digit: Atom) -> tuple[str, Index]:
    """The variable that a digit belongs to, and the weight of the digit in it."""
    if isinstance(digit, Var):
        return digit.name, ONE
    if digit.arg.atom is None:
        raise Unsupported(f"the inverse of {digit}")
    name, weight = _meaning(digit.arg.atom)
    return name, weight if digit.remainder else weight * digit.by


def _assembled(shape: Shape, digits: Digits) -> Position:
    return tuple(digits.get(f"{MARK}{axis}", ZERO) for axis in range(len(shape)))
