"""The gradients of attention to few keys, in one kernel.

A program has all keys of a group of heads that share them, and walks over blocks of its query rows. It computes the
weights P of a block again, which takes less time than to read anything that the forward might save of them; the scores
and their gradient never reach memory, except as the gradient of a mask:

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - sum(P * dP)),  dQ = dS K * scale,  dK = dS^T Q * scale

Where a row of keys is in one tile, the sum over it is all that the backward of FlashAttention (Dao et al. 2022) takes
from the forward's result and statistics; neither is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, dim_expr
from torch_rtx.lowering.kernels.attention import Attention, attention_of
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.attention_pieces import padded_width
from torch_rtx.lowering.kernels.attention_tiles import LOWEST_F32, Tiles, anchors_of
from torch_rtx.lowering.kernels.emit import Operand, Scope, indent
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, product, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ZERO, Position, Shape
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import assemble, block_of
from torch_rtx.targets import Arch

MAX_KEYS = 256
MAX_ROWS = 64  # of a block of queries
MAX_REGISTERS = 200  # of a thread, for the tiles of scores and sums; addresses and operands need others
QUERY, KEY, VALUE, MASK = range(4)  # the results of the call: gradients of these


def backward_of(region: Region) -> Attention:
    """The attention of a region whose anchor computes its gradients.

    Raises:
        Unsupported: see `attention_of`; no known number of keys, or more than a tile has; or f32.
    """
    attn = attention_of(region)
    keys = attn.keys.number
    if keys is None or not 0 < keys <= MAX_KEYS:
        raise Unsupported(f"gradients of attention to {attn.keys} keys")
    if attn.dtype == "f32":
        raise Unsupported("gradients of attention in f32")
    return attn


# ---- configurations --------------------------------------------------------------------------------------------------


def backward_configs(region: Region, arch: Arch) -> list[AttentionConfig]:
    """Configurations that fit `arch`, the fastest first: blocks of as many rows as registers hold, by few warps."""
    attn = backward_of(region)
    configs = [config for config in _candidates(attn) if _fits(attn, config, arch)]
    if not configs:
        raise Unsupported(f"gradients of heads of {attn.width} elements and {attn.keys} keys on sm_{arch.sm}")
    return configs


def _candidates(attn: Attention) -> Iterator[AttentionConfig]:
    assert attn.keys.number is not None
    keys = block_of(attn.keys.number)
    rows = attn.rows if isinstance(attn.rows, int) else MAX_ROWS
    for block in (MAX_ROWS, 32, 16):
        for warps in (4, 8):
            if block <= block_of(rows):
                yield AttentionConfig(block, keys, warps, 1)


def _fits(attn: Attention, config: AttentionConfig, arch: Arch) -> bool:
    return registers(attn, config) <= MAX_REGISTERS and shared_memory(attn, config) <= arch.shared


def shared_memory(attn: Attention, config: AttentionConfig) -> int:
    """About the shared memory of a program, in bytes: all operands, half of those of keys in the other order as well,
    and a tile of scores."""
    width = sum(padded_width(one, config.min_first) for one in (attn.width, attn.value_width))
    held = config.keys * width * 3 // 2 + config.rows * (width + config.keys)
    return held * DTYPES[attn.dtype].bytes


def registers(attn: Attention, config: AttentionConfig) -> int:
    """Registers per thread for what is held at once: the sums of keys and values, three tiles of scores, and the
    gradient of a block of queries."""
    width, values = (padded_width(one, config.min_first) for one in (attn.width, attn.value_width))
    held = config.keys * (width + values) + 3 * config.rows * config.keys + config.rows * width
    return held // (32 * config.num_warps)


def row_blocks(attn: Attention, config: AttentionConfig) -> int | None:
    """The blocks of query rows of a program; None: their number is symbolic."""
    rows = attn.rows if attn.range_rows is None else attn.range_rows
    return math.ceil(rows / config.rows) if isinstance(rows, int) else None


def programs(attn: Attention) -> tuple[Dim, ...]:
    """The programs, as sizes: ranges of queries, if there are some, and groups."""
    return attn.groups if attn.range_rows is None else (_ranges(attn), *attn.groups)


def _ranges(attn: Attention) -> int:
    if attn.packed > 1 or attn.causal or not isinstance(attn.queries, int) or attn.range_rows is None:
        raise Unsupported("ranges of queries of several heads, of causal ones, or of an open number")
    return math.ceil(attn.queries / attn.range_rows)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def backward_kernel(region: Region, name: str, config: AttentionConfig) -> Kernel:
    """The kernel that computes `region`.

    Raises:
        Unsupported: see `backward_of`; or an output that is no permutation of a gradient with pointwise operations.
    """
    attn = backward_of(region)
    lines = _Writer(region, attn, config).write()
    return assemble(region, name, lines, dim_expr("*", 1, *programs(attn)), config.num_warps, config.num_stages)


class _Writer(Tiles):
    """The lines of one kernel."""

    def write(self) -> list[str]:
        """All lines of the kernel."""
        attn, lines = self.attn, self.emitter.outer.lines
        sizes = tuple(map(from_dim, programs(attn)))
        place = unravel(variable("program", product(sizes)), sizes)
        lines.append(f"program = tl.program_id(0){self.cast}")
        lines += [f"{axis} = {at}" for axis, at in zip(self.program, place, strict=True) if axis != ZERO]
        lines += [*self.range("N", "[None, :]"), *self.range("J", "[:, None]")]
        for name, start in self.starts.items():
            lines += self.range(name, "[None, :]", str(start or ""))
        for tensor, letter, sums in ((attn.key, "D", "dk"), (attn.value, "E", "dv")):
            for name in self.pieces(letter):
                self.tile("J", name)
                held = self.operand(tensor, "J", name, self.group, variable("J", attn.keys))
                lines.append(f"{'K' if letter == 'D' else 'V'}{name[1:]} = {held}")
                lines.append(f"{sums}{name[1:]} = tl.zeros([{self.blocks['J']}, {self.blocks[name]}], tl.float32)")
        self._walk()
        self._store_sums()
        return lines

    @property
    def program(self) -> Position:
        """The position of a program among all."""
        attn = self.attn
        return self.group if attn.range_rows is None else (variable("part", constant(_ranges(attn))), *self.group)

    def _walk(self) -> None:
        """Go over the blocks of rows: one without a loop, so that nothing waits for its condition."""
        attn, rows, lines, emitter = self.attn, self.config.rows, self.emitter.outer.lines, self.emitter
        begin, end = "0", str(from_dim(attn.rows))
        if attn.range_rows is not None:
            begin = f"part * {attn.range_rows}"
            end = f"tl.minimum({begin} + {attn.range_rows}, {end})"
        if row_blocks(attn, self.config) == 1:
            lines += self.range("M", "[:, None]", begin if attn.range_rows is not None else "")
            self._block("")
            return
        emitter.scope = scope = Scope()
        scope.lines += self.range("M", "[:, None]", "first")
        self._block("M")
        body = emitter.inner()
        lines += [f"for first in range({begin}, {end}, {rows}):", *indent(body)]

    def _block(self, looped: str) -> None:
        """The lines of one block of rows, in the emitter's scope."""
        attn, emitter = self.attn, self.emitter
        lines = emitter.scope.lines
        assert attn.gradient is not None
        for tensor, letter, short in ((attn.query, "D", "Q"), (attn.gradient, "E", "G")):
            for name in self.pieces(letter):
                self.tile("M", name, looped)
                held = self.operand(tensor, "M", name, self.lead, self.row)
                lines.append(f"{short}{name[1:]} = {held}")
        self.tile("M", "N", looped)
        for added in (attn.mask, attn.bias):  # loaded before the products, so that they wait for memory together
            if added is not None:
                emitter.value(added, self.mask_at)
        lines += self._products("s", "Q", "K", "D")
        lines += self.scores(masked=True, diagonal=attn.causal, rows=True)
        lines += self._weights()
        lines += self._add_products("dv", "p", "G", "E")
        lines += self._products("dp", "G", "V", "E")
        lines.append("ds = p * (dp - tl.sum(p * dp, 1)[:, None])")
        self._store_mask(looped)
        lines += self._add_products("dk", "ds", "Q", "D")
        self._store_queries(looped)

    def _products(self, result: str, first: str, second: str, letter: str) -> list[str]:
        """The sum over all pieces of a head of products with the second operand transposed."""
        lines = list[str]()
        for name in self.pieces(letter):
            n = name[1:]
            lines.append(f"{result} = {self.dot(f'{first}{n}', f'tl.trans({second}{n})', result if n else '')}")
        return lines

    def _add_products(self, sums: str, tile: str, second: str, letter: str) -> list[str]:
        """Add products of a transposed tile of scores to the sums of each piece of a head."""
        first, lines = f"tl.trans({tile}_narrow)", [f"{tile}_narrow = {self.narrow(tile)}"]
        for name in self.pieces(letter):
            n = name[1:]
            lines.append(f"{sums}{n} = {self.dot(first, f'{second}{n}', f'{sums}{n}')}")
        return lines

    def _weights(self) -> list[str]:
        """The lines that make weights `p` of the scores `s`; those of a row without keys are 0."""
        top, factor = f"tl.maximum(tl.max(s, 1), {LOWEST_F32!r})", self.factor
        return [
            f"top = {top}",
            f"p = tl.exp2((s - top[:, None]) * {factor!r})",
            "total = tl.sum(p, 1)",
            "p = p * (1 / tl.where(total == 0, 1, total))[:, None]",
        ]

    # ---- results -----------------------------------------------------------------------------------------------------

    def _outputs(self, gradient: int) -> Iterator[int]:
        """The indices of the region's outputs that are computed from a result of the call."""
        for index, output in enumerate(self.region.outputs):
            anchors = anchors_of(output)
            if not anchors:
                raise Unsupported("an output that does not depend on attention")
            if self.attn.results.index(anchors[0]) == gradient:
                yield index

    def _store_tile(self, gradient: int, position: Position, shape: Shape, text: str) -> None:
        for index in self._outputs(gradient):
            self.store(index, position, shape, Operand(text, frozenset(self.emitter.axes)))

    def _store_mask(self, looped: str) -> None:
        """The gradient of what is added to the scores."""
        self.tile("M", "N", looped)
        shape = (*map(from_dim, self.attn.lead), from_dim(self.attn.queries), self.attn.keys)
        self._store_tile(MASK, self.mask_at, shape, "ds")

    def _store_queries(self, looped: str) -> None:
        attn, lines = self.attn, self.emitter.scope.lines
        for name in self.pieces("D"):
            if not list(self._outputs(QUERY)):
                return
            lines.append(f"dq{name[1:]} = {self.dot('ds_narrow', f'K{name[1:]}')} * {attn.scale!r}")
            self.tile("M", name, looped)
            shape = (*map(from_dim, attn.lead), from_dim(attn.queries), self.sizes[name])
            self._store_tile(QUERY, (*self.lead, self.row, self._column(name)), shape, f"dq{name[1:]}")

    def _store_sums(self) -> None:
        """The gradients of keys and values, or what a range of queries adds to them."""
        attn, lines = self.attn, self.emitter.outer.lines
        for gradient, letter, sums in ((KEY, "D", "dk"), (VALUE, "E", "dv")):
            for name in self.pieces(letter):
                if gradient == KEY:
                    lines.append(f"dk{name[1:]} = dk{name[1:]} * {attn.scale!r}")
                self.tile("J", name)
                shape = (*map(from_dim, programs(attn)), attn.keys, self.sizes[name])
                position = (*self.program, variable("J", attn.keys), self._column(name))
                self._store_tile(gradient, position, shape, f"{sums}{name[1:]}")

    def _column(self, name: str) -> Index:
        return variable(name, self.sizes[name])
