"""Moves whatever depends on parameters alone into recipes: casts, transposes, folded norms, stacked weights, tables.

The recipe of a weight is the slice of the graph that computes it. Refit only replays recipes, so a refitted engine
equals a new one. If kernels are generated, a chain that widens a weight for one product stays in the graph as its
prologue: see `lowering.widening`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch_rtx import aten
from torch_rtx.accumulation import scatters
from torch_rtx.collectives import is_ordered
from torch_rtx.ir import Expr, Graph, Node, ScalarType, Sym, TensorType, Value, Weight, attr_dims, attr_values
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import returned, with_bases
from torch_rtx.lowering.widening import smallest, widens
from torch_rtx.op_work import ANCHORS
from torch_rtx.optable import LAUNCH
from torch_rtx.targets import Target

# A recipe may not produce more bytes than both limits: a mask or table that is broadcast to gigabytes is cheaper to
# recompute per call than to store.
GROWTH_BYTES, GROWTH_FACTOR = 64 << 20, 4


def hoist_weights(graph: Graph, infer: Inference, targets: tuple[Target, ...] = ()) -> Graph:
    """Level import to level import. Parameters that the graph itself writes to are not hoisted.

    Args:
        targets: of kernels; empty: no product has a prologue.
    """
    source = {w.value.name: w for w in graph.weights if w.value.name not in graph.written and w.recipe is None}
    # The caller gets memory of its own, and so does a sum that a kernel adds to: each call makes it.
    begun = {value.name for node in graph.nodes if scatters(node) for value in attr_values(node.arg("self"))}
    given = with_bases(graph, returned(graph) | begun)
    made, rest = _divided(graph, source, given)
    prologues = list(_prologues(rest, made, source)) if targets else []
    left = {id(node) for node in (*rest, *prologues)}
    rest = [node for node in graph.nodes if id(node) in left]
    stored = made.keys() - {value.name for node in rest for value in node.results}
    weights = [*graph.weights]
    for name in dict.fromkeys(value.name for node in rest for value in node.inputs if value.name in stored):
        value = next(v for v in made[name].outputs if v is not None and v.name == name)
        weights.append(as_weight(value, made, source))
    return replace(graph, weights=tuple(weights), nodes=tuple(rest))


def _divided(graph: Graph, source: dict[str, Weight], given: set[str]) -> tuple[dict[str, Node], list[Node]]:
    """By output, the nodes that can move into a recipe, and all that have to stay, or whose results are in `given`.

    What no weight is needed for, such as a mask and a bias of each layer, takes GROWTH_BYTES in all.
    """
    made: dict[str, Node] = {}
    origins = {name: frozenset((name,)) for name in source}  # by value: the weights it depends on
    sizes = {name: _bytes(weight.value.type) for name, weight in source.items()}
    rest: list[Node] = []
    free = 0
    for node in graph.nodes:
        needed = frozenset[str]().union(*(origins.get(value.name, ()) for value in node.inputs))
        hoistable = _hoistable(node, source, made, sum(map(sizes.__getitem__, needed)))
        if hoistable and not needed and not aten.is_view(aten.overload(node.op)):
            grown = sum(_bytes(value.type) for value in node.results) - sum(_bytes(value.type) for value in node.inputs)
            free += max(grown, 0)
            hoistable = free <= GROWTH_BYTES or grown <= 0
        if hoistable:
            origins |= {value.name: needed for value in node.results}
            made |= {value.name: node for value in node.results}
        if not hoistable or any(value.name in given for value in node.results):
            rest.append(node)
    return made, rest


def _prologues(rest: list[Node], made: dict[str, Node], source: dict[str, Weight]) -> Iterator[Node]:
    """The nodes of `made` that stay in the graph as prologues: they widen an operand of one product in `rest`, starting
    from the values that take the least memory."""
    readers = Counter(name for node in rest for name in {value.name for value in node.inputs})
    for value in (value for node in rest if node.op in ANCHORS for value in node.inputs):
        if value.name in made and readers[value.name] == 1:
            stored = smallest(value, made, source)
            types = [type_ for one in stored.values() if isinstance(type_ := one.type, TensorType)]
            assert isinstance(value.type, TensorType)
            chain = list(_between(value, stored, made))
            if widens(types, value.type):
                yield from chain


def _between(value: Value, stored: dict[str, Value], made: dict[str, Node]) -> Iterator[Node]:
    """The nodes that compute `value` from the values `stored`."""
    if value.name not in stored:
        yield made[value.name]
        for given in made[value.name].inputs:
            yield from _between(given, stored, made)


def _hoistable(node: Node, source: dict[str, Weight], made: dict[str, Node], size: int) -> bool:
    """The node can move into a recipe; `size`: bytes of the weights it depends on."""
    if node.kind != "op" or not node.outputs or is_ordered(node):
        return False
    op = aten.overload(node.op)
    if aten.is_random(op) or "empty" in node.op or node.op == LAUNCH:  # a refit may not have the source of a kernel
        return False
    if any(value.name not in source and value.name not in made for value in node.inputs):
        return False
    if any(True for _, attr in node.args for _ in attr_dims(attr)):
        return False
    types = [value.type for value in node.outputs if value is not None]
    if any(isinstance(t, ScalarType) or _symbolic(t) for t in types):
        return False
    if aten.is_view(op):
        return True
    return sum(map(_bytes, types)) <= max(GROWTH_BYTES, GROWTH_FACTOR * size)


def _symbolic(type_: TensorType) -> bool:
    return any(isinstance(dim, Sym | Expr) for dim in (*type_.shape, *type_.strides))


def _bytes(type_: object) -> int:
    assert isinstance(type_, TensorType)
    return math.prod(type_.shape) * aten.DTYPES[type_.dtype].itemsize  # type: ignore[arg-type]


def as_weight(value: Value, made: dict[str, Node], source: dict[str, Weight]) -> Weight:
    """`value` as a weight, with the recipe that computes it from those in `source` by the nodes in `made`."""
    nodes: dict[int, Node] = {}
    inputs: dict[str, Value] = {}

    def visit(needed: Value) -> None:
        if needed.name in source:
            inputs[needed.name] = needed
        elif id(made[needed.name]) not in nodes:
            for before in made[needed.name].inputs:
                visit(before)
            nodes[id(made[needed.name])] = made[needed.name]

    visit(value)
    recipe = Graph("import", tuple(inputs.values()), nodes=tuple(nodes.values()), outputs=(value,))
    return Weight(value, tuple(source[name].names[0] for name in inputs), recipe)
