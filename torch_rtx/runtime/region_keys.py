"""What makes regions equal: their operations and types, whatever model they come from and however it was captured."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import gcd

from torch_rtx.ir import Dim, Graph, Node, TensorType, Type, Value, attr_map
from torch_rtx.op_work import kind_in_float32
from torch_rtx.targets import EXACT, HIGHEST, Float32

SLICE = "aten.slice.Tensor"
ALIGNED = 64  # elements: the start of a slice that is a multiple of so many is as good as any other


def plain(body: Graph) -> Graph:
    """A body without locations, in which equal layouts have equal strides. Where the first sizes are 1, no element
    depends on their strides, which PyTorch's kernels and its meta functions set differently: they become what they
    are in a contiguous tensor."""

    def value(given: Value) -> Value:
        return Value(given.name, _plain_type(given.type))

    def changed(node: Node) -> Node:
        outputs = tuple(None if one is None else value(one) for one in node.outputs)
        return Node(
            node.kind, node.op, node.map_inputs(value), outputs, None if node.body is None else plain(node.body)
        )

    inputs, outputs = tuple(map(value, body.inputs)), tuple(attr_map(one, value) for one in body.outputs)
    return replace(body, inputs=inputs, nodes=tuple(map(changed, body.nodes)), outputs=outputs)


def region_key(body: Graph, float32: Float32 = EXACT) -> str:
    """A digest of the operations and types of a region, without names and locations, and how exactly it multiplies
    float32 if that is not as float32 does. Bodies of equal keys have equal `plain` forms."""
    return _digest(_unnamed(plain(body)), float32.of(kind_in_float32(body)))


def kin_key(body: Graph, float32: Float32 = EXACT) -> str:
    """A key that regions share which differ in the starts of slices alone, as layers do that read parts of one tensor:
    the same tactic is the fastest for all."""
    return _digest(_unplaced(_unnamed(plain(body))), float32.of(kind_in_float32(body)))


def _digest(body: Graph, level: str | None) -> str:
    key = hashlib.sha256(str(body).encode()).hexdigest()[:32]
    return key if level == HIGHEST else f"{key} {level}"


def _plain_type(given: Type) -> Type:
    if not isinstance(given, TensorType) or given.shape[:1] != (1,):
        return given
    ones = next((place for place, size in enumerate(given.shape) if size != 1), len(given.shape))
    pairs = list(zip(given.shape[ones:], given.strides[ones:], strict=True))
    spans = [size * stride for size, stride in pairs if isinstance(size, int) and isinstance(stride, int)]
    if len(spans) < len(pairs):
        return given
    first: Dim = max(spans, default=1)
    return replace(given, strides=(first,) * ones + given.strides[ones:])


def _unnamed(body: Graph) -> Graph:
    """`body` without the names of kernels in it, which depend on the sizes of the capture."""
    nodes = (
        node if node.body is None else replace(node, op=node.kind, body=_unnamed(node.body)) for node in body.nodes
    )
    return replace(body, nodes=tuple(nodes))


def _unplaced(body: Graph) -> Graph:
    """`body` with slices of the same length and alignment in one place."""
    return replace(body, nodes=tuple(map(_node_unplaced, body.nodes)))


def _node_unplaced(node: Node) -> Node:
    if node.body is not None:
        return replace(node, body=_unplaced(node.body))
    start, end = node.arg("start", 0), node.arg("end")
    if node.op != SLICE or not isinstance(start, int) or not isinstance(end, int) or start < 0 or end < 0:
        return node
    placed = {"start": gcd(start, ALIGNED), "end": end - start}
    return replace(node, args=tuple((name, placed.get(name, given)) for name, given in node.args))
