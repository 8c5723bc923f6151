"""The gradients of `flex_attention`: kernels for queries, for keys and values, and for what a modification captures.

All compute the weights P of a tile again, from the scores and the statistic L that the forward saved, and go over
listed blocks alone: for a block of queries those of its keys, for a block of keys those of its queries (the backward of
FlashAttention-2, Dao 2023). With M for the modification of scores S, and D for the sums of dO * O over columns:

    P = exp(M(S) - L),  dV = P^T dO,  dP = dO V^T,  dS = M'(S, P * (dP - D)),  dQ = dS K * scale,  dK = dS^T Q * scale

Each score adds to an element of a captured tensor's gradient, in any order. What all scores of a row add to one
element, as of slopes by head, is summed in registers first, and what those of a column do in each tile.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Node, Value, dim_expr
from torch_rtx.lowering.kernels.attention import Attention, attention_of
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, precisions_of
from torch_rtx.lowering.kernels.attention_modified import Modified, Walk
from torch_rtx.lowering.kernels.attention_pieces import padded_width
from torch_rtx.lowering.kernels.attention_tiles import LOG2E, NEAR, Tiles, anchors_of, in_order
from torch_rtx.lowering.kernels.emit import Axes, Operand, indent
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO, Gather, Load, Position, Tensor, View
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import assemble, blocks
from torch_rtx.op_work import FLEX_GRAD_CAPTURED, FLEX_GRAD_KEY_VALUE, FLEX_GRAD_QUERY
from torch_rtx.targets import Arch

STEP = "step"  # the loop over tiles
MAX_REGISTERS = 232  # of a thread, for the tiles that are held at once


def gradient_configs(region: Region, arch: Arch) -> list[AttentionConfig]:
    """Configurations that fit `arch`, the fastest first: each tile with its best number of stages, then with others."""
    attn = attention_of(region)
    of_query = attn.op != FLEX_GRAD_KEY_VALUE
    tiles = [found for tile in _tiles(attn, of_query, arch) if (found := _stages(attn, tile, of_query, arch))]
    if not tiles:
        raise Unsupported(f"gradients of heads of {attn.width} elements on sm_{arch.sm}")
    return [*(best for best, *_ in tiles), *(other for _, *others in tiles for other in others)]


def _tiles(attn: Attention, of_query: bool, arch: Arch) -> list[AttentionConfig]:
    hopper, is_wide = "wgmma" in arch.features, max(attn.width, attn.value_width) > 64
    if attn.dtype == "f32":
        shapes = [(32, 32, 4), (16, 32, 4), (16, 16, 4)]
    elif is_wide:
        shapes = [(128, 64, 8), (64, 64, 8), (64, 64, 4), (64, 32, 4), (32, 32, 4)]
    elif hopper:
        shapes = [(64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8), (64, 32, 4), (32, 32, 4)]
    else:
        shapes = [(128, 64, 8), (64, 64, 4), (64, 128, 8), (128, 128, 8), (64, 32, 4), (32, 32, 4)]
    # The first number is that of what a program holds, the second that of what it goes over.
    ordered = [(held, other, warps) if of_query else (other, held, warps) for held, other, warps in shapes]
    # Several programs with narrow heads share a multiprocessor. They overlap with each other, and need its registers.
    found = [AttentionConfig(*shape, 1, overlaps=hopper and is_wide and not of_query) for shape in ordered]
    return [replace(config, input_precision=one) for one in precisions_of(attn, arch) for config in found]


def _stages(attn: Attention, tile: AttentionConfig, of_query: bool, arch: Arch) -> list[AttentionConfig]:
    """`tile` with each number of stages that fits, the best first.

    With two a load begins right before it is waited for. What hides it is another program on the multiprocessor, or
    where there is no room for one, a third stage.
    """
    counts: tuple[int, ...] = (1,)
    if "cp_async" in arch.features:
        shared = _shared(attn, replace(tile, num_stages=2), of_query, arch)
        room = min(arch.registers // (tile.num_warps * 32 * MAX_REGISTERS), arch.shared // shared)
        counts = (2, 3, 1) if room > 1 else (3, 2, 1)
    found = [replace(tile, num_stages=count) for count in counts]
    return [one for one in found if _fits(attn, one, of_query, arch)]


def _fits(attn: Attention, config: AttentionConfig, of_query: bool, arch: Arch) -> bool:
    modified = attn.modified
    if modified is None or (modified.lists and any(_sizes(modified, config))):
        return False
    held, other = (config.rows, config.keys) if of_query else (config.keys, config.rows)
    width, values = (padded_width(one, config.min_first) for one in (attn.width, attn.value_width))
    sums = held * (width if of_query else width + values) + 3 * held * other
    fits = sums // (32 * config.num_warps) <= MAX_REGISTERS
    return fits and _shared(attn, config, of_query, arch) <= arch.shared


def _shared(attn: Attention, config: AttentionConfig, of_query: bool, arch: Arch) -> int:
    """About the shared memory of a program, in bytes."""
    # Asynchronous products still read a tile while the load of the last one begins.
    buffers = config.num_stages if "wgmma" in arch.features else max(1, config.num_stages - 1)
    held, other = (config.rows, config.keys) if of_query else (config.keys, config.rows)
    width, values = (padded_width(one, config.min_first) for one in (attn.width, attn.value_width))
    elements = (held + buffers * other) * (width + values) + held * other
    return elements * DTYPES[attn.dtype].bytes


def _sizes(modified: Modified, config: AttentionConfig) -> tuple[int, int]:
    """What is left of blocks that tiles divide."""
    return modified.size[0] % config.rows, modified.size[1] % config.keys


def gradient_kernel(region: Region, name: str, config: AttentionConfig) -> Kernel:
    """The kernel that computes `region`.

    Raises:
        Unsupported: see `attention_of`; tiles that do not lie within blocks; or keys that batches share.
    """
    attn = attention_of(region)
    modified = attn.modified
    if modified is None or (modified.lists and any(_sizes(modified, config))):
        raise Unsupported("blocks that the tile does not divide")
    writer = WRITERS[attn.op](region, attn, config)
    count, groups = writer.count, attn.groups if attn.op == FLEX_GRAD_KEY_VALUE else attn.lead
    programs, options = dim_expr("*", count, *groups), (config.num_warps, config.num_stages, writer.functions)
    return assemble(region, name, writer.write(), programs, *options)


class _Writer(Tiles):
    """What the two kernels share.

    Attributes:
        modified: of the scores.
        count: the blocks of what programs hold.
        of_keys: the axis of keys in a tile of scores.
    """

    of_keys = "N"
    near: int | None = NEAR

    def __init__(self, region: Region, attn: Attention, config: AttentionConfig) -> None:
        super().__init__(region, attn, config)
        assert attn.modified is not None
        assert isinstance(region.anchor, Node)
        self.modified: Modified = attn.modified
        self.logsumexp, self.delta = (self._saved(region, name) for name in ("logsumexp", "delta"))
        self.scale_first = attn.modified.score is not None
        self.factor = LOG2E if self.scale_first else attn.scale * LOG2E
        self.count = blocks(attn.queries, config.rows)

    @staticmethod
    def _saved(region: Region, name: str) -> Tensor:
        assert region.anchor is not None
        value = region.anchor.arg(name)
        assert isinstance(value, Value)
        return region.values[value.name]

    def begin(self, groups: Position, last_first: bool) -> list[str]:
        """The lines that find what a program holds, from `first` on."""
        sizes = tuple(map(from_dim, self.attn.lead if len(groups) == 0 else self.attn.groups))
        block, group = in_order(from_dim(self.count), sizes, self.near)
        block = from_dim(self.count) - ONE - block if last_first else block
        place = unravel(group, sizes)
        lines = [f"program = tl.program_id(0){self.cast}"]
        size = self.config.rows if last_first else self.config.keys
        lines.append(f"first = {block * constant(size)}")
        return lines + [f"{axis} = {at}" for axis, at in zip(self.group, place, strict=True) if axis != ZERO]

    def products(self, result: str, first: str, second: str, letter: str) -> None:
        """The sum over all pieces of a head of products with the second operand transposed."""
        for name in self.pieces(letter):
            n = name[1:]
            self._line(f"{result} = {self.dot(f'{first}{n}', f'tl.trans({second}{n})', result if n else '')}")

    def add_products(self, sums: str, tile: str, second: str, letter: str) -> None:
        """Add products of a tile of scores to the sums of each piece of a head."""
        self._line(f"{tile}_narrow = {self.narrow(tile)}")
        for name in self.pieces(letter):
            n = name[1:]
            self._line(f"{sums}{n} = {self.dot(f'{tile}_narrow', f'{second}{n}', f'{sums}{n}')}")

    def load(self, tensor: Tensor, short: str, rows: str, letter: str, lead: Position, row: Index, loop: str) -> None:
        """Tiles of an operand under a name, one for each piece of a head."""
        for name in self.pieces(letter):
            self.tile(rows, name, loop)
            self._line(f"{short}{name[1:]} = {self.operand(tensor, rows, name, lead, row)}")

    def shift(self, axes: tuple[str, str]) -> None:
        """The line that loads `shift`, what is subtracted from the exponents of weights."""
        self.tile(*axes, STEP)
        shift = self.emitter.value(self.logsumexp, self.mask_at[:-1]).text
        if self.modified.score is not None:
            # A query whose scores all are minus infinity has that for a statistic, and weights of 0. Those of one that
            # sees no key become 0 by the mask.
            shift = f'tl.where({shift} == float("-inf"), 0, {shift})'
        self._line(f"shift = {shift}")

    def weights(self, axes: tuple[str, str]) -> None:
        """The lines that make weights `p` of the products `s`."""
        attn, modified = self.attn, self.modified
        self.tile(*axes, STEP)
        scaled = self.emitter.assign(f"s * {attn.scale!r}", frozenset((*axes, STEP)))
        self.emitter.anchored[modified.leaf, self.mask_at] = scaled
        score = "s" if modified.score is None else self.full(modified.score)
        self._line(f"p = tl.exp2({score} * {self.factor!r} - shift)")
        self.seen = self._seen()
        if self.seen:
            self._line(f"p = tl.where({self.seen}, p, 0.0)")

    def _seen(self) -> str:
        found = [f"in_{name.lower()}" for name in ("M", self.of_keys) if not self.is_full(name)]
        if self.mask is not None:
            found.append(self.full(self.mask))
        return " & ".join(found)

    def of_modified(self, axes: Axes) -> Operand:
        """The gradient of the modified scores."""
        delta = self.emitter.value(self.delta, self.mask_at[:-1]).text
        return self.emitter.assign(f"p * (dp - {delta})", axes)

    def gradient(self, axes: tuple[str, str]) -> None:
        """The lines that make the gradient `ds` of the scaled scores of the weights and their gradient `dp`."""
        self.tile(*axes, STEP)
        of_modified = self.of_modified(frozenset((*axes, STEP)))
        if self.modified.gradient is None:
            self._line(f"ds = {of_modified.text}")
            return
        self.emitter.anchored[self.modified.upstream, self.mask_at] = of_modified
        found = self.full(self.modified.gradient)
        self._line(f"ds = tl.where({self.seen}, {found}, 0.0)" if self.seen else f"ds = {found}")

    def walk(self, lead: Position, part: Index, held: int, tile: int, every: Index) -> list[str]:
        """The loops over all tiles, from `start` on each.

        Args:
            part: the block that a program is in.
            held, tile: the size of blocks that are gone over, and that of a tile.
        """
        lines = list[str]()
        if not self.modified.lists:
            return [f"for start in range(0, {every}, {tile}):", *indent(self.step())]
        for lists in self.modified.lists:
            lines += Walk(lists, lead, part, held, tile, every).lines(self.step())
            self.mask = None
        self.mask = self.attn.mask
        return lines

    def step(self) -> list[str]:
        """The lines of a tile, from `start` on."""
        raise NotImplementedError

    def write(self) -> list[str]:
        """All lines of the kernel."""
        raise NotImplementedError

    def _line(self, text: str) -> None:
        self.emitter.scope.lines.append(text)

    def results(self, which: int, position: Position, letter: str, row: str, text: str) -> None:
        """Store what is the result `which` of the call, a tile for each piece of a head."""
        attn, lines = self.attn, self.emitter.outer.lines
        for name in self.pieces(letter):
            if "d" in text and letter == "D":
                lines.append(f"{text}{name[1:]} = {text}{name[1:]} * {attn.scale!r}")
            self.tile(row, name)
            for index, output in enumerate(self.region.outputs):
                anchors = anchors_of(output)
                if not anchors:
                    raise Unsupported("an output that does not depend on attention")
                if attn.results.index(anchors[0]) == which:
                    made = Operand(f"{text}{name[1:]}", frozenset(self.emitter.axes))
                    shape = (*anchors[0].shape[:-1], self.sizes[name])
                    self.store(index, (*position, variable(name, self.sizes[name])), shape, made)


class _QueryWriter(_Writer):
    """The gradient of queries: a program has a block of these, and goes over keys."""

    def write(self) -> list[str]:
        """All lines of the kernel."""
        attn, config, lines = self.attn, self.config, self.emitter.outer.lines
        assert attn.gradient is not None
        lines += self.begin((), last_first=True)
        lines += self.range("M", "[:, None]", "first")
        for name, start in self.starts.items():
            lines += self.range(name, "[None, :]", str(start or ""))
        for tensor, letter, short in ((attn.query, "D", "Q"), (attn.gradient, "E", "G")):
            self.load(tensor, short, "M", letter, self.lead, self.row, "")
        self.zero()
        if self.modified.lists:
            lines.append(f"part = first // {self.modified.size[0]}")
        lines += self.walk(self.lead[:2], variable("part"), self.modified.size[1], config.keys, attn.keys)
        self.finish()
        return lines

    def step(self) -> list[str]:
        """The lines of a block of keys."""
        attn, key = self.attn, variable("J", self.attn.keys)
        self.emitter.step(STEP, ("N", "J", "start", "in_n", "in_j"))
        lines = self.emitter.scope.lines
        lines += [*self.range("N", "[None, :]", "start"), *self.range("J", "[:, None]", "start")]
        self.load(attn.key, "K", "J", "D", self.lead, key, STEP)
        self.products("s", "Q", "K", "D")
        self.shift(("M", "N"))
        self.weights(("M", "N"))
        self.load(attn.value, "V", "J", "E", self.lead, key, STEP)
        self.products("dp", "G", "V", "E")
        self.add()
        return self.emitter.inner()

    def add(self) -> None:
        """Add what a block of keys contributes."""
        self.gradient(("M", "N"))
        self.add_products("dq", "ds", "K", "D")

    def zero(self) -> None:
        """The lines that begin the sums."""
        for name in self.pieces("D"):
            self._line(f"dq{name[1:]} = tl.zeros([{self.config.rows}, {self.blocks[name]}], tl.float32)")

    def finish(self) -> None:
        """The lines that store the sums."""
        self.results(0, (*self.lead, self.row), "D", "M", "dq")


class _CapturedWriter(_QueryWriter):
    """The gradients of what a modification captures.

    Attributes:
        rows: by the name of a sum over whole rows, where it is added to memory.
    """

    def __init__(self, region: Region, attn: Attention, config: AttentionConfig) -> None:
        super().__init__(region, attn, config)
        self.rows: dict[str, tuple[Index, Axes, list[Operand]]] = {}

    def zero(self) -> None:
        """Sums begin where it is known which there are."""

    def add(self) -> None:
        """Add what a block of keys contributes."""
        self.tile("M", "N", STEP)
        emitter, both = self.emitter, frozenset(("M", "N", STEP))
        emitter.anchored[self.modified.upstream, self.mask_at] = self.of_modified(both)
        for index, term in enumerate(self.modified.captured):
            at, safe = self._element(term.target)
            source = term.target.source
            assert isinstance(source, Load)
            address = linear(at, source.strides) + constant(term.offset)
            axes = emitter.varies(address).union(*(one.axes for one in safe))
            number = self.full(term.number)
            value = f"tl.where({self.seen}, {number}, 0.0)" if self.seen else number
            value = value if "N" in axes else f"tl.sum({value}, 1)[:, None]"
            value = value if "M" in axes else f"tl.sum({value}, 0)[None, :]"
            if "N" not in axes:
                name = f"sum{index}"
                if name not in self.rows:
                    emitter.outer.lines.append(f"{name} = tl.zeros({emitter.shape(axes)}, tl.float32)")
                self.rows[name] = address, axes, safe
                self._line(f"{name} += {value}")
                continue
            seen = [Operand(self.seen, both)] if self.seen and both <= axes else []
            lines = emitter.add("out0", address, Operand(value, axes), (*safe, *seen))
            computed = isinstance(term.target, Gather) and both <= axes
            for line in self._to_one_place(address, value, [*safe, *seen], lines) if computed else lines:
                self._line(line)

    def _to_one_place(self, address: Index, value: str, conditions: list[Operand], otherwise: list[str]) -> list[str]:
        """The lines that add a whole tile at once where its places are all the same, as those of keys that are farther
        away than a table reaches: many additions to one place wait for each other."""
        inside = " & ".join(one.text for one in conditions)
        tile = self.emitter.shape(frozenset(("M", "N")))
        kind = "tl.int64" if self.cast else "tl.int32"
        return [
            f"place = {address} + tl.zeros({tile}, {kind})",
            f"lowest = tl.min(tl.where({inside}, place, {2**31 - 1}))",
            f"highest = tl.max(tl.where({inside}, place, -1))",
            "if lowest == highest:",
            f'    tl.atomic_add(out0 + lowest, tl.sum(tl.where({inside}, {value}, 0.0)), sem="relaxed")',
            "elif highest >= 0:",
            *indent(otherwise),
        ]

    def _element(self, target: View | Gather) -> tuple[Position, list[Operand]]:
        """The place that scores add to, and the conditions that there is one."""
        return (target.at(self.mask_at), []) if isinstance(target, View) else self.emitter.chosen(target, self.mask_at)

    def finish(self) -> None:
        """The lines that add sums over rows to memory."""
        self.tile("M", "N")
        for name, (address, axes, safe) in self.rows.items():
            value = Operand(name if axes else f"tl.sum({name})", axes)
            self.emitter.outer.lines += self.emitter.add("out0", address, value, safe)


class _KeyWriter(_Writer):
    """The gradients of keys and values: a program has a block of these, and goes over the queries of all heads that
    share them. A tile of scores has keys as rows."""

    of_keys = "J"

    def __init__(self, region: Region, attn: Attention, config: AttentionConfig) -> None:
        super().__init__(region, attn, config)
        if any(isinstance(one, Tensor) and one.shape[:2] != attn.key.shape[:2] for one in attn.results):
            raise Unsupported("gradients of keys that batches share")
        key = region.anchor.arg("key") if region.anchor is not None else None
        assert isinstance(key, Value)
        if region.values[key.name].shape[:2] != attn.key.shape[:2]:
            raise Unsupported("gradients of keys that batches share")
        keys = key.type.shape[-2]  # type: ignore[union-attr]
        self.count = blocks(keys, config.keys)
        self.sizes |= {"M": from_dim(attn.queries), "R": from_dim(attn.queries)}
        self.blocks["R"] = config.rows
        # The head of a query is one of those that share keys.
        member = self.group[-1] * constant(attn.packed)
        self.lead = (
            *self.group[:-1],
            member + variable("member", constant(attn.packed)) if attn.packed > 1 else member,
        )
        self.row = variable("M", from_dim(attn.queries))
        self.mask_at = (*self.lead, self.row, variable("J", attn.keys))

    def write(self) -> list[str]:
        """All lines of the kernel."""
        attn, config, lines = self.attn, self.config, self.emitter.outer.lines
        lines += self.begin(self.group, last_first=False)
        lines += self.range("J", "[:, None]", "first")
        for name, start in self.starts.items():
            lines += self.range(name, "[None, :]", str(start or ""))
        key = variable("J", attn.keys)
        for tensor, letter, short, sums in ((attn.key, "D", "K", "dk"), (attn.value, "E", "V", "dv")):
            self.load(tensor, short, "J", letter, self.group, key, "")
            for name in self.pieces(letter):
                lines.append(f"{sums}{name[1:]} = tl.zeros([{config.keys}, {self.blocks[name]}], tl.float32)")
        if self.modified.lists:
            lines.append(f"part = first // {self.modified.size[1]}")
        walk = self.walk(self.lead, variable("part"), self.modified.size[0], config.rows, from_dim(attn.queries))
        lines += walk if attn.packed == 1 else [f"for member in range(0, {attn.packed}):", *indent(walk)]
        self.results(0, (*self.group, key), "D", "J", "dk")
        self.results(1, (*self.group, key), "E", "J", "dv")
        return lines

    def step(self) -> list[str]:
        """The lines of a block of queries."""
        attn, row = self.attn, variable("R", from_dim(self.attn.queries))
        assert attn.gradient is not None
        self.emitter.step(STEP, ("M", "R", "member", "start", "in_m", "in_r"))
        lines = self.emitter.scope.lines
        lines += [*self.range("M", "[None, :]", "start"), *self.range("R", "[:, None]", "start")]
        self.load(attn.query, "Q", "R", "D", self.lead, row, STEP)
        self.products("s", "K", "Q", "D")
        self.shift(("J", "M"))
        if self.config.overlaps:  # weights are computed while `dp` is, and `ds` while `dv` is
            self.load(attn.gradient, "G", "R", "E", self.lead, row, STEP)
            self.products("dp", "V", "G", "E")
            self.weights(("J", "M"))
            self.add_products("dv", "p", "G", "E")
        else:
            self.weights(("J", "M"))
            self.load(attn.gradient, "G", "R", "E", self.lead, row, STEP)
            self.add_products("dv", "p", "G", "E")
            self.products("dp", "V", "G", "E")
        self.gradient(("J", "M"))
        self.add_products("dk", "ds", "Q", "D")
        return self.emitter.inner()


WRITERS: dict[str, type[_Writer]] = {
    FLEX_GRAD_QUERY: _QueryWriter,
    FLEX_GRAD_KEY_VALUE: _KeyWriter,
    FLEX_GRAD_CAPTURED: _CapturedWriter,
}
