"""Calls with effects: checks that may raise, operators that are registered as such, collectives, and random draws.

PyTorch orders them by tokens, which each such call takes and returns. In the IR they need none: calls without results
stay, and fallbacks and collectives stay in order. So do draws from the random number generator, among themselves: each
moves the generator on, and with one seed all have the numbers of eager mode only in its order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torch_rtx import aten
from torch_rtx.collectives import is_collective
from torch_rtx.control import branches, is_control
from torch_rtx.ir import COPY, Node
from torch_rtx.optable import COLLECTIVES

_FUNCTIONAL, _DIFFERENTIABLE = torch.ops._c10d_functional, torch.ops._c10d_functional_autograd
WAIT_TENSOR = getattr(getattr(_FUNCTIONAL, "wait_tensor", None), "default", None)  # None: without torch.distributed
# The wait by the one of `collectives`, and collectives with a formula for their gradients by those without.
COLLECTIVES_AS: dict[Any, Any] = (
    {}
    if WAIT_TENSOR is None
    else {WAIT_TENSOR: torch.ops.torch_rtx.wait.default}
    | {
        getattr(_DIFFERENTIABLE, name).default: getattr(_FUNCTIONAL, name).default
        for name in ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor")
    }
)
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


def is_barrier(node: Node) -> bool:
    """Whether no other call may move across `node`: a fallback, a write, or a collective, whose place among these is
    the same on all ranks."""
    return node.kind == "fallback" or node.op == COPY or is_collective(node)


def draws(nodes: Sequence[Node]) -> list[int]:
    """The positions of the calls that draw random numbers, or that may do so in one of their branches."""
    return [index for index, node in enumerate(nodes) if _draws(node)]


def _draws(node: Node) -> bool:
    if is_control(node):
        return any(draws(branch.nodes) for branch in branches(node))
    return node.kind == "op" and aten.draws(node)


def read_before_wait(node: fx.Node) -> bool:
    """Whether something else than a wait reads the result of a collective, or of what it returns as a list."""
    if str(COLLECTIVES_AS.get(node.target, node.target)) not in COLLECTIVES:
        return False
    items = [user for user in node.users if user.target is operator.getitem]
    readers = [user for one in (node, *items) for user in one.users if user not in items]
    return not readers or any(user.target is not WAIT_TENSOR for user in readers)
