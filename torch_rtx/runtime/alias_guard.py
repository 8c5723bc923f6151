"""Copies the inputs that alias a tensor which the graph updates in place, so that it reads their values at the call.

Under `torch.compile` AOTAutograd does this. A module that was made ahead of time takes whatever tensors it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch_rtx.errors import InputError
from torch_rtx.ir import COPY, Graph
from torch_rtx.runtime.strided import copy_strided
from torch_rtx.runtime.weights import WeightStore

Span = tuple[int, int]


class AliasGuard:
    """Separates the inputs of `graph` from the inputs and weights that it updates.

    Attributes:
        needed: the graph updates an input or weight.
    """

    def __init__(self, graph: Graph, store: WeightStore) -> None:
        updates = any(node.writes and node.op != COPY for node in graph.nodes)
        updated = graph.written if updates else frozenset()
        self._names = [value.name for value in graph.inputs]
        self._inputs = [i for i, name in enumerate(self._names) if name in updated]
        self._weights = [i for i, weight in enumerate(graph.weights) if weight.value.name in updated]
        self._store = store
        self.needed = bool(self._inputs or self._weights)

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """`inputs`, with copies of those that overlap an updated tensor.

        Raises:
            InputError: two inputs that the graph writes to are in the same memory.
        """
        spans: dict[Span, int] = {}
        for index in self._inputs:
            span = _span(inputs[index])
            if span is not None and span in spans:
                names = self._names[spans[span]], self._names[index]
                raise InputError(
                    f"inputs {names[0]!r} and {names[1]!r} are the same memory, and the model writes to both",
                    hint="give each of them a tensor of its own",
                )
            if span is not None:
                spans[span] = index
        weights = [span for index in self._weights if (span := _span(self._store.values[index])) is not None]
        return [
            x if index in self._inputs or not _overlaps(_span(x), (*spans, *weights)) else copy_strided(x, x.stride())
            for index, x in enumerate(inputs)
        ]


def _span(given: object) -> Span | None:
    """[start, end) of a tensor's addresses; None for empty and sparse tensors and for other values."""
    if not isinstance(given, torch.Tensor) or given.layout != torch.strided or not given.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(given.shape, given.stride(), strict=True))
    return given.data_ptr(), given.data_ptr() + (last + 1) * given.element_size()


def _overlaps(span: Span | None, others: Sequence[Span]) -> bool:
    return span is not None and any(span[0] < end and start < span[1] for start, end in others)
