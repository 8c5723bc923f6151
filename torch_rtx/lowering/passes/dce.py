"""Dead code elimination: removes unused nodes, results, weights and parameters."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.collectives import is_ordered
from torch_rtx.ir import Graph, Node, ScalarType
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import returned


def dce(graph: Graph, infer: Inference) -> Graph:
    """Any level to the same level. Writes to inputs, fallbacks, collectives, calls without results and calls that
    determine a symbol are effects, and stay. What an update returns keeps its name, which fusion needs."""
    needed = returned(graph)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        outputs = tuple(value if value is not None and value.name in needed else None for value in node.outputs)
        binds = any(isinstance(value.type, ScalarType) and value.type.dim is not None for value in node.results)
        whole = binds or node.kind == "fallback" or is_ordered(node) or bool(node.updates)
        effect = not node.outputs or whole or node.writes
        if not effect and not any(outputs):
            continue
        needed.update(value.name for value in node.inputs)
        kept.append(node if whole or outputs == node.outputs else replace(node, outputs=outputs))
    weights = tuple(weight for weight in graph.weights if weight.value.name in needed)
    names = {name for weight in weights for name in weight.names}
    parameters = tuple(parameter for parameter in graph.parameters if parameter.name in names)
    return replace(graph, nodes=tuple(reversed(kept)), weights=weights, parameters=parameters)
