"""Products of very few rows on tensor cores, in which a tile has slices of K side by side.

An instruction of tensor cores has at least 8 rows. Where a product has fewer, the others are other slices of K, and a
second instruction costs little beside the unpacking of what it multiplies. So a tile has the columns of each slice, one
slice after the other, times the rows of each slice.

    tile[s, n; t, m] = sum(b[n, k of s] * a[m, k of t])         out[m, n] = sum of the tiles where s = t

What s and t differ in costs nothing, and more warps share the work on a column: with few columns a product takes as
long as the steps of one warp.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.ir import Dim
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, substitute, variable
from torch_rtx.lowering.kernels.kernel_ir import Position
from torch_rtx.lowering.kernels.matmul_template import Contraction, GemmConfig, KLoop, M, N
from torch_rtx.lowering.kernels.mma_template import MmaWriter
from torch_rtx.lowering.kernels.region import Region

MIN_ROWS, MAX_ROWS = 8, 16  # of a tile of `tl.dot`; of a tile with slices
ROWS, COLUMNS = "MS", "NS"  # of the tile with slices
OF_ROW, OF_COLUMN = "SM", "SN"  # their slices


def rows_of_slice(rows: int) -> int:
    """The rows of a tile that a slice has, of a product with `rows`."""
    return 1 << (rows - 1).bit_length()


def rows_of_tile(rows: int, slices: int) -> int:
    """The rows of a tile with slices, of a product with `rows`."""
    return max(MIN_ROWS, slices * rows_of_slice(rows))


class SlicedWriter(MmaWriter):
    """A contraction without taps of few rows, `config.slices` of K at a time. The second operand is computed."""

    def __init__(self, region: Region, contraction: Contraction, config: GemmConfig) -> None:
        assert isinstance(contraction.rows, int)
        assert isinstance(contraction.depth, int)
        super().__init__(region, contraction, replace(config, block_m=rows_of_slice(contraction.rows)))
        self.slice_depth = contraction.depth // config.slices
        rows = rows_of_tile(contraction.rows, config.slices)
        self.loop_rows = Axis(ROWS, rows, "" if rows == contraction.rows * config.slices else "in_ms")

    def loop_columns(self, axis: Axis) -> Axis:
        """The columns of each slice."""
        return Axis(COLUMNS, axis.block * self.config.slices, axis.mask and "in_ns")

    def _range(self, axis: Axis, start: str, side: str, size: Dim) -> list[str]:
        lines = super()._range(axis, start, side, size)
        rows, cast = self.contraction.rows, "" if "tile" in start else self.cast
        if axis.name == M:
            lines += [
                f"{name} = tl.arange(0, {self.loop_rows.block}){side} {op} {axis.block}"
                for name, op in ((ROWS, "%"), (OF_ROW, "//"))
            ]
            if self.loop_rows.mask:
                lines.append(f"{self.loop_rows.mask} = ({ROWS} < {rows}) & ({OF_ROW} < {self.config.slices})")
            return lines
        inner = self.loop_columns(axis)
        every = f"tl.arange(0, {inner.block}){side}"
        lines += [f"{inner.name} = {start}{every} % {axis.block}{cast}", f"{OF_COLUMN} = {every} // {axis.block}"]
        return lines + ([f"{inner.mask} = {inner.name} < {from_dim(size)}"] if inner.mask else [])

    def k_loop(self) -> KLoop:
        """The loop over K of one slice."""
        return KLoop(replace(self.contraction, depth=self.slice_depth), self.config.block_k)

    def emitter(self, axes: list[Axis], names: str) -> Emitter:
        """An emitter that knows which slice a row and a column are of."""
        found = super().emitter(axes, names)
        found.along(ROWS, OF_ROW)
        found.along(COLUMNS, OF_COLUMN)
        return found

    def a_at(self, position: Position) -> Position:
        """The position in the first operand for one along K of a slice."""
        row = variable(ROWS, from_dim(self.contraction.rows))
        return self.contraction.a_at(self.z, row, self._slice(OF_ROW, position))

    def b_at(self, column: Index, position: Position) -> Position:
        """The position in the second operand for a column and one along K of a slice."""
        column = substitute(column, {N: variable(COLUMNS, self.indexing.width)})
        return self.contraction.b_at(self.z, column, self._slice(OF_COLUMN, position))

    def _slice(self, name: str, position: Position) -> Position:
        (k,) = position
        return (k + variable(name, constant(self.config.slices)) * constant(self.slice_depth),)

    def tile_of(self, total: Operand, axis: Axis) -> tuple[Operand, list[str]]:
        """The sums of a tile: those of a slice's rows and columns, over all slices."""
        slices, rows, of_tile = self.config.slices, self.config.block_m, self.loop_rows.block
        kept = f"tl.where({OF_COLUMN} == {OF_ROW}, {total.text}, 0)"
        lines = [
            f"{total.text} = tl.sum(tl.reshape({kept}, [{slices}, {axis.block}, {of_tile}]), 0)",
            f"{total.text} = tl.sum(tl.reshape({total.text}, [{axis.block}, {of_tile // rows}, {rows}]), 1)",
        ]
        return Operand(total.text, frozenset((M, axis.name))), lines
