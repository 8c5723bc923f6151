"""Gradients of tables of few rows, such as those of types of tokens, as sums: a row of the table gets the sum of the
gradients of its look-ups.

Thousands of look-ups would add to the same few numbers in memory, and wait for each other. Sums are reductions like any
other: they read the gradient together with those for weights and biases around them, and add in a fixed order.
"""

from __future__ import annotations

from torch_rtx.dtypes import FLOATS
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.accumulate import EMBEDDING
from torch_rtx.lowering.rewrite import Rewriter, rewrite

MAX_ROWS = 4  # each is a sum over all look-ups


def sum_few_rows(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Gradients of embeddings by frequency remain calls."""

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op != EMBEDDING or not _has_few_rows(node):
            return False
        (result,) = node.results
        sums = [_sum_of_row(node, row, rewriter) for row in range(node.arg("num_weights"))]  # type: ignore[arg-type]
        found = rewriter.emit("aten.stack.default", node.loc, (result.type,), tensors=tuple(sums), dim=0)
        rewriter.replace(result, found)
        return True

    return rewrite(graph, infer, visit)


def _has_few_rows(node: Node) -> bool:
    """Whether the table is small, and kernels sum its dtype; not for a single look-up, where nothing is summed."""
    rows, indices = node.arg("num_weights"), node.arg("indices")
    if not isinstance(rows, int) or not 1 <= rows <= MAX_ROWS or node.arg("scale_grad_by_freq") is not False:
        return False
    (result,) = node.results
    is_float = isinstance(result.type, TensorType) and result.type.dtype in FLOATS
    return is_float and isinstance(indices, Value) and isinstance(indices.type, TensorType) and bool(indices.type.shape)


def _sum_of_row(node: Node, row: int, rewriter: Rewriter) -> Value:
    """The sum of the gradients of the look-ups of `row`; zeros for padding."""
    gradient, indices = (rewriter.current(node.arg(name)) for name in ("grad_output", "indices"))  # type: ignore[arg-type]
    assert isinstance(gradient, Value)
    assert isinstance(gradient.type, TensorType)
    if row == node.arg("padding_idx"):
        size, dtype = gradient.type.shape[-1:], gradient.type.dtype
        zeros: dict[str, Attr] = {"size": size, "fill_value": 0, "dtype": dtype, "device": gradient.type.device}
        return rewriter.emit("aten.full.default", node.loc, (TensorType(dtype, size, (1,)),), **zeros)
    others = rewriter.emit("aten.ne.Scalar", node.loc, self=indices, other=row)
    others = rewriter.emit("aten.unsqueeze.default", node.loc, self=others, dim=-1)
    own = rewriter.emit("aten.masked_fill.Scalar", node.loc, self=gradient, mask=others, value=0)
    dims = tuple(range(len(gradient.type.shape) - 1))
    return rewriter.emit("aten.sum.dim_IntList", node.loc, self=own, dim=dims)
