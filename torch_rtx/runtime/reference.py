"""What is right of a region: its calls on the same inputs, as they are and in float64, in pieces that need little
memory. A piece is computed of slices of the inputs, and made float64 by itself.

A region whose float64 takes little memory is one piece. So are results without an axis that all calls before them
treat independently (see `independent_axes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, permutations

import torch

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import UPDATES, Attr, Graph, Node, TensorType, Value, attr_map, attr_values, contiguous
from torch_rtx.op_work import ANCHORS, ATTENTION, SDPA
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.control import Owned
from torch_rtx.runtime.independent_axes import Axis, Family, cut, families, is_constant, shape_of
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.targets import ALIGNMENT

NARROW_FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.tolerance and name != "f64")
BUDGET = 64 << 20  # bytes that float64 may take; a region that takes less is one piece
SCORES = 3  # times that an attention holds its scores in float64
MANY, MORE = 512, 4  # pieces, above which these get so many times the memory: each takes its launches
LEVELS, WORTH = 3, 0.9  # at which pieces are cut again, where that leaves a smaller share of their bytes
# Calls that select elements of a table, and which argument that is: what they select becomes float64, not the table.
LOOKUPS = {
    "aten.embedding.default": "weight",
    **dict.fromkeys(("aten.index_select.default", "aten.gather.default", "aten.index.Tensor"), "self"),
}
NOTHING = Graph("import")
Place = tuple[slice, ...]


@dataclass(frozen=True)
class Level:
    """One cut: pieces of `units` units of a family. `sizes`: the elements of a unit along each axis."""

    family: Family
    units: int
    sizes: Mapping[Axis, int]


@dataclass(frozen=True)
class Part:
    """Results of a region that are computed together.

    Attributes:
        graph: for one piece.
        positions: of the results among those of the region.
        levels: how pieces are cut, from the outside in; none: there is one.
        constants, views: what the graph's inputs beside the region's are, and what computes them: of nothing, and
            without moving data of the region's inputs.
        bytes: about what a piece takes in float64.
    """

    graph: Graph
    positions: tuple[int, ...]
    levels: tuple[Level, ...]
    constants: Graph
    views: Graph
    bytes: int

    def places(self) -> Iterator[tuple[dict[str, Place], dict[str, Place]]]:
        """Per piece, by name: where the inputs and results of the graph lie in the whole, and which part of a result
        no piece before had."""
        shapes = {value.name: shape_of(value) for value in (*self.graph.inputs, *_results(self.graph))}
        for at, first in _places(self.levels, {}, {}):
            whole, new = dict[str, Place](), dict[str, Place]()
            for name, shape in shapes.items():
                starts = [at.get((name, axis), 0) for axis in range(len(shape))]
                firsts = [max(first.get((name, axis), 0) - start, 0) for axis, start in enumerate(starts)]
                new[name] = tuple(slice(begin, size) for begin, size in zip(firsts, shape, strict=True))
                whole[name] = tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))
            yield whole, new


def _places(
    levels: Sequence[Level], at: dict[Axis, int], first: dict[Axis, int]
) -> Iterator[tuple[dict[Axis, int], dict[Axis, int]]]:
    """Per piece, where it begins along each axis, and where what is new in it does: the last ones of a level overlap,
    so that all pieces have one size."""
    if not levels:
        yield at, first
        return
    level = levels[0]
    for start in range(0, level.family.units, level.units):
        begin = min(start, level.family.units - level.units)
        begins = {axis: at.get(axis, 0) + begin * size for axis, size in level.sizes.items()}
        news = {axis: max(first.get(axis, 0), at.get(axis, 0) + start * size) for axis, size in level.sizes.items()}
        yield from _places(levels[1:], at | begins, first | news)


class Calls:
    """The calls of a part, piece by piece; `wide`: in float64."""

    def __init__(self, part: Part, device: torch.device, wide: bool) -> None:
        graph, constants = inline_kernels(part.graph, {}), part.constants
        if wide:
            graph, constants = in_float64(graph), in_float64(constants)
        self._dtypes: dict[str, torch.dtype] = {}
        for value in graph.inputs:
            assert isinstance(value.type, TensorType)
            self._dtypes[value.name] = aten.DTYPES[value.type.dtype]
        self._code: Code = compile_graph(graph, device)
        made = compile_graph(constants, device)((), ()) if constants.nodes else ()
        self._constants = {value.name: one for value, one in zip(attr_values(constants.outputs), made, strict=True)}
        self._views, self._see = part.views, compile_graph(part.views, device)
        self._seen: dict[str, torch.Tensor] = {}
        inner = {name for name, _ in part.levels[-1].sizes} if part.levels else set[str]()
        self._stays = {name for name in self._dtypes if part.levels and name not in inner}
        self._kept: dict[str, tuple[Place, torch.Tensor]] = {}
        self._written = graph.written

    def __call__(self, inputs: Mapping[str, torch.Tensor], places: Mapping[str, Place]) -> Sequence[torch.Tensor]:
        """The results of the piece at `places`, of the whole `inputs`, which are the same ones in each call."""
        if not self._seen and self._views.nodes:
            seen = self._see([inputs[value.name] for value in self._views.inputs], ())
            self._seen = {value.name: one for value, one in zip(_results(self._views), seen, strict=True)}
        return self._code(Owned(self._input(inputs, name, places[name]) for name in self._dtypes), ())

    def _input(self, inputs: Mapping[str, torch.Tensor], name: str, place: Place) -> torch.Tensor:
        if name in self._kept and self._kept[name][0] == place:
            return self._kept[name][1]
        self._kept.pop(name, None)
        found = next(tensors[name] for tensors in (self._constants, self._seen, inputs) if name in tensors)[place]
        if found.dtype != self._dtypes[name]:  # float64, see `in_float64`
            found = found.to(self._dtypes[name])
        elif name in self._written:
            found = copy_of(found)
        if name in self._stays:
            self._kept[name] = place, found
        return found


def whole_of(graph: Graph) -> Part:
    """All of a static graph as one piece."""
    return _whole(graph, inline_kernels(graph, {}))


def _whole(graph: Graph, flat: Graph) -> Part:
    return Part(graph, tuple(range(len(graph.outputs))), (), NOTHING, NOTHING, wide_bytes(flat))


def parts_of(graph: Graph) -> list[Part]:
    """What to compute of a static graph without weights, one kernel node."""
    flat = inline_kernels(graph, {})
    whole = _whole(graph, flat)
    if whole.bytes <= BUDGET or any(node.kind != "op" for node in flat.nodes):
        return [whole]
    return [*_cut_parts(flat, BUDGET)] or [whole]


@lru_cache(maxsize=64)  # all candidates of a region are checked one after another
def _cut_parts(flat: Graph, budget: int) -> Sequence[Part]:
    """The parts of a graph without kernel nodes; none: it has to be computed at once."""
    flat, positions = _explicit(flat), tuple(range(len(flat.outputs)))
    together = _part(flat, positions, budget)
    if together.bytes > MORE * budget and len(positions) > 1:
        alone = [_part(flat, (position,), budget) for position in positions]
        if max(part.bytes for part in alone) < together.bytes:
            return alone
    return [together] if together.levels else []


Cuts = list[tuple[Family, int]]  # from the outside in: families, and how many units a piece has


def _part(flat: Graph, positions: tuple[int, ...], budget: int) -> Part:
    """These results of `flat`, in pieces as large as may be."""
    graph, constants = _split(flat, positions)
    graph, views = _without_views(graph, {value.name for value in flat.inputs} - flat.written)
    cuts = _cuts(graph, budget)
    if _count(cuts) > MANY:
        cuts = _cuts(graph, MORE * budget)
    levels = []
    for family, units in cuts:
        shapes = {value.name: shape_of(value) for value in (*graph.inputs, *_results(graph))}
        axes = [(name, axis) for name, axis in family.axes.items() if name in shapes]
        levels.append(Level(family, units, {(n, axis): shapes[n][axis] // family.units for n, axis in axes}))
        graph = cut(graph, family, units)
    return Part(graph, positions, tuple(levels), constants, views, wide_bytes(graph))


def _cuts(graph: Graph, budget: int) -> Cuts:
    """The cuts of `graph` that give the fewest pieces; pieces that are about the smallest, if none fit."""
    if wide_bytes(graph) <= budget:
        return []
    alone = [_grown(graph, [(family, 0)], [0], budget) for family in families(graph, _results(graph))]
    fitting = [cuts for cuts in alone if cuts[0][1]]
    return min(fitting, key=_count) if fitting else _nested(graph, budget)


def _nested(graph: Graph, budget: int) -> Cuts:
    """Cuts along several axes: from the smallest pieces to larger ones, in the order that gives the fewest."""
    cuts: Cuts = []
    inner, size = graph, wide_bytes(graph)
    while size > budget and len(cuts) < LEVELS:
        small = [(wide_bytes(cut(inner, family, 1)), family) for family in families(inner, _results(inner))]
        least, family = min(small, key=lambda pair: pair[0], default=(size, None))
        if family is None or least >= WORTH * size:
            break
        cuts.append((family, 1))
        inner, size = cut(inner, family, 1), least
    budget = max(budget, int(size / WORTH))  # of pieces that do not fit, the smallest would be too many
    inputs = {value.name: _wide(value) for value in graph.inputs}
    # Inputs that the innermost does not cut are made float64 once for all pieces along it.
    by_size = sorted(cuts, key=lambda pair: -sum(inputs.get(name, 0) for name in pair[0].axes))
    for one in (by_size, cuts):
        starts = (one, _doubled(graph, one, budget))
        grown = [_grown(graph, start, order, budget) for start in starts for order in permutations(range(len(one)))]
        if holding := [found for found in grown if _holds(graph, found)]:
            return min(holding, key=_count)
    return cuts


def _grown(graph: Graph, cuts: Cuts, order: Sequence[int], budget: int) -> Cuts:
    """`cuts` with the most units that fit, one after another in this order."""
    for index in order:
        family, low = cuts[index]
        high = family.units + 1  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            fits = wide_bytes(_cut(graph, _with_units(cuts, index, middle))) <= budget
            low, high = (middle, high) if fits else (low, middle)
        # Libraries are faster for multiples, or have no others.
        even = low - low % ALIGNMENT if ALIGNMENT < low < family.units else low
        cuts = _with_units(cuts, index, even)
    return cuts


def _doubled(graph: Graph, cuts: Cuts, budget: int) -> Cuts:
    """`cuts` with twice the units, as often as these fit."""
    more = [(family, min(2 * units, family.units)) for family, units in cuts]
    return _doubled(graph, more, budget) if more != cuts and wide_bytes(_cut(graph, more)) <= budget else cuts


def _with_units(cuts: Cuts, index: int, units: int) -> Cuts:
    return [*cuts[:index], (cuts[index][0], units), *cuts[index + 1 :]]


def _cut(graph: Graph, cuts: Cuts) -> Graph:
    for family, units in cuts:
        graph = cut(graph, family, units)
    return graph


def _holds(graph: Graph, cuts: Cuts) -> bool:
    """Each family is one of what those before it leave."""
    for family, units in cuts:
        if family not in families(graph, _results(graph)):
            return False
        graph = cut(graph, family, units)
    return True


def _count(cuts: Cuts) -> int:
    """How many pieces there are."""
    return math.prod(-(-family.units // units) for family, units in cuts)


def _split(flat: Graph, positions: Sequence[int]) -> tuple[Graph, Graph]:
    """The part of a graph that computes some results, and constants, such as positions, that it gets as inputs."""
    outputs = tuple(flat.outputs[position] for position in positions)
    needed, nodes, constants = {value.name for value in attr_values(outputs)}, list[Node](), list[Node]()
    for node in reversed(flat.nodes):
        if needed.isdisjoint(value.name for value in node.results):
            continue
        needed.update(value.name for value in node.inputs)
        (constants if not node.inputs and not is_constant(node) and not aten.draws(node) else nodes).append(node)
    made = tuple(value for node in reversed(constants) for value in node.results)
    inputs = (*(value for value in flat.inputs if value.name in needed), *made)
    graph = replace(flat, inputs=inputs, nodes=tuple(reversed(nodes)), outputs=outputs)
    return graph, Graph(flat.level, nodes=tuple(reversed(constants)), outputs=made)


def _without_views(graph: Graph, known: set[str]) -> tuple[Graph, Graph]:
    """`graph` that gets views of its `known` inputs as inputs, and what computes these: queries, keys and values that
    lie in one tensor are independent ones then."""
    views, nodes = list[Node](), list[Node]()
    for node in graph.nodes:
        sizes = [math.prod(shape_of(value)) for value in (*node.inputs, *node.results)]
        is_part = len(node.inputs) == 1 and max(sizes) == sizes[0]  # and not an expanded one, of which a row is enough
        if is_part and aten.is_view(aten.overload(node.op)) and node.inputs[0].name in known:
            known = known | {value.name for value in node.results}
            views.append(node)
        else:
            nodes.append(node)
    outputs = {value.name for value in _results(graph)}
    read = {value.name for node in nodes for value in node.inputs} | outputs
    seen = tuple(value for node in views for value in node.results if value.name in read)
    if not outputs.isdisjoint(value.name for value in seen):
        return graph, NOTHING
    needed = {value.name for node in views for value in node.inputs}
    given = tuple(value for value in graph.inputs if value.name in needed)
    inputs = (*(value for value in graph.inputs if value.name in read), *seen)
    seeing = Graph(graph.level, given, nodes=tuple(views), outputs=seen)
    return replace(graph, inputs=inputs, nodes=tuple(nodes)), seeing


def _explicit(flat: Graph) -> Graph:
    """The same results without writes to inputs, and with masks instead of attention to earlier positions."""
    nodes, names = list[Node](), _new_names(flat)

    def emit(op: str, dtype: str, shape: tuple[int, ...], **args: Attr) -> Value:
        made = Value(next(names), TensorType(dtype, shape, contiguous(shape)))
        nodes.append(Node("op", op, tuple(args.items()), (made,)))
        return made

    for node in flat.nodes:
        if node.op in (SDPA, ATTENTION) and node.arg("is_causal") is True and _has_no_mask(node):
            queries, keys = (shape_of(value)[-2] for value in node.inputs[:2])
            row, column = (emit("aten.arange.default", "i64", (n,), end=n, device="main") for n in (queries, keys))
            at = emit("aten.unsqueeze.default", "i64", (queries, 1), self=row, dim=1)
            mask = emit("aten.ge.Tensor", "bool", (queries, keys), self=at, other=column)
            args = dict(node.args) | {"attn_mask": mask, "is_causal": False}
            node = replace(node, args=tuple(args.items()))
        nodes.append(replace(node, op=UPDATES.get(node.op, node.op)))
    return replace(flat, nodes=tuple(nodes))


def _new_names(graph: Graph) -> Iterator[str]:
    """Names that no value of `graph` has."""
    taken = {value.name for value in graph.values()}
    return (name for number in count() if (name := f"m{number}") not in taken)


def _has_no_mask(node: Node) -> bool:
    return all(node.arg(name) in (None, ()) for name in ("attn_mask", "fill", "band"))


def _results(graph: Graph) -> list[Value]:
    return [*attr_values(graph.outputs)]


def wide_bytes(graph: Graph) -> int:
    """About the bytes that a static graph takes in float64: its inputs, without tables, and the most that it holds
    beside them."""
    base, last = aten.bases(graph), dict[str, int]()
    sizes = {value.name: 0 if value.name in base else _wide(value) for value in graph.values()}
    sizes |= dict.fromkeys(tables(graph), 0)
    for index, node in enumerate(graph.nodes):
        last.update((base.get(value.name, value.name), index) for value in (*node.inputs, *node.results))
    kept = {base.get(value.name, value.name) for value in (*graph.inputs, *_results(graph))}
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in kept:
            ends.setdefault(index, []).append(name)
    live = most = sum(sizes[value.name] for value in graph.inputs)
    for index, node in enumerate(graph.nodes):
        live += sum(sizes[value.name] for value in node.results)
        most = max(most, live + _scores(node))
        live -= sum(sizes[name] for name in ends.get(index, ()))
    return most


def _wide(value: Value) -> int:
    """Bytes of a value in float64, if it is of floats."""
    if not isinstance(value.type, TensorType):
        return 0
    size = 8 if value.type.dtype in NARROW_FLOATS else DTYPES[value.type.dtype].bytes
    return size * math.prod(shape_of(value))


def _scores(node: Node) -> int:
    """Bytes that an attention takes in float64, where no library has a kernel for it."""
    query, key = node.arg("query"), node.arg("key")
    if not ANCHORS.get(node.op, "").startswith("attention") or not (
        isinstance(query, Value) and isinstance(key, Value)
    ):
        return 0
    return SCORES * 8 * math.prod(shape_of(query)[:-1]) * shape_of(key)[-2]


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Other memory with the same elements and strides, which `clone` changes where elements share memory."""
    extent = aten.extent(tensor.shape, tensor.stride())
    return tensor.as_strided((extent,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def tables(graph: Graph) -> set[str]:
    """Inputs of floats that only lookups read, in a graph without kernel nodes."""
    found = {
        value.name for value in graph.inputs if isinstance(value.type, TensorType) and value.type.dtype in NARROW_FLOATS
    } - graph.written
    for node in graph.nodes:
        table = node.arg(LOOKUPS.get(node.op, ""))
        read = [value.name for value in node.inputs]
        if isinstance(table, Value) and read.count(table.name) == 1:
            read.remove(table.name)
        found.difference_update(read)
    return found.difference(value.name for value in _results(graph))


def in_float64(graph: Graph) -> Graph:
    """The same operations in float64, casts to narrower floats included. Tables, see `tables`, stay as they are."""
    narrow, names = tables(graph), _new_names(graph)

    def value(v: Value) -> Value:
        if v.name in narrow or not isinstance(v.type, TensorType) or v.type.dtype not in NARROW_FLOATS:
            return v
        return replace(v, type=replace(v.type, dtype="f64"))

    def attr(name: str, given: Attr) -> Attr:
        return "f64" if "dtype" in name and given in NARROW_FLOATS else attr_map(given, value)

    def nodes(n: Node) -> Iterator[Node]:
        args = tuple((name, attr(name, given)) for name, given in n.args)
        outputs = tuple(None if v is None else value(v) for v in n.outputs)
        body = None if n.body is None else in_float64(n.body)
        table = n.arg(LOOKUPS.get(n.op, ""))
        if not isinstance(table, Value) or table.name not in narrow:
            yield replace(n, args=args, outputs=outputs, body=body)
            return
        (found,), (made,) = n.results, outputs
        selected = replace(found, name=next(names))
        yield replace(n, args=args, outputs=(selected,))
        yield Node("op", "aten._to_copy.default", (("self", selected), ("dtype", "f64")), (made,), loc=n.loc)

    inputs, outputs = tuple(map(value, graph.inputs)), tuple(attr_map(output, value) for output in graph.outputs)
    return replace(graph, inputs=inputs, nodes=tuple(one for n in graph.nodes for one in nodes(n)), outputs=outputs)
