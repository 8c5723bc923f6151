"""Attention kernels: softmax(q k^T * scale + mask) v in one pass over the keys; the scores never reach memory.

A program has a block of query rows (M) and loops over blocks of keys with a running maximum and sum per row (online
softmax, Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023). Keys are the rows of the K and V tiles (J) and the
columns of the scores (N). D and E are the columns of Q and K, and of V; D1 and E1 those of a second piece of the head
(see `attention_pieces`). Operands and masks are kernel IR: views are address arithmetic, and a mask may be computed.

With few queries per head (decoding), the rows of heads that share keys and values are packed into one block, so that K
and V are read once per group instead of once per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations

from torch_rtx import dtypes
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Node, Sym, TensorType, Value, dim_expr
from torch_rtx.lowering.kernels.attention_pieces import head_pieces, padded_width
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand, Scope, indent
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, linear, product, ravel, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Load,
    Position,
    Shape,
    Tensor,
    View,
    children,
    everything,
    expand,
)
from torch_rtx.lowering.kernels.matmul_template import operand, stored_load
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import assemble, block_of, blocks, needs_int64
from torch_rtx.lowering.kernels.triton_ops import tl_dtype
from torch_rtx.op_work import ANCHORS, ATTENTION
from torch_rtx.targets import Arch

DTYPES = ("f16", "bf16", "f32")
MAX_WIDTH = 256  # of a head
MAX_PACKED_ROWS = 64  # of a block with several heads
TARGET_PROGRAMS = 128  # about the multiprocessors of a large GPU
RESIDENT_PROGRAMS = 3  # per multiprocessor with wgmma and narrow heads: the softmax of one overlaps products of others
LOWEST_F32 = -3.4028234663852886e38  # the initial maximum: finite, so that the weights of rows without keys are 0
UNKNOWN_SIZE = 4096  # stands for a symbolic size
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class AttentionConfig:
    """The tile of scores, [rows, keys], and Triton's options.

    Attributes:
        min_first: fewest columns of the first of two pieces of a head, see `head_pieces`.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    min_first: int = 64


@dataclass(frozen=True)
class Attention:
    """The region's call of attention, with all operands expanded to the same leading dimensions (batch, heads).

    Attributes:
        bias: what is added to the scaled scores before the mask.
        causal: a query sees the keys up to its own position.
        fill: the score of a key that a boolean mask hides; None: its weight is 0.
        safe: a query that sees no key gets 0, else NaN.
        lead, queries: sizes of the result, [*lead, queries, value_width].
        packed: heads of the last leading dimension that share a block of rows.
        results: of the call. Of `attention_partial`: the weighted sums of values, the largest scores and the sums of
            weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    scale: float
    fill: float | None
    safe: bool
    lead: tuple[Dim, ...]
    queries: Dim
    packed: int
    results: tuple[Tensor, ...]

    @property
    def partial(self) -> bool:
        """The keys are a range of all keys; see `split_kv`."""
        return len(self.results) > 1

    @property
    def dtype(self) -> str:
        """The dtype of the operands."""
        return self.query.dtype

    @property
    def keys(self) -> Index:
        """The number of keys."""
        return self.key.shape[-2]

    @property
    def rows(self) -> Dim:
        """The query rows of a group: of all heads that are packed."""
        return dim_expr("*", self.queries, self.packed)

    @property
    def groups(self) -> tuple[Dim, ...]:
        """The leading dimensions, with packed heads as one."""
        return (*self.lead[:-1], dim_expr("//", self.lead[-1], self.packed)) if self.lead else ()

    @property
    def width(self) -> int:
        """Elements of a query and of a key."""
        return _static(self.query.shape[-1])

    @property
    def value_width(self) -> int:
        """Elements of a value."""
        return _static(self.value.shape[-1])

    def group(self) -> Position:
        """The leading position of a program, as variables."""
        sizes = map(from_dim, self.groups)
        return tuple(ZERO if size == ONE else variable(f"Z{axis}", size) for axis, size in enumerate(sizes))

    def place(self, group: Position, row: Index) -> tuple[Position, Index]:
        """The leading position and the query of a row."""
        queries = from_dim(self.queries)
        if self.packed == 1:
            return group, row % queries
        return (*group[:-1], group[-1] * constant(self.packed) + row // queries), row % queries


def attention_of(region: Region) -> Attention:
    """The attention of a region.

    Raises:
        Unsupported: dropout, a symbolic or too large head dimension, or a dtype that tensor cores do not multiply.
    """
    node = region.anchor
    if node is None or ANCHORS[node.op] != "attention":
        raise Unsupported("a region without attention")
    result = node.outputs[0]
    if node.arg("dropout_p", 0.0) != 0.0:
        raise Unsupported("attention with dropout", loc=node.loc)
    query, key, value = (_operand(region, node, name) for name in ("query", "key", "value"))
    if {query.dtype, key.dtype, value.dtype} - set(DTYPES) or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise Unsupported(f"attention in {query.dtype}", loc=node.loc)
    if result is None or not isinstance(result.type, TensorType) or min(len(t.shape) for t in (query, key, value)) < 2:
        raise Unsupported("attention without queries or keys", loc=node.loc)
    for width in (query.shape[-1], value.shape[-1]):
        if not 0 < _static(width) <= MAX_WIDTH:
            raise Unsupported(f"attention with heads of {width} elements", loc=node.loc)
    *lead, queries, _ = result.type.shape
    heads: Shape = tuple(map(from_dim, lead))
    if node.arg("enable_gqa"):
        key, value = (_repeated(tensor, heads[-1]) for tensor in (key, value))
    scale = node.arg("scale")
    scores = (*heads, from_dim(queries), key.shape[-2])
    mask, bias = (
        expand(_operand(region, node, name), scores) if node.arg(name) is not None else None
        for name in ("attn_mask", "bias")
    )
    fill = node.arg("fill")
    for added in (one for one in (mask, bias) if one is not None):
        if added.dtype not in (*DTYPES, *(["bool"] if added is mask else [])):
            raise Unsupported(f"a mask of dtype {added.dtype}", loc=node.loc)
    attn = Attention(
        expand(query, (*heads, *query.shape[-2:])),
        expand(key, (*heads, *key.shape[-2:])),
        expand(value, (*heads, *value.shape[-2:])),
        mask,
        bias,
        bool(node.arg("is_causal")),
        float(scale) if isinstance(scale, int | float) else 1 / math.sqrt(_static(query.shape[-1])),
        float(fill) if isinstance(fill, int | float) and math.isfinite(fill) else None,
        node.op != ATTENTION,
        tuple(lead),
        queries,
        packed=1,
        results=tuple(region.values[value.name] for value in node.outputs if value is not None),
    )
    return _packed(attn)


def _static(size: Index) -> int:
    if size.number is None:
        raise Unsupported("attention with heads of an open size")
    return size.number


def _operand(region: Region, node: Node, name: str) -> Tensor:
    value = node.arg(name)
    assert isinstance(value, Value)
    return region.values[value.name]


def _repeated(tensor: Tensor, heads: Index) -> Tensor:
    """`tensor` with each head repeated for the query heads that share it."""
    times = constant(_static(heads) // _static(tensor.shape[-3]))

    def at(position: Position) -> Position:
        return (*position[:-3], position[-3] // times, *position[-2:])

    return View((*tensor.shape[:-3], heads, *tensor.shape[-2:]), tensor.dtype, tensor, at)


def _packed(attn: Attention) -> Attention:
    """`attn` with as many heads per block of rows as share keys and values and fit."""
    heads = attn.lead[-1] if attn.lead else 1
    if not isinstance(attn.queries, int) or not isinstance(heads, int) or not attn.queries:
        return attn
    for count in range(min(heads, MAX_PACKED_ROWS // attn.queries), 1, -1):
        packed = replace(attn, packed=count)
        if heads % count == 0 and not any(_varies(packed, tensor) for tensor in (attn.key, attn.value)):
            return packed
    return attn


def _varies(attn: Attention, tensor: Tensor) -> bool:
    """The packed rows read different elements of `tensor`."""
    lead, _ = attn.place(attn.group(), variable("M", from_dim(attn.rows)))
    return _depends_on_row(tensor, (*lead, variable("J", tensor.shape[-2]), variable("D", tensor.shape[-1])))


def _depends_on_row(tensor: Tensor, position: Position) -> bool:
    """The element of `tensor` at `position` depends on the row M."""
    return bool(Emitter([Axis("M", 1)]).value(tensor, position).axes)


# ---- configurations --------------------------------------------------------------------------------------------------


def attention_configs(region: Region, arch: Arch) -> list[AttentionConfig]:
    """Configurations that fit `arch`, the fastest first.

    Blocks have as many rows as registers allow for accumulators, fewer if multiprocessors would be idle. SM versions
    without wgmma share one list, and so one binary. They also divide heads of 33 to 48 elements into two pieces, which
    is faster there alone.
    """
    attn, hopper = attention_of(region), "wgmma" in arch.features
    min_first = 64 if hopper else 32
    width = max(padded_width(attn.width, min_first), padded_width(attn.value_width, min_first))
    configs = [
        config
        for rows, keys, warps in _shapes(width, attn.dtype, arch)
        for stages in ((3, 2, 1) if "cp_async" in arch.features else (1,))
        if _shared(attn, config := AttentionConfig(rows, keys, warps, stages, min_first)) <= arch.shared
    ]
    if not configs:
        raise Unsupported(f"attention with heads of {width} elements on sm_{arch.sm}")
    wide = width > 64
    # Full warpgroups win with far fewer programs than multiprocessors.
    wanted = TARGET_PROGRAMS if not hopper else TARGET_PROGRAMS // 2 if wide else TARGET_PROGRAMS // 8

    def order(config: AttentionConfig) -> tuple[bool, int, bool, int]:
        # A single stage does not overlap loads and products: a smaller tile is better.
        is_crowded = hopper and not wide and RESIDENT_PROGRAMS * _shared(attn, config) > arch.shared
        stages = -config.num_stages if hopper and wide else 0
        return config.num_stages == 1, _penalty(attn, config, wanted), is_crowded, stages

    return sorted(configs, key=order)


def _shapes(width: int, dtype: str, arch: Arch) -> list[tuple[int, int, int]]:
    """(rows, keys, warps) of tiles for heads of this padded width, the fastest first for many rows.

    With wgmma four warps multiply 64 rows. Without, a warp has 32 rows of narrow heads: with 16 its tensor cores would
    wait for K and V in shared memory. Wider heads have fewer rows and keys per tile, for registers and shared memory.
    """
    hopper = "wgmma" in arch.features
    if dtype == "f32":
        # Full-precision products run as FMAs with both operands in registers.
        return [(32, 32, 4), (16, 32, 4), (16, 16, 4)]
    few = [(32, 64, 4), (16, 128, 4), (16, 64, 4), (16, 32, 4)]
    if width <= 64:
        many = [(64, 64, 4), (64, 128, 4), (128, 64, 8)] if hopper else [(128, 32, 4), (128, 64, 4), (64, 64, 4)]
    elif not hopper:
        many = [(128, 64, 8) if width <= 128 else (64, 32, 8), (64, 32, 4)]
    elif width == 128:
        many = [(64, 64, 4), (128, 64, 8), (128, 128, 8)]
    elif width == MAX_WIDTH:
        many = [(64, 64, 4), (64, 32, 4), (128, 64, 8)]
    else:  # in two pieces
        many = [(128, 64, 8), (64, 64, 4), (64, 32, 4)]
    return many + few


def _shared(attn: Attention, config: AttentionConfig) -> int:
    """An upper bound of shared memory per program, in bytes."""
    size = dtypes.DTYPES[attn.dtype].bytes
    width, value_width = (padded_width(one, config.min_first) for one in (attn.width, attn.value_width))
    return size * (config.num_stages * config.keys * (width + value_width) + config.rows * max(width, value_width))


def _penalty(attn: Attention, config: AttentionConfig, wanted: int) -> int:
    """0 if the grid has `wanted` programs and no tile is mostly padding; +1 for each halving of either."""
    rows = _most(attn.rows)
    programs = math.ceil(rows / config.rows) * math.prod(map(_most, attn.groups))
    idle = max(0, math.ceil(math.log2(wanted / max(programs, 1)))) if config.rows > 16 else 0
    keys = UNKNOWN_SIZE if attn.keys.number is None else attn.keys.number
    unused = max(config.rows // block_of(rows), config.keys // block_of(keys))
    return max(idle, math.ceil(math.log2(max(unused, 1))))


def _most(dim: Dim) -> int:
    """A size; of a symbolic one its maximum, or UNKNOWN_SIZE."""
    if isinstance(dim, int):
        return dim
    return dim.max if isinstance(dim, Sym) and dim.max is not None else UNKNOWN_SIZE


# ---- the kernel ------------------------------------------------------------------------------------------------------


def attention_kernel(region: Region, name: str, config: AttentionConfig) -> Kernel:
    """The kernel that computes `region`.

    Raises:
        Unsupported: see `attention_of`; or an output that is not a permutation of the result with pointwise operations.
    """
    attn = attention_of(region)
    lines = _Writer(region, attn, config).write()
    programs = dim_expr("*", blocks(attn.rows, config.rows), *attn.groups)
    return assemble(region, name, lines, programs, config.num_warps, config.num_stages)


class _Writer:
    """The lines of one attention kernel."""

    def __init__(self, region: Region, attn: Attention, config: AttentionConfig) -> None:
        self.region, self.attn, self.config = region, attn, config
        self.cast = ".to(tl.int64)" if needs_int64(region) else ""
        self.emitter = Emitter([])
        self.group = attn.group()
        self.lead, self.row = attn.place(self.group, variable("M", from_dim(attn.rows)))
        sizes = {"M": from_dim(attn.rows), "N": attn.keys, "J": attn.keys}
        cut = {"M": config.rows, "N": config.keys, "J": config.keys}
        self.starts: dict[str, int] = {}  # first column of each piece of a head
        for letter, width in (("D", attn.width), ("E", attn.value_width)):
            for name, (start, block) in zip((letter, f"{letter}1"), head_pieces(width, config.min_first), strict=False):
                sizes[name], cut[name], self.starts[name] = constant(width), block, start
        self.sizes, self.blocks = sizes, cut
        # The scale is folded into the base of the exponential, unless scaled scores are needed, as for an added mask.
        self.has_additive_mask = attn.mask is not None and attn.mask.dtype != "bool"
        self.scale_first = (
            self.has_additive_mask or attn.bias is not None or attn.fill is not None or attn.scale <= 0 or attn.partial
        )
        self.factor = LOG2E if self.scale_first else attn.scale * LOG2E
        # A mask that all rows share takes few registers, so that it can be loaded early.
        self.mask_at = (*self.lead, self.row, variable("N", attn.keys))
        self.mask_is_per_key = attn.mask is not None and not _depends_on_row(attn.mask, self.mask_at)

    # ---- tiles -------------------------------------------------------------------------------------------------------

    def _pieces(self, letter: str) -> list[str]:
        """The axes of the columns of Q and K, "D", or of V, "E"."""
        return [name for name in self.starts if name[0] == letter]

    def _is_full(self, name: str) -> bool:
        """The size along `name` is a multiple of the block: no mask is needed."""
        size, block = self.sizes[name].number, self.blocks[name]
        if name in self.starts:
            return size is not None and self.starts[name] + block <= size
        return size is not None and size % block == 0

    def _axis(self, name: str, masked: bool) -> Axis:
        return Axis(name, self.blocks[name], f"in_{name.lower()}" if masked and not self._is_full(name) else "")

    def _tile(self, rows: str, columns: str, looped: str = "", masked: bool = True) -> None:
        """Point the emitter at a [rows, columns] tile. `masked=False`: key blocks are known to be full."""
        keys = ("N", "J")
        axes = [self._axis(name, masked or name not in keys) for name in (rows, columns)]
        self.emitter.axes, self.emitter.looped = {axis.name: axis for axis in axes}, looped

    def _range(self, name: str, side: str, start: str = "", masked: bool = True) -> list[str]:
        block, size = self.blocks[name], self.sizes[name]
        lines = [f"{name} = {f'{start} + ' if start else ''}tl.arange(0, {block}){self.cast}{side}"]
        return lines + ([f"in_{name.lower()} = {name} < {size}"] if masked and not self._is_full(name) else [])

    def _operand(self, tensor: Tensor, rows: str, columns: str, lead: Position, row: Index) -> str:
        """A [rows, columns] tile of an operand of `tl.dot`, 0 out of bounds."""
        emitter, position = self.emitter, (*lead, row, variable(columns, tensor.shape[-1]))
        if not _is_plain(tensor) and stored_load(tensor) is not None:
            return operand(emitter, tensor, position, self.attn.dtype)
        value = emitter.value(tensor, position)
        axes = frozenset((rows, columns))
        masks = [axis.mask for axis in emitter.axes.values() if axis.mask]
        if masks and not _is_plain(tensor):
            value = Operand(f"tl.where({' & '.join(masks)}, {value.text}, 0.0)", axes)
        text = f"{value.text}.to({tl_dtype(self.attn.dtype)})"
        return text if value.axes == axes else f"tl.broadcast_to({text}, {emitter.shape(axes)})"

    # ---- programs ----------------------------------------------------------------------------------------------------

    def write(self) -> list[str]:
        """All lines of the kernel."""
        attn, config, emitter = self.attn, self.config, self.emitter
        lines = emitter.outer.lines
        count, groups = from_dim(blocks(attn.rows, config.rows)), tuple(map(from_dim, attn.groups))
        program = variable("program", product((count, *groups)))
        if attn.causal:
            # Blocks of rows that see the most keys start first, so that the tail of the grid is short.
            block, group = count - ONE - program // product(groups), program % product(groups)
        else:
            block, group = program % count, program // count
        lines.append(f"program = tl.program_id(0){self.cast}")
        lines.append(f"first = {block * constant(config.rows)}")
        place = unravel(group, groups)
        lines += [f"{axis} = {at}" for axis, at in zip(self.group, place, strict=True) if axis != ZERO]
        lines += self._range("M", "[:, None]", "first")
        for name, start in self.starts.items():
            lines += self._range(name, "[None, :]", str(start or ""))
        for name in self._pieces("D"):
            self._tile("M", name)
            lines.append(f"Q{name[1:]} = {self._operand(attn.query, 'M', name, self.lead, self.row)}")
        lines.append(f"top = tl.full([{config.rows}], {LOWEST_F32!r}, tl.float32)")
        lines.append(f"total = tl.zeros([{config.rows}], tl.float32)")
        sums = [f"acc{name[1:]}" for name in self._pieces("E")]
        for name, total in zip(self._pieces("E"), sums, strict=True):
            lines.append(f"{total} = tl.zeros([{config.rows}, {self.blocks[name]}], tl.float32)")
        self._walk()
        if not attn.partial:
            weights = "tl.where(total == 0, 1, total)" if attn.safe else "total"
            lines += [f"{total} = {total} / {weights}[:, None]" for total in sums]
        self._store()
        return lines

    def _walk(self) -> None:
        """Loop over blocks of keys: first those that are full and visible to every row, then the others."""
        block, keys, lines = self.config.keys, self.attn.keys, self.emitter.outer.lines
        if not self.attn.causal:
            full = keys // constant(block) * constant(block)
            if full != ZERO:
                self._loop("0", str(full))
            if full != keys:  # of a symbolic number of keys the last block may be fully masked
                lines.append(f"start = {full}")
                lines += self._block(masked=True)
            return
        packed = self.attn.packed > 1
        first, last = ("0", str(from_dim(self.attn.queries))) if packed else ("first", f"first + {self.config.rows}")
        if not packed:
            lines.append(f"whole = tl.minimum({first} + 1, {keys}) // {block} * {block}")
            self._loop("0", "whole")
        lines.append(f"end = tl.minimum({last}, {keys})")
        self._loop("0" if packed else "whole", "end", diagonal=True)

    def _loop(self, begin: str, end: str, diagonal: bool = False) -> None:
        body = self._block(masked=diagonal, diagonal=diagonal)
        self.emitter.outer.lines += [f"for start in range({begin}, {end}, {self.config.keys}):", *indent(body)]

    def _block(self, masked: bool, diagonal: bool = False) -> list[str]:
        """The lines of one block of keys, from `start`; what does not vary with keys is emitted before it."""
        emitter, attn = self.emitter, self.attn
        emitter.scope = scope = Scope()
        scope.lines += self._range("N", "[None, :]", "start", masked)
        scope.lines += self._range("J", "[:, None]", "start", masked)
        if attn.mask is not None and self.mask_is_per_key:  # loaded before the product, to overlap with it
            self._tile("M", "N", "N", masked)
            self._mask(attn.mask)
        key = variable("J", attn.keys)
        for name in self._pieces("D"):
            self._tile("J", name, "J", masked)
            k = self._operand(attn.key, "J", name, self.lead, key)
            before = ", s" if name != "D" else ""
            scope.lines.append(f"s = tl.dot(Q{name[1:]}, tl.trans({k}){before}{self._precision()})")
        self._tile("M", "N", "N", masked)
        self._scores(scope, masked, diagonal)
        for name in self._pieces("E"):
            self._tile("J", name, "J", masked)
            v = self._operand(attn.value, "J", name, self.lead, key)
            weights, acc = f"p.to({tl_dtype(attn.dtype)})", f"acc{name[1:]}"
            scope.lines.append(f"{acc} = tl.dot({weights}, {v}, {acc} * decay[:, None]{self._precision()})")
        scope.lines.append("top = peak")
        return emitter.inner()

    def _mask(self, mask: Tensor) -> Operand:
        return self.emitter.value(mask, self.mask_at)

    def _precision(self) -> str:
        return ', input_precision="ieee"' if self.attn.dtype == "f32" else ""

    def _scores(self, scope: Scope, masked: bool, diagonal: bool) -> None:
        """One online-softmax step: row maximum `peak`, weights `p`, and `decay`, which rescales the running sums."""
        attn = self.attn
        seen = ["in_n"] if masked and not self._is_full("N") else []
        if diagonal:
            seen.append(f"({self.row} >= N)")
        if self.scale_first:
            scope.lines.append(f"s = s * {attn.scale!r}")
        if attn.bias is not None:
            scope.lines.append(f"s = s + {self.emitter.value(attn.bias, self.mask_at).text}")
        if attn.mask is not None:
            mask = self._mask(attn.mask)
            if self.has_additive_mask:
                scope.lines.append(f"s = s + {mask.text}")
            elif attn.fill is not None:
                scope.lines.append(f"s = tl.where({mask.text}, s, {attn.fill!r})")
            else:
                seen.append(mask.text)
        if seen:
            scope.lines.append(f's = tl.where({" & ".join(seen)}, s, float("-inf"))')
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
        rows = {1: "top[:, None]", 2: "total[:, None]"}  # results with one number per row, by index
        for index, output in enumerate(self.region.outputs):
            anchors = _anchors(output)
            which = attn.results.index(anchors[0]) if anchors else 0
            if which in rows:
                self._store_piece(index, "E", ZERO, Operand(rows[which], frozenset(("M",))))
                continue
            for name in self._pieces("E"):
                result = Operand(f"acc{name[1:]}", frozenset(("M", name)))
                self._store_piece(index, name, variable(name, self.sizes[name]), result)

    def _store_piece(self, index: int, name: str, column: Index, result: Operand) -> None:
        """Store a column block of output `index`; `result`: the tile of the call's result there."""
        emitter, attn, output = self.emitter, self.attn, self.region.outputs[index]
        self._tile("M", name)
        sizes = (*map(from_dim, attn.lead), from_dim(attn.queries), ONE if column == ZERO else self.sizes[name])
        position = (*self.lead, self.row, column)
        place = _position(output, position, sizes)
        for anchor in _anchors(output):
            emitter.anchored[anchor, position] = result
        address = linear(place, map(from_dim, self.region.types[index].strides))
        emitter.store(f"out{index}", address, emitter.value(output, place), result.axes)


def _is_plain(tensor: Tensor) -> bool:
    """`tensor` is a view of a load, which is 0 where a mask is not set."""
    while isinstance(tensor, View):
        tensor = tensor.source
    return isinstance(tensor, Load)


def _anchors(tensor: Tensor) -> list[Load]:
    return [one for one in everything([tensor]) if isinstance(one, Load) and one.anchor]


def _reached(tensor: Tensor, position: Position) -> Position | None:
    """The position in the call's result that `tensor` reads at `position`; None if it reads none."""
    while _anchors(tensor):
        if isinstance(tensor, Load):
            return position
        if isinstance(tensor, View):
            position = tensor.at(position)
        tensor = next(child for child in children(tensor) if _anchors(child))
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


__all__ = ["Attention", "AttentionConfig", "attention_configs", "attention_kernel", "attention_of"]
