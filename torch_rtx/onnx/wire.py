"""Splits the file of a model into its structure, which is small, and the places of its weights, which are not read.

Protobuf's parser holds a whole message in memory. So the raw data of large initializers are cut out of what it gets:
each tensor is then read into its own memory, and a model takes once the memory of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

LEAST = 4096  # bytes of data that stay in the file
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # numbers of fields: of ModelProto, GraphProto and TensorProto
_SIZES = {1: 8, 5: 4}  # bytes, by wire type


class _Field(NamedTuple):
    """A field of a message: where its key begins, and where its value does and ends."""

    number: int
    wire: int
    first: int
    begin: int
    end: int


def split(file: BinaryIO) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """A serialized model without the data of its large initializers, and their places: offset and length in bytes, by
    the index of the initializer.

    Raises:
        ValueError: the file is no protobuf message.
    """
    size = file.seek(0, 2)
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
        if len(raw) == 1 and raw[0].wire == 2 and raw[0].end - raw[0].begin >= LEAST:
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
        key, at = _varint(file, begin)
        wire = key & 7
        if wire == 0:
            stop = _varint(file, at)[1]
        elif wire == 2:
            size, at = _varint(file, at)
            stop = at + size
        elif wire in _SIZES:
            stop = at + _SIZES[wire]
        else:
            raise ValueError(f"there is a field of wire type {wire}")
        if stop > end:
            raise ValueError("a field ends after its message")
        yield _Field(key >> 3, wire, begin, at, stop)
        begin = stop


def _varint(file: BinaryIO, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for count, byte in enumerate(_read(file, at, at + 10)):
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, at + count + 1
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
