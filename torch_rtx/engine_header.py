"""The header of an engine file, and the program: what a reader needs before it reads tensors. Needs no torch.

Since format 7 the file has the program in the tensor `program`, its last one: the JSON of the manifest and the tactics,
and then the text of the graph, compressed together. The header has their sizes and the digest of the tensor, so that
the program is read and checked without the rest of the file, and takes no more memory than the limits here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BufferedIOBase, BytesIO, TextIOBase
from itertools import takewhile
from typing import Any, BinaryIO

from safetensors import SafetensorError

from torch_rtx import dtypes
from torch_rtx.binaries import MAX_BINARY, compress, decompress
from torch_rtx.errors import EngineFormatError, InvalidIR, RtxError
from torch_rtx.files import Path
from torch_rtx.ir import MAX_RANK
from torch_rtx.irparse import MAX_NAME
from torch_rtx.manifest import COMPRESSED, IN_HEADER, Json, Manifest, exactly, read_manifest, read_versions

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
CHUNK = 1 << 20  # bytes that are read and digested at once, while they are in the processor's cache
ZEROS = b"0" * 64
AGAIN = "copy the file again, or build it again"  # what to do about a damaged file
# The exact start of the header, so that the digests have fixed offsets.
PREFIX = re.compile(
    rb'\{"__metadata__":\{"torch_rtx":"\{\\"header_digest\\":\\"([0-9a-f]{64})\\",\\"data_digest\\":\\"([0-9a-f]{64})\\",'
)
# Dtype of the IR: its name in safetensors (None: it has none) and its bytes.
DTYPES = {name: (dtype.safetensors, dtype.bytes) for name, dtype in dtypes.DTYPES.items()}
_STORED = {name: (dtype, size) for dtype, (name, size) in DTYPES.items() if name is not None}

PROGRAM = "program"  # key of a tensor
# Bytes of its two parts; one that is compressed gives 1000 and more, so that a hostile file would be small. A graph has
# at most 2^18 lines.
MAX_TABLES, MAX_GRAPH = 16 << 20, 32 << 20

File = Path | BinaryIO

# ---- contents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: `dtype` as the IR names it, `shape`, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of an intact file. `tensors` has the keys of the file. The graph (text) and the tactics of its kernels
    (JSON, None if there are none; `kernels` and `splits`: those of formats 2 to 4) are unchecked. `packs` has the keys
    of tensors with binaries, and for each `Pack.sizes`."""

    manifest: Manifest
    graph_text: str
    tensors: Mapping[str, TensorInfo]
    data_digest: str
    file_bytes: int
    tactics: Json = None
    kernels: Json = None
    splits: Json = None
    packs: Mapping[str, tuple[tuple[str, int], ...] | None] = field(default_factory=dict)

    @property
    def has_program(self) -> bool:
        """Whether the file has a tensor `program`."""
        return self.manifest.format_version >= COMPRESSED


# ---- opening ---------------------------------------------------------------------------------------------------------


def file_object(file: Any, method: str, mode: str) -> Any:
    """Raises RtxError if `file` has no such method, or is opened for text."""
    if callable(getattr(file, method, None)) and not isinstance(file, TextIOBase):
        return file
    what = "one that is opened for text" if isinstance(file, TextIOBase) else f"a {type(file).__name__}"
    hint = f"pass its path, open(path, {mode!r}) or io.BytesIO(...)"
    raise RtxError(f"an engine is a file, not {what}", hint=hint)


def name_of(file: object) -> str:
    """The path of a file, or the name of a file object."""
    if isinstance(file, str | os.PathLike):
        return str(os.fspath(file))
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else f"<{type(file).__name__}>"


@contextmanager
def reading(path: File) -> Iterator[BufferedIOBase]:
    """Opens the file, or reads the file object, and adds its name to EngineFormatErrors."""
    try:
        if not isinstance(path, str | os.PathLike):
            yield BytesIO(file_object(path, "read", "rb").read())
            return
        if os.path.isdir(path):
            raise EngineFormatError("this is a folder, not an .rtx file")
        with open(path, "rb") as file:
            yield file
    except EngineFormatError as error:
        raise type(error)(error.message, loc=name_of(path), hint=error.hint) from None
    except InvalidIR as error:
        raise EngineFormatError(f"the graph is not valid: {error}", loc=name_of(path)) from None
    except SafetensorError as error:
        raise EngineFormatError(f"not a safetensors file: {error}", loc=name_of(path)) from None


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_header(file: BufferedIOBase) -> Header:
    """The header of an open file, which is at its start, and its program; leaves the file where its data begins. Errors
    are those of `engine.read_header`."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = file.read(8)
    count = int.from_bytes(length, "little")
    if len(length) < 8 or count > MAX_HEADER or 8 + count > size:
        raise EngineFormatError("not an .rtx file, or truncated: its header is incomplete", hint=AGAIN)
    raw = file.read(count)
    match = PREFIX.match(raw)
    if match is None:
        hint = "files of weights are for load(path, weights=...)"
        raise EngineFormatError("not an .rtx file: its header was not written by torch_rtx", hint=hint)
    zeroed = raw[: match.start(1)] + ZEROS + raw[match.end(1) :]
    if hashlib.sha256(length + zeroed).hexdigest().encode() != match[1]:
        raise EngineFormatError("the header is damaged: its digest does not match", hint=AGAIN)
    try:
        outer = json.loads(raw, object_pairs_hook=_unique)
        inner = json.loads(outer.pop("__metadata__")["torch_rtx"], object_pairs_hook=_unique)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EngineFormatError(f"the header is not the JSON of an engine: {error}") from None
    version = read_versions(inner.get("manifest"))
    tensors, end = _tensor_table(outer)
    if 8 + count + end != size:
        raise EngineFormatError(f"the file has {size} bytes, its header describes {8 + count + end}")
    if version >= COMPRESSED:
        inner = _with_program(inner, file, tensors)
        file.seek(8 + count)
    manifest = read_manifest(inner.get("manifest"))
    text = inner.get("graph")
    if not isinstance(text, str):
        raise EngineFormatError("the header has no graph")
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != manifest.digests.get("graph"):
        raise EngineFormatError("the graph is not the one that the manifest was written for")
    packs = {key: None for key in tensors if key.startswith("kernel/")} if version < COMPRESSED else _packs(inner)
    tables = {name: inner.get(name) for name in ("tactics", "kernels", "splits")}
    return Header(manifest, text, tensors, match[2].decode(), size, **tables, packs=packs)


def _with_program(inner: dict[str, Any], file: BufferedIOBase, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """`inner`, the header of a file which is at its data, with what the tensor `program` has.

    Raises:
        EngineFormatError: the tensor is missing, damaged, or not what the header says.
    """
    try:
        given = exactly(dict)(inner["program"])
        tables, text = exactly(int)(given["tables"]), exactly(int)(given["graph"])
        info = tensors[PROGRAM]
    except (KeyError, TypeError):
        raise EngineFormatError("the header does not describe a program") from None
    if (info.dtype, len(info.shape)) != ("u8", 1):
        raise EngineFormatError(f"the program is {info.dtype}{list(info.shape)}, not bytes")
    if not 0 <= tables <= MAX_TABLES or not 0 <= text <= MAX_GRAPH or info.nbytes > MAX_HEADER:
        raise EngineFormatError(f"the program takes {tables} and {text} bytes, more than the limits of this format")
    file.seek(sum(found.nbytes for found in takewhile(lambda found: found is not info, tensors.values())), os.SEEK_CUR)
    stored = file.read(info.nbytes)
    if hashlib.sha256(stored).hexdigest() != given.get("digest"):
        raise EngineFormatError("the program is damaged: its digest is not the one in the header", hint=AGAIN)
    try:
        raw = _CODECS[exactly(str)(given["codec"])](stored, tables + text)
        if len(raw) != tables + text:
            raise ValueError("it has another size than the header says")
        rest = exactly(dict)(json.loads(raw[:tables].decode(), object_pairs_hook=_unique))
        graph = raw[tables:].decode("utf-8", "surrogatepass")
    except (zlib.error, EngineFormatError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise EngineFormatError(f"the program can't be read: {error}") from None
    manifest = rest.get("manifest")
    return {**rest, "graph": graph, "manifest": isinstance(manifest, dict) and {**manifest, **inner["manifest"]}}


def _inflate(stored: bytes, limit: int) -> bytes:
    """Raises ValueError if more than `limit` bytes come out, or if there is no end or something after it."""
    decompressor = zlib.decompressobj()
    raw = decompressor.decompress(stored, limit + 1)  # so that it comes to the end
    if len(raw) > limit or not decompressor.eof or decompressor.unused_data:
        raise ValueError("what is compressed is too large or has no end")
    return raw


# LZMA takes a quarter less, and zlib is in every Python.
_CODECS = {"zlib": _inflate, "xz": decompress}


def _packs(inner: Mapping[str, Any]) -> dict[str, tuple[tuple[str, int], ...] | None]:
    """By key of a tensor, the names and sizes of the binaries in it.

    Raises:
        EngineFormatError: no names and sizes, a name twice, or more than a pack may have.
    """
    try:
        found = {
            key: tuple((exactly(str)(one), exactly(int)(size)) for one, size in exactly(list)(rows))
            for key, rows in exactly(dict)(inner.get("packs", {})).items()
        }
    except (TypeError, ValueError) as error:
        raise EngineFormatError(f"the table of binaries is invalid: {error}") from None
    if any(not key.startswith(("kernels/", "ptx/")) for key in found):
        raise EngineFormatError("the table of binaries is invalid: a tensor of another kind")
    names = [name for sizes in found.values() for name, _ in sizes]
    if len(set(names)) != len(names):
        raise EngineFormatError("the table of binaries is invalid: a name occurs twice")
    for sizes in found.values():
        if any(size < 0 for _, size in sizes) or sum(size for _, size in sizes) > MAX_BINARY:
            raise EngineFormatError(f"the table of binaries is invalid: a pack has at most {MAX_BINARY} bytes")
    return dict(found)


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """A JSON object without duplicate names, which this parser and safetensors' could resolve differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor_table(outer: dict[str, Any]) -> tuple[dict[str, TensorInfo], int]:
    """The tensors by key, in the order of the file, and their total bytes; checks that they are stored without gaps and
    overlaps."""
    spans: list[tuple[int, int, str, TensorInfo]] = []
    for key, entry in outer.items():
        match entry:
            case {"dtype": str(name), "shape": [*shape], "data_offsets": [begin, end], **rest} if (
                not rest
                and name in _STORED
                and len(shape) <= MAX_RANK
                and len(key) <= MAX_NAME
                and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            ):
                dtype, itemsize = _STORED[name]
                spans.append((begin, end, key, TensorInfo(dtype, tuple(shape), math.prod(shape) * itemsize)))
            case _:
                raise EngineFormatError(f"the header has an invalid description of the tensor {key!r}")
    at = 0
    spans.sort(key=lambda span: span[:2])
    for begin, end, key, info in spans:
        if begin != at or end - begin != info.nbytes:
            raise EngineFormatError(f"tensor {key!r} has a wrong offset, or a size that contradicts its shape")
        at = end
    return {key: info for _, _, key, info in spans}, at


def names_of_sizes(signature: Json) -> dict[str, str]:
    """By symbol of the graph, the caller's name of that size, in the signature of a manifest.

    Raises:
        EngineFormatError: these are no names.
    """
    names: Any = signature.get("sizes", {}) if isinstance(signature, dict) else {}
    if not isinstance(names, dict) or not all(isinstance(name, str) and name.isidentifier() for name in names.values()):
        raise EngineFormatError("the signature has invalid names of sizes")
    return names


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_program(manifest: Manifest, text: str, tables: Mapping[str, Json]) -> tuple[str, bytes]:
    """The metadata of the header, with zeros for digests, and the data of the tensor `program`.

    Args:
        text: of the graph.
        tables: `tactics` and `packs`, if there are any. Their binaries need LZMA, and then the program has it, too.

    Raises:
        EngineFormatError: a field of the manifest is of a wrong type.
        RtxError: the program is larger than the format allows.
    """
    fields = json.loads(json.dumps(asdict(manifest)))
    read_manifest(fields)
    head = {name: fields.pop(name) for name in IN_HEADER}
    rest = json.dumps({"manifest": fields, **tables}, separators=(",", ":")).encode()
    graph = text.encode("utf-8", "surrogatepass")
    for what, size, limit in (("tables", len(rest), MAX_TABLES), ("graph", len(graph), MAX_GRAPH)):
        if size > limit:
            raise RtxError(f"the {what} of the program take {size} bytes, more than the {limit} that a file may have")
    codec, stored = ("xz", compress(rest + graph)) if tables else ("zlib", zlib.compress(rest + graph, 9))
    digests = dict.fromkeys(("header_digest", "data_digest"), ZEROS.decode())
    sizes: dict[str, Json] = {"tables": len(rest), "graph": len(graph)}
    program: Json = {"digest": hashlib.sha256(stored).hexdigest(), "codec": codec, **sizes}
    return json.dumps({**digests, "manifest": head, "program": program}, separators=(",", ":")), stored


def with_digests(header: bytes, data_digest: bytes) -> bytes:
    """The header of a file with both digests in the place of zeros."""
    match = PREFIX.match(header, 8)
    assert match is not None  # `write_program` has put both digests at the start
    header = header[: match.start(2)] + data_digest + header[match.end(2) :]
    return header[: match.start(1)] + hashlib.sha256(header).hexdigest().encode() + header[match.end(1) :]
