"""Rewrites AOTAutograd's joint graph of forward and backward before it is partitioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from torch_rtx.backend.row_chunks import chunk_rows, write_out

Partitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def rewriting(partition: Partitioner, logits_bytes: float) -> Partitioner:
    """`partition`, of a joint graph that is rewritten first. `logits_bytes`: see `chunk_rows`."""

    def rewritten(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        remove_aliases(joint.graph)
        chunk_rows(joint.graph, logits_bytes)
        forward, backward = partition(joint, inputs, **options)
        write_out(forward)
        return forward, backward

    return rewritten


def remove_aliases(graph: fx.Graph) -> None:
    """Autograd saves results detached; the partitioner takes a `detach` for a call that it may not compute again, and
    would save what is behind it."""
    (output,) = graph.find_nodes(op="output")
    for target in ALIASES:
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user is not output)
            if not node.users:
                graph.erase_node(node)
