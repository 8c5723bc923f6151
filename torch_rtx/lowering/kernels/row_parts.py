"""Split forms of reductions: rows that are too few to fill a chip, and long, are reduced in parts.

One kernel reduces each part by itself, a small one makes the whole of these, and a third computes what needs whole rows
for every element: as calls, a reduction is partial statistics, their total, and operations between tensors, see
`row_rules`. What others read of what comes before a reduction is stored by the first kernel, and read by the third.

A row is cut where it is longest in memory. A group of channels of channels-last images is reduced over ranges of
positions, for each channel by itself, so that neighbouring threads read neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, gcd, prod
from typing import NamedTuple

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Graph, Node, TensorType, Value, attr_values, dim_expr
from torch_rtx.lowering.kernels.calls import Calls, kernel, needed, type_of
from torch_rtx.lowering.kernels.cost import LAUNCH, bytes_of, typical
from torch_rtx.lowering.kernels.loops import loop_configs
from torch_rtx.lowering.kernels.region import ANCHORS, Region, express, reductions_of, tensor_type
from torch_rtx.lowering.kernels.row_rules import RULES, Dims, Values
from torch_rtx.lowering.kernels.tensor import Reduce, Tensor, children, everything, load
from torch_rtx.targets import Arch

PART, SHORT_PART = (512, 4096), (64, 512)  # elements of a part; where threads read neighbours of a row, and where not
TOTAL = 4096  # partial results that one program makes the whole of, if parts need not be too long for that
STEP, ELEMENTS = 0.3, 2048  # microseconds of a step of a long row, and its elements; most of them are in a cache
SECTOR, CACHE = 32, 1.3  # bytes that a cache has at least of a place in memory; how much faster it is than that
TOUCH, RUN = 0.09, 20  # cycles of a processor for an element that is read or written; twice that in runs of so many
LEAST = (3.6, 8.4)  # microseconds of two kernels, and of three, whatever they do
RESIDENT = 6  # programs that a processor holds


# ---- where rows are cut ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the rows of an operand are cut.

    Attributes:
        order: its dimensions as they lie in memory, the outermost first.
        whole: dimensions that every part has all of.
        divided: the dimension that is cut, in ranges of `size`; None: parts are positions of others.
    """

    order: Dims
    whole: Dims
    divided: int | None
    size: int

    def length(self, type_: TensorType) -> int:
        """Elements of a part."""
        return prod(typical(type_.shape[axis]) for axis in self.whole) * self.size


def _longest(type_: TensorType, axes: Dims) -> tuple[Dims, Dims]:
    """The dimensions of an operand as they lie in memory, and those among them that are the longest piece of a row."""
    order = sorted(range(len(type_.shape)), key=lambda axis: typical(type_.strides[axis]), reverse=True)
    present = [axis for axis in order if type_.shape[axis] != 1]
    runs = [tuple(run) for reduced, run in groupby(present, key=lambda axis: axis in axes) if reduced]
    if not runs:
        raise Unsupported("rows of one element in parts")
    return tuple(order), max(runs, key=lambda run: _elements(type_, run))


def _elements(type_: TensorType, axes: Iterable[int]) -> int:
    return prod(typical(type_.shape[axis]) for axis in axes)


def _place(type_: TensorType, axes: Dims, parts: int) -> Place:
    """Where to cut, in about `parts` parts or more: sizes have to be known and to divide."""
    order, run = _longest(type_, axes)
    limit = _elements(type_, run) // parts
    whole: list[int] = []
    length = 1
    for axis in reversed(run):
        size = type_.shape[axis]
        if not isinstance(size, int):
            break
        fits = max((d for d in range(1, limit // length + 1) if size % d == 0), default=1)
        if fits != size:
            return Place(order, tuple(whole), axis if fits > 1 else None, fits)
        whole.append(axis)
        length *= size
    return Place(order, tuple(whole), None, 1)


@dataclass(frozen=True)
class Cut:
    """An operand whose rows are in parts.

    Attributes:
        value: it, as it lies in memory, with one more dimension where one is cut.
        chunk: the dimensions that a part has.
        rest: those that are reduced after these.
        back: the permutation that undoes the order in memory.
        shape: that of a result: 1 in the place of what is reduced.
    """

    value: Value
    chunk: Dims
    rest: Dims
    back: Dims
    shape: tuple[Dim, ...]

    def finished(self, calls: Calls, total: Value) -> Value:
        """What `total`, reduced over everything, is in the order of the operand's dimensions."""
        return calls.reshaped(calls.permuted(total, self.back), self.shape)


def _cut(calls: Calls, operand: Value, axes: Dims, parts: int) -> Cut:
    type_ = type_of(operand)
    at = _place(type_, axes, parts)
    value, origin = operand, list(range(len(type_.shape)))
    if at.divided is not None:
        size = type_.shape[at.divided]
        assert isinstance(size, int)
        value = calls.divided(operand, at.divided, size // at.size)
        origin.insert(at.divided, at.divided)
    rank = {axis: place for place, axis in enumerate(at.order)}
    order = sorted(range(len(origin)), key=lambda dim: (rank[origin[dim]], dim))
    inner = {dim for dim in order if origin[dim] in at.whole}
    if at.divided is not None:
        inner.add(at.divided + 1)
    chunk = tuple(place for place, dim in enumerate(order) if dim in inner)
    rest = tuple(place for place, dim in enumerate(order) if origin[dim] in axes and dim not in inner)
    if not chunk or not rest:
        raise Unsupported("rows that have no equal parts")
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(type_.shape))
    return Cut(calls.permuted(value, order), chunk, rest, tuple(map(order.index, range(len(order)))), shape)


# ---- the form --------------------------------------------------------------------------------------------------------


def rows_in_parts(body: Graph, name: str, parts: int) -> Graph:
    """`body`, of the kernel `name`, with the rows that it reduces in about `parts` parts.

    Raises:
        Unsupported: a reduction that has no such form, or rows that have no equal parts.
    """
    return _Form(body, name, parts).graph()


class _Begun(NamedTuple):
    """A reduction of which there are partial results."""

    node: Node
    operand: Value
    cut: Cut
    results: Values


class _Form:
    """The kernels of a split body.

    Attributes:
        pool: nodes whose results are in no memory yet.
        memory: the values that kernels can read.
        open: the reductions that have no kernels yet.
    """

    def __init__(self, body: Graph, name: str, parts: int) -> None:
        self.body, self.name, self.parts = body, name, parts
        self.taken = {value.name for value in body.values()} | body.syms.keys()
        self.pool, self.memory = list(body.nodes), list(body.inputs)
        self.open = [node for node in self.pool if reduces(node)]
        self.kernels: list[Node] = []

    def graph(self) -> Graph:
        """The split body."""
        while ready := [node for node in self.open if not self._is_late(node.inputs)]:
            self.open = [node for node in self.open if node not in ready]
            self._level(ready)
        if not self.kernels:
            raise Unsupported("a split form without an anchor or rows")
        if left := self._left():
            self._kernel("rest", left)
        return Graph("import", self.body.inputs, nodes=tuple(self.kernels), outputs=self.body.outputs)

    def _left(self) -> list[Value]:
        """The outputs that are in no memory yet."""
        outputs = {value.name: value for value in attr_values(self.body.outputs)}
        return [value for value in outputs.values() if value not in self.memory]

    def _is_late(self, values: Iterable[Value]) -> bool:
        """Whether a reduction that is open comes before `values`."""
        return any(node in self.open for node in needed(self.pool, values))

    def _level(self, ready: list[Node]) -> None:
        """The two kernels of reductions that do not need each other."""
        begun = [self._begin(node) for node in ready]
        results = [value for one in begun for value in one.results]
        before = needed(self.pool, results)
        whole = _elements_of(begun[0].operand)
        stored = [value for value in self._left() if _elements_of(value) == whole]
        stored = [value for value in stored if all(node in before for node in needed(self.pool, [value]))]
        self._kernel("parts", [*results, *stored])
        totals = [value for one in begun for value in self._finish(one)]
        rows = _elements_of(totals[0])
        ends = [value for value in self._left() if _elements_of(value) == rows and not self._is_late([value])]
        kept = {value.name for value in ends}
        after = needed(self.pool, [value for value in self._left() if value.name not in kept])
        read = {value.name for node in after for value in node.inputs}
        self._kernel("sum", [*(value for value in totals if value.name in read), *ends])

    def _begin(self, node: Node) -> _Begun:
        """Puts the calls of partial results before `node`."""
        if node.op not in RULES:
            raise Unsupported(f"{node.op} in parts", loc=node.loc)
        rule, calls = RULES[node.op], Calls(self.taken)
        operand, axes = rule.operand(calls, node)
        cut = _cut(calls, operand, axes, self.parts)
        results = rule.statistic(node).partial(calls, cut.value, cut.chunk)
        at = self._position(node)
        self.pool[at:at] = calls.nodes
        return _Begun(node, operand, cut, results)

    def _finish(self, begun: _Begun) -> Values:
        """Puts the calls of what is made of partial results in the place of their node; returns the totals."""
        node, cut = begun.node, begun.cut
        rule, calls = RULES[node.op], Calls(self.taken)
        length = prod(size for size in (type_of(cut.value).shape[axis] for axis in cut.chunk) if isinstance(size, int))
        found = rule.statistic(node).total(calls, begun.results, cut.rest, length)
        totals = tuple(cut.finished(calls, total) for total in found)
        rule.finish(calls, node, begun.operand, totals)
        at = self._position(node)
        self.pool[at : at + 1] = calls.nodes
        return totals

    def _position(self, node: Node) -> int:
        return next(place for place, other in enumerate(self.pool) if other is node)

    def _kernel(self, kind: str, results: list[Value]) -> None:
        """A kernel that computes `results`, which are in memory from then on."""
        level = "" if len(self.kernels) < 2 or kind == "rest" else f"_{len(self.kernels) // 2}"
        name = f"{self.name}_{kind}{self.parts}{level}"
        self.kernels.append(kernel(name, self.memory, needed(self.pool, results), tuple(results)))
        self.memory += results
        names = {value.name for value in self.memory}
        outputs = [tuple(None if v is None or v.name in names else v for v in node.outputs) for node in self.pool]
        pairs = zip(self.pool, outputs, strict=True)
        self.pool = [node if left == node.outputs else replace(node, outputs=left) for node, left in pairs if any(left)]


def _elements_of(value: Value) -> Dim:
    return dim_expr("*", 1, *type_of(value).shape)


def reduces(node: Node) -> bool:
    """Whether `node` reduces rows, or runs along them."""
    if node.body is not None or node.op in ANCHORS:
        return False
    given: dict[str, Tensor] = {value.name: load(value.name, tensor_type(value)) for value in node.inputs}
    return any(isinstance(tensor, Reduce) for tensor in everything(express(node, given).values()))


# ---- where it is better ----------------------------------------------------------------------------------------------


def best_row_parts(found: Region, arch: Arch, gain: float) -> int:
    """In about how many parts the rows that a region reduces are best cut; 1: in none, which is also the answer where
    the gain is less than `gain`."""
    node = next(filter(reduces, found.body.nodes), None)
    if not reductions_of(found.outputs) or node is None or node.op not in RULES:
        return 1
    operand, axes = RULES[node.op].operand(Calls(set()), node)
    type_, on = type_of(operand), arch.chip
    order, run = _longest(type_, axes)
    size, every = _elements(type_, axes), _elements(type_, order)
    if not every:
        return 1
    neighbours = run[-1] == [axis for axis in order if type_.shape[axis] != 1][-1]
    lengths = _powers(PART)[::-1] if neighbours else _powers(SHORT_PART)
    enough = [each for each in lengths if (every >= 2 * each * on.processors if neighbours else size <= each * TOTAL)]
    wanted = enough[0] if enough else lengths[-1]
    parts = max(ceil(_elements(type_, run) / (2 * wanted - 1)), 2)
    if 2 * _place(type_, axes, parts).length(type_) < wanted:
        return 1
    whole, split = _times(found, every // size, size, _together(type_, axes), arch)
    return parts if split * gain <= whole else 1


def _powers(bounds: tuple[int, int]) -> list[int]:
    low, high = bounds
    return [low << more for more in range((high // low).bit_length())]


def _together(type_: TensorType, axes: Dims) -> int:
    """How many elements of a row lie side by side."""
    last = 1
    for axis in _longest(type_, axes)[0][::-1]:
        size = type_.shape[axis]
        if (axis not in axes and size != 1) or not isinstance(size, int):
            break
        last *= size
    return last


def _times(found: Region, rows: int, size: int, together: int, arch: Arch) -> tuple[float, float]:
    """What one kernel takes, and what those of parts do: a program waits for memory in each of its steps, which read a
    row once per level of reductions and once more for what comes after. Loads of 8 bytes and more take the shortest,
    and of neighbours in memory that are of other rows than its own a program reads what completes a sector. Where there
    are many programs, their instructions take longer than waiting: on an H200, for 512 rows of 20480 elements that are
    read twice and written twice, 33 us in runs of 80 and 87 in runs of 20.

    This is within 40 % (root mean square) of 88 group norms of a UNet with 2 and 16 images on an H200, and within 12 %
    of their forms in parts."""
    on, inputs = arch.chip, [tensor_type(value) for value in found.body.inputs]
    config = loop_configs(found)[0]
    after = any(_elements_in(type_) > rows for type_ in found.types)
    at_once = size <= config.elements
    passes = 1 if at_once else _levels(found.outputs) + after
    steps = ceil(size / (ELEMENTS if at_once else config.elements))
    programs = ceil(rows / config.rows)
    waves = ceil(programs / (on.processors * RESIDENT))
    read = max(sum(map(_elements_in, inputs)) / (rows * size), 1)  # tensors as large as the rows
    short = 1 + RUN / (config.rows * together)
    touched = rows * size * read * passes + sum(map(_elements_in, found.types))
    worked = touched * TOUCH * short / (on.clock * 1e3 * min(programs, on.processors))
    busy = waves * steps * passes * STEP * max(4 // gcd(together, 8), short) * (1 + read) / 2
    moved = sum(map(bytes_of, [*inputs, *found.types])) / (on.memory * 1e3)
    each = min((bytes_of(type_) // (rows * size) for type_ in inputs if _elements_in(type_) == rows * size), default=4)
    sectors = moved * SECTOR / (config.rows * together * each * CACHE)
    again = 1.6 if after else 1
    return LAUNCH + max(busy, worked, moved, sectors), LEAST[after] + again * moved


def _elements_in(type_: TensorType) -> int:
    return _elements(type_, range(len(type_.shape)))


def _levels(outputs: Iterable[Tensor]) -> int:
    """How many reductions come one after the other."""
    depth: dict[Tensor, int] = {}
    for tensor in everything(outputs):
        depth[tensor] = max((depth[child] for child in children(tensor)), default=0) + isinstance(tensor, Reduce)
    return max(depth.values())
