"""What a session does at the moment: its tiers, tactics and CUDA graphs, as plain data and as a table."""

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
    """A region.

    Attributes:
        op: the name of its nodes.
        where: the place in the model of one of them.
        nodes: how many nodes of the graph it stands for.
        tactic: the kind of the tactic that runs it; "calls": its operations are called one by one.
        microseconds: what was measured, by the kind and rank of the tactic.
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
    """A graph for some sizes.

    Attributes:
        sizes: of the symbols; none: it is for all sizes.
        tier: "reference", "portable" or "specialized".
        busy: something is being done for it in the background, or waits there.
        kernels: how many kernels can be launched.
    """

    sizes: Mapping[str, int]
    tier: str
    busy: bool
    kernels: int
    regions: tuple[RegionStats, ...]


@dataclass(frozen=True)
class Stats:
    """A session. `print` it, or read it.

    Attributes:
        variants: that for all sizes first, then those for some.
        graphs: how many CUDA graphs there are; `captures` and `replays` count since the beginning.
        no_graphs: why there are none; None: there may be.
        runtime_cache: of the process, for the device; None where none is used, or not yet.
    """

    variants: tuple[VariantStats, ...]
    graphs: int
    captures: int
    replays: int
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
        yield f"CUDA graphs: {self.no_graphs or f'{self.graphs}, {self.captures} captures, {self.replays} replays'}"
        if self.runtime_cache is not None:
            misses = ", ".join(f"{count} {reason}" for reason, count in self.runtime_cache.misses.items())
            yield f"runtime cache: {self.runtime_cache.hits} hits, misses: {misses or 'none'}"


def stats_of(specializer: Specializer, pool: GraphPool | None) -> Stats:
    """The stats of a session.

    Args:
        pool: its CUDA graphs; None: it has none.
    """
    variants = tuple(_variant(variant, specializer) for variant in [specializer.base, *specializer.variants.values()])
    store = None if specializer.context is None else specializer.context.database.opened
    found = None if store is None else store.stats
    if pool is None:
        return Stats(variants, 0, 0, 0, "this module has none", found)
    return Stats(variants, len(pool.captured), pool.captures, pool.replays, pool.disabled, found)


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
