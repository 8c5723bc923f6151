"""Kernel nodes that are loops: what is asked of them once operations are fused, and several of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf

from torch_rtx import accumulation
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Loc, Node, Value
from torch_rtx.lowering.fusion import kernel_name
from torch_rtx.lowering.kernels.body_builder import flat, needed
from torch_rtx.lowering.kernels.generate import fastest
from torch_rtx.targets import Arch


def is_loop_node(node: Node) -> bool:
    """Whether a kernel is one loop, that adds nothing in memory."""
    if node.kind != "kernel" or node.body is None or accumulation.starts(node.body):
        return False
    return all(inner.kind == "op" for inner in node.body.nodes)


@lru_cache(maxsize=4096)  # layers of a model have equal regions
def expected_us(body: Graph | None, arch: Arch) -> float:
    """The expected time of the best tactic for a kernel; infinite if there is none."""
    try:
        found = None if body is None else fastest(body, "trial", arch)
    except Unsupported:
        return inf
    return inf if found is None else found.expected_us


def joined(kernels: Sequence[Node], results: Sequence[Value]) -> Node:
    """The loop that computes `results` of several kernels, which are in order, at the location of the last."""
    return kernel_of(needed(flat(kernels), results), results, kernels[-1].loc)


def kernel_of(nodes: Sequence[Node], results: Sequence[Value], loc: Loc | None) -> Node:
    """A kernel node whose body has `nodes`, in order, with the names that `fuse` gives."""
    made = {value.name: value for node in nodes for value in node.results}
    given = {value.name: value for node in nodes for value in node.inputs if value.name not in made}
    names = {name: Value(f"in{i}", value.type) for i, (name, value) in enumerate(given.items())}
    names |= {name: Value(f"v{i}", value.type) for i, (name, value) in enumerate(made.items(), len(given))}
    inner = tuple(
        Node(
            node.kind,
            node.op,
            node.map_inputs(lambda value: names[value.name]),
            tuple(None if value is None else names[value.name] for value in node.outputs),
            node.body,
        )
        for node in nodes
    )
    inputs, outputs = (tuple(names[value.name] for value in values) for values in (given.values(), results))
    body = Graph("import", inputs, nodes=inner, outputs=outputs)
    args = tuple((f"in{i}", value) for i, value in enumerate(given.values()))
    return Node("kernel", kernel_name(body), args, tuple(results), body, loc)
