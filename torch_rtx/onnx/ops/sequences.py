"""Sequences, as Python lists of tensors, and optionals: a value, or None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import Ints, op


@dataclass(frozen=True)
class Growing:
    """A sequence in a pass of a captured loop that appends to it: what this pass has `added`."""

    added: tuple[Tensor, ...] = ()

    def append(self, tensor: Tensor) -> Growing:
        """The sequence with one more element."""
        return Growing((*self.added, tensor))


@dataclass(frozen=True)
class Stacked:
    """A sequence of tensors of one shape, of a length that only a run knows: `rows` (length, ...)."""

    rows: Tensor

    def append(self, tensor: Tensor) -> Stacked:
        """The sequence with one more element."""
        return Stacked(torch.cat([self.rows, tensor.unsqueeze(0)]))


Sequence = list[Tensor] | Growing | Stacked
pytree.register_pytree_node(Growing, lambda x: ([*x.added], None), lambda leaves, _: Growing(tuple(leaves)))
pytree.register_pytree_node(Stacked, lambda x: ([x.rows], None), lambda leaves, _: Stacked(*leaves))


def listed(sequence: Sequence) -> list[Tensor]:
    """A sequence of a known length.

    Raises:
        OnnxError: a run alone knows its length.
    """
    if isinstance(sequence, list):
        return sequence
    raise OnnxError(
        "the length of the sequence depends on data: in a capture, a loop may only append to it, "
        "and what follows append, stack, concatenate, or take elements",
        hint="run the module eagerly, or replace the sequence in the model",
    )


@op("SequenceConstruct", since=11)
def sequence_construct(*tensors: Tensor) -> Sequence:
    """A sequence of the inputs."""
    return list(tensors)


@op("SequenceEmpty", since=11)
def sequence_empty(*, dtype: int = 1) -> Sequence:
    """A sequence of nothing."""
    return []


def _position(sequence: list[Tensor], position: Ints | None, default: int, end: int) -> int:
    """A position as a Python index that is in range."""
    index = default if position is None else position[0]
    if not isinstance(index, int):
        raise OnnxError("a position in a sequence depends on data, which a capture can't follow")
    if not -len(sequence) <= index < end:
        raise OnnxError(f"position {index} is out of range: the sequence has {len(sequence)} elements")
    return index


@op("SequenceAt", since=11, ints=("position",))
def sequence_at(sequence: Sequence, position: Ints) -> Tensor:
    """The element at a position."""
    if isinstance(sequence, Stacked):
        return sequence.rows.select(0, position[0])
    return listed(sequence)[_position(listed(sequence), position, 0, len(listed(sequence)))]


@op("SequenceInsert", since=11, ints=("position",))
def sequence_insert(sequence: Sequence, tensor: Tensor, position: Ints | None = None) -> Sequence:
    """A sequence with one more element, before a position or at the end."""
    if position is None and not isinstance(sequence, list):
        return sequence.append(tensor)
    result = list(listed(sequence))
    result.insert(_position(result, position, len(result), len(result) + 1), tensor)
    return result


@op("SequenceErase", since=11, ints=("position",))
def sequence_erase(sequence: Sequence, position: Ints | None = None) -> Sequence:
    """A sequence without the element at a position, or without the last."""
    result = list(listed(sequence))
    del result[_position(result, position, -1, len(result))]
    return result


@op("SequenceLength", since=11)
def sequence_length(sequence: Sequence) -> Tensor:
    """The number of elements."""
    if isinstance(sequence, Stacked):
        return torch.scalar_tensor(sequence.rows.shape[0], dtype=torch.int64, device=sequence.rows.device)
    device = listed(sequence)[0].device if sequence else None
    return torch.scalar_tensor(len(listed(sequence)), dtype=torch.int64, device=device)


@op("SplitToSequence", since=11, ints=("split",))
def split_to_sequence(x: Tensor, split: Ints | None = None, *, axis: int = 0, keepdims: int = 1) -> Sequence:
    """A sequence of parts of a tensor; without `split`, of its slices."""
    if split is None:
        return list(x.split(1, axis)) if keepdims else list(x.unbind(axis))
    whole = x.shape[axis]
    # One number is the size of each part; so is a list of one, if it is not the whole.
    parts = split if len(split) > 1 or split[0] == whole else split[0]
    return list(x.split(parts, axis))


@op("ConcatFromSequence", since=11)
def concat_from_sequence(sequence: Sequence, *, axis: int, new_axis: int = 0) -> Tensor:
    """The elements along an axis that they have, or along a new one."""
    if isinstance(sequence, Stacked):
        rows = sequence.rows if new_axis else sequence.rows.movedim(0, axis % (sequence.rows.dim() - 1))
        return rows.movedim(0, axis) if new_axis else rows.flatten(axis := axis % (rows.dim() - 1), axis + 1)
    return torch.stack(listed(sequence), axis) if new_axis else torch.cat(listed(sequence), axis)


@op("Optional", since=15)
def optional(value: Any = None, *, type: Any = None) -> Any:
    """An optional with a value, or without."""
    return value


@op("OptionalHasElement", since=15)
def optional_has_element(value: Any = None) -> Tensor:
    """Whether there is a value."""
    device = value.device if isinstance(value, Tensor) else None
    return torch.scalar_tensor(value is not None, dtype=torch.bool, device=device)


@op("OptionalGetElement", since=15)
def optional_get_element(value: Any) -> Any:
    """The value of an optional.

    Raises:
        OnnxError: it has none.
    """
    if value is None:
        raise OnnxError("the optional has no value")
    return value
