"""Lays images that a training step saves for its backward out channels-last, as kernels and libraries convolve them.

The layout of a saved tensor is part of both graphs. Without this pass, the forward would copy each image to rows, and
the backward each gradient, although neither reads them so.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from torch_rtx import aten
from torch_rtx.backend.training import traced

CONVOLUTION = torch.ops.aten.convolution.default
CLONE = torch.ops.aten.clone.default
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


def save_channels_last(forward: fx.GraphModule, backward: fx.GraphModule, count: int) -> None:
    """Save a channels-last copy of each image that lies row by row, of which the backward makes what it was. The pass
    `channels_last` finds that no copy is needed where both have it so anyway. The results after the first `count` are
    saved."""
    images, output = _images(forward.graph), forward.graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    placeholders = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    returned = {node for node in results[:count] if isinstance(node, fx.Node)}
    for index, node in enumerate(results[count:], count):
        if node not in images or node in returned or node.name not in placeholders:
            continue
        given = placeholders[node.name]
        with forward.graph.inserting_before(output):
            copy = _copied(forward.graph, node, FORMATS[node.meta["val"].dim()])
        first = next((one for one in backward.graph.nodes if given in one.all_input_nodes), None)
        if first is not None:
            with backward.graph.inserting_before(first):
                back = _copied(backward.graph, given, torch.contiguous_format)
            given.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        given.meta["val"] = copy.meta["val"]
        given.target = f"{node.name}_channels_last"
        for one in (given, copy):  # graphs of a step know what is saved by its name
            one._rename(given.target)
        results[index] = copy
    output.args = (tuple(results),)
    for gm in (forward, backward):
        gm.recompile()


def _copied(graph: fx.Graph, node: fx.Node, form: torch.memory_format) -> fx.Node:
    copy = graph.call_function(CLONE, (node,), {"memory_format": form})
    copy.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    copy.meta["val"] = traced(CLONE, (node,), {"memory_format": form})
    return copy


def _images(graph: fx.Graph) -> set[fx.Node]:
    """What calls compute that lies row by row, and is an operand or a result of a convolution, a weight that is cast
    among them, or connected with these by calls that are no views: in memory the results of such calls lie as their
    operands do."""
    near: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for one in _operands(node):
            near.setdefault(node, []).append(one)
            near.setdefault(one, []).append(node)
    left = [node for node in near if node.target is CONVOLUTION]
    found = set(left)
    while left:
        more = set(near[left.pop()]) - found
        found |= more
        left += more
    return {node for node in found if node.op == "call_function" and _lies_by_rows(node.meta["val"])}


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of a call with as many dimensions as its result, but for those of a view."""
    call = node.args[0] if node.target is operator.getitem else node
    if not isinstance(call, fx.Node) or not isinstance(call.target, torch._ops.OpOverload) or aten.is_view(call.target):
        return
    rank = _rank(node)
    if rank in FORMATS:
        yield from (one for one in call.all_input_nodes if _rank(one) == rank)


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _lies_by_rows(value: torch.Tensor) -> bool:
    """Contiguous, and otherwise than channels-last; no size but that of the batch is open."""
    _, *sizes = value.shape
    if not all(type(number) is int for number in (*sizes, *value.stride())):
        return False
    expected = torch.empty(1, *sizes, device="meta").stride()
    return value.stride() == expected and sizes[0] > 1 and any(size > 1 for size in sizes[1:])
