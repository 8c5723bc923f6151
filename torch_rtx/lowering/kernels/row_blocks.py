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
from functools import lru_cache
from math import prod

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, dim_expr
from torch_rtx.lowering.kernels.emit import Axis, indent, loads_first
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, product, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ZERO, Reduce, Select, View
from torch_rtx.lowering.kernels.loops import LoopConfig, LoopWriter, R, X
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.rows import PERSISTENT, Rows, memory_order
from torch_rtx.lowering.kernels.source import assemble, next_power_of_2

# Elements of a tile, and for each thread, the fastest first. Rows that are reduced wait for each other at barriers.
TILES = (1024, 8), (1024, 4), (2048, 16), (2048, 8)
TILES_WITHOUT_ROWS = (2048, 16), (1024, 8), (2048, 8), (4096, 16)
MIN_WIDTH, MAX_WIDTH = 128, 1024  # of a tile, where rows are not reduced
# Tiles that are loaded at a time, so that a step's reductions do not wait for its own, and the bytes they may take.
AHEAD, AHEAD_BYTES = 3, 40 << 10
PROGRAM, COLUMN = "program", "column"


@dataclass(frozen=True)
class BlockConfig(LoopConfig):
    """The tile of a loop over blocks of rows.

    Attributes:
        ahead: how many tiles are loaded at a time, by asynchronous copies; 1: only that of the step.
    """

    ahead: int = 1


@dataclass(frozen=True)
class RowBlocks:
    """The iteration space: `number` blocks of `size` rows, the last one with less, and a sum over rows of a block for
    each output in `sums`. A program has `width` columns of a block: all, where rows are reduced."""

    rows: Rows
    number: Dim
    size: int
    sums: dict[int, Reduce]
    width: int

    @property
    def tiles(self) -> int:
        """How many programs the columns of a block have."""
        return -(-(self.rows.size.number or 1) // self.width)


@lru_cache(maxsize=1024)
def row_blocks(region: Region) -> RowBlocks:
    """The iteration space of a region that sums blocks of rows, and may reduce whole ones.

    Raises:
        Unsupported: it is something else.
    """
    sums = {at: output for at, output in enumerate(region.outputs) if isinstance(output, Reduce) and _is_sum(output)}
    if not sums or region.anchor is not None:
        raise Unsupported("a loop without sums over blocks of rows")
    reductions = [one for one in region.reductions if one not in sums.values()]
    number, block, *columns = next(iter(sums.values())).source.shape
    if reductions:
        shape, axes = reductions[0].source.shape, memory_order(reductions[0])
    else:
        shape, axes = (_rows_of(next(iter(sums.values())))[-1], product(columns)), (1,)
    rows = Rows(*_rows(shape, axes), shape, axes)
    size, width = block.number, rows.size.number
    if size is None or width is None or not rows.contiguous or (reductions and width > PERSISTENT):
        raise Unsupported("sums beside rows that are not held in registers")
    if any((rows.count, rows.size) != _rows(one.source.shape, one.axes) for one in reductions):
        raise Unsupported("rows of different sizes in one kernel")
    for one in sums.values():
        if rows.count not in _rows_of(one) or product(one.source.shape[2:]) != rows.size:
            raise Unsupported("rows or columns that are not those of the loop")
        if one.source.shape[:2] != (number, block):
            raise Unsupported("sums over different blocks of rows")
    left = (output for at, output in enumerate(region.outputs) if at not in sums)
    if any(product(output.shape) not in (rows.count, rows.count * rows.size) for output in left):
        raise Unsupported("outputs of different sizes in one kernel")
    return RowBlocks(rows, region.types[min(sums)].shape[0], size, sums, tile_width(width, bool(reductions)))


def tile_width(columns: int, whole: bool) -> int:
    """How many columns a program has; with `whole`, all of them."""
    divisor = columns & -columns
    exact = not whole and divisor >= MIN_WIDTH
    return min(divisor if exact else next_power_of_2(columns), PERSISTENT if whole else MAX_WIDTH)


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
    width = blocks.width
    most = blocks.size & -blocks.size  # a power of two that divides the rows of a program
    found = []
    whole = len(region.reductions) > len(blocks.sums)
    for tile, each in TILES if whole else TILES_WITHOUT_ROWS:
        rows = min(max(tile // width, 1), most)
        warps = min(max(rows * width // (32 * each), 2), 16)
        if whole and blocks.size // rows > AHEAD and AHEAD * rows * _row_bytes(region, blocks) <= AHEAD_BYTES:
            found.append(BlockConfig(rows, width, warps, ahead=AHEAD))
        found.append(BlockConfig(rows, width, warps))
    return list(dict.fromkeys(found))


def _row_bytes(region: Region, blocks: RowBlocks) -> int:
    """Bytes that are read of a row, where a program has all of it."""
    size = blocks.rows.size.number or 1
    whole = [type_ for type_ in region.read_types if prod(map(typical, type_.shape)) > size]
    return sum(DTYPES[type_.dtype].bytes for type_ in whole) * blocks.width


def block_kernel(region: Region, name: str, config: BlockConfig) -> Kernel:
    """The kernel that computes `region`, see `row_blocks`."""
    writer = _BlockWriter(region, config, row_blocks(region))
    lines = writer.write()
    programs = dim_expr("*", writer.blocks.tiles, writer.blocks.number)
    return assemble(region, name, lines, programs, config.num_warps, 1, writer.functions)


class _BlockWriter(LoopWriter):
    """The lines of a loop over blocks of rows."""

    config: BlockConfig

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
        lines = [f"{PROGRAM} = tl.program_id(0){self.cast}"]
        if (tiles := self.blocks.tiles) > 1:
            lines += [f"{COLUMN} = {PROGRAM} % {tiles} * {config.elements}", f"{PROGRAM} = {PROGRAM} // {tiles}"]
        lines += self._elements(COLUMN if tiles > 1 else "0")
        totals = {at: self._accumulator(one, 0) for at, one in self.blocks.sums.items()}
        emitter.step(X, ())
        for reduction in self.reductions:
            self._reduce_at_once(reduction)
        for at, total in totals.items():
            self._add(self.blocks.sums[at], total)
        self._store([at for at in range(len(self.region.outputs)) if at not in totals])  # what the sums have by now
        inner = [f"{X} = {PROGRAM} * {size} + start + tl.arange(0, {config.rows})[:, None]"]
        inner += [f"in_x = {X} < {self.limit}"] if emitter.axes[X].mask else []
        inner += loads_first(emitter.inner())
        steps = f"0, {size}, {config.rows}"
        steps = f"range({steps})" if config.ahead == 1 else f"tl.range({steps}, num_stages={config.ahead})"
        emitter.outer.lines += [f"for start in {steps}:", *indent(inner)]
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
