"""Lets convolutions pad: zeros that a model puts around an image before a convolution, as much on either side, are
padding of the convolution, whose kernel reads no image that is copied with them."""

from __future__ import annotations

from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_map
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, only_user, returned, rewrite, users

CONVOLUTIONS = frozenset((*(f"aten.conv{n}d.default" for n in (1, 2, 3)), "aten.convolution.default"))
PAD = "aten.constant_pad_nd.default"


def fold_padding(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Padding that others read, too, stays."""
    readers, outputs = users(graph), returned(graph)
    # By the padded image: what it was before, and how much the convolution pads instead.
    folded: dict[str, tuple[Attr, tuple[int, ...]]] = {}
    for node in graph.nodes:
        reader = only_user(node.outputs, readers, outputs) if node.op == PAD else None
        if reader is not None and (padding := _padding(node, reader)) is not None:
            folded[node.results[0].name] = node.arg("self"), padding

    def visit(node: Node, rewriter: Rewriter) -> bool:
        image = node.arg("input") if node.op in CONVOLUTIONS else None
        if not isinstance(image, Value) or image.name not in folded:
            return False
        source, padding = folded[image.name]
        args = {**dict(node.args), "input": source, "padding": padding}
        current = {name: attr_map(attr, rewriter.current) for name, attr in args.items()}
        return rewriter.expand(node, lambda: rewriter.emit(node.op, node.loc, **current))

    return rewrite(graph, infer, visit) if folded else graph


def _padding(pad: Node, reader: Node) -> tuple[int, ...] | None:
    """The padding of the convolution `reader` with that of `pad`; None: `pad` has to stay."""
    image, weight, sides = pad.results[0], reader.arg("weight"), _numbers(pad.arg("pad"))
    if reader.op not in CONVOLUTIONS or reader.arg("input") != image or reader.arg("transposed"):
        return None
    if weight == image or not isinstance(weight, Value) or not isinstance(weight.type, TensorType):
        return None
    if pad.arg("value", 0) != 0 or not sides:
        return None
    dims, own = len(weight.type.shape) - 2, _numbers(reader.arg("padding", 0))
    own = own * dims if len(own) == 1 else own
    both = list(zip(sides[::2], sides[1::2], strict=True))[::-1]  # PyTorch begins with the last dimension
    both = [(0, 0)] * (dims - len(both)) + both
    outer, inner = both[: len(both) - dims], both[len(both) - dims :]
    if len(own) != dims or any(map(any, outer)) or any(a != b or a < 0 for a, b in inner):
        return None
    return tuple(size + added for size, (added, _) in zip(own, inner, strict=True))


def _numbers(attr: Attr) -> tuple[int, ...]:
    """A number, or several; none where they are no numbers."""
    found = attr if isinstance(attr, tuple) else (attr,)
    numbers = tuple(size for size in found if type(size) is int)
    return numbers if len(numbers) == len(found) else ()
