"""Statistics of a session: its tiers, tactics and CUDA graphs, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_rtx.runtime.cudagraph import GraphPool
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.specialize import Specializer
from torch_rtx.runtime.variant import Region, Variant
from torch_rtx.settings import CALLS

if TYPE_CHECKING:
    from torch_rtx.cache.runtime import RuntimeCacheStats


@dataclass(frozen=True)
class RegionStats:
    """Statistics of a region: equal kernel nodes of a graph.

    Attributes:
        op: name of the nodes.
        where: where one of them comes from in the model.
        nodes: how many there are.
        tactic: kind of the tactic that runs it; "calls": the operations are called one by one.
        microseconds: measured time of a run, by kind and rank of the tactic.
        problems: why tactics are not used.
    """

    op: str
    where: str
    nodes: int
    tactic: str
    microseconds: Mapping[str, float]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class VariantStats:
    """Statistics of a graph for some sizes.

    Attributes:
        sizes: the sizes of the symbols; none: the graph is for all sizes.
        tier: "reference", "portable" or "specialized".
        busy: a background job for it runs or waits.
        kernels: how many kernels can be launched.
    """

    sizes: Mapping[str, int]
    tier: str
    busy: bool
    kernels: int
    regions: tuple[RegionStats, ...]


@dataclass(frozen=True)
class Stats:
    """Statistics of a session. `print` them, or read the fields.

    Attributes:
        variants: the variant for all sizes first, then those for given sizes.
        graphs: how many CUDA graphs the session has now.
        captures, replays: since the session was made.
        held: how many calls could not replay, since saved tensors or gradients of an earlier step were in use.
        no_graphs: why the session captures none; None if it may.
        runtime_cache: of the process, for the device; None if none is open.
    """

    variants: tuple[VariantStats, ...]
    graphs: int
    captures: int
    replays: int
    held: int
    no_graphs: str | None
    runtime_cache: RuntimeCacheStats | None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for variant in self.variants:
            sizes = ", ".join(f"{name} = {size}" for name, size in variant.sizes.items()) or "all sizes"
            busy = ", more is being compiled or measured" if variant.busy else ""
            yield f"{sizes}: {variant.tier}, {variant.kernels} kernels{busy}"
            for region in variant.regions:
                times = ", ".join(f"{name} {us:.1f} us" for name, us in region.microseconds.items())
                yield f"  {region.op} x{region.nodes} {region.where}: {region.tactic}{'; ' * bool(times)}{times}"
                yield from (f"    {problem}" for problem in region.problems)
        held = f", {self.held} calls while saved tensors or gradients were in use" if self.held else ""
        counts = f"{self.graphs}, {self.captures} captures, {self.replays} replays{held}"
        yield f"CUDA graphs: {self.no_graphs or counts}"
        if self.runtime_cache is not None:
            misses = ", ".join(f"{count} {reason}" for reason, count in self.runtime_cache.misses.items())
            yield f"runtime cache: {self.runtime_cache.hits} hits, misses: {misses or 'none'}"


def stats_of(specializer: Specializer, pool: GraphPool | None) -> Stats:
    """The stats of a session.

    Args:
        pool: the CUDA graphs; None: the session captures none.
    """
    variants = tuple(_variant(variant, specializer) for variant in [specializer.base, *specializer.variants.values()])
    store = None if specializer.context is None else specializer.context.database.opened
    found = None if store is None else store.stats
    if pool is None:
        return Stats(variants, 0, 0, 0, 0, "this module has none", found)
    return Stats(variants, len(pool.captured), pool.captures, pool.replays, pool.held, pool.disabled, found)


def _variant(variant: Variant, specializer: Specializer) -> VariantStats:
    regions = tuple(_region(region, variant) for region in variant.regions)
    busy = specializer.is_met and not variant.done.is_set()
    return VariantStats(variant.sizes, variant.tier, busy, len(launched(variant.code.tactics)), regions)


def _region(region: Region, variant: Variant) -> RegionStats:
    times = {} if region.choice is None else region.choice.microseconds
    nodes = sum(node.op in region.ops for node in variant.code.graph.nodes)
    tactic = variant.code.tactics.get(region.node.op)
    kind, where = CALLS if tactic is None else tactic.kind, str(region.node.loc or "")
    return RegionStats(region.node.op, where, nodes, kind, times, tuple(region.problems))
