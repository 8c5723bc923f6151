"""Forms kernels: what `grouping` puts together becomes one node whose body is the graph of its operations."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

from torch_rtx.ir import Graph, Node, attr_values
from torch_rtx.lowering.grouping import Grouping
from torch_rtx.lowering.infer import Inference
from torch_rtx.targets import Target


def fuse(graph: Graph, infer: Inference, targets: tuple[Target, ...]) -> Graph:
    """Level import to the same level, with nodes of kind `kernel`. Recipes are not fused: refit runs them once.

    Args:
        targets: what kernels are for: operations are fused if code can be generated for one of them.
    """
    grouping = Grouping(graph, tuple(dict.fromkeys(target.arch for target in targets)))
    units = {id(unit): unit for unit in grouping.unit.values()}
    fused: list[tuple[tuple[int, int], list[Node]]] = []
    for unit in units.values():
        if grouping.worthwhile(unit):
            nodes = [grouping.kernel(unit)]
        else:
            nodes = [graph.nodes[member] for member in unit.members]
        fused.append(((unit.epoch, unit.members[-1]), nodes))
    nodes = list(_ordered(graph, fused, [graph.nodes[index] for index in sorted(grouping.views)]))
    return replace(graph, nodes=tuple(nodes))


def _ordered(graph: Graph, units: list[tuple[tuple[int, int], list[Node]]], views: list[Node]) -> Iterator[Node]:
    """The nodes of all units, each after what it reads, otherwise in the order of their keys; and the views that
    anything still reads."""
    view_of = {value.name: node for node in views for value in node.outputs if value is not None}
    made = {v.name: at for at, (_, nodes) in enumerate(units) for n in nodes for v in n.outputs if v is not None}
    waits: list[set[int]] = []
    for _, nodes in units:
        names = [value.name for node in nodes for value in node.inputs]
        waits.append({made[name] for name in (_root(n, view_of) for n in names) if name in made})
    for at, wait in enumerate(waits):
        wait.discard(at)
    followers: dict[int, list[int]] = {}
    for at, wait in enumerate(waits):
        for before in wait:
            followers.setdefault(before, []).append(at)
    ready = [(units[at][0], at) for at, wait in enumerate(waits) if not wait]
    heapq.heapify(ready)
    done: set[str] = set()

    def needed(name: str) -> Iterator[Node]:
        node = view_of.get(name)
        if node is not None and name not in done:
            yield from needed(node.inputs[0].name)
            done.update(value.name for value in node.outputs if value is not None)
            yield node

    while ready:
        _, at = heapq.heappop(ready)
        for node in units[at][1]:
            for value in node.inputs:
                yield from needed(value.name)
            yield node
        for follower in followers.get(at, ()):
            waits[follower].discard(at)
            if not waits[follower]:
                heapq.heappush(ready, (units[follower][0], follower))
    assert not any(waits), "units that wait for each other"
    for value in attr_values(graph.outputs):
        yield from needed(value.name)


def _root(name: str, view_of: dict[str, Node]) -> str:
    while name in view_of:
        name = view_of[name].inputs[0].name
    return name
