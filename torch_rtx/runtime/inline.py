"""A graph as it is run: kernel nodes that are not launched as one kernel become the body of their tactic, or their own
body, and a kernel that adds to an operand in memory owns this operand, unless the graph writes to it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.ir import Graph, Node, Value, attr_values
from torch_rtx.tactics import OWN, Tactic

K = TypeVar("K")


def launched(tactics: Mapping[str, Tactic[K]]) -> dict[str, K]:
    """All kernels of `tactics`, by op: those of whole nodes and those in bodies."""
    return {
        op if key == OWN else key: kernel for op, tactic in tactics.items() for key, kernel in tactic.kernels.items()
    }


def inline_kernels(graph: Graph, tactics: Mapping[str, Tactic[K]]) -> Graph:
    """`graph` with a body inlined in place of each kernel node that is not launched: that of its tactic, else its own.
    Kernel nodes in bodies are treated alike.

    What a kernel adds to is then the result of a kernel or of a copy, and nothing needs its old contents. Values in
    bodies get fresh names. The result has level "fused" and may contain nodes of kind `op`.
    """
    nodes = tuple(chain.from_iterable(in_place(graph, tactics)))
    same = len(nodes) == len(graph.nodes) and all(a is b for a, b in zip(nodes, graph.nodes, strict=True))
    return graph if same else replace(graph, nodes=nodes)


def in_place(graph: Graph, tactics: Mapping[str, Tactic[K]]) -> list[list[Node]]:
    """Per node of `graph`, the nodes that take its place in `inline_kernels(graph, tactics)`."""
    taken = {value.name for value in graph.values()} | graph.syms.keys()
    keep = launched(tactics)
    bodies = {op: tactic.body for op, tactic in tactics.items() if tactic.body is not None}
    lists = [
        list(_inlined(node, f"k{index}", taken, keep, bodies))
        if node.kind == "kernel" and node.op not in keep
        else [node]
        for index, node in enumerate(graph.nodes)
    ]
    return _owned(graph, lists, taken) if any(map(continued, chain.from_iterable(lists))) else lists


def _owned(graph: Graph, lists: list[list[Node]], taken: set[str]) -> list[list[Node]]:
    """`lists` with a copy before each kernel that makes a new tensor by additions to an operand which has memory that
    others need, or memory at an address that kernels may not take."""
    nodes = [*chain.from_iterable(lists)]
    base = aten.bases(replace(graph, nodes=tuple(nodes)))
    made = {value.name for node in nodes if node.kind == "kernel" for value in node.results}
    kept = {base.get(value.name, value.name) for value in attr_values(graph.outputs)}
    last: dict[str, Node] = {}  # that needs the memory of a value
    for node in nodes:
        names = {base.get(value.name, value.name) for value in node.inputs}
        last.update(dict.fromkeys(names, node))
        kept |= names if node.kind == "fallback" else set()

    def owned(node: Node) -> Iterator[Node]:
        for name, operand in continued(node).items():
            if name in node.updates:
                continue
            if operand.name not in made or operand.name in kept or last[operand.name] is not node:
                copy = Value(_fresh(f"{operand.name}_begun", taken), operand.type)
                yield Node("op", "aten.clone.default", (("self", operand),), (copy,), None, node.loc)
                names = {operand.name: copy}
                node = replace(node, args=node.map_inputs(lambda value, n=names: n.get(value.name, value)))  # type: ignore[misc]
        yield node

    return [[*chain.from_iterable(map(owned, nodes))] for nodes in lists]


def _inlined(
    node: Node, prefix: str, taken: set[str], keep: Container[str], bodies: Mapping[str, Graph]
) -> Iterator[Node]:
    """The nodes of the body of `node`, on the inputs and outputs of `node`."""
    body = bodies.get(node.op, node.body)
    assert body is not None  # by the verifier
    values = {inner.name: outer for inner, outer in zip(body.inputs, node.inputs, strict=True)}
    copies: list[tuple[Value, Value]] = []
    for inner, outer in zip(body.outputs, (value for value in node.outputs if value is not None), strict=True):
        assert isinstance(inner, Value)
        if inner.name in values:  # an input or a repeated output: the copy has memory of its own
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
    """`name`, or a longer one that is free; adds it to `taken`."""
    while name in taken:
        name += "x"
    taken.add(name)
    return name
