"""The table of operators: ATen overload -> declaration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch_rtx.ir import TensorType
from torch_rtx.lowering.kernels.kernel_ir import Tensor

Result = Tensor | tuple[Tensor | None, ...]
# Called with the arguments by schema name (tensors, Indexes for dims, plain scalars), defaults left out, and with
# `out`, the types of the results.
Declaration = Callable[..., Result]
OPS: dict[str, Declaration] = {}
D = TypeVar("D", bound=Declaration)
Types = tuple[TensorType, ...]


def op(*names: str) -> Callable[[D], D]:
    """Declare the ATen overloads `names`."""

    def register(declaration: D) -> D:
        for name in names:
            assert f"aten.{name}" not in OPS, name
            OPS[f"aten.{name}"] = declaration
        return declaration

    return register
