"""Loop kernels: pointwise operations over elements, and reductions over rows.

A program of a pointwise kernel computes a block of elements, with index X; where an operand repeats along rows, a block
of several rows. With rows X is the row and R the element in it. A program reduces a few rows: those that are not too
long are held in registers, in one tile, which may have a mask, or in several of a size that divides theirs; longer ones
are read in steps, with one loop per level of dependent reductions and one for the results.
Reductions share a kernel if their rows agree in size and number; whatever comes before, between and after them stays in
registers. A scan needs its row in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import inf, prod

from torch_rtx.dtypes import register
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, TensorType, dim_expr
from torch_rtx.lowering.kernels.emit import Axis, Operand, indent, loads_first
from torch_rtx.lowering.kernels.expressions import Apply, Arg
from torch_rtx.lowering.kernels.index import (
    Index,
    constant,
    from_dim,
    linear,
    multiple,
    product,
    ravel,
    to_dim,
    unravel,
    variable,
)
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    REDUCTIONS,
    ZERO,
    Load,
    Pointwise,
    Position,
    Reduce,
    Scan,
    Scatter,
    Shape,
    Tensor,
    View,
    everything,
)
from torch_rtx.lowering.kernels.pairs import H, PairEmitter
from torch_rtx.lowering.kernels.reduction_rules import LOWEST
from torch_rtx.lowering.kernels.region import Region, needed
from torch_rtx.lowering.kernels.rows import PERSISTENT, Rows, memory_order, repeated_rows, rows_of, steady_rows
from torch_rtx.lowering.kernels.source import (
    PROGRAM,
    PartFunction,
    assemble,
    blocks,
    needs_int64,
    next_power_of_2,
    part_source,
)
from torch_rtx.lowering.kernels.triton_ops import literal, template, tl_dtype
from torch_rtx.targets import ALIGNMENT

X, R = "X", "R"
Reduced = dict[Tensor, tuple[Operand, Position]]
TILE = 1024  # elements of a default tile
# Rows whose tiles are all in registers. Up to so many elements belong to a single warp, which waits for no other.
OF_WARP = 1024
HELD_TILE, HELD_VECTOR, HELD_MOST = 4096, 8, 64  # most elements of a tile; of each thread, those of a tile and of a row
TYPICAL_PROCESSORS = 132
TILES_PER_PROCESSOR = 8
BUSY = 16  # elements of a thread at least, where a tile is divided among more warps
MOST_OF_FEW = 512  # elements of a row, of which a program has several
REPEATED = 64  # elements of an operand that repeats, less than threads: Triton lets each thread load what it needs
LEFT = 32  # times as many elements as tiles have past the end of a row, at least
UNKNOWN = 1 << 14  # elements of a row of symbolic size
OWN_SCANS = frozenset(("sum", "prod"))  # of Triton's own
COMBINE = """

@triton.jit
def _{kind}(a, b):
    return {text}
"""


@dataclass(frozen=True)
class LoopConfig:
    """The tile, [rows, elements of a row], and Triton's number of warps. With `repeated`, the rows are those of
    `repeated_rows`, with `steady` those of `steady_rows`, and each block of a row has programs of its own. With `held`,
    all tiles of a row, whose size is a multiple of theirs, are in registers at once. A program has `sharing` tiles of
    rows beside each other, which share what repeats along rows, such as the weights of a norm, and what is read for
    these."""

    rows: int
    elements: int
    num_warps: int
    repeated: bool = False
    held: bool = False
    sharing: int = 1
    steady: bool = False

    @property
    def program_rows(self) -> int:
        """The rows of a program."""
        return self.rows * self.sharing


@lru_cache(maxsize=1024)
def loop_configs(region: Region) -> list[LoopConfig]:
    """Configurations, the fastest first; then smaller tiles with more warps, for bodies that need many registers."""
    best, repeated = _best_config(region), [one for one in repeated_configs(region) if _fills(region, one)]
    smaller = [replace(best, rows=max(best.rows // 2, 1))]
    held = held_configs(region)
    if region.reductions:
        smaller += _more_warps(best)
        smaller += [LoopConfig(1, best.elements, 8), LoopConfig(1, best.elements, 16), LoopConfig(1, 1024, 8)]
    scans = any(isinstance(reduction, Scan) for reduction in region.reductions)
    count = rows_of(region).count.number
    few = count is not None and held and count < TYPICAL_PROCESSORS * held[0].rows
    once = repeated[:1] or steady_configs(region)
    every = dict.fromkeys([*once, *([best, *held] if few else [*held, best]), *smaller])
    return [one for one in every if not scans or one.elements == best.elements]


def _more_warps(config: LoopConfig) -> list[LoopConfig]:
    """The same tile with fewer elements per thread, for bodies of many operations: these need more warps at once."""
    more = (config.num_warps * times for times in (2, 4))
    return [replace(config, num_warps=n) for n in more if n <= 16 and config.rows * config.elements >= BUSY * 32 * n]


def held_configs(region: Region) -> list[LoopConfig]:
    """Tiles of a row that are in registers at once: without masks, and without barriers where a warp has the row."""
    rows = rows_of(region)
    size = rows.size.number
    if not region.reductions or not size or not rows.contiguous or size % 128:
        return []
    if size <= PERSISTENT and size > OF_WARP and size & (size - 1) == 0:
        return []
    if any(isinstance(reduction, Scan) for reduction in region.reductions):
        return []
    tile = min(size & -size, 32 * HELD_VECTOR if size <= OF_WARP else HELD_TILE)
    warps = max(tile // (32 * HELD_VECTOR), 1)  # of a row
    while size > 32 * warps * HELD_MOST:
        warps *= 2
    if tile < 32 * warps or warps > 16 or (tile == size and warps == 1):
        return []
    found = [LoopConfig(max(4 // warps, 1), tile, max(4, warps), held=True)]
    if 4 <= warps <= 8 and tile >= 64 * warps:
        found.append(replace(found[0], num_warps=2 * warps))
    try:  # results may have longer rows, and a row more values than a kernel has
        LoopWriter(region, found[0]).write()
    except Unsupported:
        return []
    return found


def _best_config(region: Region) -> LoopConfig:
    rows = rows_of(region)
    if not rows.axes:
        return _elements_config(rows.count.number)
    size = rows.size.number
    if size is None or size > PERSISTENT:
        return LoopConfig(1, 2048, 8) if rows.contiguous else LoopConfig(16, 256, 8)
    block = next_power_of_2(size)
    if rows.contiguous:
        count = max(TILE // block, 1)
        return LoopConfig(count, block, 4 if block * count <= 2048 else 8)
    # Rows, not their elements, are neighbours in memory: a tile has several. With 64 elements per thread few
    # threads have to synchronize on a row. Few rows, such as sums of columns, are divided among more programs.
    count = max(4 * TILE // block, min(16, 16 * TILE // block))
    if block <= MOST_OF_FEW and (rows.count.number or inf) < 2 * TYPICAL_PROCESSORS * count:
        return LoopConfig(16, block, 4)
    return LoopConfig(count, block, max(block * count // (2 * TILE), 2))


def _elements_config(count: int | None) -> LoopConfig:
    return LoopConfig(TILE if count is None or count >= TYPICAL_PROCESSORS * TILE else 256, 1, 4)


def repeated_configs(region: Region) -> list[LoopConfig]:
    """Tiles of several rows of a loop over elements, if an operand repeats along these: each thread reads a few
    elements of it for several rows. They do not depend on the number of rows."""
    rows = None if rows_of(region).axes else repeated_rows(region)
    fits = rows is not None and rows.size.number is not None and rows.size.number % REPEATED == 0
    return [LoopConfig(tile, REPEATED, 4, repeated=True) for tile in (REPEATED, REPEATED // 2)] if fits else []


def steady_configs(region: Region) -> list[LoopConfig]:
    """Tiles of a piece of a long row of a loop over many elements, if an operand has one element for each row: a thread
    reads that once, and no element divides its index by the size of a row."""
    rows = None if rows_of(region).axes else steady_rows(region)
    size = 0 if rows is None else rows.size.number or 0
    if rows is None or size < 2 * TILE or size & (size - 1) == 0:
        return []
    many = (rows.count.number or inf) * size >= TYPICAL_PROCESSORS * TILE
    fits = (tile for tile in (TILE, TILE // 2) if many and -size % tile * LEFT <= size)
    return [LoopConfig(1, tile, 4, steady=True) for tile in fits][:1]


def _fills(region: Region, config: LoopConfig) -> bool:
    """There are so many tiles that few elements per thread would not keep more memory busy."""
    rows = repeated_rows(region)
    if rows is None or rows.count.number is None or rows.size.number is None:
        return False
    tiles = rows.count.number // config.rows * (rows.size.number // config.elements)
    return tiles >= TILES_PER_PROCESSOR * TYPICAL_PROCESSORS


def loop_kernel(region: Region, name: str, config: LoopConfig | None = None) -> Kernel:
    """The kernel that computes `region` in one loop.

    Raises:
        Unsupported: see `rows_of`; or a reduction is read in another row than its own.
    """
    writer = LoopWriter(region, config or _best_config(region))
    lines = writer.write()
    programs = dim_expr("*", writer.pieces, blocks(writer.count, writer.config.program_rows))
    return assemble(region, name, lines, programs, writer.config.num_warps, writer.num_stages, writer.functions)


def loop_function(region: Region, config: LoopConfig) -> tuple[PartFunction, Dim]:
    """The loop of `region` as a function, and its number of rows.

    Raises:
        Unsupported: see `loop_kernel`.
    """
    writer = LoopWriter(region, config, PROGRAM, "size")
    source = part_source(region, writer.write(), writer.functions)
    pointers = tuple(type_.dtype for type_ in region.memory_types)
    aligned = config.repeated or config.steady or writer.rows.contiguous or multiple(writer.count) % ALIGNMENT == 0
    shape = config.program_rows, writer.pieces, aligned
    return PartFunction(source, pointers, config.num_warps, writer.num_stages, *shape), writer.count


def loop_operations(region: Region) -> tuple[int, Dim]:
    """How many operations the kernel that computes `region` executes for a tile, and how many tiles there are: a long
    row has several, which a split form computes side by side.

    Raises:
        Unsupported: see `loop_kernel`.
    """
    config = _best_config(region)
    writer = LoopWriter(region, config)
    writer.write()
    tile = {X: config.rows, R: config.elements, H: max(config.elements, config.rows) // 2}
    each = (count * prod(tile[axis] for axis in axes) for axes, count in writer.emitter.operations.items())
    steps = -(-(writer.rows.size.number or UNKNOWN) // config.elements) if writer.is_looped else 1
    return sum(each), dim_expr("*", steps, blocks(writer.count, config.rows))


class LoopWriter:
    """The lines of one loop kernel.

    Args:
        program: the position of the program in the loop, as code.
        count: the number of rows, as code; "": the number itself.
        rows: the iteration space, where it is not `rows_of(region)`.
    """

    def __init__(
        self,
        region: Region,
        config: LoopConfig,
        program: str = "tl.program_id(0)",
        count: str = "",
        rows: Rows | None = None,
    ) -> None:
        self.region, self.config = region, config
        of_pieces = repeated_rows(region) if config.repeated else steady_rows(region) if config.steady else None
        self.rows = rows or of_pieces or rows_of(region)
        size = self.rows.size.number
        self.pieces = -(-size // config.elements) if size and of_pieces else 1  # of a row
        self.program, self.first = program, "0"
        if self.pieces > 1:
            self.program, self.first = f"({program} // {self.pieces})", f"{program} % {self.pieces} * {config.elements}"
        self.limit = count or str(self.rows.count)
        self.reductions: Sequence[Reduce] = region.reductions
        self.cast = ".to(tl.int64)" if needs_int64(region) else ""
        self.is_pointwise = not self.rows.axes
        self.is_looped = (
            not self.is_pointwise and not config.held and (size is None or size > config.elements * self.pieces)
        )
        known, apart = self.rows.count.number, [tile * config.rows for tile in range(config.sharing)]
        last = self.rows.count - constant(apart[-1]) if known else self.rows.count
        self.x, self.r = variable(X, last), variable(R, self.rows.size)
        # The rows of each tile, and its reductions so far.
        self.tiles: list[tuple[Index, Reduced]] = [(self.x + constant(start), {}) for start in apart]
        # Where the tiles of a row begin that are in registers at once.
        self.starts = range(0, size, config.elements) if size and config.held else range(1)
        full = not count and known is not None and known % config.program_rows == 0
        if config.sharing > 1 and (not full or self.is_looped or self.is_pointwise):
            raise Unsupported("rows beside each other that are not all in registers")
        axes = [Axis(X, config.rows, "" if full else "in_x")]
        if not self.is_pointwise:
            axes.append(Axis(R, config.elements, "" if size and size % config.elements == 0 else "in_r"))
        paired = "" if self.pieces > 1 or self.is_looped else X if self.is_pointwise else R
        sizes = {X: self.rows.count, R: constant(config.elements) if config.held else self.rows.size}
        self.emitter = PairEmitter(axes, paired, sizes.get(paired, ONE))
        self.emitter.spread = R if config.held and config.rows > 1 else ""
        self.emitter.open = R
        types = (value.type for value in region.body.values())
        dims = (dim for type_ in types if isinstance(type_, TensorType) for dim in type_.shape)
        self.count = to_dim(self.rows.count, dims)

    @property
    def num_stages(self) -> int:
        """See `Kernel`."""
        return 2 if self.is_looped else 1

    @property
    def functions(self) -> str:
        """Source of the functions that the lines call."""
        totals = {reduction.kind for reduction in self.reductions if not isinstance(reduction, Scan)}
        scans = {reduction.kind for reduction in self.reductions if isinstance(reduction, Scan)}
        kinds = sorted((totals & {"max", "min", "prod"}) | (scans - OWN_SCANS))
        return "".join(
            COMBINE.format(kind=kind, text=template(REDUCTIONS[kind].combine).format("a", "b")) for kind in kinds
        )

    def write(self) -> list[str]:
        """All lines of the kernel."""
        emitter, config = self.emitter, self.config
        side = "" if self.is_pointwise else "[:, None]"
        lines = [f"{X} = {self.program}{self.cast} * {config.program_rows} + tl.arange(0, {config.rows}){side}"]
        if emitter.axes[X].mask:
            lines.append(f"in_x = {X} < {self.limit}")
        if not self.is_pointwise and not self.is_looped:
            lines += self._elements(self.first)
        if self.is_looped:
            self._stepwise()
        else:
            for reduction in self.reductions:
                self._reduce_at_once(reduction)
            if any(self._width(output) not in (ONE, self.rows.size) for output in self.region.outputs):
                raise Unsupported("rows of different sizes at once")
            for _ in self._each_of_rows():
                for tile, element in enumerate(self._tiles()):
                    outputs = enumerate(self.region.outputs)
                    self._store([at for at, output in outputs if tile == 0 or self._width(output) != ONE], element)
        if emitter.has_pairs:
            half = emitter.axes[emitter.paired].block // 2
            first = f"{self.program}{self.cast} * {half} + " if self.is_pointwise else ""
            lines.append(f"{H} = {first}tl.arange(0, {half}){'' if self.is_pointwise else f'{self.cast}[None, :]'}")
        return lines + loads_first(emitter.outer.lines)

    def _elements(self, start: str, width: Index | None = None) -> list[str]:
        offset = "" if start == "0" else f"{start} + "
        lines = [f"{R} = {offset}tl.arange(0, {self.config.elements}){self.cast}[None, :]"]
        return lines + ([f"in_r = {R} < {width or self.rows.size}"] if self.emitter.axes[R].mask else [])

    # ---- reductions --------------------------------------------------------------------------------------------------

    def _each_of_rows(self) -> Iterator[None]:
        """Each tile of rows: what is written in its turn is of these."""
        for x, reduced in self.tiles:
            self.x, self.emitter.reduced = x, reduced
            yield

    def _tiles(self) -> Iterator[Index]:
        """The elements of a row that the tiles in registers have: all, in one tile, or those of each of several."""
        if len(self.starts) < 2:
            yield self.r
            return
        within = variable(R, constant(self.config.elements))
        yield from (within + constant(start) for start in self.starts)

    def _source(self, reduction: Reduce, element: Index | None = None) -> Operand:
        position = self.rows.position(self.x, element or self.r, reduction.source.shape, memory_order(reduction))
        return self.emitter.value(reduction.source, position)

    def _known(self, reduction: Reduce, operand: Operand) -> None:
        position = self.rows.position(self.x, ZERO, reduction.source.shape, reduction.axes)
        self.emitter.reduced[reduction] = operand, position

    def _masked(self, reduction: Reduce, value: Operand) -> str:
        """The full tile to reduce, with masked elements neutral."""
        emitter = self.emitter
        tile = frozenset((X, R))
        masked = emitter.axes[R].mask
        text = f"tl.where({masked}, {value.text}, {literal(_neutral(reduction))})" if masked else value.text
        if value.axes | ({R} if masked else set()) != tile:
            text = f"tl.broadcast_to({text}, {emitter.shape(tile)})"
        return text

    def _reduce_at_once(self, reduction: Reduce) -> None:
        tiles = [self._combined(reduction) for _ in self._each_of_rows()]
        for found, _ in zip(tiles, self._each_of_rows(), strict=True):
            self._reduce_tile(reduction, found)

    def _combined(self, reduction: Reduce) -> str:
        """The tiles that a row has, as one."""
        first, *others = (self._masked(reduction, self._source(reduction, element)) for element in self._tiles())
        combine, found = template(REDUCTIONS[reduction.kind].combine), first
        for other in others:
            found = self.emitter.assign(combine.format(found, other), frozenset((X, R))).text
        return found

    def _reduce_tile(self, reduction: Reduce, found: str) -> None:
        if isinstance(reduction, Scan):
            own = reduction.kind in OWN_SCANS
            text = (
                f"tl.cum{reduction.kind}({found}, 1)" if own else f"tl.associative_scan({found}, 1, _{reduction.kind})"
            )
            running = self.emitter.assign(text, frozenset((X, R)), "r")
            position = self.rows.position(self.x, self.r, reduction.shape, reduction.axes)
            self.emitter.reduced[reduction] = running, position
        else:
            self._known(reduction, self.emitter.assign(_total(reduction, found), frozenset((X,)), "r"))

    def _stepwise(self) -> None:
        left, after = list(self.reductions), [*range(len(self.region.outputs))]
        while left:
            ready = [one for one in left if all(inner in self.emitter.reduced for inner in needed(one))]
            online = {below: one for one in left if (below := self._maximum_below(one, ready)) is not None}
            left = [one for one in left if one not in (*ready, *online.values())]
            starts = {one: LOWEST[register(one.dtype)] if one in online else _neutral(one) for one in ready}
            totals = {one: self._accumulator(one, start) for one, start in starts.items()}
            powers = {below: self._accumulator(one, 0) for below, one in online.items()}
            beside = self._beside(ready, after)
            after = [at for at in after if at not in beside]
            self._loop(partial(self._accumulate, totals, powers, beside))
            for reduction, total in totals.items():
                if reduction in online:
                    self._finish_online(reduction, online[reduction], total, powers[reduction])
                else:
                    self._known(reduction, self._row(_total(reduction, total)))
        widths: dict[Index, list[int]] = {}
        for index in after:
            widths.setdefault(self._width(self.region.outputs[index]), []).append(index)
        self._store(widths.pop(ONE, []))
        for width, which in widths.items():
            self._loop(partial(self._store, which, variable(R, width)), width)

    def _width(self, output: Tensor) -> Index:
        """How many elements of a result a row has."""
        return ONE if product(output.shape) == self.rows.count else self.rows.width(output.shape)

    def _accumulator(self, reduction: Reduce, start: float) -> str:
        dtype = tl_dtype(register(reduction.dtype))
        tile = self.emitter.shape(frozenset((X, R)))
        return self.emitter.assign(f"tl.full({tile}, {literal(start)}, {dtype})", frozenset((X,)), "acc").text

    def _beside(self, reductions: Sequence[Reduce], left: Sequence[int]) -> list[int]:
        """The outputs as wide as rows, if the loop of `reductions` has read and computed what they need: storing them
        there saves a loop of their own."""
        read = _loads(one.source for one in reductions)
        wide = [at for at in left if self._width(self.region.outputs[at]) != ONE]
        found = [self.region.outputs[at] for at in wide]
        known = all(inner in self.emitter.reduced for output in found for inner in needed(output))
        plain = not any(isinstance(output, Scatter) or self._width(output) != self.rows.size for output in found)
        return wide if known and plain and _loads(found) <= read else []

    def _accumulate(self, totals: dict[Reduce, str], powers: dict[Reduce, str], beside: list[int]) -> None:
        lines = self.emitter.scope.lines
        for reduction, total in totals.items():
            value = self._masked(reduction, self._source(reduction))
            if reduction in powers:
                above = self.emitter.assign(f"{value} - {total}", frozenset((X, R))).text
                power = self.emitter.assign(f"tl.exp(-tl.abs({above}))", frozenset((X, R))).text
                sum_ = powers[reduction]
                lines.append(f"{sum_} = tl.where({above} > 0, {sum_} * {power} + 1.0, {sum_} + {power})")
            lines.append(f"{total} = {template(REDUCTIONS[reduction.kind].combine).format(total, value)}")
        self._store(beside)

    def _row(self, text: str) -> Operand:
        return self.emitter.assign(text, frozenset((X,)), "r")

    # ---- a maximum, and the sum of exp(x - maximum), in one loop: Milakov and Gimelshein, 2018 -----------------------

    # Each place of the tile has a maximum of its own, which begins with a finite number, and the sum below it. Of this
    # maximum and the next element the larger one has the exponential 1, so that an element takes one exponential.

    def _maximum_below(self, total: Reduce, ready: list[Reduce]) -> Reduce | None:
        """The maximum of x, among `ready`, where `total` sums exp(x - maximum)."""
        power = _operands(total.source, "exp") if total.kind == "sum" else ()
        difference = _operands(power[0], "sub") if power else ()
        if not difference:
            return None
        value, base = difference
        position = self.rows.position(self.x, self.r, total.source.shape, memory_order(total))
        while isinstance(base, View):
            position = base.at(position)
            base = base.source
        for one in ready:
            own = self.rows.position(self.x, ZERO, one.source.shape, one.axes)
            if one is base and (one.kind, one.source, own) == ("max", value, position):
                return one
        return None

    def _finish_online(self, largest: Reduce, power: Reduce, tile: str, powers: str) -> None:
        """The maximum and the sum of a row. That of nothing but minus infinity is 0 by now, and NaN by definition."""
        found = self._row(_total(largest, tile))
        total = self._row(_total(power, f"{powers} * tl.exp({tile} - {found.text})"))
        self._known(largest, self._row(f'tl.where({total.text} == 0, float("-inf"), {found.text})'))
        self._known(power, self._row(f'tl.where({total.text} == 0, float("nan"), {total.text})'))

    def _loop(self, write: Callable[[], None], width: Index | None = None) -> None:
        emitter = self.emitter
        emitter.step(R, ())
        write()
        lines = [*self._elements("start", width), *loads_first(emitter.inner())]
        emitter.outer.lines.append(f"for start in range(0, {width or self.rows.size}, {self.config.elements}):")
        emitter.outer.lines += indent(lines)

    # ---- stores ------------------------------------------------------------------------------------------------------

    def _store(self, which: list[int], element: Index | None = None) -> None:
        for index in which:
            output, type_ = self.region.outputs[index], self.region.types[index]
            position, axes = self._place(index, element or self.r)
            if isinstance(output, Scatter):
                self.emitter.scatter(f"out{index}", output, position, axes)
                continue
            value = self.emitter.value(output, position)
            address = linear(position, map(from_dim, type_.strides))
            self.emitter.store(f"out{index}", address, value, axes)

    def _strides(self, index: int) -> tuple[Dim, ...]:
        """Strides of an output as it is gone through: those in memory, or row-major where it is added to."""
        output = self.region.outputs[index]
        ranks = range(len(output.shape), 0, -1)
        return tuple(ranks) if isinstance(output, Scatter) else self.region.types[index].strides

    def _place(self, index: int, element: Index) -> tuple[Position, frozenset[str]]:
        """The position in an output that X, or X and R, index, and the axes of the store."""
        rows, output = self.rows, self.region.outputs[index]
        if self.is_pointwise or product(output.shape) == rows.count:
            shape, axes = self.region.outputs[0].shape, frozenset((X,))
            position = _nth_in_memory(self.x, shape, self._strides(0))
            if not self.is_pointwise:
                return unravel(self.x, output.shape), axes
        else:
            shape = output.shape if rows.width(output.shape) != rows.size else rows.shape
            position, axes = rows.position(self.x, element, shape, rows.axes), frozenset((X, R))
            moved = _nth_in_memory(ravel(position, shape), output.shape, self._strides(index))
            if self.emitter.holds(output, moved):  # rows follow memory order, see `split_reduction`
                return moved, axes
        return (position if output.shape == shape else unravel(ravel(position, shape), output.shape)), axes


def _nth_in_memory(flat: Index, shape: Shape, strides: tuple[Dim, ...]) -> Position:
    """The position of element `flat` in memory order, so that neighbouring threads access neighbours."""
    order = list(range(len(shape)))
    if all(isinstance(stride, int) for stride in strides):
        order.sort(key=lambda axis: strides[axis], reverse=True)  # type: ignore[arg-type, return-value]
    position = unravel(flat, tuple(shape[axis] for axis in order))
    return tuple(position[order.index(axis)] for axis in range(len(shape)))


def _operands(tensor: Tensor, op: str) -> tuple[Tensor, ...]:
    """The operands of `tensor`, if it is the operation `op` of these, in their order."""
    while isinstance(tensor, Pointwise) and tensor.same_register is not None:
        tensor = tensor.same_register
    match tensor:
        case Pointwise(expression=Apply(name, args), args=operands) if name == op:
            if [arg.index for arg in args if isinstance(arg, Arg)] == [*range(len(args))]:
                return operands
    return ()


def _loads(tensors: Iterable[Tensor]) -> set[str]:
    """The names of the tensors that are read for `tensors`, beyond reductions too."""
    return {one.name for one in everything(tensors) if isinstance(one, Load)}


def _neutral(reduction: Reduce) -> float:
    return REDUCTIONS[reduction.kind].neutral(reduction.dtype)


def _total(reduction: Reduce, tile: str) -> str:
    """The reduction of a tile along its rows, [rows, 1], as source."""
    match reduction.kind:
        case "sum":
            return f"tl.sum({tile}, 1)[:, None]"
        case "any":
            return f"(tl.max(({tile}).to(tl.int32), 1) != 0)[:, None]"
        case "all":
            return f"(tl.min(({tile}).to(tl.int32), 1) != 0)[:, None]"
    return f"tl.reduce({tile}, 1, _{reduction.kind})[:, None]"
