"""Decides which FX nodes an engine can run, and gives the reason for the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import fx

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, UPDATES, TensorType
from torch_rtx.lowering.control_flow import flow_of, inner_nodes
from torch_rtx.lowering.effects import read_before_wait
from torch_rtx.lowering.flex_calls import WHY
from torch_rtx.lowering.foreign_calls import is_launch, launched
from torch_rtx.lowering.from_fx import call_arguments, flow_problem, is_number, op_of
from torch_rtx.lowering.functional_calls import functional_call
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.symbols import Symbols, unbacked

# The types of arguments that the IR expresses; it leaves out layouts, all of which are strided.
ARGUMENTS = (
    *(torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, str, type(None)),
    *(torch.device, torch.layout, torch.memory_format),
)


def reasons(gm: fx.GraphModule, symbols: Symbols) -> Callable[[fx.Node], str | None]:
    """`unsupported_reason` for the nodes of `gm`, whose `symbols` get the sizes that calls of `host_ops` compute."""
    for node in chain.from_iterable((node, *inner_nodes(node)) for node in gm.graph.nodes):
        if is_number(node) and isinstance(node.meta["val"], torch.SymInt):
            symbols.define(node.meta["val"])
    return partial(unsupported_reason, symbols=symbols)


def unsupported_reason(node: fx.Node, symbols: Symbols) -> str | None:
    """Why the `call_function` node must fall back to PyTorch, as text for the user; None if the engine can run it.

    Args:
        symbols: of the node's graph.
    """
    op = op_of(node)
    if is_number(node):
        return None
    if is_launch(node):
        return _unsupported_launch(node, symbols)
    if flow_of(node) is not None:
        return flow_problem(node, symbols)
    if (call := functional_call(node)) is not None:
        return f"operator {call[0]} writes to its arguments"
    if not isinstance(op, torch._ops.OpOverload):
        kind = "higher-order operator" if isinstance(op, torch._ops.HigherOrderOperator) else "Python function"
        why = f": {node.meta[WHY]}" if WHY in node.meta else ""
        return f"{kind} {getattr(op, '__name__', op)}{why}"
    if str(op) not in aten.ALLOWED:
        return f"operator {op} is not on the allow-list"
    if op is not node.target and _is_view(node) and _shares_result(node):
        return "its result is a view of another result that no type expresses"
    if read_before_wait(node):
        return "something else than a wait reads its result"
    if str(op) in UPDATES:
        return "it writes to its argument"  # captures are functional: the order of other accesses is unknown
    outputs = node.meta.get("val")
    inputs = [value for n in node.all_input_nodes for value in _tensors(n.meta.get("val"))]
    try:
        for value in (*_tensors(outputs), *inputs):
            type_ = symbols.type(value)
            if isinstance(type_, TensorType) and type_.device not in (MAIN, "cpu"):
                return f"tensor on {value.device} while the engine runs on {symbols.main}"
        for _, argument in call_arguments(node):
            _check_argument(argument)
    except Unsupported as error:
        return error.message
    if op._schema.returns and not isinstance(outputs, torch.Tensor | tuple | list):
        return "its result is a number on the host"
    known = set().union(*map(unbacked, inputs), *(unbacked(n.meta.get("val")) for n in node.all_input_nodes))
    if any(unbacked(value) - known for value in _tensors(outputs)):
        return "the size of its result depends on the data"
    if str(op) == "aten.copy_.default" and node.args[0].op != "placeholder":  # type: ignore[union-attr]
        return "copy_ to a tensor that is not an input"
    return None


def _unsupported_launch(node: fx.Node, symbols: Symbols) -> str | None:
    """See `unsupported_reason`, of a launch of a Triton kernel."""
    try:
        launch = launched(node, Locations().of(node))
        for tensor in launch.tensors:
            if isinstance(tensor, fx.Node):
                symbols.type(tensor.meta["val"])
        for size in launch.sizes:
            _check_argument(size)
            if isinstance(size, torch.SymInt):
                symbols.dim(size)
    except Unsupported as error:
        return error.message
    return None


def _tensors(content: Any) -> tuple[torch.Tensor, ...]:
    items = content if isinstance(content, tuple | list) else (content,)
    return tuple(item for item in items if isinstance(item, torch.Tensor))


def _shares_result(node: fx.Node) -> bool:
    """Whether the graph returns views of what `node` makes, a view, and lets nothing else read them, and also returns
    the memory otherwise: a copy would part these results."""
    base = node
    while _is_view(base):
        base = base.args[0]  # type: ignore[assignment]
    return _only_returned(node) and (base.op != "call_function" or _is_returned(base, node))


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and aten.is_view(node.target)


def _only_returned(node: fx.Node) -> bool:
    return all(user.op == "output" or (_is_view(user) and _only_returned(user)) for user in node.users)


def _is_returned(node: fx.Node, besides: fx.Node) -> bool:
    """The graph returns `node` or a view of it, other than views of `besides`."""
    users = (user for user in node.users if user is not besides)
    return any(user.op == "output" or (_is_view(user) and _is_returned(user, besides)) for user in users)


def _check_argument(argument: Any) -> None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if isinstance(value, torch.dtype):
        aten.dtype_name(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_argument(item)
    elif not isinstance(value, ARGUMENTS):
        raise Unsupported(f"an argument of type {type(value).__name__}")
