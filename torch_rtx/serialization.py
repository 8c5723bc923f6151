"""Writes the format of safetensors files, from the memory of tensors: without numpy, which the package of that name
needs to write, and without copies; and digests what is read. Imports no torch by itself."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

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


class Digests:
    """SHA-256 digests of bytes that are read piece by piece; of many, they are computed while the next ones are read,
    which takes about as long. What was given to `update` must stay as it is until `finish`.

    Args:
        starts: what comes before the first piece, by digest.
        count: of bytes that will come, about.
    """

    LARGE, AHEAD = 16 << 20, 8  # bytes that are worth threads; pieces that may wait to be digested

    def __init__(self, starts: Mapping[str, bytes], count: int) -> None:
        self._hashes = {name: hashlib.sha256(start) for name, start in starts.items()}
        # A digest takes its pieces in order.
        self._threads = [ThreadPoolExecutor(1, "torch_rtx digest") for _ in starts] if count >= self.LARGE else []
        self._waiting: deque[list[Future[None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def update(self, piece: memoryview) -> None:
        """Take the next bytes."""
        hashes = self._hashes.values()
        if not self._threads:
            for one in hashes:
                one.update(piece)
            return
        pairs = zip(self._threads, hashes, strict=True)
        self._waiting.append([thread.submit(one.update, piece) for thread, one in pairs])
        if len(self._waiting) > self.AHEAD:
            self._wait()

    def finish(self) -> dict[str, str]:
        """The digests of all bytes so far."""
        while self._waiting:
            self._wait()
        return {name: one.hexdigest() for name, one in self._hashes.items()}

    def _wait(self) -> None:
        for piece in self._waiting.popleft():
            piece.result()


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
