"""Splits the file of a model into its structure, which is small, and the places of its weights, which are not read.

Protobuf's parser holds a whole message in memory. So the raw data of large initializers are cut out of what it gets:
each tensor is then read into its own memory, and a model takes once the memory of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

LEAST = 4096
LONGEST = 10  # bytes of a number of variable length
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # numbers of fields: of ModelProto, GraphProto and TensorProto
_SIZES = {1: 8, 5: 4}  # bytes, by wire type


class _Field(NamedTuple):
    """A field of a message: where its key begins, and where its value does and ends."""

    number: int
    wire: int
    first: int
    begin: int
    end: int


def split(file: BinaryIO, least: int | None = None) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """A serialized model without the data of its large initializers, and their places: offset and length in bytes, by
    the index of the initializer.

    Args:
        least: data of fewer bytes stay in the model; None: of fewer than LEAST.

    Raises:
        ValueError: the file is no protobuf message.
    """
    least, size = LEAST if least is None else least, file.seek(0, 2)
    graphs = [field for field in _fields(file, 0, size) if (field.number, field.wire) == (GRAPH, 2)]
    if len(graphs) != 1:  # several would be merged
        return _read(file, 0, size), {}
    whole, places, index = graphs[0], dict[int, tuple[int, int]](), 0
    parts: list[bytes] = []
    copied = whole.begin
    for field in _fields(file, whole.begin, whole.end):
        if (field.number, field.wire) != (INITIALIZER, 2):
            continue
        raw = [inner for inner in _fields(file, field.begin, field.end) if inner.number == RAW_DATA]
        if len(raw) == 1 and raw[0].wire == 2 and raw[0].end - raw[0].begin >= least:
            places[index] = raw[0].begin, raw[0].end - raw[0].begin
            kept = _read(file, field.begin, raw[0].first) + _read(file, raw[0].end, field.end)
            parts += [_read(file, copied, field.first), _message(INITIALIZER, kept)]
            copied = field.end
        index += 1
    graph = b"".join([*parts, _read(file, copied, whole.end)])
    return b"".join([_read(file, 0, whole.first), _message(GRAPH, graph), _read(file, whole.end, size)]), places


def _fields(file: BinaryIO, begin: int, end: int) -> Iterator[_Field]:
    """The fields of the message in these bytes."""
    while begin < end:
        head = _read(file, begin, begin + 2 * LONGEST)
        key, at = _varint(head, 0)
        wire, size = key & 7, 0
        if wire in (0, 2):
            number, stop = _varint(head, at)
            at, size = (at, stop - at) if wire == 0 else (stop, number)
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise ValueError(f"there is a field of wire type {wire}")
        if begin + at + size > end:
            raise ValueError("a field ends after its message")
        yield _Field(key >> 3, wire, begin, begin + at, begin + at + size)
        begin += at + size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for shift, byte in enumerate(data[at : at + LONGEST]):
        value |= (byte & 127) << (7 * shift)
        if byte < 128:
            return value, at + shift + 1
    raise ValueError("a number does not end")


def _message(number: int, content: bytes) -> bytes:
    """A field that is a message."""
    size, digits = len(content), bytearray([number << 3 | 2])
    while size > 127:
        digits.append(size & 127 | 128)
        size >>= 7
    return bytes(digits) + bytes([size]) + content


def _read(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)
