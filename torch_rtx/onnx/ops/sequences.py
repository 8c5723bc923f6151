"""Sequences, as Python lists of tensors, and optionals: a value, or None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import Ints, op

Sequence = list[Tensor]


@op("SequenceConstruct", since=11)
def sequence_construct(*tensors: Tensor) -> Sequence:
    """A sequence of the inputs."""
    return list(tensors)


@op("SequenceEmpty", since=11)
def sequence_empty(*, dtype: int = 1) -> Sequence:
    """A sequence of nothing."""
    return []


def _position(sequence: Sequence, position: Ints | None, default: int, end: int) -> int:
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
    return sequence[_position(sequence, position, 0, len(sequence))]


@op("SequenceInsert", since=11, ints=("position",))
def sequence_insert(sequence: Sequence, tensor: Tensor, position: Ints | None = None) -> Sequence:
    """A sequence with one more element, before a position or at the end."""
    result = list(sequence)
    result.insert(_position(sequence, position, len(sequence), len(sequence) + 1), tensor)
    return result


@op("SequenceErase", since=11, ints=("position",))
def sequence_erase(sequence: Sequence, position: Ints | None = None) -> Sequence:
    """A sequence without the element at a position, or without the last."""
    result = list(sequence)
    del result[_position(sequence, position, -1, len(sequence))]
    return result


@op("SequenceLength", since=11)
def sequence_length(sequence: Sequence) -> Tensor:
    """The number of elements."""
    return torch.tensor(len(sequence), device=sequence[0].device if sequence else None)


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
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


@op("Optional", since=15)
def optional(value: Any = None, *, type: Any = None) -> Any:
    """An optional with a value, or without."""
    return value


@op("OptionalHasElement", since=15)
def optional_has_element(value: Any = None) -> Tensor:
    """Whether there is a value."""
    return torch.tensor(value is not None, device=value.device if isinstance(value, Tensor) else None)


@op("OptionalGetElement", since=15)
def optional_get_element(value: Any) -> Any:
    """The value of an optional.

    Raises:
        OnnxError: it has none.
    """
    if value is None:
        raise OnnxError("the optional has no value")
    return value
