"""Copies the inputs that alias a tensor which the graph writes to, so that it reads their values at the call.

Under `torch.compile` AOTAutograd does this. A module that was made ahead of time takes whatever tensors it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_rtx.errors import InputError
from torch_rtx.ir import Graph
from torch_rtx.runtime.overwriting import has_updates, writes_early
from torch_rtx.runtime.strided import Span, copy_strided, span_in_memory
from torch_rtx.runtime.weights import WeightStore


class AliasGuard:
    """Separates the inputs of `graph` from the inputs and weights that it writes to while others are still read.

    Attributes:
        needed: there are such.
    """

    def __init__(self, graph: Graph, store: WeightStore) -> None:
        updated = graph.written if writes_early(graph) else frozenset()
        self._updates = has_updates(graph)
        self._names = [value.name for value in graph.inputs]
        self._inputs = [i for i, name in enumerate(self._names) if name in updated]
        self._weights = [i for i, weight in enumerate(graph.weights) if weight.value.name in updated]
        self._store = store
        self.needed = bool(self._inputs or self._weights)

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """`inputs`, with copies of those that overlap a tensor that is written to.

        Raises:
            InputError: two inputs that the graph writes to are in the same memory, and it updates parts of one.
        """
        spans: dict[Span, int] = {}
        for index in self._inputs:
            span = span_in_memory(inputs[index])
            if span is not None and span in spans and self._updates:
                names = self._names[spans[span]], self._names[index]
                raise InputError(
                    f"inputs {names[0]!r} and {names[1]!r} are the same memory, and the model writes to both",
                    hint="give each of them a tensor of its own",
                )
            if span is not None:
                spans[span] = index
        weights = [span for index in self._weights if (span := span_in_memory(self._store.values[index])) is not None]
        taken = (*spans, *weights)
        return [
            x if index in self._inputs or not _overlaps(span_in_memory(x), taken) else copy_strided(x, x.stride())
            for index, x in enumerate(inputs)
        ]


def _overlaps(span: Span | None, others: Sequence[Span]) -> bool:
    return span is not None and any(span[0] < end and start < span[1] for start, end in others)
