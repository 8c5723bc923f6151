"""Two-stage reductions: rows that are too few to fill a GPU, and long, are reduced in chunks.

One kernel reduces each chunk, a small one combines the chunks of each row, and a third computes what needs whole rows
for every element. The softmax of x: f32[3, 4000], in 4 chunks, becomes

    m, t: f32[3, 4, 1] = kernel softmax_parts4(x)
        c = view(x, [3, 4, 1000])
        m = amax(c, 2)
        t = sum(exp(c - clamp(m, min=-3.4e38)), 2)    # finite: a chunk of nothing but -inf sums to 0, not to NaN
    row_m, row_t: f32[3, 1] = kernel softmax_sum4(m, t)
        row_m = amax(m, 1)
        row_t = sum(t * exp(m - row_m), 1)
    y: f32[3, 4000] = kernel softmax_rest4(x, row_m, row_t)
        y = exp(x - row_m) / row_t

What the bodies compute is written once per operator, in `reduction_rules`. Where only rows are asked for, as by a sum,
there is no third kernel. A reduction that needs the result of another takes two kernels more. The first kernel stores
what it computes anyway and others read, such as a residual sum, which the third reads, and what needs no row but reads
the same elements, such as an activation beside its gradient.

A row is cut along the longest run of its dimensions in memory. A group of channels of channels-last images is reduced
over ranges of pixels, each channel by itself, so that neighbouring threads read neighbouring channels; the second
kernel combines the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from math import ceil, gcd, prod
from typing import NamedTuple

from torch_rtx.chips import CACHE_SPEEDUP, CYCLES_PER_ELEMENT, RUN_OF_DOUBLE_COST, SECTOR_BYTES, STEP_US, kernels_us
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Graph, Node, TensorType, Value, attr_values, contiguous, dim_expr
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, Values, kernel, names_in, needed, type_of
from torch_rtx.lowering.kernels.index import multiple
from torch_rtx.lowering.kernels.kernel_ir import Pointwise, Reduce, Tensor, children, everything, load
from torch_rtx.lowering.kernels.loops import loop_configs
from torch_rtx.lowering.kernels.memory_model import bytes_of, typical
from torch_rtx.lowering.kernels.reduction_rules import RULES, Dims
from torch_rtx.lowering.kernels.region import ANCHORS, Region, express, tensor_type
from torch_rtx.targets import Arch

# Fewest and most elements of a chunk: where threads read neighbours of one row, and where they read across rows.
CHUNK_CONTIGUOUS, CHUNK_STRIDED = (512, 4096), (64, 512)
MAX_CHUNKS = 4096  # that one program combines, unless chunks would have to be longer than above for that
STEP_ELEMENTS = 2048  # of a step of a loop over a row; see `_times`
PROGRAMS_PER_PROCESSOR = 6
MAX_AGAIN = 8  # operations for an element that two kernels compute


# ---- where rows are cut ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Where the rows of an operand are cut.

    Attributes:
        order: the operand's dimensions as they lie in memory, the outermost first.
        full: dimensions that every chunk spans.
        split: the dimension that is cut into ranges of `size`; None: each position of the dimensions outside of `full`
            is a chunk.
    """

    order: Dims
    full: Dims
    split: int | None
    size: int

    def length(self, type_: TensorType) -> int:
        """Elements of a chunk."""
        return prod(typical(type_.shape[axis]) for axis in self.full) * self.size


def _longest_run(type_: TensorType, axes: Dims) -> tuple[Dims, Dims]:
    """The dimensions of an operand as they lie in memory, and the longest run of them that are reduced."""
    order = sorted(range(len(type_.shape)), key=lambda axis: typical(type_.strides[axis]), reverse=True)
    present = [axis for axis in order if type_.shape[axis] != 1]
    runs = [tuple(run) for reduced, run in groupby(present, key=lambda axis: axis in axes) if reduced]
    if not runs:
        raise Unsupported("rows of one element in chunks")
    return tuple(order), max(runs, key=lambda run: _elements(type_, run))


def _elements(type_: TensorType, axes: Iterable[int]) -> int:
    return prod(typical(type_.shape[axis]) for axis in axes)


def _cut(type_: TensorType, axes: Dims, chunks: int) -> Cut:
    """Where to cut for `chunks` chunks or a few more: sizes must be known, and chunks equally long."""
    order, run = _longest_run(type_, axes)
    limit = _elements(type_, run) // chunks
    full: list[int] = []
    length = 1
    for axis in reversed(run):
        size = type_.shape[axis]
        if not isinstance(size, int):
            break
        fits = max((d for d in range(1, limit // length + 1) if size % d == 0), default=1)
        if fits != size:
            return Cut(order, tuple(full), axis if fits > 1 else None, fits)
        full.append(axis)
        length *= size
    return Cut(order, tuple(full), None, 1)


@dataclass(frozen=True)
class Chunked:
    """An operand whose rows are in chunks.

    Attributes:
        value: the operand with its dimensions as they lie in memory, the one that is cut as two.
        within: the dimensions of `value` that a chunk has.
        across: the other dimensions that are reduced: they count the chunks of a row.
        restore: the permutation that undoes the order in memory.
        row_shape: of a result: 1 for each dimension of the operand that is reduced.
    """

    value: Value
    within: Dims
    across: Dims
    restore: Dims
    row_shape: tuple[Dim, ...]

    @property
    def length(self) -> int:
        """Elements of a chunk, as far as sizes are known."""
        shape = type_of(self.value).shape
        return prod(size for axis in self.within if isinstance(size := shape[axis], int))

    def unchunked(self, body: BodyBuilder, total: Value) -> Value:
        """`total`, a statistic of whole rows, with the dimensions of the operand."""
        return body.reshape(body.permute(total, self.restore), self.row_shape)


def _chunked(body: BodyBuilder, operand: Value, axes: Dims, chunks: int) -> Chunked:
    type_ = type_of(operand)
    cut = _cut(type_, axes, chunks)
    value, origin = operand, list(range(len(type_.shape)))
    if cut.split is not None:
        size = type_.shape[cut.split]
        assert isinstance(size, int)
        value = body.split_dim(operand, cut.split, size // cut.size)
        origin.insert(cut.split, cut.split)
    rank = {axis: place for place, axis in enumerate(cut.order)}
    order = sorted(range(len(origin)), key=lambda dim: (rank[origin[dim]], dim))
    inner = {dim for dim in order if origin[dim] in cut.full}
    if cut.split is not None:
        inner.add(cut.split + 1)
    within = tuple(place for place, dim in enumerate(order) if dim in inner)
    across = tuple(place for place, dim in enumerate(order) if origin[dim] in axes and dim not in inner)
    if not within or not across:
        raise Unsupported("rows that have no equal chunks")
    row_shape = tuple(1 if axis in axes else size for axis, size in enumerate(type_.shape))
    return Chunked(body.permute(value, order), within, across, tuple(map(order.index, range(len(order)))), row_shape)


def _blocks(body: BodyBuilder, operand: Value, axes: Dims, block: int) -> Chunked:
    """[blocks, rows of a block, channels]."""
    old = type_of(operand)
    order = sorted(range(len(old.shape)), key=lambda axis: (axis not in axes, -typical(old.strides[axis])))
    value = body.permute(operand, order)
    *rows, channels = type_of(value).shape
    count = dim_expr("*", 1, *rows)
    is_dense = type_of(value).strides == contiguous(type_of(value).shape)
    if len(axes) != len(rows) or not is_dense or multiple(count) % block:
        raise Unsupported(f"rows in blocks of {block}")
    value = body.reshape(value, (dim_expr("//", count, block), block, channels))
    row_shape = tuple(1 if axis in axes else size for axis, size in enumerate(old.shape))
    return Chunked(value, (1,), (0,), (0, 1, 2), row_shape)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def split_reductions(body: Graph, name: str, chunks: int) -> Graph:
    """`body`, of the kernel `name`, as several kernels: the rows that it reduces are in about `chunks` chunks.

    Raises:
        Unsupported: a reduction that has no rule, or rows that have no equal chunks.
    """
    return _Splitter(body, name, chunks, _chunked).graph()


def split_by_blocks(body: Graph, name: str, block: int) -> Graph:
    """As `split_reductions`, of a body that reduces all dimensions but the one that is contiguous in memory, such as
    channels: a chunk is `block` positions of all others, as they follow each other in memory.

    Raises:
        Unsupported: it reduces something else, or see `split_reductions`.
    """
    return _Splitter(body, name, block, _blocks).graph()


def split_evenly(body: Graph, name: str) -> Graph:
    """As `split_reductions`, of a body that reduces all of its operand: in chunks of a length that does not depend on
    how many there are, so that those of several operands are rows of one kernel.

    Raises:
        Unsupported: it reduces something else, or see `split_reductions`.
    """
    node = next(filter(reduces, body.nodes), None)
    if node is None or node.op not in RULES:
        raise Unsupported("a body without a reduction in chunks")
    operand, axes = RULES[node.op].operand(BodyBuilder(set()), node)
    if len(axes) != len(type_of(operand).shape):
        raise Unsupported("several rows in equal chunks")
    return split_reductions(body, name, max(_elements(type_of(operand), axes) // CHUNK_CONTIGUOUS[1], 2))


Cutter = Callable[[BodyBuilder, Value, Dims, int], Chunked]


class _Chunks(NamedTuple):
    """A reduction whose chunks have statistics by now."""

    node: Node
    operand: Value
    chunked: Chunked
    statistics: Values


class _Splitter:
    """Cuts a body into kernels.

    Args:
        cut: the chunks of an operand that is reduced over some dimensions, given their number or their length.

    Attributes:
        pending: nodes with results that no kernel has stored yet.
        stored: the values that a further kernel can read.
        unsplit: the reductions that are not split yet.
    """

    def __init__(self, body: Graph, name: str, chunks: int, cut: Cutter) -> None:
        self.body, self.name, self.chunks, self.cut = body, name, chunks, cut
        self.taken = names_in(body)
        self.pending, self.stored = list(body.nodes), list(body.inputs)
        self.unsplit = [node for node in self.pending if reduces(node)]
        self.kernels: list[Node] = []

    def graph(self) -> Graph:
        """The split body."""
        while ready := [node for node in self.unsplit if not self._needs_unsplit(node.inputs)]:
            self.unsplit = [node for node in self.unsplit if node not in ready]
            self._split_level(ready)
        if not self.kernels:
            raise Unsupported("a split form without an anchor or rows")
        if outputs := self._pending_outputs():
            self._kernel("rest", outputs)
        return Graph("import", self.body.inputs, nodes=tuple(self.kernels), outputs=self.body.outputs)

    def _pending_outputs(self) -> list[Value]:
        """The outputs that no kernel has stored yet."""
        outputs = {value.name: value for value in attr_values(self.body.outputs)}
        return [value for value in outputs.values() if value not in self.stored]

    def _needs_unsplit(self, values: Iterable[Value]) -> bool:
        """`values` depend on a reduction that is not split yet."""
        return any(node in self.unsplit for node in needed(self.pending, values))

    def _split_level(self, ready: list[Node]) -> None:
        """The two kernels of reductions that do not need each other."""
        started = [self._reduce_chunks(node) for node in ready]
        statistics = [value for one in started for value in one.statistics]
        before, left = needed(self.pending, statistics), [*ready, *self.unsplit]
        read = {value.name for node in before for value in node.inputs}
        size = _elements_of(started[0].operand)

        def at_once(value: Value) -> bool:
            """The first kernel can store `value`: it has all that `value` is computed from, in the same positions."""
            nodes = needed(self.pending, [value])
            fresh = {v.name for node in nodes if node not in before for v in node.inputs if v in self.stored}
            big = {v.name for v in self.stored if isinstance(v.type, TensorType) and _elements_of(v) == size}
            return _elements_of(value) == size and fresh & big <= read and not any(node in left for node in nodes)

        once = [*filter(at_once, self._pending_outputs())]
        after = needed(self.pending, [value for value in self._pending_outputs() if value not in once])
        again = [value for node in before if node in after and _is_long(node) for value in node.results]
        again = [value for value in again if _elements_of(value) == size and value not in once]
        self._kernel("parts", [*statistics, *once, *again])
        totals = [value for one in started for value in self._combine(one)]
        rows = _elements_of(totals[0])
        ends = [value for value in self._pending_outputs() if _elements_of(value) == rows]
        ends = [value for value in ends if not self._needs_unsplit([value])]
        after = needed(self.pending, [value for value in self._pending_outputs() if value not in ends])
        wanted = {value.name for node in after for value in node.inputs}
        self._kernel("sum", [*(value for value in totals if value.name in wanted), *ends])

    def _reduce_chunks(self, node: Node) -> _Chunks:
        """Puts the calls that reduce the chunks of `node` before it."""
        if node.op not in RULES:
            raise Unsupported(f"{node.op} in chunks", loc=node.loc)
        rule, body = RULES[node.op], BodyBuilder(self.taken)
        operand, axes = rule.operand(body, node)
        chunked = self.cut(body, operand, axes, self.chunks)
        statistics = rule.statistic(node).chunk(body, chunked.value, chunked.within)
        at = self._position(node)
        self.pending[at:at] = body.nodes
        return _Chunks(node, operand, chunked, statistics)

    def _combine(self, of: _Chunks) -> Values:
        """Puts the calls that combine chunks, and what follows, in the place of their node; returns the totals."""
        rule, body, chunked = RULES[of.node.op], BodyBuilder(self.taken), of.chunked
        found = rule.statistic(of.node).combine(body, of.statistics, chunked.across, chunked.length)
        totals = tuple(chunked.unchunked(body, total) for total in found)
        results = rule.finish(body, of.node, of.operand, totals)
        for result, value in zip(of.node.outputs, results, strict=True):
            if result is not None:
                body.define(result, value)
        at = self._position(of.node)
        self.pending[at : at + 1] = body.nodes
        return totals

    def _position(self, node: Node) -> int:
        return next(place for place, other in enumerate(self.pending) if other is node)

    def _kernel(self, kind: str, results: list[Value]) -> None:
        """A kernel that computes and stores `results`."""
        level = "" if len(self.kernels) < 2 or kind == "rest" else f"_{len(self.kernels) // 2}"
        name = f"{self.name}_{kind}{self.chunks}{level}"
        self.kernels.append(kernel(name, self.stored, needed(self.pending, results), tuple(results)))
        self.stored += results
        names = {value.name for value in self.stored}
        outputs = [tuple(None if v is None or v.name in names else v for v in node.outputs) for node in self.pending]
        pairs = zip(self.pending, outputs, strict=True)
        self.pending = [
            node if left == node.outputs else replace(node, outputs=left) for node, left in pairs if any(left)
        ]


def _is_long(node: Node) -> bool:
    """An element takes so long that it is stored for whoever needs it again, as that of a window."""
    given: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
    tensors = everything(express(node, given).values())
    return sum(isinstance(tensor, Pointwise) for tensor in tensors) > MAX_AGAIN


def _elements_of(value: Value) -> Dim:
    return dim_expr("*", 1, *type_of(value).shape)


@lru_cache(maxsize=4096)
def reduces(node: Node) -> bool:
    """`node` is a reduction or a scan of rows."""
    if node.body is not None or node.op in ANCHORS:
        return False
    given: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
    return any(isinstance(tensor, Reduce) for tensor in everything(express(node, given).values()))


# ---- when it is faster -----------------------------------------------------------------------------------------------


def best_chunks(found: Region, arch: Arch) -> tuple[int, float, float] | None:
    """In about how many chunks the rows that a region reduces are best cut (1: in none); and the times, in us, of the
    kernels for that and of one kernel. None: the region reduces no rows, or by an operator without a rule, or not for
    these arguments."""
    node = next(filter(reduces, found.body.nodes), None)
    if not found.reductions or node is None or node.op not in RULES:
        return None
    try:
        operand, axes = RULES[node.op].operand(BodyBuilder(set()), node)
    except Unsupported:
        return None
    type_, on = type_of(operand), arch.chip
    order, run = _longest_run(type_, axes)
    size, every = _elements(type_, axes), _elements(type_, order)
    if not every:
        return None
    neighbours = run[-1] == [axis for axis in order if type_.shape[axis] != 1][-1]
    lengths = _powers(CHUNK_CONTIGUOUS)[::-1] if neighbours else _powers(CHUNK_STRIDED)
    enough = [
        each for each in lengths if (every >= 2 * each * on.processors if neighbours else size <= each * MAX_CHUNKS)
    ]
    least = enough[0] if enough else lengths[-1]
    for wanted in sorted(each for each in lengths if each >= least):  # a row may have no ranges of the first length
        chunks = max(ceil(_elements(type_, run) / (2 * wanted - 1)), 2)
        if 2 * _cut(type_, axes, chunks).length(type_) >= wanted:
            break
    else:
        chunks = 1
    one, several = _times(found, every // size, size, _run_length(type_, axes), arch)
    return chunks, several, one


def _powers(bounds: tuple[int, int]) -> list[int]:
    low, high = bounds
    return [low << more for more in range((high // low).bit_length())]


def _run_length(type_: TensorType, axes: Dims) -> int:
    """How many elements of a row are neighbours in memory."""
    last = 1
    for axis in _longest_run(type_, axes)[0][::-1]:
        size = type_.shape[axis]
        if (axis not in axes and size != 1) or not isinstance(size, int):
            break
        last *= size
    return last


def _times(found: Region, rows: int, size: int, run: int, arch: Arch) -> tuple[float, float]:
    """The time of one kernel and of the split kernels, in us, for `rows` rows of `size` elements in runs of `run`.

    Of one kernel: the largest of the latency of its steps, the instructions of its elements, the bytes that it moves,
    and the sectors that it fetches. A row is read once per level of reductions, and once more for what follows from
    them. Loads of less than 8 bytes, and runs that are short, take more of everything.
    """
    on, inputs = arch.chip, found.read_types
    config = loop_configs(found)[0]
    after = any(_elements_in(type_) > rows for type_ in found.types)
    at_once = config.held or size <= config.elements
    wide = (output for output, type_ in zip(found.outputs, found.types, strict=True) if _elements_in(type_) > rows)
    passes = 1 if at_once else _levels(found.outputs) + any(_levels([output]) for output in wide)
    rests = [type_ for type_ in inputs if _elements_in(type_) >= rows * size]
    vector = gcd(run, 8) if at_once or not rests or not all(_passes(type_, size) for type_ in rests) else 8
    steps = ceil(size / (STEP_ELEMENTS if at_once else config.elements))
    programs = ceil(rows / config.rows)
    waves = ceil(programs / (on.processors * PROGRAMS_PER_PROCESSOR))
    read = max(sum(map(_elements_in, inputs)) / (rows * size), 1)  # tensors as large as the rows
    short = 1 + RUN_OF_DOUBLE_COST / (config.rows * run)
    touched = rows * size * read * passes + sum(map(_elements_in, found.types))
    instructions = touched * CYCLES_PER_ELEMENT * short / (on.clock * 1e3 * min(programs, on.processors))
    latency = waves * steps * passes * STEP_US * max(4 // vector, short) * (1 + read) / 2
    moved = sum(map(bytes_of, [*inputs, *found.types])) / (on.memory * 1e3)
    whole = [bytes_of(type_) // (rows * size) for type_ in inputs if _elements_in(type_) == rows * size]
    each = min(filter(None, whole), default=4)  # 0 bytes: of what is broadcast
    sectors = moved * SECTOR_BYTES / (config.rows * run * each * CACHE_SPEEDUP)
    one = on.launch + max(latency, instructions, moved, sectors)
    return one, kernels_us(on, 3) + 1.6 * moved if after else kernels_us(on, 2) + moved


def _elements_in(type_: TensorType) -> int:
    return _elements(type_, range(len(type_.shape)))


def _passes(type_: TensorType, size: int) -> bool:
    """A loop over rows of `size` elements reads whole vectors of the last one, see `whole_vectors`."""
    *strides, step = type_.strides
    last = type_.shape[-1]
    begins = all(isinstance(stride, int) and stride % 8 == 0 for stride in strides)
    return begins and step == 1 and isinstance(last, int) and last >= -(-size // 8) * 8


def _levels(outputs: Iterable[Tensor]) -> int:
    """How many reductions come one after the other."""
    depth: dict[Tensor, int] = {}
    for tensor in everything(outputs):
        depth[tensor] = max((depth[child] for child in children(tensor)), default=0) + isinstance(tensor, Reduce)
    return max(depth.values())
