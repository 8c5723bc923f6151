"""Moves a 1x1 convolution before the interpolation of its input: mixing channels and resampling positions commute.

    conv(cat(up(x), up(y), z))  =  up(conv_x(x)) + up(conv_y(y)) + conv_z(z)

So the product has the positions of the small images. Decoders that join the scales of an image end this way, and spend
most of their time in that convolution. Sums are in float32 and round once, as those of the one convolution do.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.lowering.passes.simplify import RESAMPLING
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

CONV, CAT = "aten.conv2d.default", "aten.cat.default"
HALVES = ("f16", "bf16")
LARGER = 2  # times as many positions as before: fewer are not worth a kernel


@dataclass(frozen=True)
class _Part:
    """A range of the channels of a convolution's input: `value`, which `resampled` makes larger, if that is a node."""

    value: Value
    resampled: Node | None


def mix_before_resampling(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Weights of the parts are ranges of the convolution's own."""
    found, kept = users(graph), returned(graph)
    producer = {value.name: node for node in graph.nodes for value in node.results}
    weights = {weight.value.name for weight in graph.weights} - graph.written

    def only(value: Value, reader: Node) -> Node | None:
        """The call that makes a value for one reader alone."""
        node = producer.get(value.name)
        sole = found.get(value.name, []) == [reader] and value.name not in kept
        return node if node is not None and node.kind == "op" and sole else None

    def visit(node: Node, rewriter: Rewriter) -> bool:
        weight, image = node.arg("weight"), node.arg("input")
        if node.op != CONV or not isinstance(image, Value) or not isinstance(weight, Value):
            return False
        if weight.name not in weights or not _mixes_channels(node):
            return False
        joined = only(image, node)
        is_cat = joined is not None and joined.op == CAT and joined.arg("dim", 0) == 1
        given = joined.inputs if is_cat and joined is not None else (image,)
        reader = joined if is_cat and joined is not None else node
        parts = []
        for value in given:
            before = only(value, reader)
            resampled = before if before is not None and _enlarges(before, _shape(weight)[0]) else None
            parts.append(_Part(resampled.inputs[0] if resampled else value, resampled))
        if not any(part.resampled for part in parts) or len({value.name for value in given}) < len(given):
            return False
        start = len(rewriter.nodes)
        try:
            total = _mixed(node, parts, rewriter)
        except Unsupported:
            del rewriter.nodes[start:]
            return False
        rewriter.replace(node.outputs[0], total)
        return True

    return rewrite(graph, infer, visit)


def _shape(value: Value) -> tuple[Dim, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.shape


def _mixes_channels(node: Node) -> bool:
    """A convolution of single positions, one by one."""
    (_, _, *window), result = _shape(node.inputs[1]), node.outputs[0]
    plain = (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1))
    return result is not None and window == [1, 1] and all(node.arg(name, usual) == usual for name, usual in plain)


def _enlarges(node: Node, channels: Dim) -> bool:
    """`node` makes an image larger that has at least as many `channels`."""
    if node.op not in RESAMPLING or len(node.results) != 1:
        return False
    before, after = _shape(node.inputs[0]), _shape(node.results[0])
    if not isinstance(channels, int) or not isinstance(before[1], int) or channels > before[1]:
        return False
    return typical(dim_expr("*", *after[2:])) >= LARGER * typical(dim_expr("*", *before[2:]))


def _mixed(node: Node, parts: list[_Part], rewriter: Rewriter) -> Value:
    """The sum of the convolutions of all parts."""

    def call(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(op, node.loc, **args)

    (result,) = node.results
    assert isinstance(result.type, TensorType)
    dtype = "f32" if result.type.dtype in HALVES else result.type.dtype
    ends = [*accumulate(_channels(part) for part in parts)]
    total: Value | None = None
    for part, end in zip(parts, ends, strict=True):
        weight = rewriter.current(node.inputs[1])
        if len(parts) > 1:
            weight = call("aten.slice.Tensor", self=weight, dim=1, start=end - _channels(part), end=end)
        shape = (*_shape(result)[:2], *_shape(part.value)[2:])
        types = _like(part.value, shape, result.type.dtype)
        found = rewriter.emit(CONV, node.loc, types, input=rewriter.current(part.value), weight=weight)
        found = _cast(found, dtype, node, rewriter)
        if part.resampled is not None:
            args = {name: found if attr == part.value else attr for name, attr in part.resampled.args}
            found = rewriter.emit(part.resampled.op, node.loc, _like(found, _shape(result), dtype), **args)
        total = found if total is None else call("aten.add.Tensor", self=total, other=found)
    assert total is not None
    bias = node.arg("bias")
    if isinstance(bias, Value):
        column = call("aten.view.default", self=rewriter.current(bias), size=(-1, 1, 1))
        total = call("aten.add.Tensor", self=total, other=column)
    total = _cast(total, result.type.dtype, node, rewriter)
    if total.type != result.type:
        form = "contiguous_format" if result.type.strides == contiguous(result.type.shape) else "channels_last"
        total = call("aten.clone.default", self=total, memory_format=form)
    if total.type != result.type:
        raise Unsupported("another layout")
    return total


def _like(image: Value, shape: tuple[Dim, ...], dtype: str) -> tuple[TensorType] | None:
    """The type of a result of this shape of a call that keeps the layout of a dense image, which inference does not
    give for open sizes; None: the image has another layout."""
    assert isinstance(image.type, TensorType)
    for layout in (contiguous, _channels_last):
        if image.type.strides == layout(image.type.shape):
            return (TensorType(dtype, shape, layout(shape)),)
    return None


def _channels_last(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    _, channels, height, width = shape
    return dim_expr("*", height, width, channels), 1, dim_expr("*", width, channels), channels


def _channels(part: _Part) -> int:
    count = _shape(part.value)[1]
    if not isinstance(count, int):
        raise Unsupported("channels of an open number")
    return count


def _cast(value: Value, dtype: str, node: Node, rewriter: Rewriter) -> Value:
    assert isinstance(value.type, TensorType)
    if value.type.dtype == dtype:
        return value
    return rewriter.emit("aten._to_copy.default", node.loc, self=value, dtype=dtype)
