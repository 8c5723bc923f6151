"""One row of a profile: a node that ran, with its times, bytes and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from torch_rtx.ir import Loc
from torch_rtx.runtime.call_times import percentile
from torch_rtx.runtime.node_cost import Cost


@dataclass(frozen=True)
class Row:
    """One node of a graph that ran.

    Attributes:
        name: its first result in the graph's text.
        kind: "kernel", "extern", "view" or "fallback".
        tier: "kernel for sm_90", "library call" or "fallback".
        tactic: kind of the tactic of the kernel node that the row is, or is a part of; "calls": that has no tactic; "":
            the row is no part of a kernel node.
        operations: short names of the operations, for a kernel those in its body.
        locs: where the operations come from in the model, without duplicates; the node's own first.
        times: microseconds of each run, in order.
        share: of the sum of all rows' medians, 0 to 1.
        cost: bytes and FLOPs, see `node_cost.Cost`; None if a size depends on data.
        inputs: positions of the rows whose results the node reads.
    """

    name: str
    kind: str
    op: str
    tier: str
    tactic: str
    operations: tuple[str, ...]
    locs: tuple[Loc, ...]
    times: tuple[float, ...]
    share: float
    cost: Cost | None
    inputs: tuple[int, ...]

    @property
    def module(self) -> str:
        """The path of the module that the node comes from; empty for the model itself."""
        return self.locs[0].module if self.locs else ""

    @property
    def runs_as(self) -> str:
        """The tier, after the kind of the tactic where the tier does not say it."""
        return self.tier if self.tactic in ("", "kernel") else f"{self.tactic}: {self.tier}"

    @property
    def where(self) -> str:
        """Module path, file and line."""
        return str(self.locs[0]) if self.locs else ""

    @property
    def what(self) -> str:
        """The operations as one text."""
        return " + ".join(self.operations)

    @property
    def us(self) -> float:
        """The median, in microseconds."""
        return median(self.times)

    @property
    def p95(self) -> float:
        """The 95th percentile, in microseconds."""
        return percentile(self.times, 95)

    @property
    def gbps(self) -> float | None:
        """Bytes read and written over the median, in GB/s; None for views and if unknown."""
        total = 0 if self.cost is None else self.cost.read + self.cost.written
        return total / self.us / 1e3 if total and self.us else None

    @property
    def tflops(self) -> float | None:
        """FLOPs over the median, in TFLOP/s; None if there are none or they are unknown."""
        return self.cost.flops / self.us / 1e6 if self.cost is not None and self.cost.flops and self.us else None
