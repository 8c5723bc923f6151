"""Operators that write to their arguments: PyTorch's `auto_functionalized_v2`, as functions that return copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

Call = tuple[torch._ops.OpOverload, dict[str, Any], Sequence[str]]  # the operator, its arguments, those it writes to


def functional_call(node: fx.Node) -> Call | None:
    """The call that `node` makes a function of; None if it is none, or writes to parts of tensors, or to one twice."""
    op = node.args[0] if node.args else None
    if getattr(node.target, "__name__", "") != "auto_functionalized_v2" or not isinstance(op, torch._ops.OpOverload):
        return None
    given = dict(node.kwargs)
    bases: Any = given.pop("_all_bases")
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    places = [given.pop(f"_{name}_base_index", None) for name in written]
    if places != [*range(len(bases))] or any(name.startswith("_") for name in given):
        return None
    if isinstance(node.meta["val"][0], tuple | list) or len(node.meta["val"]) != 1 + len(bases):
        return None
    given |= dict(zip(written, bases, strict=True))
    return op, {a.name: given[a.name] for a in op._schema.arguments if a.name in given}, written
