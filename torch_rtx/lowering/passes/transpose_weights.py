"""Lays weights of int8 products out with K contiguous, as tensor cores read both operands.

Halves are transposed on their way out of shared memory. Bytes are not: kernels would move them one by one.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.ir import Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, from_weights, rewrite
from torch_rtx.lowering.widening import storable
from torch_rtx.op_work import INT_MM


def transpose_weights(graph: Graph, infer: Inference, weight_copies: bool = True) -> Graph:
    """Level import to level import. Changes strides of weights alone, whose copies become recipes.

    Args:
        weight_copies: parameters may be stored once more, and not what recipes compute alone.
    """
    weights, may_store = from_weights(graph), storable(graph, weight_copies)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        weight = node.arg("mat2")
        if node.op != INT_MM or not isinstance(weight, Value) or weight.name not in weights:
            return False
        assert isinstance(weight.type, TensorType)
        if weight.type.strides[0] == 1 or not may_store(weight):
            return False
        rows = rewriter.emit("aten.t.default", node.loc, self=rewriter.current(weight))
        copy = rewriter.emit("aten.clone.default", node.loc, self=rows, memory_format="contiguous_format")
        columns = rewriter.emit("aten.t.default", node.loc, self=copy)
        given = tuple((key, columns if key == "mat2" else attr) for key, attr in node.args)
        rewriter.keep(replace(node, args=given))
        return True

    return rewrite(graph, infer, visit)
