"""Raises gelu written with tanh or erf to one call.

Models write gelu in many ways, so it is matched by its values, not its structure: the pass runs the calls between a
final multiplication and a single source on a range of numbers. The raised call rounds fewer times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_dims
from torch_rtx.lowering.constants import CPU
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

APPROXIMATE = {"aten.tanh.default": "tanh", "aten.erf.default": "none"}  # the argument of gelu, by its only such op
LAST = "aten.mul.Tensor"
CALLS = frozenset(f"aten.{name}" for name in ("add.Tensor", "div.Tensor", "mul.Tensor", "neg.default", "sub.Tensor"))
CALLS |= {"aten.pow.Tensor_Scalar", *APPROXIMATE}
DTYPES = ("f16", "bf16", "f32")  # not f64, in which the rounded constants of models make a difference
MAX_CALLS = 12
TOLERANCE = 1e-6  # absolute; the two kinds of gelu differ by 5e-4, rounded constants change less than this


@dataclass
class _Chain:
    """Calls up to a final multiplication, last one first, and the values that they read from outside."""

    calls: list[Node] = field(default_factory=list)
    reads: list[Value] = field(default_factory=list)


def raise_gelu(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    order = {value.name: index for index, node in enumerate(graph.nodes) for value in node.results}
    readers, outputs = users(graph), returned(graph)

    def extend(chain: _Chain) -> bool:
        """Add the last producer of a read value to the chain; False if it can't belong to a gelu."""
        if not chain.reads:  # products of numbers
            return False
        latest = max(chain.reads, key=lambda value: order.get(value.name, -1))
        node = graph.nodes[order[latest.name]] if latest.name in order else None
        if node is None or node.op not in CALLS or len(chain.calls) == MAX_CALLS or latest.name in outputs:
            return False
        if any(reader not in chain.calls for reader in readers[latest.name]):
            return False
        chain.calls.append(node)
        chain.reads = list(dict.fromkeys([*(value for value in chain.reads if value != latest), *node.inputs]))
        return True

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op != LAST:
            return False
        chain = _Chain([node], list(dict.fromkeys(node.inputs)))
        while extend(chain):
            kinds = [APPROXIMATE[call.op] for call in chain.calls if call.op in APPROXIMATE]
            source = chain.reads[0] if len(chain.reads) == 1 else None
            if source and node.outputs[0] and source.type == node.outputs[0].type and _is_gelu(chain, source, kinds):
                args: dict[str, Attr] = {"self": rewriter.current(source), "approximate": kinds[0]}
                rewriter.replace(node.outputs[0], rewriter.emit("aten.gelu.default", node.loc, **args))
                return True
        return False

    return rewrite(graph, infer, visit)


def _is_gelu(chain: _Chain, source: Value, kinds: list[str]) -> bool:
    sizes = [dim for call in chain.calls for _, attr in call.args for dim in attr_dims(attr)]
    if len(kinds) != 1 or sizes or not isinstance(source.type, TensorType) or source.type.dtype not in DTYPES:
        return False
    numbers = torch.linspace(-6, 6, 97, dtype=torch.float64)
    known: dict[str, torch.Tensor] = {source.name: numbers}
    for node in reversed(chain.calls):
        schema = aten.schema(aten.overload(node.op))

        def concrete(name: str, attr: Any, schema: Any = schema) -> Any:
            return known[attr.name] if isinstance(attr, Value) else aten.to_torch(schema[name][0], attr, CPU)

        (output,) = node.outputs
        assert output is not None
        known[output.name] = aten.overload(node.op)(**{name: concrete(name, attr) for name, attr in node.args})
    exact = torch.nn.functional.gelu(numbers, approximate=kinds[0])
    return torch.allclose(known[chain.calls[0].outputs[0].name], exact, rtol=0, atol=TOLERANCE)  # type: ignore[union-attr]
