"""Writes running sums of long rows out as those of chunks, to which the sum of all chunks before is added.

A kernel holds the row of a running sum in registers. Chunks of a long row fit, and are summed side by side.
"""

from __future__ import annotations

from torch_rtx.dtypes import register
from torch_rtx.ir import Attr, Graph, Node, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.rows import PERSISTENT
from torch_rtx.lowering.rewrite import Rewriter, rewrite

CUMSUM = "aten.cumsum.default"
CHUNK = 1024


def split_scans(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Rows of a symbolic size are left."""

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op != CUMSUM:
            return False
        return rewriter.expand(node, lambda: _split(node, rewriter))

    return rewrite(graph, infer, visit)


def _split(node: Node, rewriter: Rewriter) -> Value | None:
    """The running sum; None if its row is short, or so long that there would be too many chunks.

    Raises:
        Unsupported: operands that the calls do not take.
    """

    def call(op: str, /, **args: Attr) -> Value:
        return rewriter.emit(f"aten.{op}", node.loc, **args)

    value, dim = rewriter.current(argument(node, "self")), node.arg("dim")
    assert isinstance(value, Value)
    assert isinstance(dim, int)
    shape, dtype = type_of(value).shape, type_of(node.outputs[0]).dtype
    axis = dim % max(len(shape), 1)
    size = shape[axis] if shape else 1
    if not isinstance(size, int) or not PERSISTENT < size <= PERSISTENT * CHUNK:
        return None
    held, count = register(dtype), -(-size // CHUNK)
    first, rest = shape[:axis], shape[axis + 1 :]
    if size % CHUNK:
        value = call("constant_pad_nd.default", self=value, pad=(*[0, 0] * len(rest), 0, count * CHUNK - size))
    chunks = call("view.default", self=value, size=(*first, count, CHUNK, *rest))
    running = call("cumsum.default", self=chunks, dim=axis + 1, dtype=held)
    totals = call("sum.dim_IntList", self=chunks, dim=(axis + 1,), dtype=held)
    earlier = call("constant_pad_nd.default", self=totals, pad=(*[0, 0] * len(rest), 1, -1))  # the chunk before
    start = call("cumsum.default", self=earlier, dim=axis, dtype=held)
    total = call("add.Tensor", self=running, other=call("unsqueeze.default", self=start, dim=axis + 1))
    found = call("view.default", self=total, size=(*first, count * CHUNK, *rest))
    if size % CHUNK:
        found = call("slice.Tensor", self=found, dim=axis, start=0, end=size)
    if held != dtype:
        return call("_to_copy.default", self=found, dtype=dtype)
    return call("clone.default", self=found, memory_format="contiguous_format") if size % CHUNK else found
