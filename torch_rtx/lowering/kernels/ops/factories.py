"""Factories: operators whose elements are all one number."""

from __future__ import annotations

from functools import partial

from torch_rtx.lowering.kernels.kernel_ir import Scalar, Tensor
from torch_rtx.lowering.kernels.ops.pointwise import Operand, filled
from torch_rtx.lowering.kernels.ops.registry import Types, op


def _constant(value: Scalar, *, out: Types, **_: object) -> Tensor:
    return filled(value, out)


for _name, _value in {"zeros": 0, "ones": 1}.items():
    op(f"{_name}.default", f"{_name}_like.default", f"new_{_name}.default")(partial(_constant, _value))


@op("full.default", "full_like.default", "new_full.default")
def full(fill_value: Scalar, *, out: Types, **_: object) -> Tensor:
    """One number everywhere."""
    return filled(fill_value, out)


@op("fill.Scalar", "fill.Tensor")
def fill(self: Tensor, value: Operand, *, out: Types) -> Tensor:
    """One number everywhere."""
    return filled(value, out)


@op("scalar_tensor.default")
def scalar_tensor(s: Scalar, *, out: Types, **_: object) -> Tensor:
    """One number."""
    return filled(s, out)
