"""Kernels that are not launched: their bodies take their place in the graph, and run node by node."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from torch_rtx.ir import Graph, Node, Value
from torch_rtx.runtime.bind import bind

if TYPE_CHECKING:
    from torch_rtx.runtime.launch import Launcher


@dataclass(frozen=True, eq=False)
class Parts:
    """A way to run a kernel node: by a split body (see `kerneltable.Split`), whose kernels are launched.

    Attributes:
        kernels: their launchers, by op.
    """

    body: Graph
    kernels: Mapping[str, Launcher]

    def bound(self, sizes: Mapping[str, int]) -> Parts:
        """The same for a graph in which the symbols that `sizes` names are numbers."""
        return Parts(bind(self.body, sizes), {op: kernel.bound(sizes) for op, kernel in self.kernels.items()})

    def is_for(self, sm: int) -> bool:
        """Whether all of it was built for this SM version."""
        return all(kernel.is_for(sm) for kernel in self.kernels.values())


def launched(ways: Mapping[str, Launcher | Parts]) -> dict[str, Launcher]:
    """Everything that is launched, by op: kernels of nodes, and those inside of split bodies."""
    found: dict[str, Launcher] = {}
    for op, way in ways.items():
        if isinstance(way, Parts):
            found |= way.kernels
        else:
            found[op] = way
    return found


def inline_kernels(graph: Graph, ways: Mapping[str, Launcher | Parts]) -> Graph:
    """`graph` with a body in the place of each kernel that is not launched: its split body where `ways` has one, else
    its own; the same for kernels in bodies.

    The values inside get names of their own. Nodes of kind `op` then stand in a graph of level "fused".
    """
    keep = launched(ways)
    if all(node.kind != "kernel" or node.op in keep for node in graph.nodes):
        return graph
    return replace(graph, nodes=tuple(chain.from_iterable(in_place(graph, ways))))


def in_place(graph: Graph, ways: Mapping[str, Launcher | Parts]) -> list[list[Node]]:
    """Per node of `graph`, the nodes that take its place in `inline_kernels(graph, ways)`."""
    taken = {value.name for value in graph.values()} | graph.syms.keys()
    keep = launched(ways)
    bodies = {op: way.body for op, way in ways.items() if isinstance(way, Parts)}
    return [
        list(_inlined(node, f"k{index}", taken, keep, bodies))
        if node.kind == "kernel" and node.op not in keep
        else [node]
        for index, node in enumerate(graph.nodes)
    ]


def _inlined(
    node: Node, prefix: str, taken: set[str], keep: Container[str], bodies: Mapping[str, Graph]
) -> Iterator[Node]:
    """The nodes of a body of `node`, which read its inputs and define its outputs."""
    body = bodies.get(node.op, node.body)
    assert body is not None  # the verifier sees to it
    values = {inner.name: outer for inner, outer in zip(body.inputs, node.inputs, strict=True)}
    copies: list[tuple[Value, Value]] = []
    for inner, outer in zip(body.outputs, (value for value in node.outputs if value is not None), strict=True):
        assert isinstance(inner, Value)
        if inner.name in values:  # an input, or another output too: a kernel writes each into memory of its own
            copies.append((inner, outer))
        else:
            values[inner.name] = outer
    for step in body.nodes:
        for value in step.outputs:
            if value is not None and value.name not in values:
                values[value.name] = Value(_fresh(f"{prefix}_{value.name}", taken), value.type)
        args = step.map_inputs(lambda value: values[value.name])
        outputs = tuple(None if value is None else values[value.name] for value in step.outputs)
        made = replace(step, args=args, outputs=outputs, loc=step.loc or node.loc)
        if made.kind == "kernel" and made.op not in keep:
            yield from _inlined(made, prefix, taken, keep, bodies)
        else:
            yield made
    for inner, outer in copies:
        yield Node("op", "aten.clone.default", (("self", values[inner.name]),), (outer,), None, node.loc)


def _fresh(name: str, taken: set[str]) -> str:
    """`name`, or a longer one that is not taken yet; taken from now on."""
    while name in taken:
        name += "x"
    taken.add(name)
    return name
