"""Numbers on the CPU that no input decides are copied to the device of the operands beside them, once, by a recipe.

Models write them as `torch.tensor(0.5)`. PyTorch's own kernels take them as arguments, generated ones read memory.
"""

from __future__ import annotations

import torch

from torch_rtx import aten
from torch_rtx.ir import MAIN, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, rewrite


def move_numbers(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import; dtypes stay, and with them those that results are promoted to."""
    fixed = {weight.value.name for weight in graph.weights if weight.value.name not in graph.written}
    moved: dict[str, Value] = {}

    def visit(node: Node, rewriter: Rewriter) -> bool:
        op = aten.overload(node.op)
        if node.inputs and all(value.name in fixed for value in node.inputs) and not aten.is_random(op):
            fixed.update(value.name for value in node.results)
            return False
        numbers = [value for value in node.inputs if value.name in fixed and _is_number_on_cpu(value)]
        if torch.Tag.pointwise not in op.tags or not numbers or all(_is_on_cpu(value) for value in node.results):
            return False
        for value in numbers:
            if value.name not in moved:
                assert isinstance(value.type, TensorType)
                type_ = TensorType(value.type.dtype, (), ())
                moved[value.name] = rewriter.emit("aten._to_copy.default", node.loc, (type_,), self=value, device=MAIN)

        def current(value: Value) -> Value:
            return moved[value.name] if value in numbers else value

        rewriter.keep(Node(node.kind, node.op, node.map_inputs(current), node.outputs, None, node.loc))
        return True

    return rewrite(graph, infer, visit)


def _is_on_cpu(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.device == "cpu"


def _is_number_on_cpu(value: Value) -> bool:
    return _is_on_cpu(value) and isinstance(value.type, TensorType) and value.type.shape == ()
