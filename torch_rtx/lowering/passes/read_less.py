"""Kernels compute again what they would read, if they read everything that it is made of anyway.

The gradient of a batch norm and of the activation behind it reads the gradient, the input of the norm, and, for the
sign, the activation. Where the backward computes that again from the input, for the gradient of a weight, the loop may
as well do so for itself: the norm's input and statistics of channels are in its registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch_rtx.ir import Graph, Node, TensorType, Value
from torch_rtx.lowering.effects import is_barrier
from torch_rtx.lowering.fusion import MAX_POINTERS
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import flat, needed
from torch_rtx.lowering.kernels.memory_model import bytes_of
from torch_rtx.lowering.loop_nodes import expected_us, is_loop_node, joined
from torch_rtx.lowering.widening import is_elementwise
from torch_rtx.targets import Arch, Target

MAX_AGAIN = 16  # calls that are computed again for an operand
MINOR = 64  # times fewer bytes than an operand: what costs nothing to read in addition


def read_less(graph: Graph, infer: Inference, targets: tuple[Target, ...]) -> Graph:
    """Level import, after `fuse`, to the same level.

    Args:
        targets: an operand is computed again where that is expected to be faster on one of these.
    """
    arches = tuple(dict.fromkeys(target.arch for target in targets))
    producer: dict[str, tuple[int, Node]] = {}
    nodes: list[Node] = []
    epoch = 0
    for node in graph.nodes:
        epoch += is_barrier(node)
        found = _reading_less(node, producer, epoch, arches) if is_loop_node(node) else node
        producer.update({value.name: (epoch, found) for value in node.results})
        nodes.append(found)
        epoch += is_barrier(node)
    return replace(graph, nodes=tuple(nodes))


def _reading_less(node: Node, producer: Mapping[str, tuple[int, Node]], epoch: int, arches: tuple[Arch, ...]) -> Node:
    """`node`, or a kernel with the same results that reads fewer bytes."""
    for value in node.inputs:
        made_in, maker = producer.get(value.name, (-1, node))
        if made_in != epoch or not is_loop_node(maker) or not _is_at_hand(value, maker, node):
            continue
        found = joined([maker, node], node.results)
        if len(found.inputs) + len(found.outputs) > MAX_POINTERS:
            continue
        if any(expected_us(found.body, arch) < expected_us(node.body, arch) for arch in arches):
            node = found
    return node


def _is_at_hand(value: Value, maker: Node, reader: Node) -> bool:
    """Whether `value`, which `maker` computes, is made, element by element, of what `reader` reads, and of little
    else."""
    steps = needed(flat([maker]), [value])
    if len(steps) > MAX_AGAIN or not isinstance(value.type, TensorType) or not all(map(is_elementwise, steps)):
        return False
    made = {result.name for step in steps for result in step.results}
    read = {one.name: one for step in steps for one in step.inputs if one.name not in made}
    known = {one.name for one in reader.inputs}
    others = [one.type for name, one in read.items() if name not in known]
    most = bytes_of(value.type) // MINOR
    return any(name in known for name in read) and all(
        isinstance(other, TensorType) and bytes_of(other) <= most for other in others
    )
