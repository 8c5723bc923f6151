"""What the backward of a training step gets from its forward, for checks that run it alone.

Random numbers in the place of such results would make those of a library's calls wrong, and with them the error that a
kernel may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from torch_rtx.ir import Graph, Node, Value
from torch_rtx.op_work import ATTENTION_BACKWARD, ATTENTION_FORWARD
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.inline import inline_kernels

# Of a call: that of the forward, its arguments, and its results among the arguments of the call.
FORWARDS = {
    ATTENTION_BACKWARD: (
        ATTENTION_FORWARD,
        ("query", "key", "value", "attn_mask", "library", "is_causal", "scale", "bias"),
        ("out", "logsumexp"),
    )
}


def fill_saved(graph: Graph, device: torch.device, inputs: Sequence[torch.Tensor]) -> None:
    """Overwrite those of `inputs` that are results of a forward of which `graph` (static, without weights) has the
    backward, by what they are for the others."""
    flat = inline_kernels(graph, {})
    given = {value.name: tensor for value, tensor in zip(graph.inputs, inputs, strict=True)}
    for index, node in enumerate(flat.nodes):
        forward, names, results = FORWARDS.get(node.op, ("", (), ()))
        saved = [value for value in map(node.arg, results) if isinstance(value, Value) and value.name in given]
        if not saved or len(saved) < len(results):
            continue
        made = tuple(replace(value, name=f"{value.name}_saved") for value in saved)
        args = tuple((name, attr) for name, attr in node.args if name in names)
        before = (*flat.nodes[:index], Node("op", forward, args, made))
        found = compile_graph(replace(flat, nodes=before, outputs=made), device)(inputs, ())
        for value, tensor in zip(saved, found, strict=True):
            given[value.name].copy_(tensor)
