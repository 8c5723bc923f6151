"""Lays weights of products out with K contiguous, as tensor cores read both operands.

Kernels move bytes one by one to transpose them, and f32 is not transposed on its way out of shared memory either. Files
of ONNX and layers such as GPT-2's have weights the other way around.
"""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.ir import Graph, Loc, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, from_weights, rewrite
from torch_rtx.lowering.widening import storable
from torch_rtx.op_work import INT_MM

LINEAR = "aten.linear.default"

ROWS = {LINEAR: "weight"}  # by op, its weight [N, K]
COLUMNS = {INT_MM: "mat2"}  # by op, its weight [K, N]


def transpose_weights(graph: Graph, infer: Inference, weight_copies: bool = True) -> Graph:
    """Level import to level import. Changes strides of weights alone, whose copies become recipes.

    Args:
        weight_copies: parameters may be stored once more, and not what recipes compute alone.
    """
    weights, may_store = from_weights(graph), storable(graph, weight_copies)
    made: dict[tuple[str, bool], Value] = {}

    def laid_out(weight: Value, of_rows: bool, loc: Loc | None, rewriter: Rewriter) -> Value:
        given = rewriter.current(weight)
        rows = given if of_rows else rewriter.emit("aten.t.default", loc, self=given)
        copy = rewriter.emit("aten.clone.default", loc, self=rows, memory_format="contiguous_format")
        return copy if of_rows else rewriter.emit("aten.t.default", loc, self=copy)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        name = ROWS.get(node.op) or COLUMNS.get(node.op)
        weight = None if name is None else node.arg(name)
        if not isinstance(weight, Value) or weight.name not in weights:
            return False
        assert isinstance(weight.type, TensorType)
        of_rows = node.op in ROWS
        if weight.type.strides[1 if of_rows else 0] == 1 or not may_store(weight):
            return False
        key = weight.name, of_rows
        if key not in made:
            made[key] = laid_out(weight, of_rows, node.loc, rewriter)
        rewriter.keep(replace(node, args=tuple((arg, made[key] if arg == name else attr) for arg, attr in node.args)))
        return True

    return rewrite(graph, infer, visit)
