"""Associative scans: sums and products are those of PyTorch, others are written out, in log n steps of all elements.

Captures for the CPU have none: PyTorch writes them out itself. With a size that only a call knows, others than sums and
products stay calls of PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.associative_scan import generic_associative_scan
from torch.fx.experimental.proxy_tensor import make_fx

from torch_rtx.lowering.control_flow import attribute

SCANS = {
    torch.ops.aten.add.Tensor: torch.ops.aten.cumsum.default,
    torch.ops.aten.mul.Tensor: torch.ops.aten.cumprod.default,
}
KEPT = ("stack_trace", "nn_module_stack")  # what tells a location


def write_out_scans(gm: fx.GraphModule) -> None:
    """Replace each `associative_scan` of `gm`, and of the graphs that its calls hold, by other calls."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            found = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.associative_scan)
            changed = [_write_out(module, node) for node in found]
            if any(changed):
                module.graph.eliminate_dead_code()
                module.recompile()


def _write_out(module: fx.GraphModule, node: fx.Node) -> bool:
    arguments: Any = node.args
    combine = attribute(module, arguments[0])
    xs, additional = map(list, arguments[1:])
    given = [one.meta["val"] if isinstance(one, fx.Node) else one for one in (*xs, *additional)]
    scan = _known(combine, len(given))
    if scan is None and not isinstance(given[0].shape[0], int):
        return False

    def results(*values: Any) -> list[torch.Tensor]:
        if scan is not None:
            return [scan(values[0], 0, dtype=values[0].dtype)]
        return list(generic_associative_scan(combine, values[: len(xs)], additional_inputs=values[len(xs) :]))

    traced = make_fx(results)(*given)
    env: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), (*xs, *additional), strict=True))
    location = {key: node.meta[key] for key in KEPT if key in node.meta}
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                env[inner] = module.graph.node_copy(inner, env.__getitem__)
                env[inner].meta |= location
    made: Any = traced.graph.output_node().args[0]
    for user in list(node.users):
        user.replace_all_uses_with(env[made[user.args[1]]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    return True


def _known(combine: fx.GraphModule, count: int) -> Any:
    """The call that scans by the function, if it adds or multiplies its arguments, and there is one tensor."""
    *placeholders, last, _ = combine.graph.nodes
    if count != 1 or len(placeholders) != 2 or last.kwargs or {*last.args} != {*placeholders}:
        return None
    return SCANS.get(last.target)
