"""Raises gelu that a model spells out, with tanh or with erf, to the one call.

It is known by its numbers, not by how it is written, since models write it in many ways: the calls between a product
and a value are run for a range of numbers. What comes out is rounded less often.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.ir import Graph, Node, TensorType, Value, attr_dims
from torch_rtx.lowering.constants import CPU
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, returned, rewrite, users

TELLING = {"aten.tanh.default": "tanh", "aten.erf.default": "none"}  # the argument `approximate` of gelu
LAST = "aten.mul.Tensor"
CALLS = frozenset(f"aten.{name}" for name in ("add.Tensor", "div.Tensor", "mul.Tensor", "neg.default", "sub.Tensor"))
CALLS |= {"aten.pow.Tensor_Scalar", *TELLING}
DTYPES = ("f16", "bf16", "f32")  # in f64 it shows that the constants of models are rounded
MOST = 12  # calls
NEAR = 1e-6  # the two kinds of gelu differ by 5e-4, and the constants of models by less


@dataclass
class _Chain:
    """Calls between a value and a product, the last one first, and what they read."""

    calls: list[Node] = field(default_factory=list)
    reads: list[Value] = field(default_factory=list)


def raise_gelu(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    place = {value.name: at for at, node in enumerate(graph.nodes) for value in node.outputs if value is not None}
    readers, outside = users(graph), returned(graph)

    def grown(chain: _Chain) -> bool:
        """Adds the call that comes last of those that make what is read, if it is one of a gelu."""
        latest = max(chain.reads, key=lambda value: place.get(value.name, -1))
        node = graph.nodes[place[latest.name]] if latest.name in place else None
        if node is None or node.op not in CALLS or len(chain.calls) == MOST or latest.name in outside:
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
        while grown(chain):
            kinds = [TELLING[call.op] for call in chain.calls if call.op in TELLING]
            source = chain.reads[0] if len(chain.reads) == 1 else None
            if source and node.outputs[0] and source.type == node.outputs[0].type and _is_gelu(chain, source, kinds):
                now = rewriter.now(source)
                rewriter.replace(
                    node.outputs[0], rewriter.emit("aten.gelu.default", node.loc, self=now, approximate=kinds[0])
                )
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
    return torch.allclose(known[chain.calls[0].outputs[0].name], exact, rtol=0, atol=NEAR)  # type: ignore[union-attr]
