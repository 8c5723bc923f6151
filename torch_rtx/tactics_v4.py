"""Reads the kernel tables of engine formats 2 to 4: launches by op, bodies of split forms, and whether a library call
is expected to be faster. These formats have no expected times, so the tactics get times that give the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_rtx.ir import Graph, Sym, kernel_nodes
from torch_rtx.manifest import exactly
from torch_rtx.tactics import (
    OWN,
    KernelTable,
    Launch,
    Tactic,
    Tactics,
    checked_table,
    fastest_first,
    read_body,
    read_launch,
    read_target,
)
from torch_rtx.targets import Target

SPLIT_US, KERNEL_US = 0.95, 1.0
LIBRARY_US = {"slower": 1.1, "faster": 0.9}  # the third value, "none", is for loops: no library call exists
Launches = Mapping[str, Mapping[Target, tuple[Launch, str]]]  # by op; with the estimate of the library call


def read_table_v4(launches: Any, splits: Any, graph: Graph) -> KernelTable:
    """The table of a file of format 2 to 4, without its binaries, checked against the graph.

    Args:
        launches, splits: the fields `kernels` and `splits` of the header; None: it has no such field.

    Raises:
        EngineFormatError: a wrong type or value, or a kernel that is not in the graph.
    """

    def read() -> dict[str, dict[Target, Tactics]]:
        known = {
            op: _launches(rows, graph.syms) for op, rows in exactly(dict)({} if launches is None else launches).items()
        }
        bodies = {op: _bodies(rows) for op, rows in exactly(dict)({} if splits is None else splits).items()}
        inner = {node.op for found in bodies.values() for body in found.values() for node in kernel_nodes(body)}
        if left := bodies.keys() - known.keys():
            raise ValueError(f"split bodies of {', '.join(sorted(left))}, which have no launches")
        return {op: _tactics(op, known, bodies.get(op, {})) for op in known if op not in inner}

    return checked_table(read, graph)


def _launches(rows: Any, syms: Mapping[str, Sym]) -> dict[Target, tuple[Launch, str]]:
    found: dict[Target, tuple[Launch, str]] = {}
    for row in exactly(list)(rows):
        library = exactly(str)(row["library"])
        if library not in ("none", *LIBRARY_US):
            raise ValueError(f"library is {library!r}")
        found |= dict.fromkeys(map(read_target, exactly(list)(row["targets"])), (read_launch(row, syms), library))
    return found


def _bodies(rows: Any) -> dict[Target, Graph]:
    return {
        read_target(name): read_body(exactly(dict)(row)["body"])
        for row in exactly(list)(rows)
        for name in exactly(list)(row["targets"])
    }


def _tactics(op: str, known: Launches, bodies: Mapping[Target, Graph]) -> dict[Target, Tactics]:
    if bodies.keys() - known[op].keys():
        raise ValueError(f"a split body of {op} is for a target that {op} has no launch for")
    found: dict[Target, Tactics] = {}
    for target, (launch, library) in known[op].items():
        tactics = [Tactic("kernel", KERNEL_US, {OWN: launch})]
        if library in LIBRARY_US:
            tactics.append(Tactic("library", LIBRARY_US[library]))
        if target in bodies:
            inside = {node.op: known[node.op][target][0] for node in kernel_nodes(bodies[target])}
            tactics.append(Tactic("split", SPLIT_US, inside, bodies[target]))
        found[target] = fastest_first(tactics)
    return found
