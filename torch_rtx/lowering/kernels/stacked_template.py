"""Products of two ranges of columns, such as a gate and what it is multiplied with, as one product on tensor cores.

Where the second operand is computed it comes first, see `MmaWriter`, and columns of the result are rows of a tile. A
tile has the columns of both ranges side by side: instructions have as many rows as for one range of twice the columns.
So a tile has twice the rows of the result in as many registers, and a column is unpacked for all of them at once.

    tile[8*i .. 8*i+7] = columns of the first range         tile[8*i+8 .. 8*i+15] = the same ones of the second range

A thread has the sums of rows r and r + 8 of a tile: no value moves when the ranges become tiles of their own.
"""

from __future__ import annotations

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.emit import Axis
from torch_rtx.lowering.kernels.mma_template import MmaWriter, Sums
from torch_rtx.lowering.kernels.triton_ops import tl_dtype

SIDE = 8  # columns of a range that lie together


class StackedWriter(MmaWriter):
    """A contraction with two accumulators, whose second operand is computed, and whose scales do not change with K."""

    def combined(self, sums: list[Sums], axis: Axis) -> list[Sums]:
        """One accumulator in the loop, and both after it.

        Raises:
            Unsupported: other accumulators, or they are scaled in the loop.
        """
        if len(sums) != 2 or not self.swapped or not all(one.pairs and not one.by_step for one in sums):
            raise Unsupported("accumulators that are no rows of one product")
        first, second = sums
        columns, rows = axis.block, self.loop_rows.block
        depth = self.width * (self.config.block_k // self.width if self.config.joined else 1)
        both = f"{first.total.text}_{second.total.text}"
        inside = []
        for (other, one), (_, two) in zip(first.pairs, second.pairs, strict=True):
            sides = (f"tl.reshape({side}, [{columns // SIDE}, {SIDE}, {depth}])" for side in (one, two))
            tile = f"tl.reshape(tl.permute(tl.join({', '.join(sides)}), (0, 3, 1, 2)), [{2 * columns}, {depth}])"
            inside.append(self.dot(both, other, tile))
        parts = f"tl.permute(tl.reshape({both}, [{columns // SIDE}, 2, {SIDE}, {rows}]), (0, 2, 3, 1))"
        split = f"{first.total.text}, {second.total.text} = tl.split(tl.reshape({parts}, [{columns}, {rows}, 2]))"
        zeros = f"{both} = tl.zeros([{2 * columns}, {rows}], {tl_dtype(self.sums)})"
        return [
            Sums(first.total, before=[zeros], inside=inside, after=[split, *first.after]),
            Sums(second.total, after=second.after),
        ]
