"""Evaluates constant subgraphs: masks and positions computed by `arange`, `full` and comparisons."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, attr_dims, type_dims

MAX_ELEMENTS = 1 << 24  # larger tensors are not evaluated
CPU = torch.device("cpu")


class Constants:
    """The values of a graph that do not depend on inputs and weights, computed by their ATen calls."""

    def __init__(self, graph: Graph) -> None:
        self.producer = {v.name: node for node in graph.nodes for v in node.results}
        self._known: dict[str, torch.Tensor | None] = {}

    def find(self, value: Attr) -> torch.Tensor | None:
        """The elements of `value` on the CPU; None if it is not constant, or too large."""
        if not isinstance(value, Value) or value.name not in self.producer:
            return None
        if value.name not in self._known:
            node = self.producer[value.name]
            self._known |= dict.fromkeys((v.name for v in node.results), None)
            self._known |= self._run(node)
        return self._known[value.name]

    def _run(self, node: Node) -> dict[str, torch.Tensor | None]:
        if node.kind != "op" or not all(map(_is_small, node.outputs)):
            return {}
        op = aten.overload(node.op)
        if aten.is_random(op) or "empty" in node.op or any(True for _, attr in node.args for _ in attr_dims(attr)):
            return {}
        if any(self.find(value) is None for value in node.inputs):
            return {}
        schema = aten.schema(op)
        result = op(**{name: aten.to_torch(schema[name][0], self._concrete(attr), CPU) for name, attr in node.args})
        results = result if isinstance(result, tuple | list) else (result,)
        return {v.name: found for v, found in zip(node.outputs, results, strict=True) if v is not None}

    def _concrete(self, attr: Attr) -> Any:
        if isinstance(attr, Value):
            return self.find(attr)
        return [self._concrete(item) for item in attr] if isinstance(attr, tuple) else attr


def _is_small(value: Value | None) -> bool:
    if value is None:
        return True
    dims = type_dims(value.type)
    if not isinstance(value.type, TensorType) or not all(isinstance(dim, int) for dim in dims):
        return False
    return math.prod(value.type.shape) <= MAX_ELEMENTS  # type: ignore[arg-type]
