"""Operators of backward graphs: gradients of pointwise operators, views and softmax, each one loop.

Gradients that take several loops, as those of norms do, are written out by the pass `expand_norms`, and those of losses
of classes by capture.
"""

from __future__ import annotations

import math
from functools import partial

from torch_rtx.dtypes import register
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import A, B, C, D, E, Expression, exp, exp2, sigmoid, tanh, where
from torch_rtx.lowering.kernels.kernel_ir import (
    Scalar,
    Tensor,
    cast,
    pointwise,
    reduce,
)
from torch_rtx.lowering.kernels.ops.pointwise import (
    NORMAL,
    SIZE,
    SOFT,
    compute,
    filled,
    floating,
    log2_tail,
    promote,
    softplus,
)
from torch_rtx.lowering.kernels.ops.reductions import count_of, size_as
from torch_rtx.lowering.kernels.ops.registry import Types, op
from torch_rtx.lowering.kernels.ops.views import Size, select_scatter, slice_scatter

# ---- activations -----------------------------------------------------------------------------------------------------

# A: the gradient of the result; B: the result in OF_OUTPUT, the argument in OF_INPUT.
OF_OUTPUT = {"tanh": A * (1.0 - B * B), "sigmoid": A * B * (1.0 - B)}
OF_INPUT = {
    "silu": A * sigmoid(B) * (1.0 + B * (1.0 - sigmoid(B))),
    "hardsigmoid": where((B > -3.0) & (B < 3.0), A / 6.0, 0.0),
    "hardswish": where(B <= -3.0, 0.0, where(B < 3.0, A * (B / 3.0 + 0.5), A)),
}


def _of_output(expression: Expression, grad_output: Tensor, output: Tensor, *, out: Types) -> Tensor:
    floating(out)
    return compute(expression, out, grad_output, output)


def _of_input(expression: Expression, grad_output: Tensor, self: Tensor, *, out: Types) -> Tensor:
    floating(out)
    return compute(expression, out, grad_output, self)


for _name, _expression in OF_OUTPUT.items():
    op(f"{_name}_backward.default")(partial(_of_output, _expression))
for _name, _expression in OF_INPUT.items():
    op(f"{_name}_backward.default")(partial(_of_input, _expression))


@op("gelu_backward.default")
def gelu_backward(grad_output: Tensor, self: Tensor, approximate: str = "none", *, out: Types) -> Tensor:
    """g * (Phi(x) + x * phi(x)), or the derivative of the approximation by tanh, which is x * sigmoid(u)."""
    if approximate != "none":
        scale = 2 * math.sqrt(2 / math.pi)
        soft, slope = compute(SOFT, out, self), compute(scale * (1.0 + 3 * 0.044715 * A * A), out, self)
        return compute(A * C * (1.0 + B * (1.0 - C) * D), out, grad_output, self, soft, slope)
    density = compute(1 / math.sqrt(2 * math.pi) * exp(-0.5 * A * A), out, self)
    if out[0].dtype in ("f16", "bf16"):
        below = compute(exp2(A), out, log2_tail(compute(SIZE, out, self), out))
        normal = compute(where(A < 0, B, 1.0 - B), out, self, below)
    else:
        normal = compute(NORMAL, out, self)
    return compute(A * (C + B * D), out, grad_output, self, normal, density)


@op("threshold_backward.default")
def threshold_backward(grad_output: Tensor, self: Tensor, threshold: Scalar, *, out: Types) -> Tensor:
    """g where x is above the threshold, as that of relu."""
    return compute(where(B <= C, 0, A), out, grad_output, self, threshold)


@op("hardtanh_backward.default")
def hardtanh_backward(grad_output: Tensor, self: Tensor, min_val: Scalar, max_val: Scalar, *, out: Types) -> Tensor:
    """g where x is inside of a range."""
    return compute(where((B <= C) | (B >= D), 0, A), out, grad_output, self, min_val, max_val)


@op("leaky_relu_backward.default")
def leaky_relu_backward(
    grad_output: Tensor, self: Tensor, negative_slope: Scalar, self_is_result: bool, *, out: Types
) -> Tensor:
    """g, or slope * g where x, or the result, is not above 0."""
    return compute(where(B > 0, A, A * C), out, grad_output, self, negative_slope)


@op("elu_backward.default")
def elu_backward(
    grad_output: Tensor,
    alpha: Scalar,
    scale: Scalar,
    input_scale: Scalar,
    is_result: bool,
    self_or_result: Tensor,
    *,
    out: Types,
) -> Tensor:
    """scale * g, or below 0 what the exponential there gives."""
    low = A * D * (B + C * E) if is_result else A * D * C * E * exp(B * D)
    return compute(where(B <= 0, low, A * C), out, grad_output, self_or_result, scale, input_scale, alpha)


@op("softplus_backward.default")
def softplus_backward(grad_output: Tensor, self: Tensor, beta: Scalar, threshold: Scalar, *, out: Types) -> Tensor:
    """g * sigmoid(beta * x), or g above the threshold."""
    return compute(where(B * C > D, A, A * sigmoid(B * C)), out, grad_output, self, beta, threshold)


@op("mish_backward.default")
def mish_backward(grad_output: Tensor, self: Tensor, *, out: Types) -> Tensor:
    """The derivative of x * tanh(softplus(x)) times g."""
    bent = compute(tanh(A), out, softplus(self, out=out))
    return compute(A * (C + B * sigmoid(B) * (1.0 - C * C)), out, grad_output, self, bent)


@op("log_sigmoid_backward.default")
def log_sigmoid_backward(grad_output: Tensor, self: Tensor, buffer: Tensor, *, out: Types) -> Tensor:
    """g * sigmoid(-x); `buffer` is unused."""
    return compute(A * sigmoid(-B), out, grad_output, self)


@op("native_dropout_backward.default")
def native_dropout_backward(grad_output: Tensor, mask: Tensor, scale: Scalar, *, out: Types) -> Tensor:
    """scale * g where the mask is set."""
    return compute(A * B * C, out, grad_output, mask, scale)


# ---- views -----------------------------------------------------------------------------------------------------------


@op("select_backward.default")
def select_backward(grad_output: Tensor, input_sizes: object, dim: int, index: Size, *, out: Types) -> Tensor:
    """g at one position of a dimension, 0 elsewhere."""
    return select_scatter(filled(0, out), grad_output, dim, index, out=out)


@op("slice_backward.default")
def slice_backward(
    grad_output: Tensor, input_sizes: object, dim: int, start: Size, end: Size, step: int, *, out: Types
) -> Tensor:
    """g in a range of a dimension, 0 elsewhere."""
    return slice_scatter(filled(0, out), grad_output, dim, start, end, step, out=out)


# ---- softmax ---------------------------------------------------------------------------------------------------------


def _wide(value: Tensor) -> Tensor:
    return cast(value, register(value.dtype))


@op("_softmax_backward_data.default")
def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: str, *, out: Types) -> Tensor:
    """y * (g - sum(g * y)) along a dimension."""
    held = register(output.dtype)
    product = pointwise(A * B, held, cast(grad_output, held), _wide(output))
    total = reduce("sum", product, [dim])
    return cast(pointwise(A - B * C, held, product, _wide(output), total), out[0].dtype)


# ---- losses ----------------------------------------------------------------------------------------------------------

MEAN = 1  # how a loss is reduced


@op("mse_loss_backward.default")
def mse_loss_backward(grad_output: Tensor, self: Tensor, target: Tensor, reduction: int, *, out: Types) -> Tensor:
    """2 * (x - y) * g, of a mean divided by the number of elements."""
    if promote(self, target) != self.dtype:
        raise Unsupported("a loss of operands of different dtypes")
    found = compute(2.0 * (B - C) * A, out, grad_output, self, target)
    if reduction != MEAN:
        return found
    return compute(A / B, out, found, size_as(count_of(found, ()), out[0].dtype))
