"""The engine file `.rtx`: a safetensors file whose metadata holds the header and whose tensors hold the data.

    key `constant/NAME`, `weight/NAME`   the data of the graph's parameters; a weight-stripped engine has no weights
    key `kernels/DIGEST`, `ptx/DIGEST`   binaries of the graph's kernels, compressed together, see `binaries`
    key `program`                        the manifest, the graph and the tactics, compressed, see `engine_header`
    metadata, one key `torch_rtx`        JSON {"header_digest", "data_digest", "manifest", "program"}, in this order

`data_digest` is the SHA-256 of all bytes after the header; `header_digest` is that of the header and its length field,
with zeros for its own digits. Together they cover every byte. They detect damage, not forgery. Reading a file executes
nothing in it. Which calls and kernels in it run is decided when it is made callable, see `runtime.module.load`.

`read_header` and `inspect` need no torch, so that build machines and packagers without it can use them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedIOBase, BytesIO
from typing import TYPE_CHECKING, BinaryIO

from torch_rtx import tactics
from torch_rtx.binaries import Binaries, Pack, packs_of
from torch_rtx.control import check_all
from torch_rtx.engine_header import (
    AGAIN,
    CHUNK,
    DTYPES,
    MAX_HEADER,
    PROGRAM,
    File,
    Header,
    file_object,
    parse_header,
    reading,
    with_digests,
    write_program,
)
from torch_rtx.errors import EngineFormatError, InvalidIR, RtxError
from torch_rtx.files import replacing
from torch_rtx.functional import FUNCTIONAL, plain
from torch_rtx.ir import LOOP, Dim, Graph, Node, Parameter, TensorType, dim_expr, verify
from torch_rtx.irparse import parse
from torch_rtx.manifest import FORMAT_VERSION, MIN_READER, Json, Manifest
from torch_rtx.optable import ALLOWED, FILE_OPS, LAUNCH
from torch_rtx.profiles import check_profiles
from torch_rtx.serialization import Digests, memory_of, serialize
from torch_rtx.tactics import KernelTable
from torch_rtx.tactics_v4 import read_table_v4

if TYPE_CHECKING:
    from torch import Tensor

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
    target, buffer = file_object(path, "write", "wb"), BytesIO()
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
    table = tactics.with_names(engine.kernels)
    packs = packs_of(tactics.groups_of(table), table.binaries)
    tensors |= {pack.key: _bytes(pack.stored) for pack in packs}
    manifest = replace(
        engine.manifest,
        format_version=FORMAT_VERSION,
        min_reader=MIN_READER,
        stripped=engine.weights is None,
        digests={**engine.manifest.digests, "graph": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()},
    )
    names: dict[str, Json] = {pack.key: [list(row) for row in pack.sizes or ()] for pack in packs}
    tables = {"tactics": tactics.write_table(table), "packs": names} if table else {}
    metadata, program = write_program(manifest, text, tables)
    try:
        header, data = serialize(tensors, {"torch_rtx": metadata}, {PROGRAM: _bytes(program)})
    except UnicodeEncodeError as error:
        raise RtxError(f"a name can't be written: {error}") from None
    if len(header) - 8 > MAX_HEADER:
        raise RtxError(f"the header takes {len(header)} bytes, more than the {MAX_HEADER} that it may have")
    file.write(header)
    data_digest = hashlib.sha256()
    for piece in data:
        for at in range(0, len(piece), CHUNK):
            chunk = bytes(piece[at : at + CHUNK])  # what is digested is what is written, also while a model is trained
            data_digest.update(chunk)
            file.write(chunk)
    file.seek(0)
    file.write(with_digests(header, data_digest.hexdigest().encode()))


def _tensors_to_save(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Key and contiguous CPU tensor of all constants and weights."""
    from torch_rtx import aten  # imports torch

    keys = {key for key, _ in _data(engine)}
    _check_names(keys, set(engine.kernels.binaries), engine.graph, engine.weights is None, engine.kernels, RtxError)
    parameters = {_key(parameter): parameter for parameter in engine.graph.parameters}
    for key, tensor in _data(engine):
        type_ = parameters[key].type
        if tensor.is_meta:
            raise RtxError(f"{key} has no data")
        if tensor.dtype != aten.DTYPES[type_.dtype] or tuple(tensor.shape) != type_.shape:
            raise RtxError(f"{key} is a {tensor.dtype} of shape {tuple(tensor.shape)}, not {type_}")
        yield key, to_stored(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous(), type_.dtype)


def _bytes(data: bytes) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


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
        parts: dict[str, dict[str, Tensor]] = {"constant": {}, "weight": {}}
        types = {_key(parameter): parameter.type for parameter in graph.parameters}
        packs = []
        for key, tensor in _read_data(file, header, sha256, skip="weight/" if mmap else None):
            kind, _, name = key.partition("/")
            if key in header.packs:
                packs.append(Pack(bytes(memory_of(tensor)), header.packs[key], kind == "ptx"))
                if packs[-1].key != key:
                    raise EngineFormatError(f"{key} is damaged: its digest is not its name")
            elif key in types:
                parts[kind][name] = from_stored(tensor, types[key])
        if mmap:
            parts["weight"] = {n: from_stored(t, types[f"weight/{n}"]) for n, t in _mapped(path, file).items()}
        table = replace(table, binaries=Binaries(packs))
    weights = None if header.manifest.stripped else parts["weight"]
    return Engine(graph, header.manifest, parts["constant"], weights, table)


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

    starts = {"data": b""}
    if sha256 is not None:
        head = file.tell()
        file.seek(0)
        starts["file"] = file.read(head)
    with Digests(starts, header.file_bytes) as digests:
        for key, info in header.tensors.items():
            skipped = skip is not None and key.startswith(skip)
            raw = torch.empty(0 if skipped else info.nbytes, dtype=torch.uint8)
            view = memory_of(raw)
            for at in range(0, info.nbytes, CHUNK):
                end = min(at + CHUNK, info.nbytes)
                piece = memory_of(torch.empty(end - at, dtype=torch.uint8)) if skipped else view[at:end]
                if file.readinto(piece) != len(piece):
                    raise EngineFormatError("the file was truncated while it was read")
                digests.update(piece)
            if skipped:
                continue
            if info.dtype == "bool":
                digests.finish()
                raw.clamp_(max=1)  # PyTorch's kernels differ on a bool of 2
            yield key, raw.view(aten.DTYPES[info.dtype]).reshape(info.shape)
        found = digests.finish()
    if found["data"] != header.data_digest:
        raise EngineFormatError("the data is damaged: its digest is not the one in the header", hint=AGAIN)
    if sha256 is not None and found["file"] != str(sha256).lower():
        raise EngineFormatError(f"this is another file: its SHA-256 is {found['file']}, not {sha256}")


def _mapped(path: File, file: BufferedIOBase) -> dict[str, Tensor]:
    """The weights, mapped from the file."""
    from safetensors.torch import load_file

    assert isinstance(path, str | os.PathLike)
    named = load_file(path).items()
    # safetensors opens the path again: it must still be the file checked above.
    if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        raise EngineFormatError("the file was replaced while it was read")
    return {key.removeprefix("weight/"): tensor for key, tensor in named if key.startswith("weight/")}


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
    """The operators in a file that it may call only if its user trusts them, besides launches of kernels: those that
    PyTorch does not check, and calls that count from the start of a storage, of which a file knows nothing."""
    found = {node.op for node in calls(graph) if node.op not in FILE_OPS or node.arg("storage_offset") is not None}
    return tuple(sorted(found - {LAUNCH}))


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


def _check_names(
    keys: set[str], binaries: set[str], graph: Graph, stripped: bool, table: KernelTable, error: type[RtxError]
) -> None:
    """Raises `error` if these are not the keys of the graph's data and the names of the table's binaries."""
    wanted = {_key(parameter) for parameter in graph.parameters if parameter.constant or not stripped}
    for what, given, needed in (("tensors", keys, wanted), ("binaries", binaries, set(tactics.digests(table)))):
        if given != needed:
            missing, extra = (", ".join(sorted(names)) or "none" for names in (needed - given, given - needed))
            raise error(f"the {what} do not fit the graph; missing: {missing}; unexpected: {extra}")


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
    _check_tensors(header, graph, table)
    return graph, table


def _check_tensors(header: Header, graph: Graph, table: KernelTable) -> None:
    """Raises EngineFormatError if the table of tensors does not have what the graph and the tactics need."""
    tensors = header.tensors
    if missing := header.packs.keys() - tensors.keys():
        raise EngineFormatError(f"the tensors do not fit the binaries; missing: {', '.join(sorted(missing))}")
    keys = tensors.keys() - header.packs.keys() - ({PROGRAM} if header.has_program else set())
    names = set(packs_by_binary(header))
    _check_names(keys, names, graph, header.manifest.stripped, table, EngineFormatError)
    for parameter in graph.parameters:
        info = tensors.get(_key(parameter))
        if info and (info.dtype, info.shape) != stored_type(parameter.type):
            raise EngineFormatError(f"{_key(parameter)} is {info.dtype}{list(info.shape)}, not {parameter.type}")
    for key in header.packs:
        if (tensors[key].dtype, len(tensors[key].shape)) != ("u8", 1):
            raise EngineFormatError(f"{key} is {tensors[key].dtype}{list(tensors[key].shape)}, not a binary of bytes")


def packs_by_binary(header: Header) -> dict[str, str]:
    """By name of a binary: the key of the tensor that has it."""
    single = {key.partition("/")[2]: key for key, sizes in header.packs.items() if sizes is None}
    return single | {name: key for key, sizes in header.packs.items() for name, _ in sizes or ()}
