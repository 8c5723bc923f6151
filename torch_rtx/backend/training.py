"""What the forward graph of a training step saves for the backward graph, and which tensors stay where they are.

Parameters keep their addresses from step to step, and saved tensors stay in the memory of the forward's CUDA graph
until the backward has read them, so that CUDA graphs of forward and backward need no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch.multiprocessing.reductions import StorageWeakRef

Partitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]  # from a joint graph: its forward and backward


def then(partitioner: Partitioner, *changes: Callable[[fx.GraphModule, fx.GraphModule, int], None]) -> Partitioner:
    """`partitioner`, whose forward and backward are changed one after the other.

    Args:
        changes: also get the number of the forward's results that are not saved. These come first.
    """

    def partition(
        joint: fx.GraphModule, inputs: Sequence[Any], *, num_fwd_outputs: int, **others: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = partitioner(joint, inputs, num_fwd_outputs=num_fwd_outputs, **others)
        for change in changes:
            change(forward, backward, num_fwd_outputs)
        return forward, backward

    return partition


def save_old_values(forward: fx.GraphModule, backward: fx.GraphModule, count: int) -> None:
    """Save copies of what the forward graph overwrites, such as a buffer, or a view of one, instead of it: PyTorch's
    partitioners would let the backward compute with the new values. The results after the first `count` are saved."""
    writes = forward.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    written = {_storage(node.args[0]) for node in writes} - {None}
    output = forward.graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    copies: dict[fx.Node, fx.Node] = {}

    def kept(node: Any) -> Any:
        """`node`, if nothing overwrites it, else the same in other memory."""
        if _storage(node) not in written:
            return node
        if node not in copies:
            if node.op == "placeholder":
                made = forward.graph.call_function(torch.ops.aten.clone.default, (node,))
            else:
                made = forward.graph.node_copy(node, kept)
            made.meta["val"] = traced(made.target, made.args, made.kwargs)
            copies[node] = made
        return copies[node]

    with forward.graph.inserting_before(writes[0] if writes else output):
        saved = [kept(node) for node in results[count:]]
    if not copies:
        return
    output.args = ((*results[:count], *saved),)
    forward.recompile()
    by_name = {node.name: made for node, made in copies.items()}
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name in by_name:
            node.meta["val"] = by_name[node.name].meta["val"]  # a copy has no gaps between its elements


def traced(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a call of nodes, as a trace has it."""
    given, named = fx.map_arg((tuple(args), dict(kwargs)), lambda node: node.meta["val"])
    with torch.no_grad():
        return target(*given, **named)


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
