"""The iteration space of a loop: elements, or rows that are reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.index import Index, constant, linear, product, unravel, variable
from torch_rtx.lowering.kernels.kernel_ir import (
    Load,
    Pointwise,
    Position,
    Reduce,
    Scan,
    Scatter,
    Select,
    Shape,
    Tensor,
    View,
)
from torch_rtx.lowering.kernels.region import Region

PERSISTENT = 8192  # elements of the longest row that is held in registers, in one tile


@dataclass(frozen=True)
class Rows:
    """The iteration space: `count` rows of `size` elements, reduced over `axes` of a tensor of `shape`."""

    count: Index
    size: Index
    shape: Shape = ()
    axes: tuple[int, ...] = ()

    @property
    def contiguous(self) -> bool:
        """The last dimension is reduced, so the elements of a row are neighbours."""
        return max(self.axes, default=0) == len(self.shape) - 1

    def width(self, shape: Shape) -> Index:
        """Elements of a row of a result of `shape`, which may be longer than a reduced one: padded, for example."""
        last = len(self.shape) - 1
        longer = self.axes == (last,) and shape[:last] == self.shape[:last] and len(shape) == len(self.shape)
        return shape[last] if longer else self.size

    def position(self, row: Index, element: Index, shape: Shape, axes: tuple[int, ...]) -> Position:
        """The position of an element of a row in a tensor of `shape`, reduced over `axes`, the last fastest."""
        kept = iter(unravel(row, tuple(s for a, s in enumerate(shape) if a not in axes)))
        inner = dict(zip(axes, unravel(element, tuple(shape[a] for a in axes)), strict=True))
        return tuple(inner[axis] if axis in inner else next(kept) for axis in range(len(shape)))


@lru_cache(maxsize=1024)
def rows_of(region: Region) -> Rows:
    """The iteration space of `region`.

    Raises:
        Unsupported: its reductions and outputs do not share one.
    """
    reductions = region.reductions
    if region.anchor is not None:
        raise Unsupported(f"{region.anchor.op} as a plain loop")
    if not reductions:
        rows = _rows_of_results(region.outputs)
    else:
        source, axes = reductions[0].source, memory_order(reductions[0])
        rows = Rows(_kept(reductions[0]), _size(source.shape, axes), source.shape, axes)
    for reduction in reductions:
        size = _size(reduction.source.shape, reduction.axes)
        if (_kept(reduction), size) != (rows.count, rows.size):
            raise Unsupported(f"rows of {size} and of {rows.size} elements in one kernel")
        if isinstance(reduction, Scan) and (size.number is None or size.number > PERSISTENT):
            raise Unsupported(f"a scan of {size} elements")
    for output in region.outputs:
        if product(output.shape) not in (rows.count, rows.count * rows.size, rows.count * rows.width(output.shape)):
            raise Unsupported("outputs of different sizes in one kernel")
    return rows


def _rows_of_results(outputs: Sequence[Tensor]) -> Rows:
    """The iteration space of results without reductions: elements, or rows where some have one element for each."""
    sizes = {product(output.shape) for output in outputs}
    if len(sizes) > 1:
        for shape in (output.shape for output in outputs):
            rank = len(shape)
            for axes in (*(tuple(range(at, rank)) for at in range(rank - 1, 0, -1)), *((at,) for at in range(rank))):
                rows = Rows(product(s for at, s in enumerate(shape) if at not in axes), _size(shape, axes), shape, axes)
                if sizes == {rows.count, product(shape)}:
                    return rows
    return Rows(product(outputs[0].shape), constant(1))


@lru_cache(maxsize=1024)
def repeated_rows(region: Region) -> Rows | None:
    """The iteration space of a loop over elements as rows along which an operand repeats, as parameters of channels do:
    a tile of several rows reads it once. None if there are none."""
    return next(_rows_of_reads(region, lambda one, outer, axes: one <= axes), None)


@lru_cache(maxsize=1024)
def steady_rows(region: Region) -> Rows | None:
    """The iteration space of a loop over elements as rows, the longest with an operand of one element for each, as
    statistics of rows are: a program that has a piece of a row reads it once. None if there are none."""
    return max(
        _rows_of_reads(region, lambda one, outer, axes: one <= outer), key=lambda rows: len(rows.axes), default=None
    )


def _rows_of_reads(region: Region, fits: Callable[[set[int], set[int], set[int]], bool]) -> Iterator[Rows]:
    """The iteration spaces of a loop over elements as rows, the shortest first, in which the address of a read fits:
    given the axes on which it depends, those of all rows, and those of a row."""
    found = _order_and_reads(region)
    order, read = ([], []) if found is None else found
    shape = region.outputs[0].shape
    for length in range(1, len(order)):
        outer, axes = order[:-length], tuple(order[-length:])
        if outer == sorted(outer) and any(one and fits(one, {*outer}, {*axes}) for one in read):
            yield Rows(_size(shape, tuple(outer)), _size(shape, axes), shape, axes)


def _order_and_reads(region: Region) -> tuple[list[int], list[set[int]]] | None:
    """The axes of the results of a loop over elements in the order of memory, and those on which the address of each
    read depends; None if results lie in several orders."""
    output, sizes = region.outputs[0], [size.number for size in region.outputs[0].shape]
    strides = [stride for stride in region.types[0].strides if isinstance(stride, int)]
    plain = len(strides) == len(sizes) and None not in sizes
    alike = all(one.shape == output.shape for one in region.outputs) and len({t.strides for t in region.types}) == 1
    if not plain or not alike or any(isinstance(one, Scatter) for one in region.outputs):
        return None
    order = sorted((axis for axis, size in enumerate(sizes) if size != 1), key=lambda axis: -strides[axis])
    names = {f"A{axis}": axis for axis in range(len(sizes))}
    position = tuple(map(variable, names, output.shape))
    addresses = (address for one in region.outputs for address in _addresses(one, position, set()))
    return order, [{names[var.name] for var in address.variables() if var.name in names} for address in addresses]


def _size(shape: Shape, axes: tuple[int, ...]) -> Index:
    return product(shape[axis] for axis in axes)


def memory_order(reduction: Reduce) -> tuple[int, ...]:
    """The reduced axes in the memory order of the first tensor that is read, outermost first."""
    axes, shape = reduction.axes, reduction.source.shape
    names = [f"A{axis}" for axis in range(len(shape))]
    if len(axes) > 1:
        for address in _addresses(reduction.source, tuple(map(variable, names, shape)), set()):
            strides = {str(atoms[0]): count for atoms, count in address.terms if len(atoms) == 1}
            if all(names[axis] in strides for axis in axes):
                return tuple(sorted(axes, key=lambda axis: strides[names[axis]], reverse=True))
    return axes


def _addresses(tensor: Tensor, position: Position, seen: set[tuple[Tensor, Position]]) -> Iterator[Index]:
    """The memory offsets that `tensor` reads at `position`."""
    if (tensor, position) in seen:
        return
    seen.add((tensor, position))
    match tensor:
        case Load():
            yield linear(position, tensor.strides)
        case View():
            yield from _addresses(tensor.source, tensor.at(position), seen)
        case Pointwise():
            for arg in tensor.args:
                yield from _addresses(arg, position, seen)
        case Select():
            yield from _addresses(tensor.inner, tensor.inside(position), seen)
            yield from _addresses(tensor.outer, position, seen)


def _kept(reduction: Reduce) -> Index:
    return product(s for a, s in enumerate(reduction.source.shape) if a not in reduction.axes)
