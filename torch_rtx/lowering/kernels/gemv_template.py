"""Products of very few rows with FMAs, where reading the weights dominates: a [BN, BK] tile of weights is multiplied
with each row and accumulated, without padding the rows to those of a tensor core."""

from __future__ import annotations

from torch_rtx.dtypes import HALVES
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand
from torch_rtx.lowering.kernels.index import constant
from torch_rtx.lowering.kernels.kernel_ir import Position, Tensor
from torch_rtx.lowering.kernels.matmul_template import KB, MAX_GEMV_ROWS, KLoop, M, N, TileWriter, operand, stored_load
from torch_rtx.lowering.kernels.scaled_sums import scaled
from torch_rtx.lowering.kernels.triton_ops import tl_dtype


class GemvWriter(TileWriter):
    """A contraction of few rows with FMAs. A scale that is the same for all of K follows the sums."""

    row_axis = ""
    column_axis = "[:, None]"

    def body(self) -> list[str]:
        """Pointers, the loop over K, and the epilogue of each row."""
        config, contraction, rows = self.config, self.contraction, self.contraction.rows
        if not isinstance(rows, int) or rows > MAX_GEMV_ROWS:
            raise Unsupported(f"{rows} rows at once")
        k_loop = KLoop(contraction, config.block_k)
        mask = "in_kb" if k_loop.masked else ""
        emitter = Emitter([Axis(N, config.block_n, self.columns_mask), Axis(KB, k_loop.block, mask)])
        k_loop.enter(emitter, mask)
        sums, totals, scales = [], {}, dict[int, Operand]()
        places = [(part, half) for part in k_loop.parts for half in k_loop.halves]
        for k in (k_loop.position(KB, *place) for place in places):
            positions = [contraction.a_at(self.z, constant(row), k) for row in range(rows)]
            values = [operand(emitter, contraction.a, at, self.sums, mask, full_tile=False) for at in positions]
            for which, column in enumerate(self.indexing.columns):
                tensor, at, scale = self._codes(emitter, contraction.b_at(self.z, column, k), len(places) == 1)
                scales |= {} if scale is None else {which: scale}
                weight = operand(emitter, tensor, at, self.sums, mask, full_tile=False)
                for row, value in enumerate(values):
                    totals[row, which] = f"acc{which}_{row}"
                    sums.append(f"{totals[row, which]} += {value} * {weight}")
        zeros = f"tl.zeros([{config.block_n}, {k_loop.block}], {tl_dtype(self.sums)})"
        before = [*emitter.outer.lines, *(f"{total} = {zeros}" for total in totals.values())]
        loop = k_loop.loop(before, k_loop.mask(mask, KB), [*emitter.inner(), *sums])
        lines = self.k_range(KB, "[None, :]", k_loop.block) + loop
        emitter.outer.lines = []
        for row in range(rows):
            texts = [f"tl.sum({totals[row, which]}, 1)[:, None]" for which in range(len(self.indexing.columns))]
            texts = [f"{text} * {scales[which].text}" if which in scales else text for which, text in enumerate(texts)]
            sums_of_row = [emitter.assign(text, frozenset((N,)), "sum") for text in texts]
            self.write_epilogue(emitter, sums_of_row, {M: constant(row)})
        return lines + emitter.outer.lines

    def _codes(self, emitter: Emitter, position: Position, whole: bool) -> tuple[Tensor, Position, Operand | None]:
        """What the weights are computed from, at its position, and their scale, if one follows the sums."""
        weights = self.contraction.b
        dtype = weights.dtype if weights.dtype in HALVES else "f16"
        found = scaled(emitter, weights, position, KB, dtype) if whole and stored_load(weights) is None else None
        if found is None or not found.is_late(emitter):
            return weights, position, None
        return found.codes, found.position, found.factors(emitter)[0]
