"""Calls with effects: checks that may raise, and operators that are registered as such.

PyTorch orders them by tokens, which each such call takes and returns. In the IR they need none: calls without results
stay, and fallbacks stay in order.
"""

from __future__ import annotations

import torch
from torch import fx

TOKENS = (torch.ops.prims._make_token.default, torch.ops.prims._sink_tokens.default)


def drop_tokens(gm: fx.GraphModule) -> None:
    """Replace each `with_effects(token, op, ...)` of `gm` by `op(...)`, and remove the tokens."""
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects)
    for node in calls:
        token, target, *args = node.args
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function(target, tuple(args), node.kwargs)
        call.meta = dict(node.meta)
        results = node.meta["val"][1:]
        call.meta["val"] = results if len(results) > 1 else results[0]
        for item in list(node.users):
            index = item.args[1]
            if index == 0:
                item.replace_all_uses_with(token)
            elif len(results) > 1:
                item.args = (call, index - 1)
                continue
            else:
                item.replace_all_uses_with(call)
            gm.graph.erase_node(item)
        gm.graph.erase_node(node)
    for target in reversed(TOKENS):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if not node.users:
                gm.graph.erase_node(node)
    if calls:
        gm.recompile()
