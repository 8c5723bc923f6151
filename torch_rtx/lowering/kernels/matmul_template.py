"""The matmul template: output tiles, the loop over K, and an epilogue in registers.

A program computes a tile of BM rows and BN columns. Operands are kernel IR, so views and computed operands are fused
into the loads; for a plain operand the loop is that of a hand-written kernel.

This is what the writers share: `mma_template` has that of products on tensor cores, `gemv_template` that of very few
rows, `block_scaled` that of formats with scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch_rtx.dtypes import DTYPES, FLOAT, HALVES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Node, TensorType, dim_expr
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand, indent
from torch_rtx.lowering.kernels.epilogue_index import EpilogueIndexing, Tile, epilogue_indexing
from torch_rtx.lowering.kernels.expressions import Apply, Arg
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, substitute, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ZERO, Const, Load, Pointwise, Position, Select, Tensor, View
from torch_rtx.lowering.kernels.packed import HALVES_OF_WORD, Packing, fits_halves, in_halves, packing_of
from torch_rtx.lowering.kernels.region import ANCHORS, Region, tensor_type
from torch_rtx.lowering.kernels.source import PROGRAM, PartFunction, assemble, blocks, needs_int64, part_source
from torch_rtx.lowering.kernels.triton_ops import tl_dtype

Z, M, N, EXTRA, KA, KB = "Z", "M", "N", "N1", "KA", "KB"
LOOP = "step"  # the variable of the loop over K
FLOAT8 = {name for name, dtype in DTYPES.items() if dtype.packing}
TENSOR_DTYPES = {name for name, dtype in DTYPES.items() if dtype.tensor_rate}
DOT_DTYPES = {"f32", *TENSOR_DTYPES}
TAPS = ("kd", "kh", "kw")
MAX_GEMV_ROWS = 8  # each row has its own accumulator
FEW_CHANNELS = 16  # with fewer channels a step of K spans several taps


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and Triton's options.

    Attributes:
        block_m, block_n, block_k: the tile, with `block_n` columns per accumulator. A GEMV tile has all rows.
        extra_n: columns of a second accumulator: 128 and 64 make a tile of 192.
        num_warps, num_stages, input_precision: Triton's options of these names.
        group_m: row tiles per group; a group visits a column tile before the next one, which favours the L2 cache.
        gemv: use GemvWriter.
        block_scaled: use BlockScaledWriter.
        programs: of a persistent kernel; 0: one program per tile.
        promoted: the products of a step are added to the sums by separate instructions, in f32.
        joined: the parts of a packed second operand are one tile, see `MmaWriter`.
        slices: of K in a tile, side by side: use SlicedWriter if there are several.
        stacked: use StackedWriter.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    gemv: bool = False
    programs: int = 0
    input_precision: str = "ieee"
    extra_n: int = 0
    promoted: bool = False
    block_scaled: bool = False
    joined: bool = False
    slices: int = 1
    stacked: bool = False

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.block_n + self.extra_n


@dataclass(frozen=True)
class Contraction:
    """For each batch Z, row M and column N the sum over K of `a * b`: a matrix product or a convolution.

    Attributes:
        out: the anchor's result.
        axis: the dimension of `out` that columns index.
        batch, rows, columns: sizes.
        grouped: batches are ranges of columns in `out` (groups of a convolution), not of rows.
        taps: the window of a convolution; () for a matrix product. K is the taps times the depth.
        depth: the size of K per tap.
        channels_last: K is contiguous along the depth, not along the taps.
        a_at: the position in operand `a` for Z, M, and K as one index per tap and one for the depth.
        b_at: the position in operand `b` for Z, N and K.
        epilogue: from the sum over K to the anchor's result: bias and scale.
        fast_accum: products of float8 may be summed as tensor cores do it, in less than f32.
        block_scaled: the values of an element in memory, if operands are in a block-scaled format; else 0.
        ends: batches are ranges of rows, one behind the other, that end here; `rows` are those of all. None: all
            batches have `rows`.
        whole: the ends ascend, and the last one is that of all rows.
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
    epilogue: Callable[[Tensor], Tensor]
    fast_accum: bool = False
    block_scaled: int = 0
    ends: Tensor | None = None
    whole: bool = False

    def tile(self) -> Tile:
        """The result as a tile of Z, M and N."""
        z, m = batch_index(self), variable(M, from_dim(self.rows))
        columns = from_dim(self.columns)
        if self.grouped:
            return Tile(self.out, self.axis, m, z * columns, columns)
        if self.ends is not None:
            return Tile(self.out, self.axis, m, ZERO, columns)
        return Tile(self.out, self.axis, z * from_dim(self.rows) + m, ZERO, columns)


def anchor_result(region: Region, kind: str) -> tuple[Node, Load, TensorType]:
    """The anchor of a region, its result and the result's type.

    Raises:
        Unsupported: no anchor of this kind.
    """
    node = region.anchor
    if node is None or ANCHORS[node.op] != kind:
        raise Unsupported(f"{node.op if node else 'a region without an anchor'} as a {kind} kernel")
    value = node.outputs[0]
    assert value is not None
    out = region.values[value.name]
    assert isinstance(out, Load)
    return node, out, tensor_type(value)


def batch_index(contraction: Contraction) -> Index:
    """The index Z of a program's batch."""
    return ZERO if contraction.batch == 1 else variable(Z, from_dim(contraction.batch))


def uncast(tensor: Tensor) -> Tensor | None:
    """What a cast widens to the dtype of its sums, or casts without code; None if `tensor` is no such cast."""
    match tensor:
        case Pointwise(same_register=Tensor() as inner):
            return inner
        case Pointwise(expression=Apply("cast", (Arg(0),)), args=(inner,)) if inner.dtype in TENSOR_DTYPES:
            return inner if DTYPES[inner.dtype].sums == tensor.dtype else None
    return None


def stored_load(tensor: Tensor) -> Load | None:
    """The load behind views, widening casts and zero padding; None if the operand is computed."""
    match tensor:
        case Load(anchor=False):
            return tensor
        case View():
            return stored_load(tensor.source)
        case Select(outer=Const(value=0)):
            return stored_load(tensor.inner)
    inner = uncast(tensor)
    return None if inner is None else stored_load(inner)


def dot_dtype(contraction: Contraction) -> str:
    """The dtype of the operands of `tl.dot`. What is cast right before to the dtype of its sums, as halves to f32, is
    multiplied as it was. float8 is multiplied as it is, also of both kinds, if no operand has to be computed; else as
    halves of the other operand's dtype, or f16, which hold all numbers of float8.

    Raises:
        Unsupported: `tl.dot` does not multiply these dtypes.
    """
    operands = contraction.a, contraction.b
    stored = [stored_load(tensor) for tensor in operands]
    narrow = {_uncast(tensor) for tensor in operands}
    found = {tensor.dtype for tensor in operands}
    if narrow <= FLOAT8:
        return stored[0].dtype if stored[0] and stored[1] else "f16"
    widened = {DTYPES[dtype].sums for dtype in narrow}
    if len(narrow - FLOAT8) == 1 and narrow <= TENSOR_DTYPES and found == widened:
        found = narrow
    if len(found) > 1:
        found -= FLOAT8
    if len(found) > 1 or not found <= DOT_DTYPES:
        raise Unsupported(f"a matrix product of {contraction.a.dtype} and {contraction.b.dtype}")
    return found.pop()


def _uncast(tensor: Tensor) -> str:
    """The dtype of `tensor` before what `uncast` undoes."""
    match tensor:
        case View():
            return _uncast(tensor.source)
        case Select(outer=Const(value=0)):
            return _uncast(tensor.inner)
    inner = uncast(tensor)
    return tensor.dtype if inner is None else _uncast(inner)


class TileWriter:
    """What the writers share: the grid, the tile of a program, and the epilogue."""

    row_axis = "[:, None]"
    column_axis = "[None, :]"
    functions = ""  # source of those that the lines call
    live = ""  # the condition, as code, that a program has a sum to compute; "": always

    def __init__(self, region: Region, contraction: Contraction, config: GemmConfig) -> None:
        self.region, self.contraction, self.config = region, contraction, config
        self.dtype = dot_dtype(contraction)
        self.sums = DTYPES[self.dtype].sums
        self.tile = contraction.tile()
        self.indexing: EpilogueIndexing = epilogue_indexing(region.outputs, self.tile)
        self.cast = ".to(tl.int64)" if needs_int64(region) else ""
        self.z, self.m = batch_index(contraction), variable(M, from_dim(contraction.rows))
        self.n = variable(N, self.indexing.width)
        width = self.indexing.width.number
        self.columns: Dim = contraction.columns if width is None else width
        self.rows_mask = _mask(contraction.rows, config.block_m, "in_m")
        self.columns_mask = _mask(self.columns, config.width, "in_n")
        self.ranges = [Axis(N, config.block_n, self.columns_mask)]  # of columns, one per accumulator
        if config.extra_n:
            self.ranges.append(Axis(EXTRA, config.extra_n, self.columns_mask and f"{self.columns_mask}1"))

    # ---- programs ----------------------------------------------------------------------------------------------------

    @property
    def tiles(self) -> tuple[Dim, Dim]:
        """Tiles along the rows and the columns of a batch."""
        return blocks(self.contraction.rows, self.config.block_m), blocks(self.columns, self.config.width)

    @property
    def batch(self) -> Dim:
        """The batches that have programs of their own."""
        return self.contraction.batch

    @property
    def programs(self) -> Dim:
        """How many tiles there are."""
        return dim_expr("*", self.batch, *self.tiles)

    def function(self) -> PartFunction:
        """The code of a part of a horizontal kernel.

        Raises:
            Unsupported: the kernel is persistent.
        """
        if self.config.programs:
            raise Unsupported("a persistent kernel as a part of another one")
        lines = [f"tile = {PROGRAM}{self.cast}", *self.program(), *self.body()]
        pointers = tuple(type_.dtype for type_ in self.region.memory_types)
        source = part_source(self.region, lines, self.functions)
        return PartFunction(source, pointers, self.config.num_warps, self.config.num_stages)

    def kernel(self, name: str) -> Kernel:
        """The kernel under this name."""
        count = self.programs
        lines = [*self.program(), *self.body()]
        start, grid, config = "tl.program_id(0)", count, self.config
        if config.programs:
            ends = f"{start}, {from_dim(count)}, {config.programs}"
            # Flattened, the loads of a tile begin while the tile before it is written.
            loop = f"for program in {f'range({ends})' if config.gemv else f'tl.range({ends}, flatten=True)'}:"
            cast = ["tile = program + tl.full((), 0, tl.int64)" if self.cast else "tile = program"]
            lines = [loop, *indent(cast + lines)]
            grid = dim_expr("min", count, config.programs)
        else:
            lines.insert(0, f"tile = {start}{self.cast}")
        options = config.num_warps, config.num_stages, self.functions
        return assemble(self.region, name, lines, grid, *options, trigger_early=config.gemv)

    def program(self) -> list[str]:
        """The tile of a program. Programs in flight share operands through L2 (grouped ordering)."""
        tiles_m, tiles_n = map(from_dim, self.tiles)
        lines = []
        if self.batch != 1:
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
            lines += self.rows(tile_m)
        start = _times(tile_n, self.config.width)
        for columns in self.ranges:
            lines += self._range(columns, start, self.column_axis, self.columns)
            start += f"{columns.block} + "
        return lines

    def rows(self, tile: str) -> list[str]:
        """The rows of a tile, and their mask."""
        rows = Axis(M, self.config.block_m, self.rows_mask)
        return self._range(rows, _times(tile, rows.block), self.row_axis, self.contraction.rows)

    def _range(self, axis: Axis, start: str, side: str, size: Dim) -> list[str]:
        cast = "" if "tile" in start else self.cast
        lines = [f"{axis.name} = {start}tl.arange(0, {axis.block}){side}{cast}"]
        return lines + ([f"{axis.mask} = {axis.name} < {from_dim(size)}"] if axis.mask else [])

    def body(self) -> list[str]:
        """The lines after `program`."""
        raise NotImplementedError

    def k_range(self, name: str, axis: str, block: int) -> list[str]:
        """The elements of a part of a step."""
        return [f"{name} = tl.arange(0, {block}){axis}{self.cast}"]

    # ---- what follows the loop over K --------------------------------------------------------------------------------

    def write_epilogue(self, emitter: Emitter, sums: list[Operand], named: Mapping[str, Index] | None = None) -> None:
        """Evaluate and store the outputs.

        Args:
            sums: one per accumulator.
            named: replaces the variables M or N.
        """
        raw = Load(self.tile.out.shape, self.sums, "", (), anchor=True)
        result = self.contraction.epilogue(raw)

        def at(position: Position) -> Position:
            return tuple(substitute(index, named) for index in position) if named else position

        for column, total in zip(self.indexing.columns, sums, strict=True):
            here = at(self.tile.position(column))
            emitter.anchored[raw, here] = total
            emitter.anchored[self.tile.out, here] = emitter.value(result, here)
        for which, (output, position) in enumerate(zip(self.region.outputs, self.indexing.positions, strict=True)):
            value = emitter.value(output, at(position))
            address = linear(at(position), map(from_dim, self.region.types[which].strides))
            emitter.store(f"out{which}", address, value, frozenset((M, N, EXTRA)) & frozenset(emitter.axes))


def _times(tile: str, block: int) -> str:
    """The first element of a tile as the left side of a sum; "" for the only tile."""
    return f"{tile if ' ' not in tile else f'({tile})'} * {block} + " if tile else ""


def _mask(size: Dim, block: int, name: str) -> str:
    return "" if isinstance(size, int) and size % block == 0 else name


class KLoop:
    """The loop over K: the number of steps, and the position of each.

    A step is `block` elements of the depth at one tap. With `flat` and fewer than FEW_CHANNELS it is `block` elements
    of the flattened window instead, so that it is not mostly padding. Where the second operand is packed, see `packed`,
    a step has `block` words, and of each the `parts` with `halves`.
    """

    def __init__(self, contraction: Contraction, block_k: int, flat: bool = True) -> None:
        self.taps = contraction.taps
        window = prod(contraction.taps)
        self.flat = flat and window > 1 and isinstance(contraction.depth, int) and contraction.depth < FEW_CHANNELS
        self.size = dim_expr("*", window, contraction.depth) if self.flat else contraction.depth
        self.packing, block = packing(contraction), block_k
        self.parts, self.halves = range(1), range(1)
        if self.packing is not None:
            self.parts, self.halves = range(self.packing.parts), range(HALVES_OF_WORD)
            self.size, block = dim_expr("//", self.size, self.packing.values), block_k // self.packing.values
        self.channels_last, self.block, self.depth = contraction.channels_last, block, from_dim(contraction.depth)
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
        """Per tap its name, its size, and how many steps it stays the same."""
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
        """Tell an emitter which variables change in the loop."""
        if self.looped:
            emitter.step(LOOP, [*self.scalars, mask] if self.chunk.terms else self.scalars)

    def mask(self, name: str, elements: str) -> list[str]:
        """The mask of a step's elements; no lines if the block divides the size."""
        limit = from_dim(self.size) - self.chunk * constant(self.block)
        return [f"{name} = {elements} < {limit}"] if self.masked else []

    def loop(
        self,
        before: list[str],
        masks: list[str],
        inside: list[str],
        steps: str = "range",
        num_stages: int = 0,
        live: str = "",
    ) -> list[str]:
        """The loop, or its body alone for a single step. There is none where `live`, a condition, does not hold. With
        `num_stages` all loads in it are issued ahead, not only those that products need."""
        if not self.looped and not live:
            return [*masks, *before, *inside]
        always, each = ([], masks) if self.chunk.terms else (masks, [])
        lines = [*self.lines, *each, *inside]
        count = f"tl.where({live}, {self.count}, 0)" if live else str(self.count)
        steps = f"tl.range(0, {count}, num_stages={num_stages})" if num_stages else f"{steps}(0, {count})"
        return [*always, *before, f"for {LOOP} in {steps}:", *indent(lines)]

    def whole(self, name: str) -> Position:
        """As `values`, for the values `name` of all parts of a step, one part after the other."""
        width = constant(self.width)
        value = variable(name, constant(len(self.parts)) * width)
        return self._values(value % width, value // width)

    def values(self, name: str, part: int) -> Position:
        """K for the values `name` of a part of a step."""
        if self.packing is None:
            return self.position(name)
        return self._values(variable(name, constant(self.width)), constant(part))

    def _values(self, value: Index, part: Index) -> Position:
        assert self.packing is not None
        return (self.packing.of_value(self.chunk * constant(self.width) + value, part),)

    @property
    def width(self) -> int:
        """Values of a part of a step."""
        return len(self.halves) * self.block

    def position(self, name: str, part: int = 0, half: int = 0) -> Position:
        """K as one index per tap and one for the depth, for the elements, or words, `name` of a step."""
        k = self.chunk * constant(self.block) + variable(name, constant(self.block))
        if self.packing is not None:
            return (self.packing.of_word(k, part, half),)
        if not self.flat:
            return (*self.at, k)
        taps = tuple(map(constant, self.taps))
        if self.channels_last:
            return unravel(k, (*taps, self.depth))
        depth, *window = unravel(k, (self.depth, *taps))
        return (*window, depth)


def packing(contraction: Contraction) -> Packing | None:
    """How the second operand is packed; None if it is not, or not along K."""
    if contraction.taps or not isinstance(contraction.depth, int) or stored_load(contraction.b):
        return None
    k, column = variable(KB, constant(contraction.depth)), variable(N, from_dim(contraction.columns))
    z = batch_index(contraction)
    return packing_of(contraction.b, contraction.b_at(z, column, (k,)), KB, contraction.depth)


def swaps(contraction: Contraction) -> bool:
    """The second operand comes first in `tl.dot`, see `MmaWriter`."""
    return stored_load(contraction.b) is None and stored_load(contraction.a) is not None


def operand(
    emitter: Emitter,
    tensor: Tensor,
    position: Position,
    dtype: str,
    mask: str = "",
    full_tile: bool = True,
    conditions: tuple[Operand, ...] = (),
) -> str:
    """A tile of an operand as `dtype`, broadcast to all axes with `full_tile`. Elements outside of `mask` are 0: a
    computed operand (1/x of padding) may be NaN or inf there. float8 stays of its own kind. A stored operand is not
    read where `conditions` do not hold, and is 0."""
    stored = stored_load(tensor)
    if dtype in FLOAT8 and stored is not None:
        dtype = stored.dtype
    found = _load_operand(emitter, tensor, position, conditions, dtype)
    if found is not None:
        text = found.text
    else:
        held = tensor.dtype if tensor.dtype in HALVES and fits_halves(tensor, position, tensor.dtype) else "f32"
        found = emitter.value(tensor, position) if held == "f32" else in_halves(emitter, tensor, position, held)
        zero = "0.0" if DTYPES[tensor.dtype].kind == FLOAT else "0"
        text = f"tl.where({mask}, {found.text}, {zero})" if mask else found.text
        if dtype != held:
            text = f"({text}).to({tl_dtype(dtype)})" if mask else f"{text}.to({tl_dtype(dtype)})"
    axes = frozenset(emitter.axes)
    return text if not full_tile or axes <= found.axes else f"tl.broadcast_to({text}, {emitter.shape(axes)})"


def _load_operand(
    emitter: Emitter, tensor: Tensor, position: Position, conditions: tuple[Operand, ...], dtype: str
) -> Operand | None:
    """The tile of `stored_load(tensor)`; None if the operand is computed."""
    match tensor:
        case Load(anchor=False):
            return emitter.memory(tensor, position, conditions, dtype)
        case View():
            return _load_operand(emitter, tensor.source, tensor.at(position), conditions, dtype)
        case Select(outer=Const(value=0)):
            moved, tests = emitter.inside(tensor, position)
            return _load_operand(emitter, tensor.inner, moved, (*conditions, *tests), dtype)
    inner = uncast(tensor)
    return None if inner is None else _load_operand(emitter, inner, position, conditions, dtype)
