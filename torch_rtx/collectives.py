"""Collectives of torch.distributed in graphs: which there are, what they do with memory, and their process groups.

A collective starts on a stream of its own and returns a tensor that is not ready. The call `WAIT` returns the same
tensor, in the same memory, once it is. `held` of that call names what the collective reads until then: so every reader
of the graph, from the memory plan to passes that write in place, sees that this memory is still in use. Nothing else
may read the result of a collective before it is waited for, `check` says whether a graph keeps to that.

Every rank must make the same calls in the same order. So no pass drops, merges or moves collectives, and no recipe of a
weight has one: it would run whenever the weights of one rank change.

The graph names process groups as the engine does, such as `tp`. `bound` gives them the names that they have in a
process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from torch_rtx.errors import InvalidIR
from torch_rtx.ir import Graph, Node, Value, attr_values
from torch_rtx.optable import COLLECTIVES, WAIT

GROUP = "group_name"
REDUCE, REDUCE_IN_PLACE = "_c10d_functional.all_reduce.default", "_c10d_functional.all_reduce_.default"
# They return when their result is there.
FINISHED = frozenset(("_dtensor.shard_dim_alltoall.default",))
# They copy their operands when they start, or work in their memory, and need no others until they are done.
COPYING = {REDUCE, REDUCE_IN_PLACE} | {
    f"_c10d_functional.{name}.default" for name in ("all_reduce_coalesced", "broadcast")
}


def is_collective(node: Node) -> bool:
    """Whether the other ranks of a group take part in the call."""
    return node.op in COLLECTIVES


def is_ordered(node: Node) -> bool:
    """Whether the call has to stay where it is, used or not: a collective, or the wait for one."""
    return node.op in COLLECTIVES or node.op == WAIT


def starts(node: Node) -> bool:
    """Whether the results of the call are ready only when they have been waited for."""
    return node.kind != "fallback" and node.op in COLLECTIVES and node.op not in FINISHED


def held(node: Node) -> tuple[Value, ...]:
    """What a collective reads until it has been waited for."""
    return () if node.op in COPYING or node.op in FINISHED else node.inputs


def waited(node: Node) -> Value | None:
    """The value in whose memory the result of a wait lies; None for other calls."""
    tensor = node.arg("tensor") if node.op == WAIT else None
    return tensor if isinstance(tensor, Value) else None


def check(graph: Graph) -> None:
    """Raises InvalidIR if something other than waits reads the result of a collective, if a result is not waited for,
    if a wait does not hold what the collective reads until then, or if a recipe or a kernel's body has a collective."""
    inner = [weight.recipe for weight in graph.weights] + [node.body for node in graph.nodes]
    for node in (node for body in inner if body is not None for node in nodes_in(body)):
        if is_ordered(node):
            raise InvalidIR(f"{node.op} is in the body of a kernel, or in the recipe of a weight", loc=node.loc)
    pending: dict[str, tuple[Node, bool]] = {}  # by name of a result: the collective, and whether it was waited for
    for node in graph.nodes:
        tensor = waited(node)
        for value in node.inputs:
            if value.name in pending and value != tensor:
                raise InvalidIR(f"{node.op} reads {value.name}, which has to be waited for", loc=node.loc)
        if tensor is not None and tensor.name in pending:
            start, _ = pending[tensor.name]
            kept = set(attr_values(node.arg("held")))
            if not kept.issuperset(held(start)):
                raise InvalidIR(f"the wait for {tensor.name} does not hold what {start.op} reads", loc=node.loc)
            pending[tensor.name] = start, True
        if starts(node):
            pending |= {value.name: (node, False) for value in node.results}
    returned = {value.name for value in attr_values(graph.outputs)}
    for name, (start, done) in pending.items():
        if not done or name in returned:
            raise InvalidIR(f"nothing waits for {name}, a result of {start.op}", loc=start.loc)


def nodes_in(graph: Graph) -> Iterator[Node]:
    """The nodes of `graph`, and those in the bodies of these."""
    for node in graph.nodes:
        yield node
        if node.body is not None:
            yield from nodes_in(node.body)


def groups_of(graph: Graph) -> dict[str, list[Node]]:
    """By name of a process group, the collectives of the graph that it runs."""
    found: dict[str, list[Node]] = {}
    for node in filter(is_collective, graph.nodes):
        name = node.arg(GROUP)
        if not isinstance(name, str):
            raise InvalidIR(f"{node.op} names no process group", loc=node.loc)
        found.setdefault(name, []).append(node)
    return found


def bound(graph: Graph, names: Mapping[str, str]) -> Graph:
    """`graph`, in which the process groups have other names.

    Args:
        names: from the old name of each group to the new one; groups that it lacks keep theirs.
    """
    if not any(map(is_collective, graph.nodes)):
        return graph
    return replace(graph, nodes=tuple(_bound(graph.nodes, names)))


def _bound(nodes: tuple[Node, ...], names: Mapping[str, str]) -> Iterator[Node]:
    for node in nodes:
        name = node.arg(GROUP) if is_collective(node) else None
        if not isinstance(name, str) or name not in names:
            yield node
            continue
        yield replace(node, args=tuple((key, names[name] if key == GROUP else attr) for key, attr in node.args))


def _wait(tensor: torch.Tensor, held: list[torch.Tensor] | None = None) -> torch.Tensor:
    """`tensor`, when the collective that makes it is done; it reads `held` until then."""
    ready: torch.Tensor = torch.ops._c10d_functional.wait_tensor.default(tensor)
    return ready


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_LIBRARY.define("wait(Tensor tensor, Tensor[]? held=None) -> Tensor")
_LIBRARY.impl("wait", _wait, "CompositeExplicitAutograd")
_LIBRARY.impl("wait", lambda tensor, held=None: torch.empty_like(tensor), "Meta")
