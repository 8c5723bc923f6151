"""The kernels of an engine: for each kernel node of its graph how to launch it, and the binaries that are launched.

The table is written as JSON beside the graph, the binaries as tensors. This file knows both forms and the rules that
tie them to a graph. It needs neither torch nor triton.

A kernel node can run in one of several forms, its tactics: "kernel", its own kernel; "split", a body of two kernels
that has its meaning; "library", its own body, which calls a library and launches what follows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch_rtx.errors import EngineFormatError, InvalidIR
from torch_rtx.ir import MAIN, Dim, Graph, Node, Sym, TensorType, Value, kernel_nodes, verify
from torch_rtx.irparse import parse, parse_dim
from torch_rtx.manifest import Json, exactly
from torch_rtx.optable import ALLOWED
from torch_rtx.targets import Target, by_age

MAX_BINARY = 64 << 20  # bytes; bounds what a hostile file can make a reader allocate
LIBRARY = ("none", "slower", "faster")
DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Variant:
    """One binary of a kernel and its launch.

    Attributes:
        binary: its digest, the key in `KernelTable.binaries`.
        entry: the name of the kernel in it.
        num_warps: warps of a block.
        shared: bytes of dynamic shared memory of a block.
        registers, spills: registers, and bytes of spill stores, per thread.
        waits: it waits for the kernels before it by itself (programmatic dependent launch).
    """

    binary: str
    entry: str
    num_warps: int
    shared: int
    registers: int
    spills: int
    waits: bool = False


@dataclass(frozen=True)
class Launch:
    """How a kernel runs on some targets. Its parameters are the addresses of the node's inputs, then of its outputs,
    all multiples of 16; the scalars; and two null addresses, of scratch memory.

    Attributes:
        targets: those that this launch is for; binaries or PTX, not both.
        scalars: the integer parameters, dims of the graph; 64 bit if `wide`, else 32.
        grid: blocks along x, y and z, dims of the graph. Nothing is launched where one is 0.
        aligned: for calls where every scalar is a multiple of 16.
        generic: for all others; None: there are none.
        library: what its rival is, the library call at the heart of the body: expected to be "slower" or "faster", or
            "none" where the body is a loop. See `RuntimeSettings.tactics`.
    """

    targets: tuple[Target, ...]
    scalars: tuple[Dim, ...]
    grid: tuple[Dim, Dim, Dim]
    wide: bool
    aligned: Variant
    generic: Variant | None
    library: str = "none"

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those that there are."""
        return (self.aligned,) if self.generic is None else (self.aligned, self.generic)


@dataclass(frozen=True)
class Split:
    """Another body of a kernel node, of kernels alone: partial results, which fill a GPU that the node's own kernel
    leaves mostly idle, and what makes the result of them.

    Attributes:
        targets: those on which it is expected to be faster than the node's own kernel. Every kernel in it has launches
            for them.
        body: takes and returns what the node's own body does.
    """

    targets: tuple[Target, ...]
    body: Graph


@dataclass(frozen=True)
class KernelTable:
    """The kernels of an engine.

    Attributes:
        launches: by the `op` of kernel nodes; a target is in at most one launch of a node. Nodes that are not in it run
            their bodies call by call.
        binaries: compressed, by digest of the compressed bytes.
        splits: by the `op` of kernel nodes that have launches; a target is in at most one of a node.
    """

    launches: Mapping[str, tuple[Launch, ...]] = field(default_factory=dict)
    binaries: Mapping[str, bytes] = field(default_factory=dict)
    splits: Mapping[str, tuple[Split, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.launches)

    def split(self, op: str, target: Target) -> Graph | None:
        """The split body of kernel nodes `op` on a target; None if they have none."""
        return next((split.body for split in self.splits.get(op, ()) if target in split.targets), None)

    def tactics(self, op: str, target: Target) -> tuple[str, ...]:
        """The tactics of kernel nodes `op` on a target, the one that is expected to be the fastest first; none where
        they have no launch for it."""
        library = next((launch.library for launch in self.launches.get(op, ()) if target in launch.targets), None)
        if library is None:
            return ()
        own = ("kernel",) if self.split(op, target) is None else ("split", "kernel")
        return {"none": own, "slower": (*own, "library"), "faster": ("library", *own)}[library]


@dataclass(frozen=True)
class Candidate:
    """A kernel that was compiled for a running program and fits its target.

    Attributes:
        binaries: of its launch, see `KernelTable`.
        config: the number of its configuration: 0 is expected to be the best.
    """

    launch: Launch
    binaries: Mapping[str, bytes]
    config: int


@dataclass(frozen=True)
class SplitCandidate:
    """A split body (see `Split`) with the kernels in it, by op."""

    body: Graph
    kernels: Mapping[str, Candidate]


@dataclass(frozen=True)
class Request:
    """What to build for one SM version.

    Attributes:
        bodies: per name of a kernel its body and the first configuration to try.
        split: build split bodies instead, of the first configuration that fits.
    """

    bodies: Mapping[str, tuple[Graph, int]]
    sm: int
    split: bool = False


def pack(binary: bytes) -> tuple[str, bytes]:
    """The digest and the compressed form of a binary: LZMA, a fifth to a third smaller than zlib."""
    import lzma  # an optional part of Python, which engines without kernels do not need

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 20}]
    stored = lzma.compress(binary, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)
    return digest(stored), stored


def digest(stored: bytes) -> str:
    """The name of a compressed binary: half of its SHA-256."""
    return hashlib.sha256(stored).hexdigest()[:32]


def unpack(stored: bytes) -> bytes:
    """The binary.

    Raises:
        EngineFormatError: it is not compressed as `pack` does it, or larger than MAX_BINARY.
    """
    import lzma

    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * MAX_BINARY)
        binary = decompressor.decompress(stored, MAX_BINARY)
    except lzma.LZMAError as error:
        raise EngineFormatError(f"a binary of a kernel can't be decompressed: {error}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise EngineFormatError("a binary of a kernel is too large or has no end")
    return binary


# ---- JSON ------------------------------------------------------------------------------------------------------------


def write_launches(table: KernelTable) -> Json:
    """The launches as JSON; dims in their text form."""
    return {op: list(map(write_launch, launches)) for op, launches in sorted(table.launches.items())}


def write_launch(launch: Launch) -> Json:
    """A launch as JSON; dims in their text form."""
    return {
        "targets": [str(target) for target in launch.targets],
        "scalars": [str(dim) for dim in launch.scalars],
        "grid": [str(dim) for dim in launch.grid],
        "wide": launch.wide,
        "aligned": vars(launch.aligned).copy(),
        "generic": None if launch.generic is None else vars(launch.generic).copy(),
        "library": launch.library,
    }


def write_splits(table: KernelTable) -> Json:
    """The split bodies as JSON; graphs in their text form."""
    return {
        op: [{"targets": [str(target) for target in split.targets], "body": str(split.body)} for split in splits]
        for op, splits in sorted(table.splits.items())
    }


def read_table(launches: Any, splits: Any, graph: Graph) -> KernelTable:
    """The table that JSON describes, without its binaries, checked against the graph.

    Args:
        launches, splits: what `write_launches` and `write_splits` gave.

    Raises:
        EngineFormatError: a wrong type or value, or a kernel that is not in the graph.
    """
    try:
        table = KernelTable(
            {
                op: tuple(read_launch(launch, graph.syms) for launch in exactly(list)(found))
                for op, found in exactly(dict)(launches).items()
            },
            splits={op: tuple(map(_split, exactly(list)(found))) for op, found in exactly(dict)(splits).items()},
        )
        check(table, graph)
    except (TypeError, ValueError, KeyError, InvalidIR) as error:
        raise EngineFormatError(f"the table of kernels is not right: {error}") from None
    return table


def _split(value: Any) -> Split:
    given = _fields(value, Split)
    text = exactly(str)(given["body"])
    body = parse(text)
    if str(body) != text:
        raise ValueError("the text of a split body is not as this format writes it")
    return Split(tuple(map(_target, exactly(list)(given["targets"]))), body)


def read_launch(value: Any, syms: Mapping[str, Sym]) -> Launch:
    """Inverse of `write_launch`.

    Args:
        syms: the symbols that dims may be made of, by name.

    Raises:
        TypeError, ValueError, KeyError, InvalidIR: not such JSON.
    """
    given = _fields(value, Launch)
    x, y, z = (_dim(text, syms) for text in exactly(list)(given["grid"]))
    return Launch(
        tuple(map(_target, exactly(list)(given["targets"]))),
        tuple(_dim(text, syms) for text in exactly(list)(given["scalars"])),
        (x, y, z),
        exactly(bool)(given["wide"]),
        _variant(given["aligned"]),
        None if given["generic"] is None else _variant(given["generic"]),
        _library(given["library"]),
    )


def _library(value: Any) -> str:
    if exactly(str)(value) not in LIBRARY:
        raise ValueError(f"library is {value!r}")
    return str(value)


def _variant(value: Any) -> Variant:
    given = _fields({"waits": False, **exactly(dict)(value)}, Variant)  # the first files of format 4 do not say
    exactly(bool)(given["waits"])
    for name in ("num_warps", "shared", "registers", "spills"):
        if not 0 <= exactly(int)(given[name]) < 2**31:
            raise ValueError(f"{name} is {given[name]}")
    if not 1 <= given["num_warps"] <= 32:  # a block has at most 1024 threads
        raise ValueError(f"a block of {given['num_warps']} warps")
    if re.fullmatch(r"[A-Za-z_$][\w$]*", exactly(str)(given["entry"]), re.ASCII) is None:
        raise ValueError(f"{given['entry']!r} is no name of a kernel")
    if DIGEST.fullmatch(exactly(str)(given["binary"])) is None:
        raise ValueError(f"{given['binary']!r} is no digest")
    return Variant(**given)


def _fields(value: Any, kind: type) -> dict[str, Any]:
    """The fields of a dataclass by name. Names that are not known yet are ignored, as in the manifest."""
    return {item.name: exactly(dict)(value)[item.name] for item in fields(kind)}


def _target(text: Any) -> Target:
    # Not `parse_targets`: a file may be for GPUs that this release does not know.
    match = re.fullmatch(r"(sm|compute)_(\d{2,3})", exactly(str)(text), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is no target")
    return Target(int(match[2]), match[1] == "compute")


def _dim(text: Any, syms: Mapping[str, Sym]) -> Dim:
    dim = parse_dim(exactly(str)(text), syms)
    if isinstance(dim, int) and dim < 0:
        raise ValueError(f"the dim {dim} is negative")
    return dim


# ---- rules -----------------------------------------------------------------------------------------------------------


def check(table: KernelTable, graph: Graph) -> None:
    """The rules of a table.

    Raises:
        InvalidIR: a kernel that is not in the graph; one name for two kernels; a node that can't be launched; two
            launches or two split bodies for a target; PTX and binaries in one; a split body that is no body of its
            kernel, or has kernels without a launch.
    """
    nodes: dict[str, Node] = {}
    bodies = [split.body for found in table.splits.values() for split in found]
    for node in (node for whole in (graph, *bodies) for node in kernel_nodes(whole)):
        if node.op in table.launches:
            _check_node(node, nodes.setdefault(node.op, node))
    for op, found in table.launches.items():
        if op not in nodes:
            raise InvalidIR(f"the graph has no kernel {op}")
        _check_targets(op, [launch.targets for launch in found])
        if any(len({target.ptx for target in launch.targets}) > 1 for launch in found):
            raise InvalidIR(f"kernel {op} has PTX and binaries in one launch")
    for op, splits in table.splits.items():
        if op not in nodes:
            raise InvalidIR(f"split bodies of {op}, which has no launches")
        _check_targets(op, [split.targets for split in splits])
        for split in splits:
            _check_split(table, nodes[op], split)


def _check_targets(op: str, targets: Sequence[tuple[Target, ...]]) -> None:
    every = [target for some in targets for target in some]
    if not targets or not all(targets) or len(set(every)) != len(every):
        raise InvalidIR(f"kernel {op} must have each target once")


def _check_split(table: KernelTable, node: Node, split: Split) -> None:
    inputs = tuple(dict.fromkeys(node.inputs))
    verify(Graph("import", inputs, nodes=(replace(node, body=split.body),), outputs=node.outputs), ALLOWED)
    for inner in split.body.nodes:
        launched = {target for launch in table.launches.get(inner.op, ()) for target in launch.targets}
        if inner.kind != "kernel" or not launched.issuperset(split.targets):
            raise InvalidIR(f"the split body of {node.op} has {inner.op}, which has no launch for all of its targets")


def _check_node(node: Node, first: Node) -> None:
    values: list[Any] = [*(attr for _, attr in node.args), *node.outputs]
    if not all(isinstance(v, Value) and isinstance(v.type, TensorType) and v.type.device == MAIN for v in values):
        raise InvalidIR(f"kernel {node.op} must take and return tensors of the session's device, and nothing else")
    # The same body has the same types, so that the dims of the launch are those of every node.
    if node.body != first.body:
        raise InvalidIR(f"two different kernels are called {node.op}")


def digests(launches: Mapping[str, tuple[Launch, ...]]) -> Iterator[str]:
    """The digests of the binaries that are launched, with repeats."""
    for found in launches.values():
        for launch in found:
            for variant in launch.variants:
                yield variant.binary


def bytes_of(launches: Mapping[str, tuple[Launch, ...]], sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Per target, in order: how many kernels have a launch for it, and the bytes of their binaries.

    Args:
        sizes: stored bytes by digest. A binary that serves several targets counts for each.
    """
    kernels: dict[Target, int] = {}
    binaries: dict[Target, set[str]] = {}
    for found in launches.values():
        for launch in found:
            for target in launch.targets:
                kernels[target] = kernels.get(target, 0) + 1
                binaries.setdefault(target, set()).update(variant.binary for variant in launch.variants)
    return {str(t): (kernels[t], sum(sizes[name] for name in binaries[t])) for t in by_age(kernels)}
