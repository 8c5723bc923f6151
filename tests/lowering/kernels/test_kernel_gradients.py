"""Gradients as kernels in Triton's interpreter, against the ATen call; and that every one is tried, and compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.lowering.kernels.test_kernel_ops import Body, built
from torch_rtx.lowering.kernels.ops import gradients
from torch_rtx.lowering.kernels.ops.registry import OPS
from torch_rtx.targets import Target

A = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
Make = Callable[[torch.dtype], tuple[Any, ...]]


def pair(dtype: torch.dtype, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient, and the argument or the result that it is taken at; some of it is at the bends of activations."""
    at = scale * torch.randn(6, 40)
    at[0, :6] = torch.tensor([-3.0, 3.0, 0.0, 1.0, -1.0, 20.0])
    return torch.randn(6, 40).to(dtype), at.to(dtype)


def pointwise(*more: Any, **named: Any) -> Make:
    return lambda dtype: (*pair(dtype), *more)


def log_sigmoid(dtype: torch.dtype) -> tuple[Any, ...]:
    gradient, at = pair(dtype)
    return gradient, at, A.log_sigmoid_forward.default(at)[1]


CALLS: dict[str, tuple[Any, Make]] = {
    "tanh": (A.tanh_backward.default, lambda dtype: (pair(dtype)[0], pair(dtype)[1].tanh())),
    "sigmoid": (A.sigmoid_backward.default, lambda dtype: (pair(dtype)[0], pair(dtype)[1].sigmoid())),
    "silu": (A.silu_backward.default, pointwise()),
    "hardsigmoid": (A.hardsigmoid_backward.default, pointwise()),
    "hardswish": (A.hardswish_backward.default, pointwise()),
    "gelu": (A.gelu_backward.default, pointwise()),
    "relu": (A.threshold_backward.default, pointwise(0)),
    "threshold": (A.threshold_backward.default, pointwise(0.5)),
    "hardtanh": (A.hardtanh_backward.default, pointwise(-1.0, 1.0)),
    "leaky_relu": (A.leaky_relu_backward.default, pointwise(0.1, False)),
    "elu": (A.elu_backward.default, lambda dtype: (pair(dtype)[0], 1.5, 1.1, 0.7, False, pair(dtype)[1])),
    "elu of its result": (A.elu_backward.default, lambda dtype: (pair(dtype)[0], 1, 1, 1, True, pair(dtype, 0.3)[1])),
    "softplus": (A.softplus_backward.default, pointwise(2, 20)),
    "mish": (A.mish_backward.default, pointwise()),
    "log_sigmoid": (A.log_sigmoid_backward.default, log_sigmoid),
    "dropout": (A.native_dropout_backward.default, lambda dtype: (pair(dtype)[0], pair(dtype)[1] > 0, 1.25)),
    "select": (A.select_backward.default, lambda dtype: (pair(dtype)[0], [6, 3, 40], 1, -1)),
    "slice": (A.slice_backward.default, lambda dtype: (pair(dtype)[0], [6, 90], 1, 20, 60, 1)),
    "slice from the end": (A.slice_backward.default, lambda dtype: (pair(dtype)[0], [6, 90], 1, -40, 2**63 - 1, 1)),
    "softmax": (A._softmax_backward_data.default, lambda dtype: (pair(dtype)[0], pair(dtype)[1].softmax(1), 1, dtype)),
    "mse_loss": (A.mse_loss_backward.default, lambda dtype: (torch.randn(()).to(dtype), *pair(dtype), 1)),
    "mse_loss, none": (A.mse_loss_backward.default, lambda dtype: (*pair(dtype), pair(dtype)[1], 0)),
}
NAMED = {"gelu": {"approximate": "tanh"}}


def made(name: str, dtype: torch.dtype, **named: Any) -> Body:
    torch.manual_seed(0)
    op, make = CALLS[name]
    args = make(dtype)
    return Body(op, args, named, op(*args, **named))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, dtype: torch.dtype) -> None:
    made(name, dtype).check()
    if name in NAMED:
        made(name, dtype, **NAMED[name]).check()


def test_every_gradient_is_called() -> None:
    declared = {name for name, call in OPS.items() if getattr(call, "func", call).__module__ == gradients.__name__}
    assert declared == {str(op) for op, _ in CALLS.values()}


def test_all_compile() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, table = built([made(name, dtype) for name in sorted(CALLS)], Target(90))
        launches = [launch for _, launch in table.launches()]
        assert launches
        assert all(launch.aligned.spills == 0 for launch in launches)
