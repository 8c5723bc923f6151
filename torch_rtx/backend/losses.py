"""Decomposes the logarithm of a softmax and the likelihood of classes, so that kernels compute them from the logits.

PyTorch's operators save the logarithms of all probabilities for the backward, in float32 below autocast. Written out,
a backward computes them again from the logits and two numbers per row, which is all that the partitioner saves, and a
forward reads the probability of each target without storing any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
MEAN, SUM = 1, 2  # how a loss is reduced


def _wide(value: Tensor) -> Tensor:
    """`value` in the dtype that PyTorch's own kernels compute in."""
    return value.to(torch.float32) if value.dtype in (torch.float16, torch.bfloat16) else value


def _log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Any:
    """x - max - log(sum(exp(x - max))); the maximum is taken away first, as nothing is lost that way."""
    if not self.dim() or not self.numel():
        return NotImplemented
    wide = _wide(self)
    shifted = wide - wide.amax(dim, keepdim=True)
    found = shifted - shifted.exp().sum(dim, keepdim=True).log()
    return found if half_to_float else found.to(self.dtype)


def _log_softmax_backward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Any:
    """g - exp(y) * sum(g) along a dimension."""
    if not output.dim() or not output.numel():
        return NotImplemented
    gradient = _wide(grad_output)
    return (gradient - _wide(output).exp() * gradient.sum(dim, keepdim=True)).to(input_dtype)


def _of_targets(
    self: Tensor, axis: int, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Positions of the targets along the classes, and their weights: 0 for ignored ones, NaN for classes that do not
    exist. A position is in range whatever the target is: kernels that are given a part of all this rely on it."""
    safe = target.clamp(0, self.shape[axis] - 1)
    wide = _wide(self).dtype
    each = torch.ones_like(target, dtype=wide) if weight is None else aten.index.Tensor(_wide(weight), [safe])
    return safe, each.masked_fill(target != safe, math.nan).masked_fill(target == ignore_index, 0.0)


def _nll_loss(self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Any:
    """The negative log-likelihood of the targets, [classes] or [batch, classes, ...], and the sum of their weights."""
    axis = min(self.dim(), 2) - 1
    safe, each = _of_targets(self, axis, target, weight, ignore_index)
    found = _wide(self.gather(axis, safe.unsqueeze(axis)).squeeze(axis))
    losses = (-found * each).masked_fill(target == ignore_index, 0.0)
    if reduction not in (MEAN, SUM):
        return losses.to(self.dtype), self.new_zeros(())
    loss, total = losses.sum(), each.sum()
    return (loss / total if reduction == MEAN else loss).to(self.dtype), total.to(self.dtype)


def _nll_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Any:
    """-g times the weight of its class at each target, 0 elsewhere."""
    axis = min(self.dim(), 2) - 1
    safe, each = _of_targets(self, axis, target, weight, ignore_index)
    gradient = _wide(grad_output)
    if reduction == MEAN:
        gradient = gradient / _wide(total_weight)
    at_target = (-gradient * each).masked_fill(target == ignore_index, 0.0).to(self.dtype)
    return self.new_zeros(self.shape).scatter(axis, safe.unsqueeze(axis), at_target.unsqueeze(axis))


LOSSES: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss2d_forward.default: _nll_loss,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.nll_loss2d_backward.default: _nll_loss_backward,
}
