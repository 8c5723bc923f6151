"""The engine file `.rtx`: a safetensors file whose metadata holds the program and whose tensors hold the data.

    key `constant/NAME`, `weight/NAME`   the data of the graph's parameters; a weight-stripped engine has no weights
    key `kernel/DIGEST`                  the binaries of the graph's kernels, compressed
    metadata, one key `torch_rtx`        JSON {"header_digest", "data_digest", "manifest", "graph"} and, if there are
                                         any, "tactics", in this order

`data_digest` is the SHA-256 of all bytes after the header; `header_digest` is that of the header and its length field,
with zeros for its own digits. Together they cover every byte. They detect damage, not forgery. Reading a file executes
nothing in it. Which calls and kernels in it run is decided when it is made callable, see `runtime.module.load`.

`read_header` and `inspect` need no torch, so that build machines and packagers without it can use them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BufferedIOBase, BytesIO, TextIOBase
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from torch_rtx import dtypes, tactics
from torch_rtx.accumulation import continued
from torch_rtx.control import check_all, is_control
from torch_rtx.errors import EngineFormatError, InvalidIR, RtxError
from torch_rtx.files import Path, replacing
from torch_rtx.functional import FUNCTIONAL, plain
from torch_rtx.ir import (
    LOOP,
    MAX_RANK,
    UPDATES,
    Dim,
    Graph,
    Node,
    Parameter,
    TensorType,
    dim_expr,
    kernel_nodes,
    verify,
)
from torch_rtx.irparse import MAX_NAME, parse
from torch_rtx.manifest import (
    ADDITION_READER,
    FORMAT_VERSION,
    PLAIN_READER,
    PROFILE_READER,
    TACTIC_READER,
    UPDATE_READER,
    Json,
    Manifest,
    read_manifest,
)
from torch_rtx.optable import ALLOWED, FILE_OPS, LAUNCH
from torch_rtx.profiles import check_profiles
from torch_rtx.serialization import memory_of, serialize
from torch_rtx.tactics import KernelTable
from torch_rtx.tactics_v4 import read_table_v4

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
CHUNK = 1 << 20  # bytes that are read and digested at once, while they are in the processor's cache
ZEROS = b"0" * 64
AGAIN = "copy the file again, or build it again"
# The exact start of the header, so that the digests have fixed offsets.
PREFIX = re.compile(
    rb'\{"__metadata__":\{"torch_rtx":"\{\\"header_digest\\":\\"([0-9a-f]{64})\\",\\"data_digest\\":\\"([0-9a-f]{64})\\",'
)
# Dtype of the IR: its name in safetensors (None: it has none) and its bytes.
DTYPES = {name: (dtype.safetensors, dtype.bytes) for name, dtype in dtypes.DTYPES.items()}
_STORED = {name: (dtype, size) for dtype, (name, size) in DTYPES.items() if name is not None}

File = Path | BinaryIO

# ---- contents of a file ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Engine:
    """A compiled program.

    Attributes:
        graph: of level "fused".
        manifest: see `Manifest`.
        constants: the data of each `constant` parameter of the graph, by name, with the parameter's dtype and shape and
            any strides (`load` returns contiguous tensors on the CPU).
        weights: the same for the other parameters; None if the engine is weight-stripped.
        kernels: launches of the kernel nodes, and their binaries.
    """

    graph: Graph
    manifest: Manifest
    constants: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] | None
    kernels: KernelTable = KernelTable()


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: `dtype` as the IR names it, `shape`, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of an intact file. `tensors` has the keys of the file. The graph (text) and the tactics of its kernels
    (JSON, None if there are none; `kernels` and `splits`: those of formats 2 to 4) are unchecked."""

    manifest: Manifest
    graph_text: str
    tensors: Mapping[str, TensorInfo]
    data_digest: str
    file_bytes: int
    tactics: Json = None
    kernels: Json = None
    splits: Json = None


# ---- save ------------------------------------------------------------------------------------------------------------


def save(engine: Engine, path: File) -> None:
    """Writes `engine` to `path` atomically: a failure leaves the old file. Equal engines give equal bytes.

    Processes that have the old file open or mapped keep its bytes (on Windows, replacing a mapped file is a
    PermissionError). In place of a path, a binary file object gets the bytes from where it is on.

    Raises:
        RtxError, InvalidIR: see `write`.
        OSError: the file can't be written.
    """
    if isinstance(path, str | os.PathLike):
        with replacing(path) as temporary, open(temporary, "wb") as file:
            write(engine, file)
        return
    target, buffer = _object(path, "write", "wb"), BytesIO()
    write(engine, buffer)
    left = buffer.getbuffer()
    while left and (written := target.write(left)):  # an unbuffered file may take less than all
        left = left[written:]


def write(engine: Engine, file: BinaryIO) -> None:
    """Writes the content of the file of `engine` to an empty file, which can seek.

    Raises:
        RtxError: a fallback node calls a Python function; a tensor is missing, unexpected, without data, or not of the
            dtype and shape in the graph; a manifest field is of the wrong type.
        InvalidIR: the graph is not a valid graph of level "fused", its text does not parse back to the same graph, or
            the kernels do not fit the graph.
    """
    text = str(engine.graph)
    _parsed(text)
    tactics.check(engine.kernels, engine.graph)
    check_profiles(engine.graph, engine.manifest.profiles)
    tensors = dict(_tensors_to_save(engine))
    manifest = replace(
        engine.manifest,
        format_version=FORMAT_VERSION,
        min_reader=_oldest_reader(engine),
        stripped=engine.weights is None,
        digests={**engine.manifest.digests, "graph": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()},
    )
    digests = dict.fromkeys(("header_digest", "data_digest"), ZEROS.decode())
    table = {"tactics": tactics.write_table(engine.kernels)} if engine.kernels else {}
    metadata = json.dumps({**digests, "manifest": asdict(manifest), "graph": text, **table}, separators=(",", ":"))
    read_manifest(json.loads(metadata)["manifest"])
    try:
        header, data = serialize(tensors, {"torch_rtx": metadata})
    except UnicodeEncodeError as error:
        raise RtxError(f"a name can't be written: {error}") from None
    if len(header) - 8 > MAX_HEADER:
        raise RtxError(f"the program takes {len(header)} bytes, more than the {MAX_HEADER} that a header may have")
    file.write(header)
    digest = hashlib.sha256()
    for piece in data:
        for at in range(0, len(piece), CHUNK):
            chunk = bytes(piece[at : at + CHUNK])  # what is digested is what is written, also while a model is trained
            digest.update(chunk)
            file.write(chunk)
    file.seek(0)
    file.write(_with_digests(header, digest.hexdigest().encode()))


def _oldest_reader(engine: Engine) -> int:
    """Older readers refuse control flow, launches of kernels that others wrote, tactics, updates and typical values,
    accept sizes between several profiles, and launch kernels that add to their results in memory that holds anything.
    They refuse kernels that write to inputs.
    """
    if any(is_control(node) or node.op == LAUNCH for node in calls(engine.graph)):
        return ADDITION_READER
    nodes = list(kernel_nodes(engine.graph))
    if any(node.writes for node in nodes) or (engine.kernels and any(map(continued, nodes))):
        return ADDITION_READER
    if engine.kernels:
        return TACTIC_READER
    if any(node.op in UPDATES for node in engine.graph.nodes):
        return UPDATE_READER
    if len(engine.manifest.profiles) > 1 or any(sym.typical is not None for sym in engine.graph.syms.values()):
        return PROFILE_READER
    return PLAIN_READER


def _tensors_to_save(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Key and contiguous CPU tensor of all data."""
    import torch

    from torch_rtx import aten  # imports torch, too

    binaries = {f"kernel/{name}": stored for name, stored in engine.kernels.binaries.items()}
    keys = {key for key, _ in _data(engine)} | binaries.keys()
    _check_names(keys, engine.graph, engine.weights is None, engine.kernels, RtxError)
    for key, stored in binaries.items():
        yield key, torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    parameters = {_key(parameter): parameter for parameter in engine.graph.parameters}
    for key, tensor in _data(engine):
        type_ = parameters[key].type
        if tensor.is_meta:
            raise RtxError(f"{key} has no data")
        if tensor.dtype != aten.DTYPES[type_.dtype] or tuple(tensor.shape) != type_.shape:
            raise RtxError(f"{key} is a {tensor.dtype} of shape {tuple(tensor.shape)}, not {type_}")
        yield key, to_stored(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous(), type_.dtype)


def stored_type(type_: TensorType) -> tuple[str, tuple[Dim, ...]]:
    """Dtype and shape of a tensor in a file: of a dtype that safetensors has no name for, the flat bytes."""
    name, size = DTYPES[type_.dtype]
    return (type_.dtype, type_.shape) if name else ("u8", (dim_expr("*", size, *type_.shape),))


def to_stored(tensor: Tensor, dtype: str) -> Tensor:
    """A contiguous tensor of `dtype` as files hold it, see `stored_type`."""
    import torch

    return tensor if DTYPES[dtype][0] else tensor.reshape(-1).view(torch.uint8)


def from_stored(tensor: Tensor, type_: TensorType) -> Tensor:
    """The tensor of `type_` that is stored as `tensor`."""
    from torch_rtx import aten

    if DTYPES[type_.dtype][0]:
        return tensor
    if tensor.data_ptr() % DTYPES[type_.dtype][1]:
        tensor = tensor.clone()
    return tensor.view(aten.DTYPES[type_.dtype]).reshape(type_.shape)  # type: ignore[arg-type]


def _data(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"constant/{name}", tensor) for name, tensor in engine.constants.items())
    yield from ((f"weight/{name}", tensor) for name, tensor in (engine.weights or {}).items())


def _with_digests(header: bytes, data_digest: bytes) -> bytes:
    match = PREFIX.match(header, 8)
    assert match is not None  # `write` has put both digests at the start
    header = header[: match.start(2)] + data_digest + header[match.end(2) :]
    return header[: match.start(1)] + hashlib.sha256(header).hexdigest().encode() + header[match.end(1) :]


# ---- read ------------------------------------------------------------------------------------------------------------


def read_header(path: File) -> Header:
    """Reads the header alone. Needs no torch.

    Raises:
        EngineFormatError: not an `.rtx` file, a damaged header, or a file size that contradicts the header.
        EngineVersionError: this release can't read the format of the file.
        OSError: the file can't be opened.
    """
    with reading(path) as file:
        return parse_header(file)


def load(path: File, mmap: bool = False, sha256: str | None = None) -> Engine:
    """Loads an engine, and checks every digest, name and rule of the graph; calls in the graph are not checked, see
    `runtime.file_check`.

    The tensors are contiguous and on the CPU. They are read into memory, so that nobody who changes the file later can
    change them.

    Args:
        path: the file, or a binary file object, which is read to its end from where it is on.
        mmap: map the weights, copy on write, instead of reading them: faster, and processes share the memory. A process
            that truncates the file then ends this one (SIGBUS), and one that writes to it changes the weights.
        sha256: the SHA-256 of the file, as 64 hexadecimal digits; None: any file.

    Raises:
        EngineFormatError: not an `.rtx` file, or its content is damaged, incomplete, unexpected or not allowed; or it
            is another file than `sha256` says.
        EngineVersionError: this release can't read the format of the file.
        RtxError: `path` is neither, or `mmap` is given with a file object.
        OSError: the file can't be opened.
    """
    with reading(path) as file:
        if mmap and isinstance(file, BytesIO):
            raise RtxError("mmap=True maps a file: pass its path, not a file object")
        header = parse_header(file)
        graph, table = program_of(header)
        parts: dict[str, dict[str, Tensor]] = {"constant": {}, "weight": {}, "kernel": {}}
        types = {_key(parameter): parameter.type for parameter in graph.parameters}
        for key, tensor in _read_data(file, header, sha256, skip="weight/" if mmap else None):
            kind, _, name = key.partition("/")
            parts[kind][name] = from_stored(tensor, types[key]) if key in types else tensor
        if mmap:
            parts["weight"] = {n: from_stored(t, types[f"weight/{n}"]) for n, t in _mapped(path, file).items()}
        binaries = {name: bytes(memory_of(tensor)) for name, tensor in parts["kernel"].items()}
        wrong = [name for name, stored in binaries.items() if tactics.digest(stored) != name]
        if wrong:
            raise EngineFormatError(f"kernel/{wrong[0]} is damaged: its digest is not its name")
    weights = None if header.manifest.stripped else parts["weight"]
    return Engine(graph, header.manifest, parts["constant"], weights, replace(table, binaries=binaries))


def _object(file: Any, method: str, mode: str) -> Any:
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


def _read_data(
    file: BufferedIOBase, header: Header, sha256: str | None, skip: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Key and data of each tensor, each in memory of its own, in the order of the file, which is at its data.

    Args:
        skip: tensors whose keys begin with this are digested alone.

    Raises:
        EngineFormatError: after the last tensor: the data or the file has another digest.
    """
    import torch

    from torch_rtx import aten

    data, whole = hashlib.sha256(), None
    if sha256 is not None:
        head = file.tell()
        file.seek(0)
        whole = hashlib.sha256(file.read(head))
    for key, info in header.tensors.items():
        skipped = skip is not None and key.startswith(skip)
        raw = torch.empty(min(info.nbytes, CHUNK) if skipped else info.nbytes, dtype=torch.uint8)
        view = memory_of(raw)
        for at in range(0, info.nbytes, CHUNK):
            start = 0 if skipped else at
            piece = view[start : start + min(CHUNK, info.nbytes - at)]
            if file.readinto(piece) != len(piece):
                raise EngineFormatError("the file was truncated while it was read")
            data.update(piece)
            if whole is not None:
                whole.update(piece)
        if skipped:
            continue
        if info.dtype == "bool":
            raw.clamp_(max=1)  # PyTorch's kernels differ on a bool of 2
        yield key, raw.view(aten.DTYPES[info.dtype]).reshape(info.shape)
    if data.hexdigest() != header.data_digest:
        raise EngineFormatError("the data is damaged: its digest is not the one in the header", hint=AGAIN)
    if whole is not None and whole.hexdigest() != str(sha256).lower():
        raise EngineFormatError(f"this is another file: its SHA-256 is {whole.hexdigest()}, not {sha256}")


def _mapped(path: File, file: BufferedIOBase) -> dict[str, Tensor]:
    """The weights, mapped from the file."""
    from safetensors.torch import load_file

    assert isinstance(path, str | os.PathLike)
    named = load_file(path).items()
    # safetensors opens the path again: it must still be the file checked above.
    if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        raise EngineFormatError("the file was replaced while it was read")
    return {key.removeprefix("weight/"): tensor for key, tensor in named if key.startswith("weight/")}


@contextmanager
def reading(path: File) -> Iterator[BufferedIOBase]:
    """Opens the file, or reads the file object, and adds its name to EngineFormatErrors."""
    try:
        if not isinstance(path, str | os.PathLike):
            yield BytesIO(_object(path, "read", "rb").read())
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


def parse_header(file: BufferedIOBase) -> Header:
    """The header of an open file, which is at its start. Errors are those of `read_header`."""
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
    manifest = read_manifest(inner.get("manifest"))
    text = inner.get("graph")
    if not isinstance(text, str):
        raise EngineFormatError("the header has no graph")
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != manifest.digests.get("graph"):
        raise EngineFormatError("the graph is not the one that the manifest was written for")
    tensors, end = _tensor_table(outer)
    if 8 + count + end != size:
        raise EngineFormatError(f"the file has {size} bytes, its header describes {8 + count + end}")
    table = (inner.get(name) for name in ("tactics", "kernels", "splits"))
    return Header(manifest, text, tensors, match[2].decode(), size, *table)


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


# ---- the graph -------------------------------------------------------------------------------------------------------


def _key(parameter: Parameter) -> str:
    return f"{'constant' if parameter.constant else 'weight'}/{parameter.name}"


def calls(graph: Graph) -> Iterator[Node]:
    """The nodes of the graph, its recipes and the bodies of its nodes: without kernels and control flow themselves, but
    for loops, since nothing bounds their time."""
    for recipe in (weight.recipe for weight in graph.weights if weight.recipe):
        yield from calls(recipe)
    for node in graph.nodes:
        if node.body is None or node.op == LOOP:
            yield plain(node) if node.op == FUNCTIONAL else node
        if node.body is not None:
            yield from calls(node.body)


def needs_trust(graph: Graph) -> tuple[str, ...]:
    """The operators in a file that it may call only if its user trusts them, besides launches of kernels."""
    return tuple(sorted({node.op for node in calls(graph)} - FILE_OPS - {LAUNCH}))


def _parsed(text: str) -> Graph:
    """Parses and checks the graph of a file.

    Raises:
        InvalidIR: not a valid graph of level "fused" with static parameters.
        RtxError: a node calls a Python function, which exists only in the process of the capture.
    """
    graph = parse(text)
    verify(graph, ALLOWED)
    check_all(graph)
    if graph.level != "fused":
        raise InvalidIR(f"the graph of an engine is of level 'fused', not {graph.level!r}")
    if str(graph) != text:
        raise InvalidIR("the text of the graph is not in the normal form of this format")
    for node in calls(graph):
        if node.kind == "fallback" and node.op == "python":
            names = ", ".join(str(value) for value in node.outputs if value) or "without outputs"
            raise RtxError(f"the fallback node {names} calls a Python function, which no file can hold", loc=node.loc)
    return graph


def _check_names(keys: set[str], graph: Graph, stripped: bool, table: KernelTable, error: type[RtxError]) -> None:
    wanted = {_key(parameter) for parameter in graph.parameters if parameter.constant or not stripped}
    wanted |= {f"kernel/{name}" for name in tactics.digests(table)}
    if keys != wanted:
        missing, extra = ", ".join(sorted(wanted - keys)), ", ".join(sorted(keys - wanted))
        raise error(f"the tensors do not fit the graph; missing: {missing or 'none'}; unexpected: {extra or 'none'}")


def program_of(header: Header) -> tuple[Graph, KernelTable]:
    """The graph of a file and its kernels without binaries, checked against the table of tensors."""
    try:
        graph = _parsed(header.graph_text)
    except InvalidIR:
        raise
    except RtxError as error:
        raise EngineFormatError(str(error)) from None
    if header.tactics is None:
        table = read_table_v4(header.kernels, header.splits, graph)
    else:
        table = tactics.read_table(header.tactics, graph)
    check_profiles(graph, header.manifest.profiles)
    _check_names(set(header.tensors), graph, header.manifest.stripped, table, EngineFormatError)
    for parameter in graph.parameters:
        info = header.tensors.get(_key(parameter))
        if info and (info.dtype, info.shape) != stored_type(parameter.type):
            raise EngineFormatError(f"{_key(parameter)} is {info.dtype}{list(info.shape)}, not {parameter.type}")
    for key, info in header.tensors.items():
        if key.startswith("kernel/") and (info.dtype, len(info.shape)) != ("u8", 1):
            raise EngineFormatError(f"{key} is {info.dtype}{list(info.shape)}, not a binary of bytes")
    return graph, table
