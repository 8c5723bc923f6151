"""Kernels around a matrix product: tiles of it, the loop over K, and everything that is done with the result.

A program computes a tile of BM rows and BN columns. Operands are tensors as functions of a position, so that views and
whatever is computed from memory on the way cost no pass of their own; where an operand is plainly in memory, the loop
is the one of a hand-written kernel. After the loop the rest of the region is evaluated in registers.

    dots       `tl.dot` of [BM, BK] and [BK, BN] tiles, summed in f32
    sums       for very few rows, where the weights' way from memory is all that counts: the products of a [BN, BK]
               tile of weights and each row are summed in f32, without padding the rows to a tensor core's 16
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Node, TensorType, dim_expr
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand, indent
from torch_rtx.lowering.kernels.epilogue_index import EpilogueIndexing, Tile, epilogue_indexing
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, substitute, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import (
    ZERO,
    Const,
    Load,
    Pointwise,
    Position,
    Select,
    Tensor,
    View,
)
from torch_rtx.lowering.kernels.region import ANCHORS, Region, tensor_type
from torch_rtx.lowering.kernels.source import assemble, blocks, is_wide
from torch_rtx.lowering.kernels.triton_ops import tl_dtype

Z, M, N, EXTRA, KA, KB = "Z", "M", "N", "N1", "KA", "KB"
LOOP = "step"  # the loop over K, as one of the axes that a value varies with
TAPS = ("kd", "kh", "kw")
MOST_ROWS = 8  # of sums: each row has an accumulator of its own
FEW = 16  # channels: with fewer of them K runs over all taps at once


@dataclass(frozen=True)
class GemmConfig:
    """How a product is cut, and Triton's options.

    Attributes:
        block_m, block_n, block_k: the sizes of tiles; block_n is that of one accumulator. Sums have all rows in a tile.
        extra_n: so many columns more in a tile, in an accumulator of their own: 128 and 64 make one of 192.
        num_warps, num_stages: Triton's options of these names.
        group_m: this many tiles of rows are computed for one tile of columns before the next one.
        sums: without `tl.dot`.
        programs: how many programs share all tiles, in a loop; 0: one program for each tile.
        input_precision: of f32 operands, as `tl.dot` takes it.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    sums: bool = False
    programs: int = 0
    input_precision: str = "ieee"
    extra_n: int = 0

    @property
    def width(self) -> int:
        """The columns of a tile."""
        return self.block_n + self.extra_n


@dataclass(frozen=True)
class Product:
    """For each batch Z, row M and column N the sum over K of `a * b`, where K is taps and a depth.

    Attributes:
        out: the anchor's result.
        axis: the dimension of `out` that is made of columns.
        batch, rows, columns: sizes.
        grouped: each batch has columns of its own in `out`, not rows.
        taps: the window of a convolution; () for a matrix product.
        depth: the size of K, without the taps.
        channels_last: the depth, not the taps, is what lies closest together in memory.
        a, b: the operands.
        a_at: the position in `a` for Z, M, and K as one index for each tap and one for the depth.
        b_at: the position in `b` for Z, N and K.
        finish: the result of the anchor from the sum: bias and scale.
    """

    out: Load
    axis: int
    batch: Dim
    rows: Dim
    columns: Dim
    grouped: bool
    taps: tuple[int, ...]
    depth: Dim
    channels_last: bool
    a: Tensor
    b: Tensor
    a_at: Callable[[Index, Index, Position], Position]
    b_at: Callable[[Index, Index, Position], Position]
    finish: Callable[[Tensor], Tensor]

    def tile(self) -> Tile:
        """The result as programs number it."""
        z, m = batch_of(self), variable(M, from_dim(self.rows))
        columns = from_dim(self.columns)
        if self.grouped:
            return Tile(self.out, self.axis, m, z * columns, columns)
        return Tile(self.out, self.axis, z * from_dim(self.rows) + m, ZERO, columns)


def result(region: Region, kind: str) -> tuple[Node, Load, TensorType]:
    """The anchor of a region, its result and the type of that.

    Raises:
        Unsupported: an anchor of another kind, or none.
    """
    node = region.anchor
    if node is None or ANCHORS[node.op] != kind:
        raise Unsupported(f"{node.op if node else 'a region without an anchor'} as a {kind} kernel")
    value = node.outputs[0]
    assert value is not None
    out = region.values[value.name]
    assert isinstance(out, Load)
    return node, out, tensor_type(value)


def batch_of(of: Product) -> Index:
    """The number of a program's batch."""
    return ZERO if of.batch == 1 else variable(Z, from_dim(of.batch))


def in_memory(tensor: Tensor) -> Load | None:
    """The tensor in memory that this is a view of, perhaps in a wider dtype or with zeros around it."""
    match tensor:
        case Load(anchor=False):
            return tensor
        case View():
            return in_memory(tensor.source)
        case Pointwise(same_register=Tensor() as inner):
            return in_memory(inner)
        case Select(outer=Const(value=0)):
            return in_memory(tensor.inner)
    return None


def dot_dtype(of: Product) -> str:
    """The dtype of the operands of `tl.dot`: what casts to f32 right before the product is multiplied as it was.

    Raises:
        Unsupported: operands of a dtype that has no product.
    """
    stored = [in_memory(tensor) for tensor in (of.a, of.b)]
    halves = {one.dtype if one else "f32" for one in stored}
    found = {of.a.dtype, of.b.dtype}
    if found == {"f32"} and len(halves) == 1 and halves <= {"f16", "bf16"}:
        found = halves
    if len(found) > 1 or not found <= {"f32", "f16", "bf16"}:
        raise Unsupported(f"a matrix product of {of.a.dtype} and {of.b.dtype}")
    return found.pop()


class TileWriter:
    """What the kernels of products have in common: programs, tiles and what follows the loop over K."""

    row_axis = "[:, None]"
    column_axis = "[None, :]"

    def __init__(self, region: Region, of: Product, config: GemmConfig) -> None:
        self.region, self.product, self.config = region, of, config
        self.tile = of.tile()
        self.epilogue: EpilogueIndexing = epilogue_indexing(region.outputs, self.tile)
        self.wide = is_wide(region)
        self.z, self.m = batch_of(of), variable(M, from_dim(of.rows))
        self.n = variable(N, self.epilogue.width)
        width = self.epilogue.width.number
        self.columns: Dim = of.columns if width is None else width
        self.rows_mask = _mask(of.rows, config.block_m, "in_m")
        self.columns_mask = _mask(self.columns, config.width, "in_n")
        self.ranges = [Axis(N, config.block_n, self.columns_mask)]  # of columns, side by side
        if config.extra_n:
            self.ranges.append(Axis(EXTRA, config.extra_n, self.columns_mask and f"{self.columns_mask}1"))

    # ---- programs ----------------------------------------------------------------------------------------------------

    @property
    def tiles(self) -> tuple[Dim, Dim]:
        """How many tiles the rows and the columns of a batch have."""
        return blocks(self.product.rows, self.config.block_m), blocks(self.columns, self.config.width)

    def kernel(self, name: str) -> Kernel:
        """The kernel, called `name`."""
        count = dim_expr("*", self.product.batch, *self.tiles)
        lines = [*self.program(), *self.body()]
        start, grid, config = "tl.program_id(0)", count, self.config
        if config.programs:
            loop = f"for program in range({start}, {from_dim(count)}, {config.programs}):"
            cast = ["tile = program + tl.full((), 0, tl.int64)" if self.wide else "tile = program"]
            lines = [loop, *indent(cast + lines)]
            grid = dim_expr("min", count, config.programs)
        else:
            lines.insert(0, f"tile = {start}{'.to(tl.int64)' if self.wide else ''}")
        return assemble(self.region, name, lines, grid, config.num_warps, config.num_stages, trigger_early=config.sums)

    def program(self) -> list[str]:
        """Which rows and columns a program has: those that run together share operands, which the L2 cache holds."""
        tiles_m, tiles_n = map(from_dim, self.tiles)
        lines = []
        if self.product.batch != 1:
            each = (tiles_m * tiles_n).factor
            lines += [f"{Z} = tile // {each}", f"tile = tile % {each}"] if each != "1" else [f"{Z} = tile"]
        group, count = self.config.group_m, tiles_m.number
        if count == 1 or tiles_n.number == 1:
            tile_m, tile_n = "" if count == 1 else "tile", "" if tiles_n.number == 1 else "tile"
        elif count is not None and count <= group:
            tile_m, tile_n = f"tile % {count}", f"tile // {count}"
        else:
            size = (tiles_n * constant(group)).factor
            lines.append(f"first = tile // {size} * {group}")
            height = str(group)
            if count is None or count % group:
                lines.append(f"height = tl.minimum({tiles_m} - first, {group})")
                height = "height"
            tile_m, tile_n = f"first + tile % {size} % {height}", f"tile % {size} // {height}"
        if self.row_axis:
            rows = Axis(M, self.config.block_m, self.rows_mask)
            lines += self._range(rows, _times(tile_m, rows.block), self.row_axis, self.product.rows)
        start = _times(tile_n, self.config.width)
        for columns in self.ranges:
            lines += self._range(columns, start, self.column_axis, self.columns)
            start += f"{columns.block} + "
        return lines

    def _range(self, axis: Axis, start: str, side: str, size: Dim) -> list[str]:
        wide = ".to(tl.int64)" if self.wide and "tile" not in start else ""
        lines = [f"{axis.name} = {start}tl.arange(0, {axis.block}){side}{wide}"]
        return lines + ([f"{axis.mask} = {axis.name} < {from_dim(size)}"] if axis.mask else [])

    def body(self) -> list[str]:
        """The lines that follow."""
        raise NotImplementedError

    def k_range(self, name: str, axis: str) -> list[str]:
        """The places in a step."""
        return [f"{name} = tl.arange(0, {self.config.block_k}){axis}{'.to(tl.int64)' if self.wide else ''}"]

    # ---- what follows the loop over K --------------------------------------------------------------------------------

    def finish(self, emitter: Emitter, sums: list[Operand], named: Mapping[str, Index] | None = None) -> None:
        """Evaluates and stores the outputs for the sums of every accumulator; `named` says what rows or columns are
        called, if not M and N."""
        raw = Load(self.tile.out.shape, "f32", "", (), anchor=True)
        result = self.product.finish(raw)

        def at(position: Position) -> Position:
            return tuple(substitute(index, named) for index in position) if named else position

        for column, total in zip(self.epilogue.columns, sums, strict=True):
            here = at(self.tile.position(column))
            emitter.anchored[raw, here] = total
            emitter.anchored[self.tile.out, here] = emitter.value(result, here)
        for which, (output, position) in enumerate(zip(self.region.outputs, self.epilogue.positions, strict=True)):
            value = emitter.value(output, at(position))
            address = linear(at(position), map(from_dim, self.region.types[which].strides))
            emitter.store(f"out{which}", address, value, frozenset((M, N, EXTRA)) & frozenset(emitter.axes))


def _times(tile: str, block: int) -> str:
    """The first element of a tile as what is added to others; "" for the only tile."""
    return f"{tile if ' ' not in tile else f'({tile})'} * {block} + " if tile else ""


def _mask(size: Dim, block: int, name: str) -> str:
    return "" if isinstance(size, int) and size % block == 0 else name


class Steps:
    """The loop over K: how many steps, and where each one is.

    A step has one tap and `block` of the depth; where `flat` is set, and the depth is so small that this would waste
    most of it, `block` of all elements of the window.
    """

    def __init__(self, of: Product, block: int, flat: bool = True) -> None:
        self.taps = of.taps
        window = prod(of.taps)
        self.flat = flat and window > 1 and isinstance(of.depth, int) and of.depth < FEW
        self.size: Dim = window * of.depth if self.flat and isinstance(of.depth, int) else of.depth
        self.channels_last, self.block, self.depth = of.channels_last, block, from_dim(of.depth)
        self.masked = bool(_mask(self.size, block, "in_k"))
        chunks = from_dim(blocks(self.size, block))
        self.count = chunks if self.flat else constant(window) * chunks
        step = ZERO if self.count.number == 1 else variable(LOOP, self.count)
        self.lines: list[str] = []
        self.scalars = [LOOP]
        self.at: list[Index] = []
        for name, tap, inner in self._windows(chunks):
            self.at.append(self._scalar(name, step // inner % constant(tap), tap))
        self.chunk = step if self.flat or window == 1 else step % chunks

    def _windows(self, chunks: Index) -> list[tuple[str, int, Index]]:
        """For each tap its name, its size and the number of steps that it keeps still."""
        found = []
        inner = chunks
        for name, tap in reversed(list(zip(TAPS[len(TAPS) - len(self.taps) :], self.taps, strict=True))):
            found.append((name, tap, inner))
            inner = inner * constant(tap)
        return found[::-1]

    def _scalar(self, name: str, value: Index, size: int) -> Index:
        if self.flat or not value.terms:
            return ZERO
        self.lines.append(f"{name} = {value}")
        self.scalars.append(name)
        return variable(name, constant(size))

    @property
    def looped(self) -> bool:
        """There is more than one step."""
        return bool(self.chunk.terms or self.lines)

    def enter(self, emitter: Emitter, mask: str) -> None:
        """Tells an emitter what each step changes."""
        if self.looped:
            emitter.step(LOOP, [*self.scalars, mask] if self.chunk.terms else self.scalars)

    def mask(self, name: str, elements: str) -> list[str]:
        """The lines that say which elements of a step count; none if all do."""
        limit = from_dim(self.size) - self.chunk * constant(self.block)
        return [f"{name} = {elements} < {limit}"] if self.masked else []

    def loop(self, before: list[str], masks: list[str], inside: list[str], steps: str = "range") -> list[str]:
        """The lines of all steps."""
        if not self.looped:
            return [*masks, *before, *inside]
        always, each = ([], masks) if self.chunk.terms else (masks, [])
        lines = [*self.lines, *each, *inside]
        return [*always, *before, f"for {LOOP} in {steps}(0, {self.count}):", *indent(lines)]

    def position(self, name: str) -> Position:
        """K as one index for each tap and one for the depth, for the elements `name` of a step."""
        k = self.chunk * constant(self.block) + variable(name, constant(self.block))
        if not self.flat:
            return (*self.at, k)
        taps = tuple(map(constant, self.taps))
        if self.channels_last:
            return unravel(k, (*taps, self.depth))
        depth, *window = unravel(k, (self.depth, *taps))
        return (*window, depth)


class DotWriter(TileWriter):
    """A product by `tl.dot`."""

    def body(self) -> list[str]:
        """Pointers, the loop over K, and the rest of the region."""
        config, of = self.config, self.product
        steps = Steps(of, config.block_k)
        a_mask, b_mask = ("in_ka", "in_kb") if steps.masked else ("", "")
        a = Emitter([Axis(M, config.block_m, self.rows_mask), Axis(KA, config.block_k, a_mask)], "a")
        steps.enter(a, a_mask)
        dtype = dot_dtype(of)
        precision = f', input_precision="{config.input_precision}"' if dtype == "f32" else ""
        left = operand(a, of.a, of.a_at(self.z, self.m, steps.position(KA)), dtype, a_mask)
        before, inside, dots, rest = a.outer.lines, a.inner(), [], []
        for part, axis in enumerate(self.ranges):
            b = Emitter([Axis(KB, config.block_k, b_mask), axis], "bc"[part])
            steps.enter(b, b_mask)
            named = {N: variable(axis.name, self.epilogue.width)} if part else {}
            totals = []
            for which, column in enumerate(self.epilogue.columns):
                total = Operand(f"acc{part * len(self.epilogue.columns) + which}", frozenset((M, axis.name)))
                at = of.b_at(self.z, substitute(column, named), steps.position(KB))
                dots.append(
                    f"{total.text} = tl.dot({left}, {operand(b, of.b, at, dtype, b_mask)}, {total.text}{precision})"
                )
                totals.append(total)
            zeros = f"tl.zeros([{config.block_m}, {axis.block}], tl.float32)"
            before += [*b.outer.lines, *(f"{total.text} = {zeros}" for total in totals)]
            inside += b.inner()
            finish = Emitter([Axis(M, config.block_m, self.rows_mask), axis], "" if part == 0 else "e")
            self.finish(finish, totals, named)
            rest += finish.outer.lines
        lines = self.k_range(KA, "[None, :]") + self.k_range(KB, "[:, None]")
        masks = [*steps.mask(a_mask, KA), *steps.mask(b_mask, KB)]
        return lines + steps.loop(before, masks, inside + dots) + rest


class SumWriter(TileWriter):
    """A product of few rows without `tl.dot`."""

    row_axis = ""
    column_axis = "[:, None]"

    def body(self) -> list[str]:
        """Pointers, the loop over K, and for each row the rest of the region."""
        config, of, rows = self.config, self.product, self.product.rows
        if not isinstance(rows, int) or rows > MOST_ROWS:
            raise Unsupported(f"{rows} rows at once")
        dot_dtype(of)
        steps = Steps(of, config.block_k)
        mask = "in_kb" if steps.masked else ""
        emitter = Emitter([Axis(N, config.block_n, self.columns_mask), Axis(KB, config.block_k, mask)])
        steps.enter(emitter, mask)
        k = steps.position(KB)
        values = [
            operand(emitter, of.a, of.a_at(self.z, constant(row), k), "f32", mask, whole=False) for row in range(rows)
        ]
        sums, totals = [], {}
        for which, column in enumerate(self.epilogue.columns):
            weight = operand(emitter, of.b, of.b_at(self.z, column, k), "f32", mask, whole=False)
            for row, value in enumerate(values):
                totals[row, which] = f"acc{which}_{row}"
                sums.append(f"{totals[row, which]} += {value} * {weight}")
        zeros = f"tl.zeros([{config.block_n}, {config.block_k}], tl.float32)"
        before = [*emitter.outer.lines, *(f"{total} = {zeros}" for total in totals.values())]
        lines = self.k_range(KB, "[None, :]") + steps.loop(before, steps.mask(mask, KB), [*emitter.inner(), *sums])
        emitter.outer.lines = []
        for row in range(rows):
            texts = [f"tl.sum({totals[row, which]}, 1)[:, None]" for which in range(len(self.epilogue.columns))]
            sums_of_row = [emitter.assign(text, frozenset((N,)), "sum") for text in texts]
            self.finish(emitter, sums_of_row, {M: constant(row)})
        return lines + emitter.outer.lines


def operand(
    emitter: Emitter, tensor: Tensor, position: Position, dtype: str, mask: str = "", whole: bool = True
) -> str:
    """The elements of an operand as `dtype`; where `whole` is set a tile of them, even if all of its rows are equal.
    Where `mask` does not hold they are 0: what is computed there, of nothing, may be no number."""
    found = _stored(emitter, tensor, position, (), dtype)
    if found is None:
        found = emitter.value(tensor, position)
        text = f"tl.where({mask}, {found.text}, 0.0)" if mask else found.text
        if dtype != "f32":
            text = f"({text}).to({tl_dtype(dtype)})" if mask else f"{text}.to({tl_dtype(dtype)})"
    else:
        text = found.text
    axes = frozenset(emitter.axes)
    return text if not whole or axes <= found.axes else f"tl.broadcast_to({text}, {emitter.shape(axes)})"


def _stored(
    emitter: Emitter, tensor: Tensor, position: Position, conditions: tuple[Operand, ...], dtype: str
) -> Operand | None:
    """The elements of `in_memory(tensor)`, if there is one."""
    match tensor:
        case Load(anchor=False):
            return emitter.memory(tensor, position, conditions, dtype)
        case View():
            return _stored(emitter, tensor.source, tensor.at(position), conditions, dtype)
        case Pointwise(same_register=Tensor() as inner):
            return _stored(emitter, inner, position, conditions, dtype)
        case Select(outer=Const(value=0)):
            moved, tests = emitter.inside(tensor, position)
            return _stored(emitter, tensor.inner, moved, (*conditions, *tests), dtype)
    return None
