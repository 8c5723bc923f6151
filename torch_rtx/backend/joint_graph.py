"""Rewrites AOTAutograd's joint graph of forward and backward before it is partitioned."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from torch_rtx.backend.attention_calls import name_attention
from torch_rtx.backend.row_chunks import chunk_rows, write_out
from torch_rtx.backend.training import Partitioner, traced

aten = torch.ops.aten
# What reduces everything, and the same along dimensions.
TOTALS = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}
POOLING_GRADIENT = aten.max_pool2d_with_indices_backward.default
RUNNING, TRAIN = (3, 4), 7  # arguments of the gradient of a batch norm
ALIASES = (aten.detach.default, aten.alias.default)


def rewriting(partition: Partitioner, logits_bytes: float) -> Partitioner:
    """`partition`, of a joint graph that is rewritten first. `logits_bytes`: see `chunk_rows`."""

    def rewritten(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        remove_aliases(joint.graph)
        drop_running_statistics(joint.graph)
        name_attention(joint.graph)
        sum_by_rows(joint.graph)
        narrow_positions(joint.graph)
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


def drop_running_statistics(graph: fx.Graph) -> None:
    """The gradient of a batch norm by statistics of its own has the running ones as arguments and does not read them.
    The forward, which overwrites them, would save what they were before."""
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default):
        if node.args[TRAIN]:
            node.args = tuple(None if index in RUNNING else given for index, given in enumerate(node.args))


def narrow_positions(graph: fx.Graph) -> None:
    """Let the gradient of a pooling read the positions of the maxima, in an image of known size, in as many bytes as
    they need, so that a quarter of the memory is saved for it."""
    for pool in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default):
        *_, height, width = pool.args[0].meta["val"].shape
        dtype = _position_dtype(height * width) if type(height) is type(width) is int else None
        for positions in [user for user in pool.users if user.target is operator.getitem and user.args[1] == 1]:
            gradients = [user for user in positions.users if user.target is POOLING_GRADIENT]
            if dtype is None or not gradients:
                continue
            with graph.inserting_after(positions):
                narrow = _cast(graph, positions, dtype)
            for gradient in gradients:
                with graph.inserting_before(gradient):
                    gradient.replace_input_with(positions, _cast(graph, narrow, torch.int64))


def _position_dtype(count: int) -> torch.dtype | None:
    """The narrowest dtype of `count` positions; None if that is the widest."""
    return next((one for one in (torch.int16, torch.int32) if count - 1 <= torch.iinfo(one).max), None)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = {**node.meta, "val": traced(cast.target, cast.args, cast.kwargs)}
    return cast


def sum_by_rows(graph: fx.Graph) -> None:
    """Sum what is computed from numbers per row, such as losses of soft targets, along rows first: the kernel that
    computes these then does not store every element."""
    for total, along in TOTALS.items():
        for node in graph.find_nodes(op="call_function", target=total):
            (value,) = node.args
            if _is_from_rows(value):
                with graph.inserting_before(node):
                    rows = graph.call_function(along, (value, [-1]), dict(node.kwargs))
                rows.meta = {**node.meta, "val": along(value.meta["val"], [-1], **node.kwargs)}
                node.args = (rows,)


def _is_from_rows(value: fx.Node) -> bool:
    """Element-wise operations make `value` of numbers per row, among others: its last dimension is one of these."""
    shape = value.meta["val"].shape
    left, seen = [value], set[fx.Node]()
    while left and len(shape) > 1:
        node = left.pop()
        seen.add(node)
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
            continue
        for one in node.all_input_nodes:
            sizes = getattr(one.meta.get("val"), "shape", None)
            if sizes == (*shape[:-1], 1) != shape:
                return True
            if sizes == shape and one not in seen:
                left.append(one)
    return False
