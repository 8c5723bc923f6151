"""Numbers on the CPU that sizes and weights alone decide move to the device of the operands beside them.

Models write them as `torch.tensor(0.5)`, or as the root of a size. PyTorch's own kernels take them as arguments,
generated ones read memory, or compute them from sizes. What weights decide is copied once, by a recipe.
"""

from __future__ import annotations

from torch_rtx import aten
from torch_rtx.ir import MAIN, Attr, Graph, Node, TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.region import is_loop
from torch_rtx.lowering.rewrite import Rewriter, rewrite


def move_numbers(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import; dtypes stay, and with them those that results are promoted to."""
    fixed = {weight.value.name for weight in graph.weights if weight.value.name not in graph.written}
    computed: dict[str, Node] = {}  # by result: calls on the CPU that make numbers of others, or of sizes
    moved: dict[str, Value] = {}

    def on_device(value: Value, rewriter: Rewriter, node: Node) -> Value:
        if value.name not in moved:
            assert isinstance(value.type, TensorType)
            type_, made = TensorType(value.type.dtype, (), ()), computed.get(value.name)
            op, args = "aten._to_copy.default", dict[str, Attr](self=value, device=MAIN)
            if made is not None:
                op, args = made.op, dict(made.map_inputs(lambda operand: on_device(operand, rewriter, node)))
                args |= {"device": MAIN} if "device" in args or not made.inputs else {}
            moved[value.name] = rewriter.emit(op, node.loc, (type_,), **args)
        return moved[value.name]

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.inputs and all(value.name in fixed for value in node.inputs) and not _is_random(node):
            fixed.update(value.name for value in node.results)
            return False
        if _makes_number(node) and all(value.name in fixed or value.name in computed for value in node.inputs):
            computed.update((value.name, node) for value in node.results)
            return False
        numbers = [v for v in node.inputs if (v.name in fixed or v.name in computed) and _is_number_on_cpu(v)]
        if not is_loop(node.op) or not numbers or all(map(_is_on_cpu, node.results)):
            return False

        def current(value: Value) -> Value:
            return on_device(value, rewriter, node) if value in numbers else value

        rewriter.keep(Node(node.kind, node.op, node.map_inputs(current), node.outputs, None, node.loc))
        return True

    return rewrite(graph, infer, visit)


def _makes_number(node: Node) -> bool:
    """A kernel could compute what `node` does on the CPU: one number."""
    is_one = len(node.outputs) == 1 and len(node.results) == 1 and all(map(_is_number_on_cpu, node.results))
    return is_one and is_loop(node.op) and all(map(_is_number_on_cpu, node.inputs)) and not _is_random(node)


def _is_random(node: Node) -> bool:
    return aten.is_random(aten.overload(node.op))


def _is_on_cpu(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.device == "cpu"


def _is_number_on_cpu(value: Value) -> bool:
    return _is_on_cpu(value) and isinstance(value.type, TensorType) and value.type.shape == ()
