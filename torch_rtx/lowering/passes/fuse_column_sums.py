"""Joins a loop over rows with sums over all rows of what it computes, or of what it reads.

The gradients of a norm are such: that of its input is a loop over rows, those of its weight and bias sum columns, as
does that of the bias of the linear layer before it. See `kernels.split_columns` for how that is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf

from torch_rtx import accumulation
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values
from torch_rtx.lowering.effects import is_barrier
from torch_rtx.lowering.fusion import MAX_POINTERS, kernel_name
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import flat
from torch_rtx.lowering.kernels.generate import fastest
from torch_rtx.lowering.kernels.split_columns import sums_rows
from torch_rtx.lowering.kernels.split_reduction import reduces
from torch_rtx.targets import Arch, Target


def fuse_column_sums(graph: Graph, infer: Inference, targets: tuple[Target, ...]) -> Graph:
    """Level import, after `fuse`, to the same level.

    Args:
        targets: sums join a loop where that is expected to be faster on one of these.
    """
    arches = tuple(dict.fromkeys(target.arch for target in targets))
    readers: dict[str, set[int]] = {value.name: {len(graph.nodes)} for value in attr_values(graph.outputs)}
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            readers.setdefault(value.name, set()).add(index)
    groups: dict[int, list[int]] = {}
    for index, loop in _pairs(graph, readers):
        node, group = graph.nodes[index], [*groups.get(loop, [loop]), index]
        if any(index in other for other in groups.values()):
            continue
        joint = _joint(graph, group, readers)
        apart = _joint(graph, groups[loop], readers) if loop in groups else graph.nodes[loop]
        if len(joint.inputs) + len(joint.outputs) <= MAX_POINTERS and _is_faster(joint, (apart, node), arches):
            groups[loop] = group
    gone = {index for group in groups.values() for index in group[1:]}
    nodes = (
        _joint(graph, groups[index], readers) if index in groups else node
        for index, node in enumerate(graph.nodes)
        if index not in gone
    )
    return replace(graph, nodes=tuple(nodes))


def _pairs(graph: Graph, readers: Mapping[str, set[int]]) -> Iterator[tuple[int, int]]:
    """The positions of kernels that sum rows, each with loops in whose place it can be: first those that compute what
    it sums, the last one before others, then those that read the same."""
    producer = {value.name: index for index, node in enumerate(graph.nodes) for value in node.results}
    barriers = [at for at, node in enumerate(graph.nodes) if is_barrier(node)]
    loops = {at for at, node in enumerate(graph.nodes) if _is_loop(node) and _reductions(node, sums=False)}
    for index, node in enumerate(graph.nodes):
        if not _is_loop(node) or index in loops or not _reductions(node, sums=True):
            continue
        made = {producer[value.name] for value in node.inputs if value.name in producer} & loops
        beside = {at for value in node.inputs if _is_large(value) for at in readers[value.name]} & loops
        after = min((at for value in node.results for at in readers.get(value.name, ())), default=len(graph.nodes))
        for loop in (*sorted(made, reverse=True), *sorted(beside - made)):
            ready = all(producer.get(value.name, -1) <= loop for value in node.inputs)
            if ready and loop < after and not any(min(loop, index) < at < max(loop, index) for at in barriers):
                yield index, loop


def _is_large(value: Value) -> bool:
    return isinstance(value.type, TensorType) and len(value.type.shape) > 1


def _is_loop(node: Node) -> bool:
    """Whether a kernel is one loop, that adds nothing in memory."""
    if node.kind != "kernel" or node.body is None or accumulation.starts(node.body):
        return False
    return all(inner.kind == "op" for inner in node.body.nodes)


def _reductions(node: Node, sums: bool) -> bool:
    """Whether a loop has sums over all rows, or other reductions."""
    assert node.body is not None
    return any(sums_rows(inner) if sums else reduces(inner) and not sums_rows(inner) for inner in node.body.nodes)


def _is_faster(joint: Node, nodes: Sequence[Node], arches: tuple[Arch, ...]) -> bool:
    """`joint` is expected to be faster than `nodes`, one by one, on one of `arches`."""
    return any(_us(joint.body, arch) < sum(_us(node.body, arch) for node in nodes) for arch in arches)


@lru_cache(maxsize=4096)  # layers of a model have equal regions
def _us(body: Graph | None, arch: Arch) -> float:
    """The expected time of the best tactic for a kernel; infinite if there is none."""
    try:
        found = None if body is None else fastest(body, "trial", arch)
    except Unsupported:
        return inf
    return inf if found is None else found.expected_us


def _joint(graph: Graph, group: Sequence[int], readers: Mapping[str, set[int]]) -> Node:
    """The kernel of a loop and of sums, in that order, with the results that other nodes read."""
    nodes = flat([graph.nodes[index] for index in group])
    made = {value.name: value for node in nodes for value in node.results}
    given = {value.name: value for node in nodes for value in node.inputs if value.name not in made}
    results = tuple(value for value in made.values() if readers.get(value.name, set()) - {*group})
    names = {name: Value(f"in{i}", value.type) for i, (name, value) in enumerate(given.items())}
    names |= {name: Value(f"v{i}", value.type) for i, (name, value) in enumerate(made.items(), len(given))}
    inner = tuple(
        replace(
            node,
            args=node.map_inputs(lambda value: names[value.name]),
            outputs=tuple(None if value is None else names[value.name] for value in node.outputs),
            loc=None,
        )
        for node in nodes
    )
    inputs, outputs = (tuple(names[value.name] for value in values) for values in (given.values(), results))
    body = Graph("import", inputs, nodes=inner, outputs=outputs)
    args = tuple((f"in{i}", value) for i, value in enumerate(given.values()))
    return Node("kernel", kernel_name(body), args, results, body, graph.nodes[group[0]].loc)
