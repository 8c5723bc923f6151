"""Kernels that are not launched: their bodies take their place in the graph, and run node by node."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from itertools import chain

from torch_rtx.ir import Graph, Node, Value, kernel_nodes


def inline_kernels(graph: Graph, keep: Container[str]) -> Graph:
    """`graph` with the body of each kernel in its place, except those whose `op` is in `keep`; the same for kernels in
    bodies.

    The values inside get names of their own. Nodes of kind `op` then stand in a graph of level "fused".
    """
    if all(node.kind != "kernel" or node.op in keep for node in graph.nodes):
        return graph
    return replace(graph, nodes=tuple(chain.from_iterable(in_place(graph, keep))))


def in_place(graph: Graph, keep: Container[str]) -> list[list[Node]]:
    """Per node of `graph`, the nodes that take its place in `inline_kernels(graph, keep)`."""
    taken = {value.name for value in graph.values()} | graph.syms.keys()
    return [
        list(_inlined(node, f"k{index}", taken, keep)) if node.kind == "kernel" and node.op not in keep else [node]
        for index, node in enumerate(graph.nodes)
    ]


def with_bodies(graph: Graph, bodies: Mapping[str, Graph]) -> Graph:
    """`graph` with other bodies in the place of kernels, by the `op` of their nodes; kernels in these stay kernels."""
    inside = {node.op for body in bodies.values() for node in kernel_nodes(body)}
    keep = inside | {node.op for node in graph.nodes if node.op not in bodies}
    nodes = (replace(node, body=bodies[node.op]) if node.op in bodies else node for node in graph.nodes)
    return inline_kernels(replace(graph, nodes=tuple(nodes)), keep)


def _inlined(node: Node, prefix: str, taken: set[str], keep: Container[str]) -> Iterator[Node]:
    """The nodes of the body of `node`, which read its inputs and define its outputs."""
    assert node.body is not None  # the verifier sees to it
    values = {inner.name: outer for inner, outer in zip(node.body.inputs, node.inputs, strict=True)}
    copies: list[tuple[Value, Value]] = []
    for inner, outer in zip(node.body.outputs, (value for value in node.outputs if value is not None), strict=True):
        assert isinstance(inner, Value)
        if inner.name in values:  # an input, or another output too: a kernel writes each into memory of its own
            copies.append((inner, outer))
        else:
            values[inner.name] = outer
    for step in node.body.nodes:
        for value in step.outputs:
            if value is not None and value.name not in values:
                values[value.name] = Value(_fresh(f"{prefix}_{value.name}", taken), value.type)
        args = step.map_inputs(lambda value: values[value.name])
        outputs = tuple(None if value is None else values[value.name] for value in step.outputs)
        made = replace(step, args=args, outputs=outputs, loc=step.loc or node.loc)
        if made.kind == "kernel" and made.op not in keep:
            yield from _inlined(made, prefix, taken, keep)
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
