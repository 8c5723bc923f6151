"""Which tensors of a training step stay where they are, so that CUDA graphs of forward and backward need no copies.

Parameters keep their addresses from step to step, and saved tensors stay in the memory of the forward's CUDA graph
until the backward has read them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch.multiprocessing.reductions import StorageWeakRef


class TrainingStep:
    """Connects the forward graph of AOTAutograd with the backward graph, which has the same names for saved tensors."""

    def __init__(self) -> None:
        self._stay: frozenset[str] = frozenset()

    def forward(self, graph: fx.GraphModule, static: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
        """The positions of the placeholders that stay, and of the results that are saved in the graph's memory.

        Args:
            static: the positions of parameters and buffers that the graph does not write.
        """
        context = TracingContext.try_get()
        if context is None or context.fw_metadata is None:
            return frozenset(), frozenset()
        count = context.fw_metadata.num_forward_returns
        context.fw_metadata.bw_donated_idxs = []  # no backward overwrites a saved tensor, so `retain_graph` may keep it
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        results: list[Any] = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
        # A result may be a view of an input, whose address changes, or be returned to the user as well, who keeps it.
        changing = [node for index, node in enumerate(placeholders) if index not in static]
        others = {None, *map(_storage, [*results[:count], *changing])}
        saved = {i: node for i, node in enumerate(results) if i >= count and _storage(node) not in others}
        self._stay = frozenset(node.name for node in (*saved.values(), *(placeholders[i] for i in static)))
        return static, frozenset(i for i, node in saved.items() if node.op != "placeholder")

    def backward(self, graph: fx.GraphModule) -> frozenset[int]:
        """The positions of the placeholders that stay."""
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        return frozenset(index for index, node in enumerate(placeholders) if node.name in self._stay)


def _storage(node: object) -> StorageWeakRef | None:
    """The memory of a tensor of the trace, which its views share; None for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return StorageWeakRef(value.untyped_storage()) if isinstance(value, torch.Tensor) else None
