"""Writes pooling of windows with many elements out as one pooling along each axis.

A loop reads every element of a window. The largest element of a rectangle is that of the largest elements of its rows,
and likewise the average, so that 9 and 9 loads take the place of 81.
"""

from __future__ import annotations

from math import prod

from torch_rtx.ir import Attr, Graph, Node, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.ops.pooling import LARGEST
from torch_rtx.lowering.rewrite import Rewriter, rewrite

RANKS = {f"aten.{kind}_pool{rank}d.default": rank for kind in ("max", "avg") for rank in (2, 3)}


def separate_pools(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Averages separate where all windows have the same number of elements."""

    def visit(node: Node, rewriter: Rewriter) -> bool:
        sizes = _each(node, "kernel_size") if node.op in RANKS else []
        if prod(sizes) <= LARGEST or not _is_uniform(node):
            return False
        return rewriter.expand(node, lambda: _separated(node, sizes, rewriter))

    return rewrite(graph, infer, visit)


def _is_uniform(node: Node) -> bool:
    """Each window has the same number of elements, and is not the whole image, whose average is one reduction."""
    if "max" in node.op:
        return True
    padded = any(_each(node, "padding", 0))
    bordered = padded and not node.arg("count_include_pad", True)
    sizes = tuple(_each(node, "kernel_size"))
    if not padded and sizes == type_of(argument(node, "self")).shape[-len(sizes) :]:
        return False
    return not bordered and not node.arg("ceil_mode", False) and node.arg("divisor_override") is None


def _each(node: Node, name: str, default: int = 1) -> list[int]:
    """An argument for each axis, which one number may stand for; [] if a number is not known."""
    given = node.arg(name, default)
    found = list(given) if isinstance(given, tuple) else [given]
    found = found * RANKS[node.op] if len(found) == 1 else found
    return found if all(isinstance(one, int) for one in found) else []  # type: ignore[return-value]


def _separated(node: Node, sizes: list[int], rewriter: Rewriter) -> Value:
    """The last axis first: its elements are neighbours.

    Raises:
        Unsupported: operands that the call does not take.
    """
    value = rewriter.current(argument(node, "self"))
    assert isinstance(value, Value)
    dtype, strides = type_of(value).dtype, _each(node, "stride") if node.arg("stride") else sizes
    padding = _each(node, "padding", 0)
    wide = "avg" in node.op and dtype in ("f16", "bf16")
    if wide:
        value = rewriter.emit("aten._to_copy.default", node.loc, self=value, dtype="f32")
    for axis in reversed(range(len(sizes))):

        def alone(one: int, other: int, axis: int = axis) -> tuple[int, ...]:
            return tuple(one if at == axis else other for at in range(len(sizes)))

        args: dict[str, Attr] = {"kernel_size": alone(sizes[axis], 1), "stride": alone(strides[axis], 1)}
        args["padding"] = alone(padding[axis], 0)
        if "max" in node.op:
            args |= {"dilation": alone(_each(node, "dilation")[axis], 1), "ceil_mode": node.arg("ceil_mode", False)}
        value = rewriter.emit(node.op, node.loc, self=value, **args)
    return rewriter.emit("aten._to_copy.default", node.loc, self=value, dtype=dtype) if wide else value
