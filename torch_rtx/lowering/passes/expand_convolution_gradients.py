"""Computes gradients of convolutions one by one: those of the image apart from those of the weight.

A convolution by windows of one pixel is a product of all pixels with a matrix, and so is the gradient of its image. As
a product it has an epilogue, in which gradients of activations and sums of residual branches are computed. The gradient
of the weight remains a call.

Other gradients are two calls where the weight's needs an image that the backward computes again, such as an activation
behind a norm: the image's needs nothing of it but its size, and the gradient of the norm, which follows from that,
computes the activation beside itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch_rtx.dtypes import HALVES
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.lowering.widening import is_elementwise

MAX_AGAIN = 32  # values between an image and what it is computed of
GRADIENTS = "aten.convolution_backward.default"
PLAIN = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def expand_convolution_gradients(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Products of images that do not lie channels-last, and in float32, are left to
    libraries."""
    producer = {value.name: node for node in graph.nodes for value in node.results}

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op != GRADIENTS:
            return False
        if not _is_product(node):
            return _computed_apart(node, producer, rewriter)
        image, *others = node.outputs
        assert image is not None

        def call(op: str, /, **args: Attr) -> Value:
            return rewriter.emit(f"aten.{op}", node.loc, **args)

        gradient, weight = (rewriter.current(node.arg(name)) for name in ("grad_output", "weight"))  # type: ignore[arg-type]
        filters, channels = type_of(weight).shape[:2]
        pixels = dim_expr("*", 1, *(size for axis, size in enumerate(type_of(gradient).shape) if axis != 1))
        rows = call("permute.default", self=gradient, dims=_to_rows(len(type_of(gradient).shape)))
        *sizes, _ = type_of(rows).shape
        rows = call("view.default", self=rows, size=(pixels, filters))
        matrix = call("view.default", self=weight, size=(filters, channels))
        found = call("mm.default", self=rows, mat2=matrix)
        found = call("view.default", self=found, size=(*sizes, channels))
        found = call("permute.default", self=found, dims=_from_rows(len(sizes) + 1))
        rewriter.replace(image, found)
        if any(others):
            mask = (False, *(other is not None for other in others))
            rest = {**dict(node.args), "output_mask": mask}
            rewriter.keep(Node(node.kind, node.op, tuple(rest.items()), (None, *others), None, node.loc))
        return True

    return rewrite(graph, infer, visit)


def _computed_apart(node: Node, producer: Mapping[str, Node], rewriter: Rewriter) -> bool:
    """Two calls, if the image is computed again; the one for its gradient gets another image of that type."""
    source = _made_of(node, producer)
    if source is None or None in node.outputs[:2] or node.arg("transposed"):
        return False
    image, *others = node.outputs
    for outputs, given in (((image, None, None), {"input": source}), ((None, *others), {})):
        mask = tuple(output is not None for output in outputs)
        args = {**dict(node.args), **given, "output_mask": mask}
        rewriter.keep(Node(node.kind, node.op, tuple(args.items()), outputs, None, node.loc))
    return True


def _made_of(node: Node, producer: Mapping[str, Node]) -> Value | None:
    """What an image is computed of, element by element, that is an input of the graph, of the image's type."""
    image = node.arg("input")
    assert isinstance(image, Value)
    left, seen = [image], set[str]()
    while left and len(seen) < MAX_AGAIN:
        value = left.pop()
        seen.add(value.name)
        maker = producer.get(value.name)
        if maker is None:
            if value.type == image.type and value != image:
                return value
        elif is_elementwise(maker):
            left += [one for one in maker.inputs if one.name not in seen]
    return None


def _is_product(node: Node) -> bool:
    """The gradient of the image is wanted, and is a product whose factors and result lie as rows of channels."""
    image, weight = node.outputs[0], node.arg("weight")
    if image is None or not isinstance(weight, Value) or node.arg("transposed") or node.arg("groups") != 1:
        return False
    given = [type_of(node.arg("grad_output")), type_of(image)]
    window = type_of(weight).shape[2:]
    plain = all(set(_numbers(node.arg(name))) <= {value} for name, value in PLAIN.items())
    return plain and set(window) == {1} and type_of(image).dtype in HALVES and all(map(_lies_by_pixels, given))


def _numbers(attr: Attr) -> tuple[Attr, ...]:
    return attr if isinstance(attr, tuple) else (attr,)


def _lies_by_pixels(type_: TensorType) -> bool:
    """Channels-last, densely."""
    length: Attr = 1
    for axis in reversed(_to_rows(len(type_.shape))):
        if type_.strides[axis] != length:
            return False
        length = dim_expr("*", length, type_.shape[axis])  # type: ignore[arg-type]
    return True


def _to_rows(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def _from_rows(rank: int) -> tuple[int, ...]:
    return (0, rank - 1, *range(1, rank - 1))
