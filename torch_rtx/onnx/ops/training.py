"""Steps of optimizers, of the domain ai.onnx.preview.training.

Inputs after the learning rate and the number of steps are all tensors, all gradients, and all of each further state;
results are in the same order, without the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import op

TRAINING = "ai.onnx.preview.training"


def _each(inputs: tuple[Tensor, ...], states: int) -> Iterator[tuple[Tensor, ...]]:
    """For each tensor: itself, its gradient and its states."""
    count = len(inputs) // (2 + states)
    return zip(*(inputs[at : at + count] for at in range(0, len(inputs), count)), strict=True)


def _in_order(results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(chain.from_iterable(zip(*results, strict=True)))


@op("Adagrad", domain=TRAINING)
def adagrad(
    rate: Tensor,
    steps: Tensor,
    *inputs: Tensor,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> tuple[Tensor, ...]:
    """The state is the sum of squares."""
    rate = rate / (1 + steps * decay_factor)
    results = []
    for x, gradient, squares in _each(inputs, 1):
        gradient = norm_coefficient * x + gradient
        squares = squares + gradient.square()
        results.append((x - rate * gradient / (squares.sqrt() + epsilon), squares))
    return _in_order(results)


@op("Adam", domain=TRAINING)
def adam(
    rate: Tensor,
    steps: Tensor,
    *inputs: Tensor,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> tuple[Tensor, ...]:
    """The states are the means of gradients and of squares."""
    done = steps.clamp(min=1).to(rate.dtype)
    rate = torch.where(steps > 0, rate * (1 - beta**done).sqrt() / (1 - alpha**done), rate)
    results = []
    for x, gradient, mean, squares in _each(inputs, 2):
        gradient = norm_coefficient * x + gradient
        mean = alpha * mean + (1 - alpha) * gradient
        squares = beta * squares + (1 - beta) * gradient.square()
        x = x - rate * mean / (squares.sqrt() + epsilon)
        results.append(((1 - norm_coefficient_post) * x, mean, squares))
    return _in_order(results)


@op("Momentum", domain=TRAINING)
def momentum(
    rate: Tensor, steps: Tensor, *inputs: Tensor, alpha: float, beta: float, mode: str, norm_coefficient: float
) -> tuple[Tensor, ...]:
    """The state is the momentum."""
    if mode not in ("standard", "nesterov"):
        raise OnnxError(f"Momentum of mode {mode!r}", hint="'standard' and 'nesterov' are supported")
    factor = torch.where(steps > 0, beta, 1.0)
    results = []
    for x, gradient, velocity in _each(inputs, 1):
        gradient = norm_coefficient * x + gradient
        velocity = alpha * velocity + factor.to(x.dtype) * gradient
        results.append((x - rate * (gradient + alpha * velocity if mode == "nesterov" else velocity), velocity))
    return _in_order(results)
