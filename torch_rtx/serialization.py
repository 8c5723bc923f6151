"""Writes the format of safetensors files, from the memory of tensors: without numpy, which the package of that name
needs to write, and without copies. Imports no torch by itself."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch_rtx.dtypes import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

# By the name of a dtype of PyTorch.
_NAMES = {f"torch.{dtype.torch}": dtype.safetensors for dtype in DTYPES.values() if dtype.safetensors is not None}


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, to read and to write."""
    if not tensor.nbytes:
        return memoryview(b"")
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # which lives as long as the view
    return memoryview(array)


def serialize(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, last: Mapping[str, Tensor] | None = None
) -> tuple[bytes, list[memoryview]]:
    """The header of a safetensors file, with its length field, and the pieces of the data that follow. The order is
    that of sizes of elements, the largest first, which aligns each tensor, and then of names.

    Args:
        tensors: contiguous, in host memory, of dtypes that the format has; they may share memory.
        last: the same, of single bytes, which come after all others.

    Raises:
        UnicodeEncodeError: a name has half of a surrogate pair.
    """
    names = [*sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), *(last or {})]
    tensors = {**tensors, **(last or {})}
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [memory_of(tensors[name]) for name in names]
