"""Sums over the rows of a tile in the epilogue of a product.

The statistics of a batch norm are sums over all rows of the convolution before it; its gradients are such sums of what
the product before it makes of a gradient. An epilogue has the rows of one tile in registers, and reduces these:

    r1 = tl.sum(t0, 0)[None, :]
    tl.store(out1 + (N + 64 * block), r1)

In the body that is a reduction over the second dimension of [blocks, rows of a block, columns], where a block has as
many rows as a tile. What follows, such as a variance around the block's own mean, has the shape [blocks, 1, columns].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.emit import Emitter
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, variable
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO, Reduce, Shape, Tensor
from torch_rtx.lowering.kernels.region import Region, needed

BLOCK = "block"  # the number of a program's tile along the rows


@dataclass(frozen=True)
class TileSums:
    """What an epilogue reduces.

    Attributes:
        rows: of a block.
        shape: of what is reduced: [blocks, rows, columns].
        results: the outputs that depend on reductions, by index.
    """

    rows: int
    shape: Shape
    results: tuple[int, ...]


def tile_sums(region: Region) -> TileSums | None:
    """What the epilogue of a region's anchor reduces; None: nothing.

    Raises:
        Unsupported: something else than sums over blocks of rows, or an element needs them.
    """
    if not region.reductions:
        return None
    shape = region.reductions[0].source.shape
    rows = shape[1].number if len(shape) == 3 else None
    if rows is None or any((one.kind, one.axes, one.source.shape) != ("sum", (1,), shape) for one in region.reductions):
        raise Unsupported("an epilogue that reduces something else than blocks of rows")
    results = tuple(at for at, output in enumerate(region.outputs) if _is_reduced(output))
    if any(region.outputs[at].shape != (shape[0], ONE, shape[2]) for at in results):
        raise Unsupported("an element that needs a sum of its block")
    return TileSums(rows, shape, results)


def plain_outputs(region: Region) -> dict[int, Tensor]:
    """The outputs that an epilogue computes element by element, by index.

    Raises:
        Unsupported: see `tile_sums`.
    """
    sums = tile_sums(region)
    return {at: output for at, output in enumerate(region.outputs) if sums is None or at not in sums.results}


def _is_reduced(output: Tensor) -> bool:
    return isinstance(output, Reduce) or any(True for _ in needed(output))


def write_tile_sums(region: Region, sums: TileSums, emitter: Emitter, row: Index, column: Index, axis: str) -> None:
    """Reduce a tile, and store the results.

    Args:
        row, column: of an element of the tile.
        axis: of its columns.
    """
    size, columns = constant(sums.rows), frozenset((axis,))
    inside, number = row // size, variable(BLOCK, sums.shape[0])
    totals = {}
    for reduction in region.reductions:
        value = emitter.value(reduction.source, (inside, row % size, column))
        text, whole = value.text, frozenset(emitter.axes)
        text = text if value.axes == whole else f"tl.broadcast_to({text}, {emitter.shape(whole)})"
        totals[reduction] = emitter.assign(f"tl.sum({text}, 0)[None, :]", columns, "r")
        emitter.reduced[reduction] = totals[reduction], (inside, ZERO, column)
    position = number, ZERO, column
    emitter.reduced.update({reduction: (total, position) for reduction, total in totals.items()})
    for at in sums.results:
        value = emitter.value(region.outputs[at], position)
        address = linear(position, map(from_dim, region.types[at].strides))
        emitter.store(f"out{at}", address, value, columns)
