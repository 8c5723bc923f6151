"""Merges linear layers that are one layer of each position of a tensor, as of the inputs of a cell in a loop:

    linear(select(x, 1, 0), w), linear(select(x, 1, 1), w), ...  ->  select(linear(permute(x, [1, 0, 2]), w), 0, 0), ...

The loop has to wait for its state alone, and one product of all positions uses the GPU better than many small ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch_rtx.ir import Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, escaping, rewrite

LINEAR, SELECT = "aten.linear.default", "aten.select.int"


class Step(NamedTuple):
    """A layer of one position: what all of them share, and the position."""

    source: Value
    dim: int
    weights: tuple[str, ...]
    position: int


def merge_steps(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Layers merge where they are of all positions along a dimension, so that the merged
    one computes nothing more. Results keep their strides, and those that the caller gets their own memory."""
    kept = escaping(graph)
    producer = {value.name: node for node in graph.nodes for value in node.results}
    weights = {weight.value.name for weight in graph.weights} - graph.written
    candidates = (node for node in graph.nodes if not any(value.name in kept for value in node.results))
    steps = {id(node): step for node in candidates if (step := _step(node, producer, weights)) is not None}
    places: dict[tuple[object, ...], set[int]] = {}
    for step in steps.values():
        places.setdefault(step[:-1], set()).add(step.position)
    made: dict[tuple[object, ...], Value] = {}

    def visit(node: Node, rewriter: Rewriter) -> bool:
        step = steps.get(id(node))
        if step is None or not 1 < len(places[step[:-1]]) == _sizes(step.source)[step.dim]:
            return False
        if step[:-1] not in made:
            made[step[:-1]] = _whole(node, step, rewriter)
        whole = made[step[:-1]]
        rewriter.replace(node.outputs[0], rewriter.emit(SELECT, node.loc, self=whole, dim=0, index=step.position))
        return True

    return rewrite(graph, infer, visit)


def _sizes(value: Value) -> tuple[object, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.shape


def _step(node: Node, producer: Mapping[str, Node], weights: set[str]) -> Step | None:
    """`node` as a layer of one position, with parameters that the graph does not write; None if it is none."""
    if node.op != LINEAR or node.kind != "op":
        return None
    source, *own = node.inputs
    select = producer.get(source.name)
    if select is None or select.op != SELECT or any(value.name not in weights for value in own):
        return None
    (whole,), dim, index = select.inputs, select.arg("dim"), select.arg("index")
    assert isinstance(dim, int)
    sizes = _sizes(whole)
    size, axis = sizes[dim], dim % len(sizes)
    if not isinstance(size, int) or not isinstance(index, int) or len(sizes) < 3 or axis == len(sizes) - 1:
        return None
    return Step(whole, axis, tuple(value.name for value in own), index % size)


def _whole(node: Node, step: Step, rewriter: Rewriter) -> Value:
    """The layer of all positions, which come first."""
    order = (step.dim, *(axis for axis in range(len(_sizes(step.source))) if axis != step.dim))
    source = rewriter.current(step.source)
    if step.dim:
        source = rewriter.emit("aten.permute.default", node.loc, self=source, dims=order)
    return rewriter.emit(LINEAR, node.loc, **{**dict(node.args), "input": source})
