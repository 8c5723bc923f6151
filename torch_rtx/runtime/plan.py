"""Memory planning: an arena for a graph's intermediate values, in which values that are not live at once share memory.

Offsets are functions of the dims. One packing is made, for typical sizes: in the order of first uses, each value gets
the lowest offset that is free while it is live. While the arena exceeds the peak of live bytes, the value that ends
highest is moved to the front of the order and the packing repeated. The plan keeps which value lies below which. For
other sizes a value begins where the highest of those below it ends: values can't overlap at any size, and the packing
is the same in other proportions. If more pairs of values are live at once than any model has, values share no memory.

A backward graph finds a `Room`: memory of its forward graph, which frees its parts as saved tensors are read for the
last time. Values of known sizes that fit into it, gradients among them, lie there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.ir import (
    MAIN,
    Dim,
    Graph,
    Node,
    TensorType,
    Value,
    attr_values,
    contiguous,
    dim_expr,
    dim_syms,
    evaluate,
    typical_size,
)
from torch_rtx.runtime.convolve import writes_anywhere

PIECE = 256  # bytes: alignment of offsets in the arena, as in PyTorch's allocator
TYPICAL = 1024  # assumed for a symbolic size, within its range
ROUNDS = 60  # of packing; no model needed more than 14
PAIRS = 1_000_000  # of values that are live at once, in all rounds together: about a second
PACKINGS_KEPT = 256  # combinations of sizes whose offsets are cached


@dataclass(frozen=True)
class Buffer:
    """The memory of a value: its bytes, and the positions of the first and last node that use it."""

    name: str
    size: Dim
    first: int
    last: int


@dataclass(frozen=True)
class Memory:
    """Device memory that a call takes besides weights and inputs, in bytes.

    Attributes:
        arena: of intermediate values, in one allocation.
        others: the peak of outputs and of results of library calls that can't write into the arena. Workspaces of
            library calls are not known ahead and do not count.
    """

    arena: int
    others: int

    @property
    def peak(self) -> int:
        """The sum of both."""
        return self.arena + self.others


@dataclass(frozen=True)
class Room:
    """Memory beside the arena that a call may write to.

    Attributes:
        size: bytes.
        parts: the bytes [start, end) that hold something when the call begins, each with the names of the inputs that
            lie there. It is free after their last use; without any, never.
        takes_outputs: outputs may lie there, too.
    """

    size: int
    parts: Sequence[tuple[int, int, frozenset[str]]]
    takes_outputs: bool = True


class Plan:
    """The values of `graph` that lie in the arena, and their offsets.

    Args:
        graph: as it is run: kernels are launched, all other nodes are calls.
        trusted_ops: see `compile_graph`.
        known: the symbols that the inputs determine. Values whose size depends on data are not planned.
        elsewhere: names of results that have no memory of their own.
        stay: names of outputs that lie in the arena like values that are no outputs.
        room: values may lie there.
        cudnn: results of convolutions lie in the arena, see `writes_anywhere`.

    Attributes:
        buffers: the buffers in the arena, lowest first.
        placed: by name, the offset of each value in the room, in bytes.
        owners: by name, the value in whose memory a value lies.
        index: by name, the position in `buffers`.
        returned: names of values that outputs have in memory of their own, which each call can bring.
        symbols: names of the symbols that offsets depend on, in order; none for a static graph.
    """

    def __init__(
        self,
        graph: Graph,
        trusted_ops: frozenset[str],
        known: frozenset[str],
        elsewhere: frozenset[str] = frozenset(),
        stay: frozenset[str] = frozenset(),
        room: Room | None = None,
        cudnn: bool = False,
    ) -> None:
        lifetimes = _Lifetimes(graph, trusted_ops, stay, cudnn)
        alive = [buffer for buffer in lifetimes.buffers if all(sym.name in known for sym in dim_syms(buffer.size))]
        alive = [buffer for buffer in alive if buffer.name not in elsewhere]
        self.owners = lifetimes.owners
        self.placed = {} if room is None else _placed(room, alive, lifetimes)
        alive = [buffer for buffer in alive if buffer.name not in self.placed]
        kept = lifetimes.kept | lifetimes.returned
        self.symbols = tuple(dict.fromkeys(sym.name for buffer in alive for sym in dim_syms(buffer.size)))
        inside = [buffer for buffer in alive if buffer.name not in kept]
        self._others = [buffer for buffer in alive if buffer.name in kept]
        self.returned = frozenset(buffer.name for buffer in self._others if buffer.name not in lifetimes.kept)
        sizes = {buffer.name: typical_size(buffer.size, TYPICAL) for buffer in inside}
        packed = pairs_alive(inside) <= PAIRS
        together = neighbours(inside) if packed else {}
        places = best_packing(inside, sizes, together) if packed else dict.fromkeys(sizes, 0)
        self.buffers = sorted(inside, key=lambda buffer: (places[buffer.name], buffer.first))
        self.index = {buffer.name: index for index, buffer in enumerate(self.buffers)}
        stack = [(index - 1,) * (index > 0) for index in range(len(inside))]  # each above the one before
        self._below = _below(self.buffers, together) if packed else stack
        self.offsets = lru_cache(maxsize=PACKINGS_KEPT)(self._offsets)

    def _offsets(self, *dims: int) -> tuple[int, ...]:
        """The size of the arena, then the offset of each buffer, in bytes.

        Args:
            dims: the sizes of `symbols`, in order.
        """
        sizes = self._sizes(dims, self.buffers)
        ends: list[int] = []
        offsets: list[int] = []
        for below, size in zip(self._below, sizes, strict=True):
            offsets.append(max((ends[index] for index in below), default=0))
            ends.append(offsets[-1] + size)
        return max(ends, default=0), *offsets

    def _sizes(self, dims: Sequence[int], buffers: Sequence[Buffer]) -> list[int]:
        known = dict(zip(self.symbols, dims, strict=True))
        numbers = {size: evaluate(size, known) or 0 for size in {buffer.size for buffer in buffers}}
        return [numbers[buffer.size] for buffer in buffers]

    def memory(self, sizes: Mapping[str, int]) -> Memory:
        """The memory of a call.

        Args:
            sizes: by name, the size of each symbol of the graph.
        """
        dims = [sizes[name] for name in self.symbols]
        alive = zip(self._others, self._sizes(dims, self._others), strict=True)
        return Memory(self.offsets(*dims)[0], most_alive((b, size) for b, size in alive))


# ---- lifetimes -------------------------------------------------------------------------------------------------------


class _Lifetimes:
    """When the memory of the values of `graph` is used.

    Attributes:
        buffers: of all values that the nodes compute on the session's device.
        owners: by name, the value in whose memory a value lies.
        kept: names of those that can lie in no planned memory: values that a fallback sees and may keep, and results of
            calls without `out=`.
        returned: names of those whose memory outputs have, except outputs that `stay`.
        last: by the name of an input, the position of the last node that uses its memory.
    """

    def __init__(self, graph: Graph, trusted_ops: frozenset[str], stay: frozenset[str], cudnn: bool) -> None:
        inputs = [value.name for value in graph.inputs]
        root = dict(zip(inputs, inputs, strict=True))
        first: dict[str, tuple[int, TensorType]] = {}
        last = dict.fromkeys(inputs, -1)
        kept: set[str] = set()

        def roots(values: Iterable[Value]) -> Iterable[str]:
            return (root[value.name] for value in values if value.name in root)

        for position, node in enumerate(graph.nodes):
            sources = list(roots(node.inputs))
            last.update(dict.fromkeys(sources, position))
            if node.kind == "fallback":
                kept.update(sources)
            alias, places = aten.may_alias(node, trusted_ops), continued(node)
            for value in node.outputs:
                if value is None or not isinstance(value.type, TensorType) or value.name in node.updates:
                    continue  # an input or weight, which no plan holds
                if value.name in places and places[value.name].name in root:
                    root[value.name] = root[places[value.name].name]
                elif not alias:
                    root[value.name] = value.name
                    first[value.name] = position, value.type
                    last[value.name] = position
                    if not in_arena(node, value.type, cudnn):
                        kept.add(value.name)
                elif may_be := list(roots(aten.aliased(node))):  # of several any may be it
                    root[value.name] = may_be[0]
                    kept.update(may_be if len(may_be) > 1 else ())
        outputs = list(attr_values(graph.outputs))
        end = len(graph.nodes)
        last.update(dict.fromkeys([*roots(outputs), *(kept & set(inputs))], end))
        self.owners, self.kept = root, kept
        self.returned = set(roots(value for value in outputs if value.name not in stay))
        self.last = {name: last[name] for name in inputs}
        self.end = end
        self.buffers = [
            Buffer(name, size_of(type_), position, last[name])
            for name, (position, type_) in first.items()
            if type_.device == MAIN
        ]


def in_arena(node: Node, type_: TensorType, cudnn: bool) -> bool:
    """A result of `node` can be written to a given address."""
    writes = node.kind == "kernel" or node.op in aten.OUT or (cudnn and writes_anywhere(node))
    return type_.device == MAIN and writes


def size_of(type_: TensorType) -> Dim:
    """Bytes from the first to the last element of a tensor, rounded up to PIECE."""
    count: Dim
    if type_.strides == contiguous(type_.shape):
        count = dim_expr("*", *type_.shape) if type_.shape else 1
    else:
        steps = (dim_expr("*", dim_expr("+", n, -1), s) for n, s in zip(type_.shape, type_.strides, strict=True))
        count = dim_expr("max", 0, dim_expr("+", 1, *steps))
    nbytes = dim_expr("*", count, aten.DTYPES[type_.dtype].itemsize)
    return dim_expr("*", dim_expr("//", dim_expr("+", nbytes, PIECE - 1), PIECE), PIECE)


# ---- packing ---------------------------------------------------------------------------------------------------------


def most_alive(sized: Iterable[tuple[Buffer, int]]) -> int:
    """The peak of live bytes: no packing is smaller."""
    changes: dict[int, int] = {}
    for buffer, size in sized:
        changes[buffer.first] = changes.get(buffer.first, 0) + size
        changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - size
    now = most = 0
    for position in sorted(changes):
        now += changes[position]
        most = max(most, now)
    return most


def pairs_alive(buffers: Sequence[Buffer]) -> int:
    """How many pairs of buffers are live together."""
    lasts = sorted(buffer.last for buffer in buffers)
    firsts = sorted(buffer.first for buffer in buffers)
    return sum(index - bisect_left(lasts, first) for index, first in enumerate(firsts))


def neighbours(buffers: Iterable[Buffer]) -> dict[str, list[Buffer]]:
    """By name, the buffers that are live together with each buffer."""
    found: dict[str, list[Buffer]] = {}
    active: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda buffer: buffer.first):
        active = [other for other in active if other.last >= buffer.first]
        found[buffer.name] = list(active)
        for other in active:
            found[other.name].append(buffer)
        active.append(buffer)
    return found


def best_packing(
    buffers: Sequence[Buffer], sizes: Mapping[str, int], together: Mapping[str, Sequence[Buffer]]
) -> dict[str, int]:
    """By name, the offset of each buffer in the smallest packing found. Of equal ones, one in which what lives to the
    end lies below all else: a backward finds the memory that the forward has left in one piece."""
    least = most_alive((buffer, sizes[buffer.name]) for buffer in buffers)
    order = sorted(buffers, key=lambda buffer: (buffer.first, -sizes[buffer.name]))
    best: dict[str, int] = {}
    height = -1
    rounds = min(ROUNDS, 1 + PAIRS // max(pairs_alive(buffers), 1))
    for _ in range(rounds):
        places = _packing(order, sizes, together)
        ends = [places[buffer.name] + sizes[buffer.name] for buffer in order]
        total = max(ends, default=0)
        if height < 0 or total < height:
            best, height = places, total
        if height == least:
            break
        order.insert(0, order.pop(ends.index(total)))
    end = max((buffer.last for buffer in buffers), default=0)
    places = _packing(sorted(buffers, key=lambda b: (b.last < end, b.first, -sizes[b.name])), sizes, together)
    return places if max((places[b.name] + sizes[b.name] for b in buffers), default=0) <= height else best


def _packing(
    buffers: Sequence[Buffer],
    sizes: Mapping[str, int],
    together: Mapping[str, Sequence[Buffer]],
    fixed: Mapping[str, int] | None = None,
    limit: float = inf,
) -> dict[str, int]:
    """First fit: each buffer in turn gets the lowest offset that is free while it is live; none if it would end above
    `limit`. `fixed` are places of others."""
    places = dict(fixed or {})
    for buffer in buffers:
        taken = sorted((places[b.name], sizes[b.name]) for b in together[buffer.name] if b.name in places)
        place = 0
        for start, size in taken:
            if place + sizes[buffer.name] <= start:
                break
            place = max(place, start + size)
        if place + sizes[buffer.name] <= limit:
            places[buffer.name] = place
    return places


def _placed(room: Room, buffers: Sequence[Buffer], lifetimes: _Lifetimes) -> dict[str, int]:
    """By name, the offsets of the buffers that find a place in `room`: the order that leaves the least arena counts,
    largest first or in the order of first uses."""
    never = lifetimes.kept if room.takes_outputs else lifetimes.kept | lifetimes.returned
    able = [buffer for buffer in buffers if isinstance(buffer.size, int) and buffer.name not in never]
    sizes = {buffer.name: buffer.size for buffer in able if isinstance(buffer.size, int)}
    taken, places = list[Buffer](), dict[str, int]()
    for start, end, names in room.parts:
        last = max((lifetimes.last[name] for name in names), default=lifetimes.end)
        start, end = start // PIECE * PIECE, -(-end // PIECE) * PIECE
        taken.append(Buffer(f"[{start}:{end}] {len(taken)}", end - start, -1, last))  # no value has such a name
        places[taken[-1].name], sizes[taken[-1].name] = start, end - start
    if pairs_alive([*able, *taken]) > PAIRS:
        return {}
    together = neighbours([*taken, *able])
    found: list[tuple[int, dict[str, int]]] = []
    for order in (sorted(able, key=lambda b: -sizes[b.name]), sorted(able, key=lambda b: (b.first, -sizes[b.name]))):
        inside = _packing(order, sizes, together, places, room.size)
        left = most_alive((buffer, sizes[buffer.name]) for buffer in able if buffer.name not in inside)
        found.append((left, {name: place for name, place in inside.items() if name not in places}))
    return min(found, key=lambda one: one[0])[1]


def _below(buffers: Sequence[Buffer], together: Mapping[str, Sequence[Buffer]]) -> list[tuple[int, ...]]:
    """Per buffer, the earlier buffers that it must lie above, without those implied by others."""
    index = {buffer.name: number for number, buffer in enumerate(buffers)}
    below: list[tuple[int, ...]] = []
    for number, buffer in enumerate(buffers):
        found = sorted(index[other.name] for other in together[buffer.name] if index[other.name] < number)
        implied = {lower for other in found for lower in below[other]}
        below.append(tuple(other for other in found if other not in implied))
    return below
