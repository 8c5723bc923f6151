"""Rotations by Hadamard matrices: they spread outliers over a block of channels, and a product does not change where
both operands are rotated."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGEST = 256  # a product with a larger matrix costs more than it gains


def block_of(width: int) -> int:
    """The size of the rotation of that many channels: the largest power of two that divides it, within limits."""
    return min(width & -width, LARGEST)


@cache
@torch.inference_mode(False)
def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthogonal, symmetric Hadamard matrix of a power of two, f32[size, size]. All layers share one, so that a
    program has it once."""
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / size**0.5).to(device)


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` with each block of its last axis multiplied by `matrix`."""
    return (x.unflatten(-1, (-1, matrix.shape[0])) @ matrix.to(x.dtype)).flatten(-2)
