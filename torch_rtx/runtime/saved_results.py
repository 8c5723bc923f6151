"""What the backward of a training step gets from its forward, for checks that run it alone.

Random numbers in the place of such results would make those of a library's calls wrong, and with them the error that a
kernel may have; or weights that a kernel makes of them again larger than its dtype holds, as in the gradients of
`flex_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from torch_rtx.ir import Graph, Node, TensorType, Value, attr_values, contiguous
from torch_rtx.op_work import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    FLEX,
    FLEX_GRAD_KEY_VALUE,
    FLEX_GRADS,
    POOLING,
    POOLING_BACKWARD,
)
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.example_lists import by_queries
from torch_rtx.runtime.index_check import CAST
from torch_rtx.runtime.inline import inline_kernels

_FLEX = (
    FLEX,
    ("query", "key", "value", "blocks", "buffers", "scale", "score_mod", "mask_mod", "block_size"),
    ("", "logsumexp", ""),
)
# Of a call: that of the forward, its arguments, and its results by their names among the arguments of the call; "": one
# that the call does not get.
FORWARDS = {
    **dict.fromkeys(FLEX_GRADS, _FLEX),
    ATTENTION_BACKWARD: (
        ATTENTION_FORWARD,
        ("query", "key", "value", "attn_mask", "library", "is_causal", "scale", "bias"),
        ("out", "logsumexp"),
    ),
    POOLING_BACKWARD: (
        POOLING,
        ("self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
        ("", "indices"),
    ),
}


def fill_saved(graph: Graph, device: torch.device, inputs: Sequence[torch.Tensor]) -> None:
    """Overwrite those of `inputs` that are results of a forward of which `graph` (static, without weights) has the
    backward, by what they are for the others."""
    flat = inline_kernels(graph, {})
    given = {value.name: tensor for value, tensor in zip(graph.inputs, inputs, strict=True)}
    for node in flat.nodes:  # integers that the forward saved as narrower ones
        source = node.arg("self") if node.op == CAST else None
        if isinstance(source, Value) and source.name in given:
            given.update({value.name: given[source.name] for value in node.results})
    for index, node in enumerate(flat.nodes):
        forward, names, results = FORWARDS.get(node.op, ("", (), ()))
        saved = [
            value if isinstance(value := node.arg(name), Value) and value.name in given else None for name in results
        ]
        if not results or any(name and value is None for name, value in zip(results, saved, strict=True)):
            continue
        made = tuple(None if value is None else replace(value, name=f"{value.name}_saved") for value in saved)
        args, others = {name: attr for name, attr in node.args if name in names}, dict[Value, torch.Tensor]()
        if node.op == FLEX_GRAD_KEY_VALUE:
            if not all(value.name in given for value in attr_values(node.arg("blocks"))):
                continue
            others = _by_queries(node, given)
            args["blocks"] = tuple(others)
        before = (*flat.nodes[:index], Node("op", forward, tuple(args.items()), made))
        outputs = tuple(value for value in made if value is not None)
        whole = replace(flat, inputs=(*flat.inputs, *others), nodes=before, outputs=outputs)
        found = compile_graph(whole, device)([*inputs, *others.values()], ())
        for value, tensor in zip(filter(None, saved), found, strict=True):
            given[value.name].copy_(tensor)


def _by_queries(node: Node, given: Mapping[str, torch.Tensor]) -> dict[Value, torch.Tensor]:
    """The lists that the forward has, of those by keys that `node` has."""
    lists, size, saved = [*attr_values(node.arg("blocks"))], node.arg("block_size", ()), node.arg("logsumexp")
    assert isinstance(saved, Value)
    queries = given[saved.name].shape[2]
    found = dict[Value, torch.Tensor]()
    for count, indices in zip(lists[::2], lists[1::2], strict=True):
        assert isinstance(size, tuple)
        assert isinstance(size[0], int)
        turned = by_queries(given[count.name], given[indices.name], -(-queries // size[0]))
        for value, tensor in zip((count, indices), turned, strict=True):
            shape = tuple(tensor.shape)
            found[Value(f"{value.name}_by_queries", TensorType("i32", shape, contiguous(shape)))] = tensor
    return found
