"""Definitions of operators of other libraries, in PyTorch's operations: `register_decomposition`, `register_pointwise`.

A capture replaces each call of such an operator by what its definition computes, so that it is fused with what is
around it, and files need not trust it. Definitions that a library registered with PyTorch count as well
(`torch._decomp.register_decomposition`). A definition that does not fit a call returns NotImplemented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._decomp import decomposition_table
from torch._library.simple_registry import singleton
from torch._subclasses.functional_tensor import FunctionalTensorMode

from torch_rtx.errors import CaptureError, SettingsError

Definition = Callable[..., Any]
D = TypeVar("D", bound=Definition)
# The namespaces of PyTorch itself, whose operators have kernels or are decomposed elsewhere.
_OWN = frozenset(("aten", "prims", "prim", "rngprims", "debugprims", "inductor", "quantized", "quantized_decomposed"))
_registered: dict[torch._ops.OpOverload, Definition] = {}


def register_decomposition(op: str) -> Callable[[D], D]:
    """A decorator of a function that computes the same as an operator, by operations of PyTorch.

    Args:
        op: "namespace::name" or "namespace::name.overload". The function takes the operator's arguments.

    Raises:
        SettingsError: there is no such operator, or it is PyTorch's own.
    """
    overload = operator_of(op)

    def register(function: D) -> D:
        _registered[overload] = function
        return function

    return register


def register_pointwise(op: str) -> Callable[[D], D]:
    """As `register_decomposition`, of an operator that computes each element of its result from those at the same
    place of its operands, as broadcasting lays them: it becomes part of the kernels around it. Also for operators that
    are made of Triton kernels (`torch.library.triton_op`), which are then not launched in engines.

    Raises:
        SettingsError: there is no such operator, or it is PyTorch's own.
    """
    overload = operator_of(op)

    def register(function: D) -> D:
        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            shapes = [x.shape for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if result is not NotImplemented and result.shape != torch.broadcast_shapes(*shapes):
                found, given = list(result.shape), ", ".join(str(list(shape)) for shape in shapes)
                hint = "register_decomposition takes functions that are not pointwise"
                raise CaptureError(f"{op} is registered as pointwise, and makes {found} of {given}", hint=hint)
            return result

        _registered[overload] = checked
        return function

    return register


def operator_of(op: str) -> torch._ops.OpOverload:
    """The operator "namespace::name" or "namespace::name.overload".

    Raises:
        SettingsError: there is none, or it is PyTorch's own.
    """
    namespace, _, rest = op.partition("::")
    name, _, overload = rest.partition(".")
    if namespace in _OWN:
        raise SettingsError(f"{op} is an operator of PyTorch itself")
    try:
        found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
    except AttributeError:
        hint = "names look like lib::op; import the library first"
        raise SettingsError(f"there is no operator {op!r}", hint=hint) from None
    return found


def registered_definitions() -> dict[torch._ops.OperatorBase, Definition]:
    """By operator: what was registered here, else with PyTorch."""
    found: dict[torch._ops.OperatorBase, Definition] = {
        op: definition
        for op, definition in decomposition_table.items()
        if isinstance(op, torch._ops.OpOverload) and op.namespace not in _OWN
    }
    for op, definition in _registered.items():
        found[op] = definition
    return found


@contextmanager
def defined_operators() -> Iterator[None]:
    """Inside, operators that have a definition and are made of Triton kernels are not replaced by these.

    Changes a registry of PyTorch: hold a lock around it.
    """
    taken = []
    for op in _registered:
        entry = singleton.get(op._schema.name)
        rules = {} if entry is None else entry.torch_dispatch_rules._data
        if FunctionalTensorMode in rules:
            taken.append((rules, rules.pop(FunctionalTensorMode)))
    try:
        yield
    finally:
        for rules, rule in taken:
            rules[FunctionalTensorMode] = rule
