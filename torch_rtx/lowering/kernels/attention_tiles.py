"""What the kernels of attention share: axes of tiles, operands of products, and stores of results."""

from __future__ import annotations

import itertools
import math
from itertools import permutations

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels import float32_dots
from torch_rtx.lowering.kernels.attention import Attention
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.attention_pieces import head_pieces
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, product, ravel, unravel, variable
from torch_rtx.lowering.kernels.kernel_ir import Load, Position, Shape, Tensor, View, children, everything
from torch_rtx.lowering.kernels.matmul_template import operand, stored_load
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import needs_int64
from torch_rtx.lowering.kernels.triton_ops import tl_dtype

LOWEST_F32 = -3.4028234663852886e38  # the least maximum: finite, so that the weights of rows without keys are 0
LOG2E = math.log2(math.e)
NEAR = 8  # groups whose programs start next to each other: what these read again is still in the L2 cache


def in_order(count: Index, sizes: Position, near: int | None = None) -> tuple[Index, Index]:
    """The block and the group of a program, where the first blocks of groups start first.

    Args:
        count: blocks of a group.
        sizes: the groups.
        near: of so many groups all blocks start before those of the next ones, or of as many as divide the groups
            evenly; None: of all.
    """
    groups = product(sizes)
    program = variable("program", product((count, *sizes)))
    if near is not None:
        known = math.prod(size.number or 1 for size in itertools.takewhile(lambda one: one.number, reversed(sizes)))
        groups = constant(max(divisor for divisor in range(1, near + 1) if known % divisor == 0))
    within = program % (count * groups)
    return within // groups, program // (count * groups) * groups + within % groups


class Tiles:
    """The tiles of one attention kernel.

    Attributes:
        lead, row: the leading position and the query of the row M.
        scale_first: scores are scaled; else the factor is.
        factor: of scores in the exponent of 2.
        mask_at: the position of a score.
        sizes, blocks: of each axis.
        starts: the first column of each piece of a head.
    """

    def __init__(self, region: Region, attn: Attention, config: AttentionConfig) -> None:
        self.region, self.attn, self.config = region, attn, config
        self.cast = ".to(tl.int64)" if needs_int64(region) else ""
        self.emitter = Emitter([])
        self.group = attn.group()
        self.lead, self.row = attn.place(self.group, variable("M", from_dim(attn.rows)))
        self.sizes = {"M": from_dim(attn.rows), "N": attn.keys, "J": attn.keys}
        self.blocks = {"M": config.rows, "N": config.keys, "J": config.keys}
        self.starts: dict[str, int] = {}
        for letter, width in (("D", attn.width), ("E", attn.value_width)):
            for name, (start, block) in zip((letter, f"{letter}1"), head_pieces(width, config.min_first), strict=False):
                self.sizes[name], self.blocks[name], self.starts[name] = constant(width), block, start
        # The scale is folded into the base of the exponential, unless scaled scores are needed, as for an added mask.
        self.mask = attn.mask  # of the keys that are written now
        self.has_additive_mask = attn.mask is not None and attn.mask.dtype != "bool"
        self.scale_first = (
            self.has_additive_mask or attn.bias is not None or attn.fill is not None or attn.scale <= 0 or attn.partial
        )
        self.scale_first |= attn.modified is not None and attn.modified.score is not None
        self.factor = LOG2E if self.scale_first else attn.scale * LOG2E
        self.mask_at = (*self.lead, self.row, variable("N", attn.keys))

    def pieces(self, letter: str) -> list[str]:
        """The axes of the columns of Q and K, "D", or of V, "E"."""
        return [name for name in self.starts if name[0] == letter]

    def is_full(self, name: str) -> bool:
        """The size along `name` is a multiple of the block: no mask is needed."""
        size, block = self.sizes[name].number, self.blocks[name]
        if name in self.starts:
            return size is not None and self.starts[name] + block <= size
        return size is not None and size % block == 0

    def _axis(self, name: str, masked: bool) -> Axis:
        return Axis(name, self.blocks[name], f"in_{name.lower()}" if masked and not self.is_full(name) else "")

    def tile(self, rows: str, columns: str, looped: str = "", masked: bool = True) -> None:
        """Point the emitter at a [rows, columns] tile. `masked=False`: key blocks are known to be full."""
        keys = ("N", "J")
        axes = [self._axis(name, masked or name not in keys) for name in (rows, columns)]
        self.emitter.axes, self.emitter.looped = {axis.name: axis for axis in axes}, looped

    def range(self, name: str, side: str, start: str = "", masked: bool = True) -> list[str]:
        """The lines that define the positions along an axis, and which of them are in bounds."""
        block, size = self.blocks[name], self.sizes[name]
        lines = [f"{name} = {f'{start} + ' if start else ''}tl.arange(0, {block}){self.cast}{side}"]
        return lines + ([f"in_{name.lower()} = {name} < {size}"] if masked and not self.is_full(name) else [])

    def operand(self, tensor: Tensor, rows: str, columns: str, lead: Position, row: Index) -> str:
        """A [rows, columns] tile of an operand of `tl.dot`, 0 out of bounds."""
        emitter, position = self.emitter, (*lead, row, variable(columns, tensor.shape[-1]))
        if not _is_plain(tensor) and stored_load(tensor) is not None:
            return operand(emitter, tensor, position, self.attn.dtype)
        value = emitter.value(tensor, position)
        axes = frozenset((rows, columns))
        masks = [axis.mask for axis in emitter.axes.values() if axis.mask]
        if masks and not _is_plain(tensor):
            value = Operand(f"tl.where({' & '.join(masks)}, {value.text}, 0.0)", axes)
        text = self.narrow(value.text)
        return text if value.axes == axes else f"tl.broadcast_to({text}, {emitter.shape(axes)})"

    def narrow(self, text: str) -> str:
        """A value in the dtype of the operands."""
        return f"{text}.to({tl_dtype(self.attn.dtype)})"

    def dot(self, first: str, second: str, added: str = "") -> str:
        """A product of two operands, with sums in f32."""
        if self.attn.dtype == "f32":
            return float32_dots.dot(first, second, added, self.config.input_precision)
        return f"tl.dot({first}, {second}{f', {added}' if added else ''})"

    @property
    def functions(self) -> str:
        """Source of the functions that the lines call."""
        return float32_dots.functions(self.attn.dtype, self.config.input_precision)

    def scores(self, masked: bool, diagonal: bool, rows: bool = False) -> list[str]:
        """The lines that scale the scores `s` and apply masks: minus infinity for a key that has no weight.

        Args:
            masked: keys may be out of bounds.
            diagonal: keys may be behind the row.
            rows: no key has a weight in rows out of bounds.
        """
        attn, lines = self.attn, list[str]()
        seen = ["in_n"] if masked and not self.is_full("N") else []
        seen += ["in_m"] if rows and not self.is_full("M") else []
        if diagonal:
            seen.append(f"({self.row} >= N)")
        if attn.band is not None:
            seen += [f"(N - ({self.row}) {op} {end})" for op, end in zip((">=", "<="), attn.band, strict=True)]
        if attn.modified is not None and attn.modified.score is not None:
            scaled = self.emitter.assign(f"s * {attn.scale!r}", frozenset(("M", "N")))
            self.emitter.anchored[attn.modified.leaf, self.mask_at] = scaled
            lines.append(f"s = {self.full(attn.modified.score)}")
        elif self.scale_first:
            lines.append(f"s = s * {attn.scale!r}")
        if attn.bias is not None:
            lines.append(f"s = s + {self.emitter.value(attn.bias, self.mask_at).text}")
        if self.mask is not None:
            mask = self.emitter.value(self.mask, self.mask_at)
            if self.has_additive_mask:
                lines.append(f"s = s + {mask.text}")
            elif attn.fill is not None:
                lines.append(f"s = tl.where({mask.text}, s, {attn.fill!r})")
            else:
                seen.append(mask.text)
        if seen:
            lines.append(f's = tl.where({" & ".join(seen)}, s, float("-inf"))')
        return lines

    def full(self, tensor: Tensor) -> str:
        """`tensor` at the places of the scores, as a whole tile."""
        value = self.emitter.value(tensor, self.mask_at)
        axes = frozenset(self.emitter.axes)
        return value.text if value.axes == axes else f"tl.broadcast_to({value.text}, {self.emitter.shape(axes)})"

    def store(self, index: int, position: Position, shape: Shape, result: Operand) -> None:
        """Store the emitter's tile of output `index`; `result` is the call's own there, at `position` of `shape`."""
        emitter, output = self.emitter, self.region.outputs[index]
        place = _position(output, position, shape)
        for anchor in anchors_of(output):
            emitter.anchored[anchor, position] = result
        address = linear(place, map(from_dim, self.region.types[index].strides))
        emitter.store(f"out{index}", address, emitter.value(output, place), result.axes)


def _is_plain(tensor: Tensor) -> bool:
    """`tensor` is a view of a load, which is 0 where a mask is not set."""
    while isinstance(tensor, View):
        tensor = tensor.source
    return isinstance(tensor, Load)


def anchors_of(tensor: Tensor) -> list[Load]:
    """The results of the call that `tensor` is computed from."""
    return [one for one in everything([tensor]) if isinstance(one, Load) and one.anchor]


def _reached(tensor: Tensor, position: Position) -> Position | None:
    """The position in the call's result that `tensor` reads at `position`; None if it reads none."""
    while anchors_of(tensor):
        if isinstance(tensor, Load):
            return position
        if isinstance(tensor, View):
            position = tensor.at(position)
        tensor = next(child for child in children(tensor) if anchors_of(child))
    return None


def _position(output: Tensor, position: Position, shape: Shape) -> Position:
    """The position in `output` of the element `position` of the result.

    An output is a reshaped permutation of the result, so one order of the result's dimensions, flattened, is its own.
    """
    for order in permutations(range(len(shape))):
        flat = ravel([position[axis] for axis in order], [shape[axis] for axis in order])
        place = unravel(flat, output.shape)
        if product(output.shape) == product(shape) and _reached(output, place) == position:
            return place
    raise Unsupported("an output that is no permutation of the result of attention")
