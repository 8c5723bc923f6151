"""Variants: the graph of a session for some sizes, or for all, with the code that runs it now."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch_rtx.ir import Graph, Node
from torch_rtx.runtime.code import Code
from torch_rtx.runtime.tuning_db import Choice

REFERENCE, PORTABLE, SPECIALIZED = "reference", "portable", "specialized"  # tiers


@dataclass
class Region:
    """The equal kernel nodes of a variant, and what tuning found out about them.

    Attributes:
        node: one of the nodes, as the variant's graph has it.
        ops: the names of all of the nodes.
        choice: the tactic that was measured fastest; None: nothing was measured.
        problems: why tactics are not used.
    """

    key: str
    node: Node
    ops: list[str] = field(default_factory=list)
    choice: Choice | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def body(self) -> Graph:
        """The operations of each node."""
        assert self.node.body is not None
        return self.node.body

    def __str__(self) -> str:
        return str(self.node.loc or self.node.op)


@dataclass(eq=False)
class Variant:
    """A graph on its way up the tiers.

    Attributes:
        sizes: numbers for symbols of the graph, which this variant is for; none: it is for all sizes.
        code: what runs now: that of the session's graph until a tuner has put the numbers in.
        tier: REFERENCE (calls), PORTABLE (kernels for any size, or those of the engine) or SPECIALIZED.
        ready: the code changes no more, except by measuring: worth a CUDA graph.
        regions: what tuners found out.
        used: the number of the last call that ran this variant.
        done: nothing more is being compiled or measured for it.
    """

    sizes: Mapping[str, int]
    code: Code
    tier: str
    ready: bool = False
    regions: Sequence[Region] = ()
    used: int = 0
    done: threading.Event = field(default_factory=threading.Event)
