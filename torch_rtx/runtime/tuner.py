"""The tuner takes one variant of a graph up the tiers: it compiles, checks and uses tactics, then measures them.

Every tactic is checked against the calls that it stands for, on this device, before it is used. Measuring is bounded in
time and in memory. What fails is logged once, and the region goes on as it ran before.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch

from torch_rtx.errors import KernelError, RtxError
from torch_rtx.ir import Graph, Node, Sym, kernel_nodes, typical_size
from torch_rtx.runtime.background import Background
from torch_rtx.runtime.bind import bind, bind_node
from torch_rtx.runtime.candidate_check import CandidateCheck, Run
from torch_rtx.runtime.code import Code, undisturbed
from torch_rtx.runtime.driver import new_stream, relaxed
from torch_rtx.runtime.inline import inline_kernels, launched
from torch_rtx.runtime.launch import LoadedTactic, bound
from torch_rtx.runtime.plan import TYPICAL
from torch_rtx.runtime.tuning_db import Choice, TuningDatabase, region_key
from torch_rtx.runtime.variant import PORTABLE, SPECIALIZED, Region, Variant
from torch_rtx.settings import RuntimeSettings
from torch_rtx.tactics import Candidate
from torch_rtx.targets import ALIGNMENT

log = logging.getLogger(__name__)
MEASURED_OF_A_KIND = 4  # tactics of a region that are measured: so many of the kind that has most
# What an early start in a CUDA graph saves: 0.26 to 0.51 us for each edge of the graphs of 11 models on an H200.
EARLY_START_US = 0.4


@dataclass(frozen=True)
class TuningContext:
    """What tuners work with on a device.

    Attributes:
        database: of the device's SM version.
        load: a tactic of a node with its kernels on the device.
        jit: the tactics of the engine that the driver has to compile first.
        time: microseconds of one of some equal runs.
        background: runs the tuners.
    """

    database: TuningDatabase
    load: Callable[[Node, Candidate], LoadedTactic]
    jit: Callable[[], Mapping[str, LoadedTactic]]
    time: Callable[[Sequence[Run]], float]
    background: Background


@dataclass(frozen=True)
class TunedGraph:
    """A graph whose variants are tuned.

    Attributes:
        graph: level fused.
        compiled: makes the code of a graph that runs by given tactics.
        native: the kernel nodes whose tactics come with the engine and are as good as compiled here: built for this SM
            version and the only sizes.
    """

    graph: Graph
    compiled: Callable[[Graph, Mapping[str, LoadedTactic]], Code]
    device: torch.device
    settings: RuntimeSettings
    native: frozenset[str]


class Tuner:
    """Takes `variant` up the tiers.

    Args:
        sizes: example sizes for the symbols that the variant leaves open; used only to check its kernels.
    """

    def __init__(self, of: TunedGraph, variant: Variant, sizes: Mapping[str, int], context: TuningContext) -> None:
        self.of, self.variant, self.context = of, variant, context
        self.generic = bool(sizes)
        tactics = variant.code.tactics
        is_bound = bool(variant.regions) or not variant.sizes  # by the tuner before this one, or nothing is to bind
        self.graph = variant.code.graph if is_bound else bind(of.graph, variant.sizes)
        # Sizes that depend on data are checked with a typical one.
        self.sizes = {name: typical_size(sym, TYPICAL) for name, sym in self.graph.syms.items()} | dict(sizes)
        self.cases = [self.sizes, self.other_case()] if self.generic else [self.sizes]
        # The same objects where nothing is bound: code is made again, and CUDA graphs are dropped, only for others.
        self.tactics = dict(tactics) if is_bound else {op: bound(one, variant.sizes) for op, one in tactics.items()}

    def other_case(self) -> Mapping[str, int]:
        """Sizes near to those that were met which kernels have other code for: multiples of 16 if these are not."""
        aligned = all(size % ALIGNMENT == 0 for size in self.sizes.values())
        return {name: _nearest(self.graph.syms[name], size, not aligned) for name, size in self.sizes.items()}

    def compile(self) -> None:
        """Compile, check, swap. What goes wrong leaves the variant as it is then."""
        variant = self.variant
        try:
            with undisturbed(self.of.device), _own_stream(self.of.device):
                variant.regions = regions = list(self.regions())
                try:
                    self.specialize(regions)
                except KernelError as error:  # nothing can be compiled here
                    self.context.background.step()  # or no more: the process ends
                    warn_once(f"{error}; only kernels that come with the engine are used")
                    brought = self.context.jit().items()
                    self.tactics = {op: bound(tactic, variant.sizes) for op, tactic in brought} | self.tactics
                self.swap()
        finally:
            variant.ready = not self.generic

    def measure(self) -> None:
        """Measure, swap: what comes after `compile`, for a variant whose sizes are known."""
        with undisturbed(self.of.device), _own_stream(self.of.device):
            self.tune(self.variant.regions)
            self.swap()

    def regions(self) -> Iterator[Region]:
        """The regions, those inside of others first."""
        found: dict[str, Region] = {}
        for node in reversed(list(kernel_nodes(self.graph))):
            assert node.body is not None
            region = found.setdefault(region_key(node.body), Region(region_key(node.body), node))
            if node.op not in region.ops:
                region.ops.append(node.op)
        return iter(found.values())

    def specialize(self, regions: Sequence[Region]) -> None:
        """Give every region the tactic that was measured fastest, or is expected to be."""
        database = self.context.database
        wanted: dict[str, tuple[Graph, int]] = {}
        for region in regions:
            region.choice = None if self.generic else database.choice(region.key)
            if region.choice is not None and region.choice.rank is None and not self.is_native(region):
                region.choice = None  # it was measured with another engine
            if region.choice is not None and region.choice.rank is not None:
                wanted[region.key] = region.body, region.choice.rank
            elif not self.is_native(region):
                wanted[region.key] = region.body, 0
        made = database.candidates(wanted) if wanted else {}
        for region in regions:
            self.context.background.step()
            candidate = made.get(region.key)
            if region.choice is not None and region.choice.rank not in (None, candidate and candidate.rank):
                region.choice = None  # what was measured can't be built here
            if candidate is not None:
                self.try_first(region, candidate)

    def is_native(self, region: Region) -> bool:
        """The engine brought a tactic for the region that is as good as the first candidate."""
        if self.generic:
            return all(op in self.tactics for op in region.ops)
        return region.node.op in self.of.native

    def try_first(self, region: Region, candidate: Candidate) -> None:
        """Use a candidate if it is right. The one that was measured was checked before."""
        try:
            tactic = self.context.load(region.node, candidate)
            for sizes in self.cases if tactic.kernels and region.choice is None else ():
                check = CandidateCheck(bind_node(region.node, sizes), self.of.device)
                problem = check.problem(check.code({region.node.op: bound(tactic, sizes)}))
                if problem is not None:
                    raise KernelError(f"its kernel is wrong: {problem}")
            self.use(region, tactic)
        except (RtxError, torch.OutOfMemoryError) as error:
            self.leave(region, error)

    def use(self, region: Region, tactic: LoadedTactic) -> None:
        """Run the nodes of a region by a tactic."""
        self.tactics.update(dict.fromkeys(region.ops, tactic))

    def leave(self, region: Region, error: Exception) -> None:
        """Note why a candidate is not used."""
        region.problems.append(str(error).splitlines()[0])
        log.warning("%s goes on as it ran: %s", region, region.problems[-1])

    def swap(self) -> None:
        """Run the variant by the tactics that were chosen, from its next call on."""
        variant, tactics, before = self.variant, dict(self.tactics), self.variant.code
        same = tactics.keys() == before.tactics.keys() and all(tactics[op] is before.tactics[op] for op in tactics)
        if not same or before.graph is not self.graph:
            variant.code = self.of.compiled(self.graph, tactics)
        if tactics:
            variant.tier = PORTABLE if self.generic else SPECIALIZED
        log.debug("%d kernels of %d regions are launched now", len(launched(tactics)), len(variant.regions))

    def tune(self, regions: Sequence[Region]) -> None:
        """Measure what was not measured, as long as there is time, and use the fastest."""
        end = time.monotonic() + self.of.settings.tuning_seconds
        contests = {r.key: Contest(self, r) for r in regions if r.choice is None and not r.body.syms}
        open_ = dict(contests)
        try:
            for rank in count():
                wanted = {key: (one.region.body, rank) for key, one in open_.items() if rank not in one.ranks}
                if not open_ or time.monotonic() >= end:
                    break
                made = self.context.database.candidates(wanted) if wanted else {}
                for key, candidate in made.items():
                    self.context.background.step()
                    if time.monotonic() < end:
                        contests[key].measure(candidate)
                open_ = {k: one for k, one in open_.items() if not one.is_over and (k in made or k not in wanted)}
        except KernelError as error:
            self.context.background.step()
            warn_once(f"nothing more is measured: {error}")
        for contest in contests.values():
            contest.decide()


class Contest:
    """The tactics of one region, measured against each other.

    Attributes:
        times: microseconds, by the name of the tactic.
        early_starts: per tactic, how many of its kernels use PDL in a CUDA graph; while they are measured, none does.
        loaded: the candidates with their ranks.
        ranks: those of all candidates that were tried.
    """

    def __init__(self, tuner: Tuner, region: Region) -> None:
        self.tuner, self.region = tuner, region
        self.times: dict[str, float] = {}
        self.early_starts: dict[str, int] = {}
        self.loaded: dict[str, tuple[LoadedTactic, int]] = {}
        self.ranks: set[int] = set()
        self._kinds: Counter[str] = Counter()

    @property
    def is_over(self) -> bool:
        """Enough tactics were tried."""
        return max(self._kinds.values(), default=0) >= MEASURED_OF_A_KIND

    def measure(self, candidate: Candidate) -> None:
        """Check and time a candidate; with the first one, the tactic that the engine brought."""
        tuner, region, op = self.tuner, self.region, self.region.node.op
        kind = candidate.tactic.kind
        if candidate.rank in self.ranks:
            return
        self.ranks.add(candidate.rank)
        self._kinds[kind] += 1
        try:
            tactic = tuner.context.load(region.node, candidate)
            check = CandidateCheck(region.node, tuner.of.device)
            inside = {node.op: tuner.tactics[node.op] for node in kernel_nodes(region.body) if node.op in tuner.tactics}
            code = check.code(inside | {op: tactic})
            problem = check.problem(code)
            if problem is not None:
                raise KernelError(f"a kernel for it is wrong: {problem}")
            if not self.times and tuner.is_native(region):
                brought = tuner.tactics[op]
                self._time(f"engine {brought.kind}", check, check.code(inside | {op: brought}))
            name = f"{kind} {candidate.rank}"
            self._time(name, check, code)
            self.loaded[name] = tactic, candidate.rank
        except (RtxError, torch.OutOfMemoryError) as error:
            tuner.leave(region, error)

    def _time(self, name: str, check: CandidateCheck, code: Code) -> None:
        self.times[name] = self.tuner.context.time(check.runs(code))
        kernels, nodes = launched(code.tactics), inline_kernels(code.graph, code.tactics).nodes
        self.early_starts[name] = sum(bool(kernels[node.op].waiting) for node in nodes if node.kind == "kernel")

    def decide(self) -> None:
        """Use the fastest from now on, and remember it."""
        if not self.loaded:
            return
        saved_us = 0.0 if self.tuner.of.settings.cuda_graph_strategy == "disabled" else EARLY_START_US
        best = min(self.times, key=lambda name: self.times[name] - saved_us * self.early_starts[name])
        tactic, rank = self.loaded.get(best, (None, None))
        self.region.choice = Choice(best, rank, dict(self.times))
        self.tuner.context.database.remember(self.region.key, self.region.choice)
        if tactic is not None:
            self.tuner.use(self.region, tactic)


def _nearest(sym: Sym, size: int, aligned: bool) -> int:
    """The size nearest to `size` that `sym` may have and that is a multiple of 16, or is none; `size` if there is
    none."""
    steps = (sign * step * max(sym.multiple, 1) for step in range(ALIGNMENT) for sign in (1, -1))
    fits = (n for n in (size + step for step in steps) if sym.min <= n and (sym.max is None or n <= sym.max))
    return next((n for n in fits if (n % ALIGNMENT == 0) == aligned), size)


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless it was logged before."""
    log.warning("%s", message)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Beside the calls of the program: on a stream that nobody else has, and whatever other threads capture."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream(device.index)), relaxed():
        yield


@cache
def _stream(index: int) -> Any:
    """The tuners' stream on a device: one, since the allocator keeps memory per stream. New streams are of the lowest
    priority."""
    return new_stream(torch.device("cuda", index))
