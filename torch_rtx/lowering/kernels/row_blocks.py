"""Loops over blocks of rows: each program sums over its rows, column by column, what it computes of each of them.

The gradients of a norm are a loop over rows, which reduces each row, and sums over all rows for weight and bias. A
program reads some rows, one tile after another, reduces each, writes what has the size of rows, and adds the rest up in
registers. It writes one row of partial sums at its end:

    program = tl.program_id(0)
    R = tl.arange(0, 256)[None, :]
    acc = tl.full([4, 256], 0, tl.float32)
    for start in range(0, 16, 4):
        X = program * 16 + start + tl.arange(0, 4)[:, None]
        x = tl.load(in0 + (R + 256 * X))
        ...
        acc += x
    tl.store(out0 + (R + 256 * program), tl.sum(acc, 0)[None, :])

In the body such sums are over the second dimension of [programs, rows of a program, columns].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim
from torch_rtx.lowering.kernels.emit import Axis, indent, loads_first
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, product, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ZERO, Reduce, Select, View
from torch_rtx.lowering.kernels.loops import PERSISTENT, LoopConfig, LoopWriter, R, Rows, X, memory_order
from torch_rtx.lowering.kernels.region import Region, reductions_of
from torch_rtx.lowering.kernels.source import assemble, next_power_of_2

TILES = (1024, 8), (1024, 4), (2048, 16), (2048, 8)  # elements of a tile, and for each thread; the fastest first
PROGRAM = "program"


class BlockConfig(LoopConfig):
    """The tile of a loop over blocks of rows."""


@dataclass(frozen=True)
class RowBlocks:
    """The iteration space: `programs` blocks of `size` rows, the last ones with less, and a sum over rows of a block
    for each output in `sums`."""

    rows: Rows
    programs: Dim
    size: int
    sums: dict[int, Reduce]


def row_blocks(region: Region) -> RowBlocks:
    """The iteration space of a region that reduces whole rows, and sums blocks of them.

    Raises:
        Unsupported: it is something else.
    """
    sums = {at: output for at, output in enumerate(region.outputs) if isinstance(output, Reduce) and _is_sum(output)}
    reductions = [one for one in reductions_of(region.outputs) if one not in sums.values()]
    if not sums or not reductions or region.anchor is not None:
        raise Unsupported("a loop without sums over blocks of rows")
    source, axes = reductions[0].source, memory_order(reductions[0])
    width = product(source.shape[axis] for axis in axes)
    rows = Rows(product(s for at, s in enumerate(source.shape) if at not in axes), width, source.shape, axes)
    blocks = {one.source.shape[:2] for one in sums.values()}
    shapes = {(one.source.shape, one.axes) for one in reductions}
    size = next(iter(blocks))[1].number
    if len(blocks) > 1 or size is None or not rows.contiguous or (width.number or PERSISTENT + 1) > PERSISTENT:
        raise Unsupported("sums over different rows, or beside rows that are not held in registers")
    if any((rows.count, width) != _rows(*one) for one in shapes):
        raise Unsupported("rows of different sizes in one kernel")
    if any(rows.count not in _rows_of(one) or product(one.source.shape[2:]) != width for one in sums.values()):
        raise Unsupported("rows or columns that are not those of the loop")
    others = (output for at, output in enumerate(region.outputs) if at not in sums)
    if any(product(output.shape) not in (rows.count, rows.count * width) for output in others):
        raise Unsupported("outputs of different sizes in one kernel")
    return RowBlocks(rows, region.types[min(sums)].shape[0], size, sums)


def _is_sum(reduction: Reduce) -> bool:
    return reduction.kind == "sum" and reduction.axes == (1,) and len(reduction.shape) > 2


def _rows_of(reduction: Reduce) -> tuple[Index, ...]:
    """The number of rows that all blocks have, and without those that fill up the last block."""
    source = reduction.source.source if isinstance(reduction.source, View) else reduction.source
    number = product(reduction.source.shape[:2])
    return (number, source.inner.shape[0]) if isinstance(source, Select) else (number,)


def _rows(shape: tuple[Index, ...], axes: tuple[int, ...]) -> tuple[Index, Index]:
    kept, reduced = ([size for at, size in enumerate(shape) if (at in axes) == wanted] for wanted in (False, True))
    return product(kept), product(reduced)


def block_configs(region: Region) -> list[BlockConfig]:
    """Configurations, the fastest first.

    Raises:
        Unsupported: see `row_blocks`.
    """
    blocks = row_blocks(region)
    width = next_power_of_2(blocks.rows.size.number or 1)
    most = blocks.size & -blocks.size  # a power of two that divides the rows of a program
    found = []
    for tile, each in TILES:
        rows = min(max(tile // width, 1), most)
        warps = min(max(rows * width // (32 * each), 2), 16)
        found.append(BlockConfig(rows, width, warps))
    return list(dict.fromkeys(found))


def block_kernel(region: Region, name: str, config: BlockConfig) -> Kernel:
    """The kernel that computes `region`, see `row_blocks`."""
    writer = _BlockWriter(region, config, row_blocks(region))
    lines = writer.write()
    return assemble(region, name, lines, writer.blocks.programs, config.num_warps, 1, writer.functions)


class _BlockWriter(LoopWriter):
    """The lines of a loop over blocks of rows."""

    def __init__(self, region: Region, config: BlockConfig, blocks: RowBlocks) -> None:
        super().__init__(region, config, rows=blocks.rows)
        self.blocks = blocks
        self.reductions = [one for one in self.reductions if one not in blocks.sums.values()]
        known = blocks.rows.count.number
        if known is None or known % blocks.size:
            self.emitter.axes[X] = Axis(X, config.rows, "in_x")

    def write(self) -> list[str]:
        """All lines of the kernel."""
        emitter, config, size = self.emitter, self.config, self.blocks.size
        lines = [f"{PROGRAM} = tl.program_id(0){self.cast}", *self._elements("0")]
        totals = {at: self._accumulator(one, 0) for at, one in self.blocks.sums.items()}
        emitter.step(X, ())
        for reduction in self.reductions:
            self._reduce_at_once(reduction)
        self._store([at for at in range(len(self.region.outputs)) if at not in totals])
        for at, total in totals.items():
            self._add(self.blocks.sums[at], total)
        inner = [f"{X} = {PROGRAM} * {size} + start + tl.arange(0, {config.rows})[:, None]"]
        inner += [f"in_x = {X} < {self.limit}"] if emitter.axes[X].mask else []
        inner += loads_first(emitter.inner())
        emitter.outer.lines += [f"for start in range(0, {size}, {config.rows}):", *indent(inner)]
        for at, total in totals.items():
            self._store_sum(at, total)
        return lines + emitter.outer.lines

    def _add(self, reduction: Reduce, total: str) -> None:
        """Add a tile to the sums of its columns."""
        emitter, shape = self.emitter, reduction.source.shape
        block = constant(self.blocks.size)
        value = emitter.value(reduction.source, (self.x // block, self.x % block, *unravel(self.r, shape[2:])))
        mask = emitter.axes[X].mask
        text = f"tl.where({mask}, {value.text}, 0)" if mask else value.text
        emitter.scope.lines.append(f"{total} += {text}")

    def _store_sum(self, at: int, total: str) -> None:
        """Store the sums of a program, at the output `at`."""
        shape, type_ = self.region.outputs[at].shape, self.region.types[at]
        position = (variable(PROGRAM), ZERO, *unravel(self.r, shape[2:]))
        value = self.emitter.assign(f"tl.sum({total}, 0)[None, :]", frozenset((R,)), "r")
        self.emitter.store(f"out{at}", linear(position, map(from_dim, type_.strides)), value, frozenset((R,)))
