"""Products on tensor cores: the loop over K of `tl.dot`, and what operands have to do with it.

acc = tl.dot(a, b, acc)                         sums in f32; of integers in i32
acc += scale * tl.dot(codes, a) + shift * q     few rows: a group of K with a scale and a shift; q = sum(a)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch_rtx.dtypes import HALVES
from torch_rtx.lowering.kernels import float32_dots
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand
from torch_rtx.lowering.kernels.index import Index, substitute, variable
from torch_rtx.lowering.kernels.kernel_ir import Position
from torch_rtx.lowering.kernels.matmul_template import (
    KA,
    KB,
    LOOP,
    Contraction,
    GemmConfig,
    KLoop,
    M,
    N,
    TileWriter,
    operand,
    stored_load,
    swaps,
)
from torch_rtx.lowering.kernels.packed import with_magic
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.scaled_sums import Scaled, scaled
from torch_rtx.lowering.kernels.triton_ops import tl_dtype

FEW_ROWS = 16  # sums of a group of K have a tile of their own


@dataclass
class Sums:
    """An accumulator.

    Attributes:
        by_step: scales and shifts are applied to the sums of each step.
        pairs: the tiles of both operands that a step multiplies and adds to `total` alone; [] if it does more.
        before, inside, after: lines before the loop, in it, and after it.
    """

    total: Operand
    by_step: bool = False
    pairs: list[tuple[str, str]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


class MmaWriter(TileWriter):
    """A contraction on tensor cores.

    Where the second operand alone is computed it comes first: the tile is transposed, and goes to tensor cores from
    registers. Of a packed operand each part is a product of its own. With `joined` all parts are one tile, without a
    move between threads: Hopper's products by warpgroups take it piece by piece, while other instructions unpack the
    next step. Products of their own would wait for each other.

    Scales follow the sums, see `scaled_sums`: after the loop if they are the same for all of K, else, for few rows,
    with each step.
    """

    def __init__(self, region: Region, contraction: Contraction, config: GemmConfig) -> None:
        super().__init__(region, contraction, config)
        self.swapped = swaps(contraction)
        self.functions += float32_dots.functions(self.dtype, config.input_precision)
        if self.swapped:
            self.row_axis, self.column_axis = self.column_axis, self.row_axis
        self.loop_rows = Axis(M, self.config.block_m, self.rows_mask)  # of a tile in the loop
        self.block = self.width = config.block_k  # elements in memory of a part of a step, and values

    def loop_columns(self, axis: Axis) -> Axis:
        """The columns of a tile in the loop, for those of a tile."""
        return axis

    def k_loop(self) -> KLoop:
        """The loop over K."""
        return KLoop(self.contraction, self.config.block_k)

    def emitter(self, axes: list[Axis], names: str) -> Emitter:
        """An emitter of lines of the loop."""
        return Emitter(axes, names, zeros=True)

    def a_at(self, position: Position) -> Position:
        """The position in the first operand for one along K, in the loop."""
        return self.contraction.a_at(self.z, self.m, position)

    def b_at(self, column: Index, position: Position) -> Position:
        """The position in the second operand for a column of the tile and a position along K, in the loop."""
        return self.contraction.b_at(self.z, column, position)

    def tile_of(self, total: Operand, axis: Axis) -> tuple[Operand, list[str]]:
        """The sums of a tile, for what the loop computed, and the lines that make them of it."""
        return total, []

    def combined(self, sums: list[Sums], axis: Axis) -> list[Sums]:
        """The accumulators of columns along `axis` as the loop computes them."""
        return sums

    def body(self) -> list[str]:
        """Pointers, the loop over K, and the epilogue."""
        config, k_loop = self.config, self.k_loop()
        a_mask, b_mask = ("in_ka", "in_kb") if k_loop.masked else ("", "")
        rows, is_joined = Axis(M, config.block_m, self.rows_mask), config.joined and k_loop.packing is not None
        self.block, self.width = k_loop.block, k_loop.width
        block_a = len(k_loop.parts) * k_loop.width if is_joined else k_loop.width
        a = self.emitter(self._axes(self.loop_rows, Axis(KA, block_a, a_mask)), "a")
        k_loop.enter(a, a_mask)
        places = [k_loop.whole(KA)] if is_joined else [k_loop.values(KA, part) for part in k_loop.parts]
        left = [self._left(a, place, a_mask) for place in places]
        before, inside, dots, rest = a.outer.lines, a.inner(), list[str](), list[str]()
        num_stages = 0
        for part, axis in enumerate(self.ranges):
            inner = self.loop_columns(axis)
            b = self.emitter(self._axes(Axis(KB, k_loop.block, b_mask), inner), "bc"[part])
            k_loop.enter(b, b_mask)
            named = {N: variable(axis.name, self.indexing.width)} if part else {}
            sums = []
            for which, column in enumerate(self.indexing.columns):
                name = f"acc{part * len(self.indexing.columns) + which}"
                columns = substitute(column, named)
                positions = [
                    [self.b_at(columns, k_loop.position(KB, one, half)) for half in k_loop.halves]
                    for one in k_loop.parts
                ]
                total = Operand(name, frozenset((self.loop_rows.name, inner.name)))
                sums.append(self._sums(total, b, inner, positions, left, b_mask))
            sums = self.combined(sums, inner)
            before += [*b.outer.lines, *(line for one in sums for line in one.before)]
            inside += b.inner()
            dots += [line for one in sums for line in one.inside]
            num_stages = config.num_stages if any(one.by_step for one in sums) else num_stages
            epilogue = Emitter(self._axes(rows, axis), "" if part == 0 else "e")
            tiles = [self.tile_of(one.total, axis) for one in sums]
            self.write_epilogue(epilogue, [total for total, _ in tiles], named)
            rest += [line for one, (_, lines) in zip(sums, tiles, strict=True) for line in (*one.after, *lines)]
            rest += epilogue.outer.lines
        k_axes = "[:, None]" if self.swapped else "[None, :]", "[None, :]" if self.swapped else "[:, None]"
        lines = [*self.k_range(KA, k_axes[0], block_a), *self.k_range(KB, k_axes[1], k_loop.block)]
        value = f"{KA} % {k_loop.width}" if is_joined else KA
        word = f"({value} // {len(k_loop.halves)})" if k_loop.packing is not None else KA
        masks = [*k_loop.mask(a_mask, word), *k_loop.mask(b_mask, KB)]
        return lines + k_loop.loop(before, masks, inside + dots, num_stages=num_stages, live=self.live) + rest

    def _left(self, emitter: Emitter, position: Position, mask: str) -> str:
        """A tile of the first operand. One row is read once, not by all rows of the tile."""
        at = self.a_at(position)
        is_one = self.contraction.rows == 1 and self.rows_mask != ""
        conditions = (Operand(self.rows_mask, frozenset((M,))),) if is_one else ()
        return operand(emitter, self.contraction.a, at, self.dtype, mask, conditions=conditions)

    def _sums(
        self, total: Operand, b: Emitter, axis: Axis, positions: list[list[Position]], left: list[str], mask: str
    ) -> Sums:
        """The accumulator `total` of columns along `axis`, to which each part of a step adds; `positions` are those of
        the halves of each part."""
        made, contraction, zeros = Sums(total), self.contraction, self._zeros(axis)
        made.before.append(f"{total.text} = {zeros}")
        found = self._scaled(b, positions)
        if not found:
            parts = [[operand(b, contraction.b, at, self.dtype, mask) for at in halves] for halves in positions]
            values = self._tiles(parts, axis)
            made.pairs = list(zip(left, values, strict=True))
            made.inside += [self.dot(total.text, *pair) for pair in made.pairs]
            return made
        parts, factors = [], []
        for halves in found:
            pairs = [self._value(b, one, mask) for one in halves]
            parts.append([value for value, _ in pairs])
            factors.append(halves[0].factors(b, pairs[0][1]))
        groups: dict[tuple[Operand | None, Operand | None], list[tuple[str, str]]] = {}
        for factor, other, value in zip(factors, left, self._tiles(parts, axis), strict=False):
            groups.setdefault(factor, []).append((other, value))  # joined parts have the same factors
        made.by_step = len(groups) > 1 or any(LOOP in one.varies(b) for halves in found for one in halves)
        for number, (both, products) in enumerate(groups.items()):
            name = f"{total.text}_{number}" if made.by_step else total.text
            dots, terms = self._group(name, both, products, axis)
            empty = [f"{tile} = {zeros}" for tile in dots if tile != total.text]
            lines = [line for lines in dots.values() for line in lines]
            if made.by_step:
                made.inside += [*empty, *lines, f"{total.text} += {terms}"]
            else:
                made.before, made.inside, made.after = made.before + empty, lines, [f"{total.text} = {terms}"]
                made.pairs = products if len(dots) == 1 else []
        return made

    def _value(self, b: Emitter, one: Scaled, mask: str) -> tuple[str, float]:
        """Codes as floats plus a number, and that number."""
        magic = with_magic(b, one.codes, one.position, self.dtype) if self.is_small else None
        if magic is not None:
            return magic[0].text, magic[1]
        return operand(b, one.codes, one.position, self.dtype, mask), 0.0

    def _group(
        self, sums: str, factors: tuple[Operand | None, Operand | None], pairs: list[tuple[str, str]], axis: Axis
    ) -> tuple[dict[str, list[str]], str]:
        """The products of codes that share a scale and a shift, by the tile that they are added to, and what comes of
        these tiles."""
        scale, shift = factors
        dots = {sums: [self.dot(sums, other, value) for other, value in pairs]}
        terms = sums if scale is None else f"{sums} * {scale.text}"
        if shift is not None:  # times the sum over K of the first operand, by tensor cores as well
            sizes = ", ".join(str(one.block) for one in self._axes(Axis(KB, self.block), axis))
            halves = [f"tl.full([{sizes}], 1.0, {tl_dtype(self.dtype)})"] * (self.width // self.block)
            (ones,) = self._tiles([halves], axis)  # Triton reads both products' operands in one layout
            dots[f"{sums}_ones"] = [self.dot(f"{sums}_ones", other, ones) for other, _ in pairs]
            terms += f" + {sums}_ones * {shift.text}"
        return dots, terms

    def _scaled(self, b: Emitter, positions: list[list[Position]]) -> list[list[Scaled]]:
        """The second operand as codes, for the halves of each part of a step; [] if its scales do not follow the
        sums."""
        if self.dtype not in HALVES or stored_load(self.contraction.b) is not None:
            return []
        found = [[scaled(b, self.contraction.b, at, KB, self.dtype) for at in halves] for halves in positions]
        known = [[one for one in halves if one is not None] for halves in found]
        if known != found:
            return []
        late = all(one.is_late(b) for halves in known for one in halves)
        is_joined = self.config.joined and len(known) > 1
        if not late and (is_joined or not self.is_small):
            return []
        factors = [{one.factors(b) for one in halves} for halves in known]
        are_equal = len(set[object]().union(*factors)) == 1 if is_joined else all(len(one) == 1 for one in factors)
        return known if are_equal else []

    def _tiles(self, parts: list[list[str]], axis: Axis) -> list[str]:
        """The tiles of the parts of a step, of which each is given as its halves: neighbours along K. With `joined` it
        is one tile, one part after the other."""
        if len(parts[0]) == 1:
            return [one for (one,) in parts]
        tiles, rank = [f"tl.join({low}, {high})" for low, high in parts], 3
        while self.config.joined and len(tiles) > 1:
            tiles = [f"tl.join({one}, {two})" for one, two in zip(tiles[::2], tiles[1::2], strict=True)]
            rank += 1
        more = range(rank - 1, 2, -1)  # the parts, and then the words of each and their halves, are K
        order = (0, *more, 1, 2) if self.swapped else (*more, 0, 2, 1)
        moved = (f"tl.permute({tile}, {order})" if order != (0, 1, 2) else tile for tile in tiles)
        return [f"tl.reshape({tile}, {self._shape(axis, len(parts) // len(tiles))})" for tile in moved]

    def _shape(self, axis: Axis, parts: int = 1) -> str:
        """The shape of a tile of parts of the second operand."""
        return "[" + ", ".join(str(one.block) for one in self._axes(Axis(KB, parts * self.width), axis)) + "]"

    @property
    def is_small(self) -> bool:
        """Sums of groups, and of the first operand, may have tiles of their own."""
        return self.config.block_m <= FEW_ROWS

    def _zeros(self, axis: Axis) -> str:
        shape = ", ".join(str(one.block) for one in self._axes(self.loop_rows, axis))
        return f"tl.zeros([{shape}], {tl_dtype(self.sums)})"

    def _axes(self, first: Axis, second: Axis) -> list[Axis]:
        """The dimensions of a tile."""
        return [second, first] if self.swapped else [first, second]

    def dot(self, total: str, a: str, b: str) -> str:
        """The line that adds the product of two tiles to a third one."""
        first, second = (b, a) if self.swapped else (a, b)
        if self.config.promoted:  # with the last argument, Triton does not make one dot of both again
            return f"{total} += tl.dot({first}, {second}, max_num_imprecise_acc={self.config.block_k})"
        if self.dtype == "f32":
            return f"{total} = {float32_dots.dot(first, second, total, self.config.input_precision)}"
        how = "" if self.sums == "f32" else f", out_dtype={tl_dtype(self.sums)}"  # f32 is taken for granted
        return f"{total} = tl.dot({first}, {second}, {total}{how})"
