"""Decides which FX nodes an engine can run, and gives the reason for the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.ir import MAIN, UPDATES, TensorType
from torch_rtx.lowering.from_fx import call_arguments, is_number, op_of
from torch_rtx.lowering.symbols import Symbols, unbacked


def reasons(gm: fx.GraphModule, symbols: Symbols) -> Callable[[fx.Node], str | None]:
    """`unsupported_reason` for the nodes of `gm`, whose `symbols` get the sizes that calls of `host_ops` compute."""
    for node in gm.graph.nodes:
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
    if not isinstance(op, torch._ops.OpOverload):
        kind = "higher-order operator" if isinstance(op, torch._ops.HigherOrderOperator) else "Python function"
        return f"{kind} {getattr(op, '__name__', op)}"
    if str(op) not in aten.ALLOWED:
        return f"operator {op} is not on the allow-list"
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


def _tensors(content: Any) -> tuple[torch.Tensor, ...]:
    items = content if isinstance(content, tuple | list) else (content,)
    return tuple(item for item in items if isinstance(item, torch.Tensor))


def _check_argument(argument: Any) -> None:
    kinds = complex | torch.Generator | torch.ScriptObject
    if isinstance(argument, kinds) or type(argument).__name__ == "FakeScriptObject":
        raise Unsupported(f"an argument of type {type(argument).__name__}")
    if isinstance(argument, torch.dtype):
        aten.dtype_name(argument)
    if isinstance(argument, list | tuple):
        for item in argument:
            _check_argument(item)
