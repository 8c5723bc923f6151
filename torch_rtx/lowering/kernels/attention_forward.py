"""Attention kernels: softmax(q k^T * scale + mask) v in one pass over the keys; the scores never reach memory.

A program has a block of query rows and loops over blocks of keys with a running maximum and sum per row (online
softmax, Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023).
"""

from __future__ import annotations

from torch_rtx.errors import Unsupported
from torch_rtx.ir import dim_expr
from torch_rtx.lowering.kernels.attention import Attention, attention_of, depends_on_row
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, row_multiple
from torch_rtx.lowering.kernels.attention_tiles import LOG2E, LOWEST_F32, Tiles, anchors_of, in_order
from torch_rtx.lowering.kernels.emit import Operand, Scope, indent
from torch_rtx.lowering.kernels.index import constant, from_dim, linear, product, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO, Load, Position, Shape, Tensor
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import assemble, blocks
from torch_rtx.op_work import ATTENTION_FORWARD


def attention_kernel(region: Region, name: str, config: AttentionConfig) -> Kernel:
    """The kernel that computes `region`.

    Raises:
        Unsupported: see `attention_of`; or an output that is not a permutation of the result with pointwise operations.
    """
    attn = attention_of(region)
    return forward_kernel(ForwardWriter(region, attn, config), name)


def forward_kernel(writer: ForwardWriter, name: str) -> Kernel:
    """The kernel that `writer` writes."""
    attn, config = writer.attn, writer.config
    programs = dim_expr("*", blocks(attn.rows, config.rows), *writer.programs)
    return assemble(
        writer.region, name, writer.write(), programs, config.num_warps, config.num_stages, writer.functions
    )


class ForwardWriter(Tiles):
    """The lines of one attention kernel.

    Attributes:
        near: see `in_order`.
    """

    near: int | None = None

    def __init__(self, region: Region, attn: Attention, config: AttentionConfig) -> None:
        super().__init__(region, attn, config)
        self.starts_last = attn.causal
        # The programs of a block of rows, and the place of each; the place and the sizes before those of results.
        self.programs, self.program = attn.groups, self.group
        self.before: Position = ()
        self.sizes_before: Shape = ()
        # A mask that all rows share takes few registers, so that it can be loaded early; and so can all of one block.
        self.one_block = attn.keys.number is not None and attn.keys.number <= config.keys
        self.early_masks = [
            added
            for added in (attn.mask, attn.bias)
            if added is not None and (self.one_block or not depends_on_row(added, self.mask_at))
        ]

    # ---- programs ----------------------------------------------------------------------------------------------------

    def write(self) -> list[str]:
        """All lines of the kernel."""
        attn, config, emitter = self.attn, self.config, self.emitter
        lines = emitter.outer.lines
        count, groups = from_dim(blocks(attn.rows, config.rows)), tuple(map(from_dim, self.programs))
        program = variable("program", product((count, *groups)))
        if self.starts_last:
            # Blocks of rows that see the most keys start first, so that the tail of the grid is short.
            block, group = in_order(count, groups, self.near)
            block = count - ONE - block
        else:
            block, group = program % count, program // count
        lines.append(f"program = tl.program_id(0){self.cast}")
        lines.append(f"first = {block * constant(config.rows)}")
        place = unravel(group, groups)
        lines += [f"{axis} = {at}" for axis, at in zip(self.program, place, strict=True) if axis != ZERO]
        lines += self.range("M", "[:, None]", "first")
        for name, start in self.starts.items():
            lines += self.range(name, "[None, :]", str(start or ""))
        for name in self.pieces("D"):
            self.tile("M", name)
            lines.append(f"Q{name[1:]} = {self.operand(attn.query, 'M', name, self.lead, self.row)}")
        sink = None if attn.sink is None else emitter.value(attn.sink, (*self.lead, self.row, ZERO)).text
        lines.append(f"top = tl.full([{config.rows}], {LOWEST_F32!r}, tl.float32)")
        lines.append(f"total = tl.zeros([{config.rows}], tl.float32)")
        sums = [f"acc{name[1:]}" for name in self.pieces("E")]
        for name, total in zip(self.pieces("E"), sums, strict=True):
            lines.append(f"{total} = tl.zeros([{config.rows}, {self.blocks[name]}], tl.float32)")
        self.walk()
        if not attn.partial:
            weights = f"{'tl.where(total == 0, 1, total)' if attn.safe else 'total'}[:, None]"
            if sink is not None:
                # Infinite where the sink outweighs all keys by more than float32 holds: these weigh nothing then.
                rise = (
                    f"({sink} - top[:, None]) * {LOG2E!r}" if self.scale_first else f"{sink} * {LOG2E!r} - top[:, None]"
                )
                weights = f"({weights} + tl.exp2({rise}))"
            lines += [f"{total} = {total} / {weights}" for total in sums]
        self._store()
        return lines

    def walk(self) -> None:
        """Loop over blocks of keys: first those that are full and visible to every row, then the others."""
        block, keys, lines = self.config.keys, self.attn.keys, self.emitter.outer.lines
        if self.attn.band is not None and self.attn.packed == 1:
            begin, end = self.attn.band
            lines.append(f"begin = tl.maximum(first + {begin}, 0) // {block} * {block}")
            lines.append(f"end = tl.minimum(first + {self.config.rows + end}, {keys})")
            self._loop("begin", "end", masked=True)
            return
        if not self.attn.causal:
            full = keys // constant(block) * constant(block)
            if full != ZERO:
                self._loop("0", str(full))
            if full != keys:  # of a symbolic number of keys the last block may be fully masked
                lines.append(f"start = {full}")
                lines += self.block(masked=True)
            return
        packed = self.attn.packed > 1
        first, last = ("0", str(from_dim(self.attn.queries))) if packed else ("first", f"first + {self.config.rows}")
        if not packed:
            lines.append(f"whole = tl.minimum({first} + 1, {keys}) // {block} * {block}")
            self._loop("0", "whole")
        lines.append(f"end = tl.minimum({last}, {keys})")
        self._loop("0" if packed else "whole", "end", diagonal=True)

    def _loop(self, begin: str, end: str, diagonal: bool = False, masked: bool = False) -> None:
        body = self.block(masked=masked or diagonal, diagonal=diagonal)
        self.emitter.outer.lines += [f"for start in range({begin}, {end}, {self.config.keys}):", *indent(body)]

    def block(self, masked: bool, diagonal: bool = False) -> list[str]:
        """The lines of one block of keys, from `start`; what does not vary with keys is emitted before it."""
        emitter, attn = self.emitter, self.attn
        emitter.scope = scope = Scope()
        scope.lines += self.range("N", "[None, :]", "start", masked)
        scope.lines += self.range("J", "[:, None]", "start", masked)
        key = variable("J", attn.keys)
        if self.one_block:  # all that it reads is asked for at once; the layout of a mask changes by shared memory
            for tensor, letter in ((attn.key, "D"), (attn.value, "E")):
                for name in self.pieces(letter):
                    self.tile("J", name, "J", masked)
                    self.operand(tensor, "J", name, self.lead, key)
        for added in self.early_masks:  # loaded before the product, to overlap with it
            self.tile("M", "N", "N", masked)
            emitter.value(added, self.mask_at)
        for name in self.pieces("D"):
            self.tile("J", name, "J", masked)
            k = self.operand(attn.key, "J", name, self.lead, key)
            before = "s" if name != "D" else ""
            scope.lines.append(f"s = {self.dot(f'Q{name[1:]}', f'tl.trans({k})', before)}")
        self.tile("M", "N", "N", masked)
        scope.lines += self.scores(masked, diagonal)
        self._softmax(scope)
        for name in self.pieces("E"):
            self.tile("J", name, "J", masked)
            v = self.operand(attn.value, "J", name, self.lead, key)
            acc = f"acc{name[1:]}"
            scope.lines.append(f"{acc} = {self.dot(self.narrow('p'), v, f'{acc} * decay[:, None]')}")
        scope.lines.append("top = peak")
        return emitter.inner()

    def _softmax(self, scope: Scope) -> None:
        """One online-softmax step: row maximum `peak`, weights `p`, and `decay`, which rescales the running sums."""
        if self.scale_first:
            # The difference comes before the factor: the lowest float, as masks have it, times log2(e) is -inf.
            scope.lines.append("peak = tl.maximum(top, tl.max(s, 1))")
            scope.lines.append(f"p = tl.exp2((s - peak[:, None]) * {self.factor!r})")
            scope.lines.append(f"decay = tl.exp2((top - peak) * {self.factor!r})")
        else:
            scope.lines.append(f"peak = tl.maximum(top, tl.max(s, 1) * {self.factor!r})")
            scope.lines.append(f"p = tl.exp2(s * {self.factor!r} - peak[:, None])")
            scope.lines.append("decay = tl.exp2(top - peak)")
        scope.lines.append("total = total * decay + tl.sum(p, 1)")

    # ---- the result --------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        attn = self.attn
        rows = self.numbers()
        for index, output in enumerate(self.region.outputs):
            anchors = anchors_of(output)
            which = attn.results.index(anchors[0]) if anchors else 0
            if attn.op == ATTENTION_FORWARD and which == 1:
                self._store_statistic(index, output)
                continue
            pieces = ["E"] if which in rows else self.pieces("E")
            for name in pieces:
                self.tile("M", name)
                column, size = (ZERO, ONE) if which in rows else (variable(name, self.sizes[name]), self.sizes[name])
                axes = frozenset(("M",) if which in rows else ("M", name))
                result = Operand(rows.get(which, f"acc{name[1:]}"), axes)
                shape = (*self.sizes_before, *map(from_dim, attn.lead), from_dim(attn.queries), size)
                rank = len(anchors[0].shape) if anchors else len(shape)
                self.store(index, (*self.before, *self.lead, self.row, column)[:rank], shape[:rank], result)

    def numbers(self) -> dict[int, str]:
        """The results that are one number per row, as a column."""
        return {1: "top[:, None]", 2: "total[:, None]"} if self.attn.partial else {}

    def _store_statistic(self, index: int, output: Tensor) -> None:
        """Store the logarithm of the sum of weights of each row, as libraries have it: 0 of a row without keys,
        infinity in rows of padding."""
        if not isinstance(output, Load) or self.config.rows % row_multiple(self.attn):
            raise Unsupported("an operation on what attention saves for its gradient")
        lines, rows = self.emitter.outer.lines, output.shape[2]
        value = "top + tl.log(total)" if self.scale_first else f"(top + tl.log2(total)) * {1 / LOG2E!r}"
        lines.append(f"statistic = tl.where(total == 0, 0.0, {value})[:, None]")
        if not self.is_full("M"):
            lines.append('statistic = tl.where(in_m, statistic, float("inf"))')
        place = (*self.lead, variable("M"), *[ZERO] * (len(output.shape) - 3))
        address = linear(place, map(from_dim, self.region.types[index].strides))
        mask = "" if self.is_full("M") else f", mask=M < {rows}"
        lines.append(f"tl.store(out{index} + ({address}), statistic{mask})")
