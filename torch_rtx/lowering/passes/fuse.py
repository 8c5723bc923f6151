"""Fusion as a pass: each profitable fusion group becomes a kernel node, whose body is the graph of its operations."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from torch_rtx.ir import Graph, Node, attr_values
from torch_rtx.lowering.effects import draws
from torch_rtx.lowering.fusion import FusionPlan
from torch_rtx.lowering.infer import Inference
from torch_rtx.targets import Target

Group = tuple[tuple[int, int], list[Node]]  # the nodes of a fusion group, and its key: epoch and last member


def fuse(graph: Graph, infer: Inference, targets: tuple[Target, ...], atomics: bool = True) -> Graph:
    """Level import to the same level, with nodes of kind `kernel`. Recipes are not fused: refit runs them once.

    Args:
        targets: operations are fused if code can be generated for one of these.
        atomics: see `FusionPlan`.
    """
    plan = FusionPlan(graph, tuple(dict.fromkeys(target.arch for target in targets)), atomics)
    groups = {id(group): group for group in plan.group_of.values()}
    fused: list[Group] = []
    for group in groups.values():
        calls = [graph.nodes[member] for member in group.members]
        nodes = [plan.kernel(group)] if plan.is_profitable(group) else calls
        fused.append(((group.epoch, group.members[-1]), nodes))
    nodes = list(_ordered(graph, fused, [graph.nodes[index] for index in sorted(plan.views)]))
    return replace(graph, nodes=tuple(nodes))


def _ordered(graph: Graph, groups: list[Group], views: list[Node]) -> Iterator[Node]:
    """The nodes of all groups in topological order, ties by key, and the views that are still read. Draws of random
    numbers keep their order. A kernel that reads inputs alone comes just before its first reader: until then its
    results would only take memory."""
    view_of = {value.name: node for node in views for value in node.outputs if value is not None}
    made = {v.name: at for at, (_, nodes) in enumerate(groups) for n in nodes for v in n.outputs if v is not None}
    waits: list[set[int]] = []
    for _, nodes in groups:
        names = [value.name for node in nodes for value in node.inputs]
        waits.append({made[name] for name in (_root(n, view_of) for n in names) if name in made})
    at_draw = [at for _, at in sorted((key, at) for at, (key, nodes) in enumerate(groups) if draws(nodes))]
    for before, at in pairwise(at_draw):
        waits[at].add(before)
    for at, wait in enumerate(waits):
        wait.discard(at)
    followers: dict[int, list[int]] = {}
    for at, wait in enumerate(waits):
        for before in wait:
            followers.setdefault(before, []).append(at)
    late = {at for at, wait in enumerate(waits) if not wait and _can_wait(at, groups, followers.get(at, ()))}
    for wait in waits:
        wait -= late
    ready = [(groups[at][0], at) for at, wait in enumerate(waits) if not wait and at not in late]
    heapq.heapify(ready)
    done: set[str] = set()

    def needed(name: str) -> Iterator[Node]:
        node = view_of.get(name)
        if node is not None and name not in done:
            yield from needed(node.inputs[0].name)
            done.update(value.name for value in node.outputs if value is not None)
            yield node
        elif made.get(name) in late:
            late.remove(made[name])
            yield from written(made[name])

    def written(at: int) -> Iterator[Node]:
        for node in groups[at][1]:
            for value in node.inputs:
                yield from needed(value.name)
            yield node

    while ready:
        _, at = heapq.heappop(ready)
        yield from written(at)
        for follower in followers.get(at, ()):
            waits[follower].discard(at)
            if not waits[follower]:
                heapq.heappush(ready, (groups[follower][0], follower))
    assert not any(waits), "groups that depend on each other"
    for value in attr_values(graph.outputs):
        yield from needed(value.name)


def _can_wait(at: int, groups: list[Group], followers: Iterable[int]) -> bool:
    """A group is a kernel, with a reader before the next write to memory that others see."""
    (epoch, _), nodes = groups[at]
    return all(node.kind == "kernel" for node in nodes) and any(groups[other][0][0] == epoch for other in followers)


def _root(name: str, view_of: dict[str, Node]) -> str:
    while name in view_of:
        name = view_of[name].inputs[0].name
    return name
