"""The memory of a graph's intermediate values: one arena, in which values that are not alive at once share memory.

Offsets are functions of the dims. A packing is made once, for typical sizes: values in the order of their first use get
the lowest place that is free while they live, and as long as that takes more than is alive at once, the value that
sticks out is placed first in the next round. What is kept of it is which value lies below which. For other sizes a
value begins where the last of those below it ends, which can't overlap at any size and is the same packing in other
proportions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch_rtx import aten
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

PIECE = 256  # bytes: places in the arena are multiples of it, as those of PyTorch's allocator are
TYPICAL = 1024  # what a symbolic size is taken for, within its range
ROUNDS = 60  # of packing; 14 were the most that a model needed
PACKINGS_KEPT = 256  # sizes whose offsets are remembered


@dataclass(frozen=True)
class Buffer:
    """The memory of a value: how many bytes, and between which nodes it is in use, by position."""

    name: str
    size: Dim
    first: int
    last: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that a call takes for what it computes, beside weights and inputs.

    Attributes:
        arena: of intermediate values, one piece.
        others: the most that results of library calls which can't write into the arena, and the outputs, take at once.
            What library calls need while they run (workspaces) is not known ahead.
    """

    arena: int
    others: int

    @property
    def peak(self) -> int:
        """The most that is in use at once."""
        return self.arena + self.others


class Plan:
    """Which values of `graph` lie in the arena, and where.

    Args:
        graph: as it is run: its kernels are launched, its other nodes are calls.
        trusted_ops: see `compile_graph`.
        known: the symbols that the inputs determine. Values of other sizes, which depend on data, are not planned.

    Attributes:
        buffers: those in the arena, lowest first.
        index: the place of each in this list, by name.
        symbols: the names of the symbols that offsets depend on, in order; none where all sizes are numbers.
    """

    def __init__(self, graph: Graph, trusted_ops: frozenset[str], known: frozenset[str]) -> None:
        alive, kept = _lifetimes(graph, trusted_ops)
        alive = [buffer for buffer in alive if all(sym.name in known for sym in dim_syms(buffer.size))]
        self.symbols = tuple(dict.fromkeys(sym.name for buffer in alive for sym in dim_syms(buffer.size)))
        inside = [buffer for buffer in alive if buffer.name not in kept]
        self._others = [buffer for buffer in alive if buffer.name in kept]
        sizes = {buffer.name: typical_size(buffer.size, TYPICAL) for buffer in inside}
        together = neighbours(inside)
        places = best_packing(inside, sizes, together)
        self.buffers = sorted(inside, key=lambda buffer: (places[buffer.name], buffer.first))
        self.index = {buffer.name: index for index, buffer in enumerate(self.buffers)}
        self._below = _below(self.buffers, together)
        self.offsets = lru_cache(maxsize=PACKINGS_KEPT)(self._offsets)

    def _offsets(self, *dims: int) -> tuple[int, ...]:
        """The bytes of the arena, then the offset of each buffer.

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
        """What a call takes.

        Args:
            sizes: of each symbol of the graph, by name.
        """
        dims = [sizes[name] for name in self.symbols]
        alive = zip(self._others, self._sizes(dims, self._others), strict=True)
        return Memory(self.offsets(*dims)[0], most_alive((b, size) for b, size in alive))


# ---- lifetimes -------------------------------------------------------------------------------------------------------


def _lifetimes(graph: Graph, trusted_ops: frozenset[str]) -> tuple[list[Buffer], set[str]]:
    """The memory of everything that the nodes of `graph` compute on the session's device, and the names of those that
    have memory of their own: outputs, what fallbacks see, which may keep it, and results of calls without `out=`."""
    root: dict[str, str] = {}  # of a value, the one whose memory it lies in
    first: dict[str, tuple[int, TensorType]] = {}
    last: dict[str, int] = {}
    kept: set[str] = set()

    def roots(values: Iterable[Value]) -> Iterable[str]:
        return (root[value.name] for value in values if value.name in root)

    for position, node in enumerate(graph.nodes):
        sources = list(roots(node.inputs))
        last.update(dict.fromkeys(sources, position))
        if node.kind == "fallback":
            kept.update(sources)
        if node.writes:
            continue  # its result is an input or weight, in no memory of a plan
        alias = aliases(node, trusted_ops)
        for value in node.outputs:
            if value is None or not isinstance(value.type, TensorType):
                continue
            if not alias:
                root[value.name] = value.name
                first[value.name] = position, value.type
                last[value.name] = position
                if not in_arena(node, value.type):
                    kept.add(value.name)
            elif sources:  # of one value; where there are several, of any of them
                root[value.name] = sources[0]
                kept.update(sources if len(sources) > 1 else ())
    returned = set(roots(attr_values(graph.outputs)))
    kept |= returned
    last.update(dict.fromkeys(returned, len(graph.nodes)))
    found = [
        Buffer(name, size_of(type_), position, last[name])
        for name, (position, type_) in first.items()
        if type_.device == MAIN
    ]
    return found, kept


def aliases(node: Node, trusted_ops: frozenset[str]) -> bool:
    """Whether results of `node` may lie in the memory of what it reads."""
    if node.kind == "kernel" or node.op == "python":
        return False  # what a Python function reads has memory of its own in any case
    op = aten.overload(node.op, trusted_ops)
    return node.op in aten.MAY_ALIAS or any(result.alias_info is not None for result in op._schema.returns)


def in_arena(node: Node, type_: TensorType) -> bool:
    """Whether a result of `node` can be written to a given place."""
    return type_.device == MAIN and (node.kind == "kernel" or node.op in aten.OUT)


def size_of(type_: TensorType) -> Dim:
    """Bytes from the first to the last element of a tensor, in pieces."""
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
    """The most bytes that are in use at once: no packing is smaller."""
    changes: dict[int, int] = {}
    for buffer, size in sized:
        changes[buffer.first] = changes.get(buffer.first, 0) + size
        changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - size
    now = most = 0
    for position in sorted(changes):
        now += changes[position]
        most = max(most, now)
    return most


def neighbours(buffers: Iterable[Buffer]) -> dict[str, list[Buffer]]:
    """Per buffer, by name, those that are in use together with it."""
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
    """An offset for each buffer, by name: the lowest packing that was found."""
    least = most_alive((buffer, sizes[buffer.name]) for buffer in buffers)
    order = sorted(buffers, key=lambda buffer: (buffer.first, -sizes[buffer.name]))
    best: dict[str, int] = {}
    height = -1
    for _ in range(ROUNDS):
        places = _packing(order, sizes, together)
        ends = [places[buffer.name] + sizes[buffer.name] for buffer in order]
        total = max(ends, default=0)
        if height < 0 or total < height:
            best, height = places, total
        if height == least:
            break
        order.insert(0, order.pop(ends.index(total)))
    return best


def _packing(
    buffers: Sequence[Buffer], sizes: Mapping[str, int], together: Mapping[str, Sequence[Buffer]]
) -> dict[str, int]:
    """Offsets when each buffer in turn gets the lowest place that is free while it is in use."""
    places: dict[str, int] = {}
    for buffer in buffers:
        taken = sorted((places[b.name], sizes[b.name]) for b in together[buffer.name] if b.name in places)
        place = 0
        for start, size in taken:
            if place + sizes[buffer.name] <= start:
                break
            place = max(place, start + size)
        places[buffer.name] = place
    return places


def _below(buffers: Sequence[Buffer], together: Mapping[str, Sequence[Buffer]]) -> list[tuple[int, ...]]:
    """Per buffer, those of the earlier ones that it has to lie above; without those that lie below another of them."""
    index = {buffer.name: number for number, buffer in enumerate(buffers)}
    below: list[tuple[int, ...]] = []
    for number, buffer in enumerate(buffers):
        found = sorted(index[other.name] for other in together[buffer.name] if index[other.name] < number)
        implied = {lower for other in found for lower in below[other]}
        below.append(tuple(other for other in found if other not in implied))
    return below
