"""Tensors that a formula describes: of one number, of positions along an axis or several, and triangles of two numbers.

Exporters compute the masks and the positions of a model and write them as tensors, of which nothing is known to a
compiler. Written as PyTorch writes them, a causal mask is seen to be one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

MAX_COLUMNS = 8  # dimensions that positions are in
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Formula:
    """A tensor of `shape`: first + the sum of steps[axis] * (place on that axis), or `other` where the column is more
    than `diagonal` behind the row.

    Attributes:
        other: None: the same formula holds everywhere.
        columns: on the last axis, whose every place has a formula of its own, as positions in several dimensions do:
            how much more than `first` it begins with, and its steps on the other axes. None: there is one formula.
    """

    shape: tuple[int, ...]
    first: float = field(repr=False)  # a number of the model, which a refit compares
    steps: tuple[int, ...] = ()
    other: float | None = None
    diagonal: int = 0
    columns: tuple[tuple[int, tuple[int, ...]], ...] | None = None

    def tensor(self, like: Tensor) -> Tensor:
        """The tensor, in the dtype and on the device of another."""
        dtype, device = like.dtype, like.device
        if self.columns is not None:
            parts = (Formula(self.shape[:-1], self.first + more, steps) for more, steps in self.columns)
            return torch.stack([part.tensor(like) for part in parts], -1)
        if any(self.steps):
            behind = range(len(self.shape) - 1, -1, -1)
            places = [
                (torch.arange(size, device=device) * step).reshape(-1, *[1] * count)
                for size, step, count in zip(self.shape, self.steps, behind, strict=True)
                if step
            ]
            return (reduce(operator.add, places) + int(self.first)).to(dtype).expand(self.shape)
        if self.other is None:
            return torch.full(self.shape, self.first, dtype=dtype, device=device)
        rows, columns = (torch.arange(size, device=device) for size in self.shape[-2:])
        inner = torch.full((), self.first, dtype=dtype, device=device)
        outer = torch.full((), self.other, dtype=dtype, device=device)
        return torch.where(columns <= rows[:, None] + self.diagonal, inner, outer).expand(self.shape)


def computed(like: Tensor, *, formula: Formula) -> Tensor:
    """The tensor of a formula, as an operator."""
    return formula.tensor(like)


def formula(tensor: Tensor) -> Formula | None:
    """The formula of a tensor, exact to the bit; None: there is none."""
    shape, bits = tuple(tensor.shape), tensor.contiguous().view(BITS[tensor.dtype.itemsize])
    if tensor.numel() < 2 or tensor.is_complex():
        return None
    first = bits.reshape(-1)[0]
    if bool((bits == first).all()):
        return Formula(shape, tensor.reshape(-1)[0].item())
    return _progression(tensor, shape) if tensor.dtype in (torch.int32, torch.int64) else _triangle(tensor, bits, shape)


def _progression(tensor: Tensor, shape: tuple[int, ...]) -> Formula | None:
    first = int(tensor.reshape(-1)[0])
    seconds = [tensor.select(axis, min(1, size - 1)).reshape(-1)[0] for axis, size in enumerate(shape)]
    found = Formula(shape, first, tuple(int(second) - first for second in seconds))
    if any(found.steps) and torch.equal(found.tensor(tensor), tensor):
        return found
    return _columns(tensor, shape, first)


def _columns(tensor: Tensor, shape: tuple[int, ...], first: int) -> Formula | None:
    """Of positions in several dimensions, the last axis."""
    if shape[-1] > MAX_COLUMNS or tensor.numel() <= len(shape) * shape[-1]:  # else there is more of the formula
        return None
    parts = [formula(column) for column in tensor.unbind(-1)]
    columns = [(int(part.first) - first, part.steps) for part in parts if part and part.columns is None]
    return Formula(shape, first, columns=tuple(columns)) if len(columns) == len(parts) else None


def _triangle(tensor: Tensor, bits: Tensor, shape: tuple[int, ...]) -> Formula | None:
    """Of a lower triangle: its corners at the lower left and the upper right differ."""
    if len(shape) < 2:
        return None
    inner, outer = bits[..., -1, 0].reshape(-1)[0], bits[..., 0, -1].reshape(-1)[0]
    (first, other) = (tensor[..., row, column].reshape(-1)[0].item() for row, column in ((-1, 0), (0, -1)))
    last_row = bits[..., -1, :].reshape(-1, shape[-1])[0]
    diagonal = int((last_row == inner).sum()) - shape[-2]  # where the last row ends
    if diagonal + shape[-2] == shape[-1]:  # at its end: the first row says it
        diagonal = int((bits[..., 0, :].reshape(-1, shape[-1])[0] == inner).sum()) - 1
    rows, columns = torch.arange(shape[-2]), torch.arange(shape[-1])
    wanted = torch.where(columns <= rows[:, None] + diagonal, inner, outer)
    return Formula(shape, first, other=other, diagonal=diagonal) if bool((bits == wanted).all()) else None
