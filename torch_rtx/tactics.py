"""Tactics: the ways to run a kernel node, as values; and the table of those that an engine brings.

A tactic is a graph that takes the place of a node, and what is launched in it. Code generation offers tactics with
`Kernel`s (Triton source), a build turns these into `Launch`es (binaries), and the runtime into launchers. Nothing asks
what kind a tactic is: a library call, a fused kernel and a split form differ in their bodies and kernels alone.

The table is written as JSON beside the graph, the binaries as tensors. This file knows both forms and the rules that
tie them to a graph. It needs neither torch nor triton.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from torch_rtx.errors import EngineFormatError, InvalidIR
from torch_rtx.ir import MAIN, Dim, Graph, Node, Sym, TensorType, Type, Value, kernel_nodes, verify
from torch_rtx.irparse import parse, parse_dim
from torch_rtx.manifest import Json, exactly
from torch_rtx.optable import ALLOWED
from torch_rtx.targets import Target, by_age

MAX_BINARY = 64 << 20  # bytes; bounds what a hostile file can make a reader allocate
DIGEST = re.compile(r"[0-9a-f]{32}")
OWN = "self"  # the key of a node's own kernel in `Tactic.kernels`
K = TypeVar("K")
L = TypeVar("L")


@dataclass(frozen=True)
class Variant:
    """One binary of a kernel and its launch.

    Attributes:
        binary: its digest, the key in `KernelTable.binaries`.
        entry: the name of the kernel in it.
        num_warps: warps of a block.
        shared: bytes of dynamic shared memory of a block.
        registers, spills: registers, and bytes of spill stores, per thread.
        waits: the kernel waits for those before it by itself (programmatic dependent launch).
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
    """How a compiled kernel is launched. Its parameters are the addresses of the node's inputs, then of its outputs,
    all multiples of 16; the scalars; and two null addresses, of scratch memory.

    Attributes:
        scalars: the integer parameters, dims of the graph; 64 bit if `wide`, else 32.
        grid: blocks along x, y and z, dims of the graph. Nothing is launched where one is 0.
        aligned: for calls where every scalar is a multiple of 16.
        generic: for all others; None: there are none.
    """

    scalars: tuple[Dim, ...]
    grid: tuple[Dim, Dim, Dim]
    wide: bool
    aligned: Variant
    generic: Variant | None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that exist."""
        return (self.aligned,) if self.generic is None else (self.aligned, self.generic)


@dataclass(frozen=True)
class Tactic(Generic[K]):
    """One way to run a kernel node on one target.

    Attributes:
        kind: "kernel", "split", "library", ...: a name for people.
        expected_us: microseconds that the node should take, by the model of the family that offers the tactic.
        kernels: what is launched, by the op of the kernel nodes in `body`; by OWN, the kernel of the whole node.
        body: what runs in place of the node: it takes and returns what the node's own body does. None: the node itself
            where `kernels` has OWN, else its own body.
    """

    kind: str
    expected_us: float
    kernels: Mapping[str, K] = field(default_factory=dict)
    body: Graph | None = None

    def with_kernels(self, convert: Callable[[str, K], L]) -> Tactic[L]:
        """The same tactic with `convert(op, kernel)` in place of each kernel."""
        return Tactic(self.kind, self.expected_us, {op: convert(op, k) for op, k in self.kernels.items()}, self.body)

    def nodes(self, node: Node) -> dict[str, Node]:
        """The kernel nodes that are launched where the tactic runs `node`, by their keys in `kernels`."""
        inside = {} if self.body is None else {inner.op: inner for inner in kernel_nodes(self.body)}
        return {OWN: node} if OWN in self.kernels else {op: inside[op] for op in self.kernels if op in inside}


Tactics = tuple[Tactic[Launch], ...]


@dataclass(frozen=True)
class KernelTable:
    """The tactics that an engine brings.

    Attributes:
        tactics: by the `op` of kernel nodes and by target, the one expected to be fastest first. Nodes that are not in
            the table run their bodies call by call.
        binaries: compressed, by digest of the compressed bytes.
    """

    tactics: Mapping[str, Mapping[Target, Tactics]] = field(default_factory=dict)
    binaries: Mapping[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tactics)

    @property
    def targets(self) -> frozenset[Target]:
        """The targets that anything is built for."""
        return frozenset(target for found in self.tactics.values() for target in found)

    def launches(self) -> Iterator[tuple[Target, Launch]]:
        """Every launch with its target, with repeats."""
        for found in self.tactics.values():
            for target, tactics in found.items():
                yield from ((target, launch) for tactic in tactics for launch in tactic.kernels.values())


@dataclass(frozen=True)
class Candidate:
    """A tactic that was compiled for a running program and fits its GPU.

    Attributes:
        rank: its place among the tactics that code generation offers for the region, from 0.
        binaries: of its launches, see `KernelTable`.
    """

    tactic: Tactic[Launch]
    rank: int
    binaries: Mapping[str, bytes] = field(default_factory=dict)


def fastest_first(tactics: Iterable[Tactic[K]]) -> tuple[Tactic[K], ...]:
    """`tactics` in order of their expected times."""
    return tuple(sorted(tactics, key=lambda tactic: tactic.expected_us))


# ---- binaries --------------------------------------------------------------------------------------------------------


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


def digests(table: KernelTable) -> Iterator[str]:
    """The digests of the binaries that are launched, with repeats."""
    for _, launch in table.launches():
        yield from (variant.binary for variant in launch.variants)


def bytes_of(table: KernelTable, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Per target, in order: how many kernels have a launch for it, and the bytes of their binaries.

    Args:
        sizes: stored bytes by digest. A binary that serves several targets counts for each.
    """
    kernels: dict[Target, int] = {}
    binaries: dict[Target, set[str]] = {}
    for target, launch in table.launches():
        kernels[target] = kernels.get(target, 0) + 1
        binaries.setdefault(target, set()).update(variant.binary for variant in launch.variants)
    return {str(t): (kernels[t], sum(sizes[name] for name in binaries[t])) for t in by_age(kernels)}


def kinds_of(table: KernelTable) -> dict[str, dict[str, int]]:
    """Per target, in order: for how many kernel nodes a tactic of each kind is the one expected to be fastest."""
    kinds: dict[Target, Counter[str]] = {}
    for found in table.tactics.values():
        for target, tactics in found.items():
            kinds.setdefault(target, Counter())[tactics[0].kind] += 1
    return {str(target): dict(kinds[target].most_common()) for target in by_age(kinds)}


# ---- JSON ------------------------------------------------------------------------------------------------------------


def write_table(table: KernelTable) -> Json:
    """The tactics as JSON: per op a list, in which targets that share a tactic share a row."""
    return {op: _rows(found) for op, found in sorted(table.tactics.items())}


def _rows(found: Mapping[Target, Tactics]) -> Json:
    rows: dict[str, dict[str, Any]] = {}
    for target in by_age(found):
        for tactic in found[target]:
            row = write_tactic(tactic, target)
            expected = row.pop("expected_us")
            rows.setdefault(json.dumps(row), {**row, "expected_us": {}})["expected_us"] |= expected
    return list(rows.values())


def write_tactic(tactic: Tactic[Launch], target: Target) -> dict[str, Any]:
    """A tactic as JSON; graphs and dims in their text form."""
    return {
        "kind": tactic.kind,
        "body": None if tactic.body is None else str(tactic.body),
        "kernels": {op: _write_launch(launch) for op, launch in tactic.kernels.items()},
        "expected_us": {str(target): tactic.expected_us},
    }


def _write_launch(launch: Launch) -> Json:
    return {
        "scalars": [str(dim) for dim in launch.scalars],
        "grid": [str(dim) for dim in launch.grid],
        "wide": launch.wide,
        "aligned": vars(launch.aligned).copy(),
        "generic": None if launch.generic is None else vars(launch.generic).copy(),
    }


def read_table(tactics: Any, graph: Graph) -> KernelTable:
    """The table that JSON describes, without its binaries, checked against the graph.

    Args:
        tactics: what `write_table` gave.

    Raises:
        EngineFormatError: a wrong type or value, or a kernel that is not in the graph.
    """
    return checked_table(lambda: {op: _by_target(rows, graph) for op, rows in exactly(dict)(tactics).items()}, graph)


def checked_table(read: Callable[[], Mapping[str, Mapping[Target, Tactics]]], graph: Graph) -> KernelTable:
    """The table that `read` gives, if it is right for the graph.

    Raises:
        EngineFormatError: it is not, or `read` fails on what it reads.
    """
    try:
        table = KernelTable(read())
        check(table, graph)
    except (TypeError, ValueError, KeyError, InvalidIR) as error:
        raise EngineFormatError(f"the table of kernels is not right: {error}") from None
    return table


def _by_target(rows: Any, graph: Graph) -> dict[Target, Tactics]:
    found: dict[Target, list[Tactic[Launch]]] = {}
    for row in exactly(list)(rows):
        for target, tactic in read_tactic(row, graph.syms).items():
            found.setdefault(target, []).append(tactic)
    return {target: fastest_first(tactics) for target, tactics in found.items()}


def read_tactic(row: Any, syms: Mapping[str, Sym]) -> dict[Target, Tactic[Launch]]:
    """Inverse of `write_tactic`, for each of the targets in `row`.

    Args:
        syms: the symbols that dims may be made of, by name.

    Raises:
        TypeError, ValueError, KeyError, InvalidIR: not such JSON.
    """
    given = exactly(dict)(row)
    kind, body = exactly(str)(given["kind"]), None if given["body"] is None else read_body(given["body"])
    kernels = {op: read_launch(launch, syms) for op, launch in exactly(dict)(given["kernels"]).items()}
    expected = {read_target(name): _microseconds(us) for name, us in exactly(dict)(given["expected_us"]).items()}
    return {target: Tactic(kind, us, kernels, body) for target, us in expected.items()}


def _microseconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"a tactic is expected to take {value!r} microseconds")
    return float(value)


def read_body(value: Any) -> Graph:
    """A graph from exactly the text that this format writes for it.

    Raises:
        TypeError, ValueError, InvalidIR: another text.
    """
    body = parse(exactly(str)(value))
    if str(body) != value:
        raise ValueError("the text of a body is not as this format writes it")
    return body


def read_launch(value: Any, syms: Mapping[str, Sym]) -> Launch:
    """A launch from JSON, see `read_tactic`; fields that are not known yet are ignored, as in the manifest."""
    given = {item.name: exactly(dict)(value)[item.name] for item in fields(Launch)}
    x, y, z = (_dim(text, syms) for text in exactly(list)(given["grid"]))
    return Launch(
        tuple(_dim(text, syms) for text in exactly(list)(given["scalars"])),
        (x, y, z),
        exactly(bool)(given["wide"]),
        _variant(given["aligned"]),
        None if given["generic"] is None else _variant(given["generic"]),
    )


def _variant(value: Any) -> Variant:
    named = {"waits": False, **exactly(dict)(value)}  # the first files of format 4 do not say
    given = {item.name: named[item.name] for item in fields(Variant)}
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


def read_target(text: Any) -> Target:
    """A target by its name. Not `parse_targets`: a file may be for GPUs that this release does not know."""
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
        InvalidIR: a kernel that is not in the graph; one name for two kernels; a node that can't be launched; a target
            without tactics; a body that is no body of its kernel; a launch of a kernel that is not in the body; PTX
            that is launched as a binary.
    """
    nodes: dict[str, Node] = {}
    for node in kernel_nodes(graph):
        if node.op in table.tactics:
            _check_node(node, nodes.setdefault(node.op, node))
    for op, found in table.tactics.items():
        if op not in nodes:
            raise InvalidIR(f"the graph has no kernel {op}")
        if not found or not all(found.values()):
            raise InvalidIR(f"kernel {op} has a target without tactics")
        body = nodes[op].body
        assert body is not None  # `kernel_nodes` gives no others
        for tactic in (tactic for tactics in found.values() for tactic in tactics):
            check_tactic(tactic, op, body)
    used = {(variant.binary, target.ptx) for target, launch in table.launches() for variant in launch.variants}
    if len({binary for binary, _ in used}) != len(used):
        raise InvalidIR("one binary is launched as PTX and as a binary")


def check_tactic(tactic: Tactic[Launch], op: str, body: Graph) -> None:
    """The rules of a tactic of the kernel nodes `op`, whose own body is `body`.

    Raises:
        InvalidIR: see `check`.
    """
    inside: dict[str, Node] = {}
    if tactic.body is not None:
        verify(tactic.body, ALLOWED)
        if _signature(tactic.body) != _signature(body):
            raise InvalidIR(f"the {tactic.kind} tactic of {op} takes or returns other types than {op}")
        if tactic.body.level != "import" or tactic.body.weights or tactic.body.written:
            raise InvalidIR(f"the {tactic.kind} tactic of {op} has weights or writes to what it is given")
        for inner in kernel_nodes(tactic.body):
            _check_node(inner, inside.setdefault(inner.op, inner))
    for launched in tactic.kernels:
        if launched not in inside and (launched != OWN or tactic.body is not None):
            raise InvalidIR(f"the {tactic.kind} tactic of {op} launches {launched}, which is not in its body")


def _signature(body: Graph) -> tuple[list[Type], list[Type]]:
    outputs = [attr.type for attr in body.outputs if isinstance(attr, Value)]
    return [value.type for value in body.inputs], outputs


def _check_node(node: Node, first: Node) -> None:
    values: list[Any] = [*(attr for _, attr in node.args), *node.outputs]
    if not all(isinstance(v, Value) and isinstance(v.type, TensorType) and v.type.device == MAIN for v in values):
        raise InvalidIR(f"kernel {node.op} must take and return tensors of the session's device, and nothing else")
    # The same body has the same types, so that the dims of the launch are those of every node.
    if node.body != first.body:
        raise InvalidIR(f"two different kernels are called {node.op}")
