"""Rewrites AOTAutograd's joint graph of forward and backward before it is partitioned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Partitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def rewriting(partition: Partitioner) -> Partitioner:
    """`partition`, of a joint graph that is rewritten first."""

    def rewritten(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        remove_aliases(joint.graph)
        return partition(joint, inputs, **options)

    return rewritten


def remove_aliases(graph: fx.Graph) -> None:
    """Autograd saves results detached; the partitioner takes a `detach` for a call that it may not compute again, and
    would save what is behind it."""
    (output,) = graph.find_nodes(op="output")
    for target in ALIASES:
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user is not output)
