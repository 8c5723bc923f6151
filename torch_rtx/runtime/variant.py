"""Variants: the graph of a session for some sizes, or for all, with its current code."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch_rtx.ir import Graph, Node
from torch_rtx.runtime.background import Work
from torch_rtx.runtime.code import Code
from torch_rtx.runtime.shared_tuning import SharedTuning
from torch_rtx.runtime.tuning_db import Choice

REFERENCE, PORTABLE, SPECIALIZED = "reference", "portable", "specialized"  # tiers


@dataclass
class Region:
    """The equal kernel nodes of a variant, with their tuning results.

    Attributes:
        key, kin: see `region_keys`.
        node: one of the nodes, as the variant's graph has it.
        body: its operations, as all regions of the key have them.
        ops: the names of all of the nodes.
        rank, expected_us: of the tactic that is used before any is measured; microseconds of one node.
        choice: the tactic that was measured fastest; None: not measured.
        problems: reasons why tactics are not used.
    """

    key: str
    kin: str
    node: Node
    body: Graph
    ops: list[str] = field(default_factory=list)
    rank: int | None = None
    expected_us: float = 0.0
    choice: Choice | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return str(self.node.loc or self.node.op)


@dataclass(eq=False)
class Variant:
    """A graph on its way up the tiers.

    Attributes:
        sizes: numbers for symbols of the graph; empty: the variant is for all sizes.
        code: what calls run now. Until a tuner has run, it is the base variant's.
        tier: REFERENCE (calls), PORTABLE (kernels for any size, or those of the engine) or SPECIALIZED.
        ready: only measuring may still change the code, so a CUDA graph is worth capturing.
        regions: set by the tuner.
        used: number of the last call that ran this variant, see `admission.Used`.
        shared: what this rank has measured, and others do.
        done: set when tuning has ended.
        work: what tuning has left to do.
    """

    sizes: Mapping[str, int]
    code: Code
    tier: str
    ready: bool = False
    regions: Sequence[Region] = ()
    used: int = 0
    shared: SharedTuning | None = None
    done: threading.Event = field(default_factory=threading.Event)
    work: Work = field(default_factory=Work)
