"""Tactics: the alternative implementations of a kernel node, as values; and the table of those in an engine.

A tactic is a graph that replaces the node, and the kernels that are launched in it. Code generation offers tactics of
`Kernel`s (Triton source), a build turns these into `Launch`es (binaries), and the runtime into `Launcher`s. No code
branches on the kind of a tactic: a library call, a fused kernel and a split form differ in body and kernels alone.

An engine file has the table as JSON beside the graph, and the binaries as tensors. This module reads, writes and checks
the table. It imports neither torch nor triton.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

from torch_rtx.binaries import digest
from torch_rtx.errors import EngineFormatError, InvalidIR
from torch_rtx.ir import MAIN, Dim, Graph, Node, Sym, TensorType, Type, Value, kernel_nodes, verify
from torch_rtx.irparse import parse, parse_dim
from torch_rtx.manifest import Json, exactly
from torch_rtx.optable import ALLOWED
from torch_rtx.targets import Target, arch_of, by_age, oldest_driver

DIGEST = re.compile(r"[0-9a-f]{32}")
MAX_SLOTS = 1024
MAX_THREADS = 1024  # of a block
# The types of numbers that kernels take, in the notation of `struct`.
NUMBERS = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "u64": "Q", "i64": "q"}
NUMBERS |= {"f16": "e", "f32": "f", "f64": "d"}
OWN = "self"  # the key of a node's own kernel in `Tactic.kernels`
K = TypeVar("K")
L = TypeVar("L")


@dataclass(frozen=True)
class Variant:
    """One binary of a kernel.

    Attributes:
        binary: its name, the key in `KernelTable.binaries`.
        entry: the kernel's name in the binary.
        num_warps: per block.
        shared: bytes of dynamic shared memory per block.
        registers, spills: registers, and bytes of spill stores, per thread.
        uses_pdl: the kernel executes `griddepcontrol.wait` before it accesses memory, see `runtime.pdl`. "waits" in
            files.
    """

    binary: str
    entry: str
    num_warps: int
    shared: int
    registers: int
    spills: int
    uses_pdl: bool = False


@dataclass(frozen=True)
class Slot:
    """A parameter of a kernel that others wrote.

    Attributes:
        kind: "pointer", or the type of a number, in NUMBERS.
        source: "tensor": the address of one of the node's inputs and outputs, by index; "scalar": one of the scalars of
            the launch, by index; "constant": `value` itself.
    """

    kind: str
    source: str
    value: int | float


@dataclass(frozen=True)
class Launch:
    """How a compiled kernel is launched. Its parameters are the addresses of the node's inputs and outputs, multiples
    of 16; the scalars; and two null addresses of scratch memory, which Triton's ABI asks for.

    Attributes:
        scalars: the integer parameters, as dims of the graph; int64 if `wide`, else int32.
        grid: blocks along x, y and z, as dims of the graph. An empty grid is not launched.
        aligned: for calls where every scalar is a multiple of 16.
        generic: for all other calls; None: there are no others.
        slots: of a kernel that others wrote: its parameters in order, in place of those above.
        block: its threads along x, y and z; None: those of `Variant.num_warps`.
    """

    scalars: tuple[Dim, ...]
    grid: tuple[Dim, Dim, Dim]
    wide: bool
    aligned: Variant
    generic: Variant | None
    slots: tuple[Slot, ...] | None = None
    block: tuple[int, int, int] | None = None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that exist."""
        return (self.aligned,) if self.generic is None else (self.aligned, self.generic)


@dataclass(frozen=True)
class Tactic(Generic[K]):
    """One implementation of a kernel node on one target.

    Attributes:
        kind: "kernel", "split", "library", ...: a name for people.
        expected_us: time of the node by the performance model of the family that offers the tactic.
        kernels: the kernels to launch, by the op of kernel nodes in `body`; OWN: the kernel of the node itself.
        body: the graph that replaces the node; it takes and returns the same values. None: the node itself if `kernels`
            has OWN, else its own body.
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
Runnable = tuple[Tactic[Launch], Target]  # with the target that the tactic is for


@dataclass(frozen=True)
class KernelTable:
    """The tactics in an engine.

    Attributes:
        tactics: by the `op` of kernel nodes and by target, the one expected to be fastest first. The body of a node
            without tactics runs call by call.
        binaries: by name, see `binaries`.
    """

    tactics: Mapping[str, Mapping[Target, Tactics]] = field(default_factory=dict)
    binaries: Mapping[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tactics)

    @property
    def targets(self) -> frozenset[Target]:
        """All targets of tactics."""
        return frozenset(target for found in self.tactics.values() for target in found)

    def launches(self) -> Iterator[tuple[Target, Launch]]:
        """Every launch with its target, with repeats."""
        for found in self.tactics.values():
            for target, tactics in found.items():
                yield from ((target, launch) for tactic in tactics for launch in tactic.kernels.values())


@dataclass(frozen=True)
class Candidate:
    """A tactic that was compiled at run time and fits the GPU.

    Attributes:
        rank: its position among the tactics that code generation offers for the region, from 0.
        binaries: of its launches, see `KernelTable`.
    """

    tactic: Tactic[Launch]
    rank: int
    binaries: Mapping[str, bytes] = field(default_factory=dict)


def fastest_first(tactics: Iterable[Tactic[K]]) -> tuple[Tactic[K], ...]:
    """`tactics` in order of their expected times."""
    return tuple(sorted(tactics, key=lambda tactic: tactic.expected_us))


# ---- which run where -------------------------------------------------------------------------------------------------


def runnable_tactics(tactics: Mapping[Target, Tactics], sm: int, shared: int) -> list[Runnable]:
    """The tactics that a GPU can run, best first: code for its SM version, code for the nearest older version of its
    generation, then PTX, the newest first. Tactics of one target keep their order.

    Args:
        sm: compute capability of the GPU, without the dot.
        shared: its limit of shared memory per block, in bytes.
    """
    newest = by_age(target for target in tactics if _runs_on(target, sm))[::-1]
    return [
        (tactic, target)
        for target in sorted(newest, key=lambda target: target.ptx)
        for tactic in tactics[target]
        if all(variant.shared <= shared for launch in tactic.kernels.values() for variant in launch.variants)
    ]


def _runs_on(target: Target, sm: int) -> bool:
    if target.ptx:
        return target.sm <= sm
    return target.sm == sm or (target.sm // 10 == sm // 10 and target.sm < sm and not arch_of(sm).exact)


def oldest_drivers(table: KernelTable, producer: Mapping[str, str]) -> dict[Target, tuple[int, int]]:
    """The CUDA version of the oldest driver that takes the code for each target, where `producer`, that of the
    manifest, says what made it."""
    made = {target: producer.get(f"ptxas for {target}", "") for target in table.targets}
    versions = {target: re.match(r"(\d+)\.(\d+)", version) for target, version in made.items()}
    return {t: oldest_driver(t, (int(m[1]), int(m[2]))) for t, m in versions.items() if m is not None}


# ---- binaries --------------------------------------------------------------------------------------------------------


def with_names(table: KernelTable) -> KernelTable:
    """The table with each binary under its own name: files up to format 6 have other names."""
    names = {old: digest(binary) for old, binary in table.binaries.items()}
    if all(old == new for old, new in names.items()):
        return table

    def renamed(_: str, launch: Launch) -> Launch:
        aligned = replace(launch.aligned, binary=names[launch.aligned.binary])
        generic = launch.generic and replace(launch.generic, binary=names[launch.generic.binary])
        return replace(launch, aligned=aligned, generic=generic)

    tactics = {
        op: {target: tuple(one.with_kernels(renamed) for one in ones) for target, ones in found.items()}
        for op, found in table.tactics.items()
    }
    return KernelTable(tactics, {names[old]: binary for old, binary in table.binaries.items()})


def groups_of(table: KernelTable) -> list[list[str]]:
    """The names of the binaries: machine code for one generation of GPUs, and PTX; in each group, those
    of a kernel side by side."""
    targets: dict[str, set[Target]] = {}
    ops: dict[str, str] = {}
    for op, found in sorted(table.tactics.items()):
        for target, tactics in found.items():
            for name in (v.binary for one in tactics for launch in one.kernels.values() for v in launch.variants):
                targets.setdefault(name, set()).add(target)
                ops.setdefault(name, op)
    groups: dict[tuple[bool, int], list[str]] = {}
    for name in sorted(targets, key=lambda name: (ops[name], name)):
        oldest = by_age(targets[name])[0]
        groups.setdefault((oldest.ptx, oldest.sm // 10), []).append(name)
    return [groups[key] for key in sorted(groups)]


def digests(table: KernelTable) -> Iterator[str]:
    """The digests of all launched binaries, with repeats."""
    for _, launch in table.launches():
        yield from (variant.binary for variant in launch.variants)


def bytes_of(table: KernelTable, packs: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Per target, the oldest first: the number of launches, and the bytes of their binaries in a file.

    Args:
        packs: by name of a binary, the tensor of the file that has it.
        sizes: bytes of these tensors. One that serves several targets counts for each.
    """
    kernels: dict[Target, int] = {}
    used: dict[Target, set[str]] = {}
    for target, launch in table.launches():
        kernels[target] = kernels.get(target, 0) + 1
        used.setdefault(target, set()).update(packs[variant.binary] for variant in launch.variants)
    return {str(t): (kernels[t], sum(sizes[key] for key in used[t])) for t in by_age(kernels)}


def kinds_of(table: KernelTable) -> dict[str, dict[str, int]]:
    """Per target, the oldest first: the kinds of the tactics expected to be fastest, with their numbers of kernels."""
    kinds: dict[Target, Counter[str]] = {}
    for found in table.tactics.values():
        for target, tactics in found.items():
            kinds.setdefault(target, Counter())[tactics[0].kind] += 1
    return {str(target): dict(kinds[target].most_common()) for target in by_age(kinds)}


# ---- JSON ------------------------------------------------------------------------------------------------------------


def write_table(table: KernelTable) -> Json:
    """The tactics as JSON: a list per op; targets with equal tactics share a row."""
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
    written: dict[str, Json] = {
        "scalars": [str(dim) for dim in launch.scalars],
        "grid": [str(dim) for dim in launch.grid],
        "wide": launch.wide,
        "aligned": _write_variant(launch.aligned),
        "generic": None if launch.generic is None else _write_variant(launch.generic),
    }
    if launch.slots is not None:
        written["slots"] = [[slot.kind, slot.source, slot.value] for slot in launch.slots]
        written["block"] = None if launch.block is None else list(launch.block)
    return written


def _write_variant(variant: Variant) -> Json:
    return {("waits" if name == "uses_pdl" else name): value for name, value in vars(variant).items()}


def read_table(tactics: Any, graph: Graph) -> KernelTable:
    """Inverse of `write_table`: the table without its binaries, checked against the graph.

    Raises:
        EngineFormatError: a wrong type or value, or a kernel that is not in the graph.
    """
    return checked_table(lambda: {op: _by_target(rows, graph) for op, rows in exactly(dict)(tactics).items()}, graph)


def checked_table(read: Callable[[], Mapping[str, Mapping[Target, Tactics]]], graph: Graph) -> KernelTable:
    """The table that `read` returns, checked against the graph.

    Raises:
        EngineFormatError: `read` fails, or the table breaks a rule of `check`.
    """
    try:
        table = KernelTable(read())
        check(table, graph)
    except (TypeError, ValueError, KeyError, InvalidIR) as error:
        raise EngineFormatError(f"the table of kernels is invalid: {error}") from None
    return table


def _by_target(rows: Any, graph: Graph) -> dict[Target, Tactics]:
    found: dict[Target, list[Tactic[Launch]]] = {}
    for row in exactly(list)(rows):
        for target, tactic in read_tactic(row, graph.syms).items():
            found.setdefault(target, []).append(tactic)
    return {target: fastest_first(tactics) for target, tactics in found.items()}


def read_tactic(row: Any, syms: Mapping[str, Sym]) -> dict[Target, Tactic[Launch]]:
    """Inverse of `write_tactic`, by the targets in `row`.

    Args:
        syms: the symbols that dims may contain, by name.

    Raises:
        TypeError, ValueError, KeyError, InvalidIR: other JSON.
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
    """A graph from its text.

    Raises:
        TypeError, ValueError, InvalidIR: no graph, or not the text that this format writes for it.
    """
    body = parse(exactly(str)(value))
    if str(body) != value:
        raise ValueError("the text of a body is not as this format writes it")
    return body


def read_launch(value: Any, syms: Mapping[str, Sym]) -> Launch:
    """A launch from JSON, see `read_tactic`. Unknown fields are ignored, as in the manifest."""
    given = {"slots": None, "block": None, **exactly(dict)(value)}
    given = {item.name: given[item.name] for item in fields(Launch)}
    x, y, z = (_dim(text, syms) for text in exactly(list)(given["grid"]))
    scalars = tuple(_dim(text, syms) for text in exactly(list)(given["scalars"]))
    return Launch(
        scalars,
        (x, y, z),
        exactly(bool)(given["wide"]),
        _variant(given["aligned"]),
        None if given["generic"] is None else _variant(given["generic"]),
        None if given["slots"] is None else _slots(given["slots"], len(scalars)),
        None if given["block"] is None else _block(given["block"]),
    )


def _slots(value: Any, scalars: int) -> tuple[Slot, ...]:
    slots = tuple(Slot(*exactly(list)(row)) for row in exactly(list)(value))
    if len(slots) > MAX_SLOTS:
        raise ValueError(f"a kernel of {len(slots)} parameters")
    for slot in slots:
        if slot.source == "constant" and slot.kind in NUMBERS:
            struct.pack(NUMBERS[slot.kind], exactly(type(slot.value))(slot.value))  # raises if it does not fit
            continue
        limit = {"tensor": MAX_SLOTS, "scalar": scalars}[exactly(str)(slot.source)]
        if (slot.kind == "pointer") != (slot.source == "tensor") or slot.kind not in (*NUMBERS, "pointer"):
            raise ValueError(f"no parameter {slot}")
        if not 0 <= exactly(int)(slot.value) < limit:
            raise ValueError(f"a parameter of {slot.source} {slot.value}")
    return slots


def _block(value: Any) -> tuple[int, int, int]:
    x, y, z = map(exactly(int), exactly(list)(value))
    if min(x, y, z) < 1 or x * y * z > MAX_THREADS:
        raise ValueError(f"a block of {x} x {y} x {z} threads")
    return x, y, z


def _variant(value: Any) -> Variant:
    named = {"waits": False, **exactly(dict)(value)}  # the first files of format 4 lack it
    given = {item.name: named["waits" if item.name == "uses_pdl" else item.name] for item in fields(Variant)}
    exactly(bool)(given["uses_pdl"])
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
    """A target by its name. Unlike `parse_targets`, it accepts GPUs that are newer than this release."""
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
            without tactics; a body that does not fit its node; a launch of a kernel that is not in the body; one binary
            that is launched both as PTX and as a cubin.
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
        assert body is not None  # `kernel_nodes` yields only nodes with one
        for tactic in (tactic for tactics in found.values() for tactic in tactics):
            check_tactic(tactic, op, body)
    used = {(variant.binary, target.ptx) for target, launch in table.launches() for variant in launch.variants}
    if len({binary for binary, _ in used}) != len(used):
        raise InvalidIR("one binary is launched as PTX and as a binary")


def check_tactic(tactic: Tactic[Launch], op: str, body: Graph) -> None:
    """The rules of one tactic for the kernel nodes `op`, whose own body is `body`.

    Raises:
        InvalidIR: see `check`.
    """
    inside: dict[str, Node] = {}
    if tactic.body is not None:
        verify(tactic.body, ALLOWED)
        if _signature(tactic.body) != _signature(body):
            raise InvalidIR(f"the {tactic.kind} tactic of {op} takes or returns other types than {op}")
        pairs = [[value.name in one.written for value in one.inputs] for one in (tactic.body, body)]
        if tactic.body.level != "import" or tactic.body.weights or pairs[0] != pairs[1]:
            raise InvalidIR(f"the {tactic.kind} tactic of {op} has weights or writes to other inputs than {op}")
        for inner in kernel_nodes(tactic.body):
            _check_node(inner, inside.setdefault(inner.op, inner))
    for launched in tactic.kernels:
        if launched not in inside and (launched != OWN or tactic.body is not None):
            raise InvalidIR(f"the {tactic.kind} tactic of {op} launches {launched}, which is not in its body")
    for launched, launch in tactic.kernels.items():
        given = body if launched == OWN else inside[launched].body
        assert given is not None
        tensors = len(given.inputs) + len(given.outputs)
        if any(slot.source == "tensor" and slot.value >= tensors for slot in launch.slots or ()):
            raise InvalidIR(f"the {tactic.kind} tactic of {op} passes a tensor that it does not have")


def _signature(body: Graph) -> tuple[list[Type], list[Type]]:
    outputs = [attr.type for attr in body.outputs if isinstance(attr, Value)]
    return [value.type for value in body.inputs], outputs


def _check_node(node: Node, first: Node) -> None:
    values: list[Any] = [*(attr for _, attr in node.args), *node.outputs]
    if not all(isinstance(v, Value) and isinstance(v.type, TensorType) and v.type.device == MAIN for v in values):
        raise InvalidIR(f"kernel {node.op} must take and return tensors of the session's device, and nothing else")
    # Equal bodies have equal types, so the dims of the launch are valid for every node.
    if node.body != first.body:
        raise InvalidIR(f"two different kernels are called {node.op}")
