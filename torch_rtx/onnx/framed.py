"""The frame of a model's file: its bytes without the data of its initializers.

A model that is trained further and exported again has the same frame as a rule. Its weights then lie where they lay in
the other file, and none of it has to be parsed.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torch_rtx.onnx import wire


def frame(file: BinaryIO) -> tuple[str, dict[int, tuple[int, int]]]:
    """A digest of a serialized model's frame, and the places of what is left out, see `wire.split`.

    Raises:
        ValueError: the file is no protobuf message.
    """
    structure, places = wire.split(file, 0)
    return hashlib.sha256(structure).hexdigest(), places


def digest_of_bytes(data: Any) -> str:
    """A digest of bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def mapped(file: BinaryIO) -> mmap.mmap | bytearray:
    """The bytes of a file, which nobody should change meanwhile. Writes to them do not reach the file."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if os.fstat(file.fileno()).st_size else bytearray()


def tensor_at(data: Any, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor over bytes. They may begin anywhere: it is there to be copied, see `aligned`."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:  # any byte but 0 is true
        return tensor_at(data, offset, torch.uint8, shape) != 0
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it lies where one can't be computed with."""
    if tensor.is_meta or tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone().view(tensor.dtype).reshape(tensor.shape)


def weights_in(
    path: str | os.PathLike[str], program: Mapping[str, Any], wanted: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> dict[str, Tensor] | None:
    """The tensors of a file that has the frame of the engine's own, mapped, by the names that the engine has for them.
    None: it has another frame, or other values of what is part of the program.

    Args:
        program: see `weights.program_of`.
        wanted: the types of those that are needed.
    """
    with open(path, "rb") as file:
        try:
            digest, places = frame(file)
        except ValueError:
            return None
        if digest != program["frame"]:
            return None
        data = mapped(file)
    numbers, found = iter(program["numbers"]), {}
    for name, index in zip(program["weights"], program["initializers"], strict=True):
        number = next(numbers, "") if name is None else ""
        if index is None:
            continue
        offset, size = places.get(index, (0, -1))
        if name is None:
            if digest_of_bytes(data[offset : offset + size]) != number.rpartition(";")[2]:
                return None
        elif name in wanted:
            dtype, shape = wanted[name]
            if size != math.prod(shape) * dtype.itemsize:
                return None
            found[name] = tensor_at(data, offset, dtype, shape)
    return found
