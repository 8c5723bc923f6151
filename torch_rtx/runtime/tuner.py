"""The tuner takes one variant of a graph up the tiers: it compiles, checks and uses tactics, then measures them.

Every tactic is checked on this device against the ATen calls of the region before it is used. Measuring has a limit of
time and of memory. A failure is logged once, and the region keeps the tactic that it has.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count, islice
from typing import Any

import torch

from torch_rtx.chips import PDL_SAVES_US
from torch_rtx.dtypes import DTYPES, FLOAT
from torch_rtx.errors import KernelError, RtxError
from torch_rtx.foreign import launch_in
from torch_rtx.ir import Graph, Node, Sym, TensorType, attr_values, kernel_nodes, typical_size
from torch_rtx.runtime.background import Background
from torch_rtx.runtime.benchmark import Run
from torch_rtx.runtime.bind import bind, bind_node
from torch_rtx.runtime.candidate_check import LESS_EXACT, CandidateCheck, InputPool
from torch_rtx.runtime.code import Code, undisturbed
from torch_rtx.runtime.driver import new_stream, relaxed
from torch_rtx.runtime.inline import inline_kernels, launched
from torch_rtx.runtime.launch import LoadedTactic, bound
from torch_rtx.runtime.node_cost import is_view, nbytes
from torch_rtx.runtime.plan import TYPICAL
from torch_rtx.runtime.region_keys import kin_key, plain, region_key
from torch_rtx.runtime.shared_tuning import SharedTuning
from torch_rtx.runtime.tuning_db import Bodies, Choice, Later, TuningDatabase
from torch_rtx.runtime.variant import PORTABLE, SPECIALIZED, Region, Variant
from torch_rtx.settings import RuntimeSettings
from torch_rtx.tactics import Candidate
from torch_rtx.targets import ALIGNMENT

log = logging.getLogger(__name__)
MEASURED_OF_A_KIND = 4  # measuring a region ends with so many tactics of one kind
# Or with fewer, where a library is faster by such a factor: more than the configurations of a kernel differ in time.
TRIED, HOPELESS = 2, 1.5
# Regions that are asked for at a time, of which any may be ready first; and those whose kernels may compile meanwhile.
WINDOW, LATER = 16, 48


@dataclass(frozen=True)
class TuningContext:
    """The services that tuners use on a device.

    Attributes:
        database: of the device's SM version.
        load: loads the kernels of a candidate for a node.
        jit: loads the engine's tactics, also those that the driver compiles from PTX.
        time: times equivalent runs; returns microseconds per run.
        background: runs the tuners.
        rivals: loads the tactics that the engine has for a kernel node, by its op.
    """

    database: TuningDatabase
    load: Callable[[Node, Candidate], LoadedTactic]
    jit: Callable[[], Mapping[str, LoadedTactic]]
    time: Callable[[Sequence[Run]], float]
    background: Background
    rivals: Callable[[str], Sequence[LoadedTactic]] = lambda op: ()


@dataclass(frozen=True)
class TunedGraph:
    """A graph whose variants are tuned.

    Attributes:
        graph: level fused.
        compiled: generates the code of a graph with given tactics.
        native: ops of the kernel nodes whose tactics come with the engine and are as good as those compiled here: built
            for this SM version and for the only sizes.
    """

    graph: Graph
    compiled: Callable[[Graph, Mapping[str, LoadedTactic]], Code]
    device: torch.device
    settings: RuntimeSettings
    native: frozenset[str]


class Tuner:
    """Takes `variant` up the tiers.

    Args:
        sizes: example sizes for symbols that the variant leaves dynamic; used only to check its kernels.
    """

    def __init__(self, of: TunedGraph, variant: Variant, sizes: Mapping[str, int], context: TuningContext) -> None:
        self.of, self.variant, self.context = of, variant, context
        self.generic = bool(sizes)
        tactics = variant.code.tactics
        is_bound = bool(variant.regions) or not variant.sizes  # an earlier tuner bound it, or it has no sizes
        self.graph = variant.code.graph if is_bound else bind(of.graph, variant.sizes)
        # Kernels with data-dependent sizes are checked at a typical size.
        self.sizes = {name: typical_size(sym, TYPICAL) for name, sym in self.graph.syms.items()} | dict(sizes)
        self.cases = [self.sizes, self.other_case()] if self.generic else [self.sizes]
        # Tactics stay the same objects where nothing is bound: new ones would mean new code, which drops CUDA graphs.
        self.tactics = dict(tactics) if is_bound else {op: bound(one, variant.sizes) for op, one in tactics.items()}

    def other_case(self) -> Mapping[str, int]:
        """Sizes close to the example that select the other variant of kernels: multiples of 16 if those are not."""
        aligned = all(size % ALIGNMENT == 0 for size in self.sizes.values())
        return {name: _nearest(self.graph.syms[name], size, not aligned) for name, size in self.sizes.items()}

    @cached_property
    def pool(self) -> InputPool:
        """What all timed runs read; the tuner, and so this memory, lives as long as one step."""
        return InputPool(self.of.device)

    @cached_property
    def returned(self) -> frozenset[str]:
        """The values whose memory the graph returns, by name: its results, and what these are views of."""
        found = {value.name for value in attr_values(self.graph.outputs)}
        for node in reversed(self.graph.nodes):
            if is_view(node) and not found.isdisjoint(value.name for value in node.results):
                found.add(node.inputs[0].name)
        return frozenset(found)

    def copied_us(self, region: Region) -> float:
        """Microseconds, per node of a region, of copying what the graph returns of it: a CUDA graph does, unless a
        kernel writes that, which replays tell where."""
        if self.of.settings.cuda_graph_strategy == "disabled":
            return 0.0
        nodes = [node for node in self.graph.nodes if node.op in region.ops]
        results = [value for node in nodes for value in node.results if value.name in self.returned]
        chip = self.context.database.chip
        copies = [chip.launch + 2 * nbytes(value, self.sizes) / (chip.memory * 1e3) for value in results]
        return sum(copies) / max(len(nodes), 1)

    def check(self, node: Node, tactics: Mapping[str, LoadedTactic] | None = None) -> CandidateCheck:
        """A check of tactics of a kernel node, which has numbers for all sizes; `tactics`: see `CandidateCheck`."""
        constants = {one.value.name: one.recipe for one in self.graph.weights if one.recipe and not one.names}
        return CandidateCheck(node, self.of.device, constants, tactics, self.context.database.float32)

    def compile(self) -> None:
        """Compile and check the first tactic of each region, then swap the code. Errors leave the variant usable."""
        variant = self.variant
        try:
            with undisturbed(self.of.device), _own_stream(self.of.device):
                variant.regions = regions = list(self.regions())
                try:
                    self.specialize(regions)
                except KernelError as error:  # nothing can be compiled here
                    self.context.background.step()  # raises if the process is ending: no reason to warn
                    warn_once(f"{error}; only kernels that come with the engine are used")
                    brought = self.context.jit().items()
                    self.tactics = {op: bound(tactic, variant.sizes) for op, tactic in brought} | self.tactics
                self.swap()
        finally:
            variant.ready = not self.generic
        self.context.database.flush()

    def measure(self) -> None:
        """Measure tactics and swap the code; follows `compile`, for a variant without symbols. Other ranks measure some
        of the regions, see `hear`."""
        with undisturbed(self.of.device), _own_stream(self.of.device):
            regions = [region for region in self.variant.regions if is_measurable(region.body)]
            regions = [region for region in regions if not self.compare(region)]
            regions = [region for region in regions if region.choice is None and not region.body.syms]
            known = {region.kin for region in self.variant.regions if region.choice is not None}
            first: dict[str, Region] = {}
            for region in regions:
                if region.kin not in known:
                    first.setdefault(region.kin, region)
            by_name = {self.context.database.named(region.key): region for region in first.values()}
            self.variant.shared = shared = SharedTuning(list(by_name))
            end = time.monotonic() + self.of.settings.tuning_seconds
            while taken := shared.take():
                try:
                    self.tune_launched([by_name[name] for name in taken], end)
                finally:
                    shared.give(taken)
            self.tune(self.follow(), end)
            self.swap()
        self.context.database.flush()

    def hear(self) -> None:
        """Use what other ranks have measured; follows `measure`. Waits for no longer than measuring may take."""
        database, shared = self.context.database, self.variant.shared
        assert shared is not None
        self.variant.work.begin(0, 0)
        names = {*shared.heard(self.of.settings.tuning_seconds, self.context.background.step)}
        regions = [region for region in self.variant.regions if database.named(region.key) in names]
        if not regions:
            return
        with undisturbed(self.of.device), _own_stream(self.of.device):
            self.specialize(regions)
            for region in regions:
                if region.choice is not None:
                    database.remember(region.key, region.choice)
            self.follow()
            self.swap()

    def regions(self) -> Iterator[Region]:
        """The regions, inner ones first."""
        found: dict[str, Region] = {}
        named = {node.op: node for node in kernel_nodes(self.graph)}  # equal names mean equal bodies
        for op, node in reversed(named.items()):
            assert node.body is not None
            key, kin = (of(node.body, self.context.database.float32) for of in (region_key, kin_key))
            region = found.setdefault(key, Region(key, kin, node, plain(node.body)))
            region.ops.append(op)
        return iter(found.values())

    def specialize(self, regions: Sequence[Region]) -> None:
        """Give each region the tactic that was measured fastest before, else the one expected to be fastest."""
        database = self.context.database
        wanted: dict[str, tuple[Graph, int]] = {}
        for region in regions:
            region.choice = None if self.generic else database.choice(region.key)
            if region.choice is not None and region.choice.rank is None and not self.is_native(region):
                region.choice = None  # the tactic of another engine won
            if region.choice is not None and region.choice.rank is not None:
                wanted[region.key] = region.body, region.choice.rank
            elif not self.is_native(region):
                wanted[region.key] = region.body, 0
        by_key = {region.key: region for region in regions}
        is_measured = not self.generic and self.of.settings.tuning_seconds > 0
        whole = [region for region in regions if is_measured and self.nodes_of(region)]
        then = [(region.key, region.body, rank) for rank in (1, 2) for region in whole if region.choice is None]
        for key, candidate in self.arriving(wanted, then):
            region = by_key[key]
            if region.choice is not None and region.choice.rank != (candidate and candidate.rank):
                region.choice = None  # the tactic that won can't be built here
            if candidate is not None:
                self.try_first(region, candidate)

    def arriving(self, wanted: Bodies, then: Later = ()) -> Iterator[tuple[str, Candidate | None]]:
        """What the database has or compiles of `wanted`, as soon as it is there; None: no tactic fits. Others compile
        while the caller works on one, and last those of `then`, which the caller will want next.

        Raises:
            KernelError: nothing can be compiled here.
        """
        work, database, step = self.variant.work, self.context.database, self.context.background.step
        work.begin(len(wanted), work.tactics, work.limit_s)
        made = database.stored(wanted)
        left = {key: entry for key, entry in wanted.items() if key not in made}
        while made or left:
            if not made:
                later = [(key, *entry) for key, entry in islice(left.items(), WINDOW, LATER)] or then[:LATER]
                made = self.compiled(dict(islice(left.items(), WINDOW)), later)
            for key, candidate in made.items():
                step()
                left.pop(key, None)
                yield key, candidate
            work.begin(len(left), work.tactics, work.limit_s)
            made = {}

    def compiled(self, wanted: Bodies, later: Later) -> dict[str, Candidate | None]:
        """See `TuningDatabase.compiled`; timed for those who wait."""
        start = time.monotonic()
        made = self.context.database.compiled(wanted, later)
        self.context.background.compiling.add(len(made), time.monotonic() - start)
        return made

    def is_native(self, region: Region) -> bool:
        """The engine's tactic for the region is as good as the first candidate."""
        if self.generic:
            return all(op in self.tactics for op in region.ops)
        return region.node.op in self.of.native

    def try_first(self, region: Region, candidate: Candidate) -> bool:
        """Use a candidate if its results are right, as said. One that was measured before was also checked then."""
        try:
            tactic = self.context.load(region.node, candidate)
            region.expected_us = candidate.tactic.expected_us
            for sizes in self.cases if tactic.kernels and region.choice is None else ():
                check = self.check(bind_node(region.node, sizes))
                problem = check.problem(check.code({region.node.op: bound(tactic, sizes)}))
                if problem is not None:
                    raise KernelError(_refused(region, candidate, problem))
            self.use(region, tactic)
        except (RtxError, torch.OutOfMemoryError) as error:
            self.reject(region, error)
            return False
        region.rank = candidate.rank
        return True

    def use(self, region: Region, tactic: LoadedTactic) -> None:
        """Let a tactic run the nodes of a region."""
        self.tactics.update(dict.fromkeys(region.ops, tactic))

    def reject(self, region: Region, error: Exception) -> None:
        """Record why a candidate is not used."""
        problem = str(error).splitlines()[0]
        region.problems.append(problem)
        level = logging.INFO if problem == LESS_EXACT else logging.WARNING
        log.log(level, "%s: a tactic is not used: %s", region, problem)

    def swap(self) -> None:
        """Replace the variant's code by code with the chosen tactics, unless it is the same."""
        variant, tactics, before = self.variant, dict(self.tactics), self.variant.code
        same = tactics.keys() == before.tactics.keys() and all(tactics[op] is before.tactics[op] for op in tactics)
        if not same or before.graph is not self.graph:
            variant.code = self.of.compiled(self.graph, tactics)
        if tactics:
            variant.tier = PORTABLE if self.generic else SPECIALIZED
        log.debug("%d regions, %d kernels are launched", len(variant.regions), len(launched(tactics)))

    def compare(self, region: Region) -> bool:
        """Measure the engine's own tactics for a kernel that others wrote, and use the fastest; False if there are no
        several ones, for a kernel that can be compiled here, or for another region."""
        if launch_in(region.body) is None or region.body.syms:
            return False
        measured = Measurements(self, region)
        for tactic in self.context.rivals(region.node.op):
            self.context.background.step()
            measured.add_loaded(tactic.kind, bound(tactic, self.variant.sizes))
        measured.use_fastest()
        return bool(measured.times)

    def tune(self, regions: Sequence[Region], end: float) -> None:
        """Measure regions until `end`, those first that take the most time, and use the fastest tactic of each."""
        in_order = sorted(regions, key=self.share_us, reverse=True)
        measured = {region.key: Measurements(self, region) for region in in_order}
        open_, asked = dict(measured), set[tuple[str, int]]()
        try:
            while open_ and time.monotonic() < end:
                first = list(islice(open_.items(), WINDOW))
                wanted = {key: (one.region.body, one.rank) for key, one in first}
                ahead = range(1, 1 + max(WINDOW // len(first), 1))
                later = [(key, one, one.rank + more) for more in ahead for key, one in first if more < one.left]
                later += [(key, one, one.rank) for key, one in islice(open_.items(), WINDOW, LATER)]
                new = {key: entry for key, entry in wanted.items() if (key, entry[1]) not in asked}
                asked.update((key, rank) for key, (_, rank) in new.items())
                made = self.context.database.stored(new)
                if not made:
                    made = self.compiled(wanted, [(key, one.region.body, rank) for key, one, rank in later])
                for key, candidate in made.items():
                    self.tell(open_.values(), end)
                    start = time.monotonic()
                    if candidate is not None and start < end:
                        measured[key].add(candidate)
                        self.context.background.measuring.add(1, time.monotonic() - start)
                    if candidate is None or measured[key].is_done:
                        del open_[key]
        except KernelError as error:
            self.context.background.step()
            warn_once(f"measuring ends: {error}")
        for one in measured.values():
            one.select()

    def tune_launched(self, regions: Sequence[Region], end: float) -> None:
        """Measure regions until `end`. Kernels inside of others are measured last, and if the fastest tactics of these
        launch them: otherwise they never run."""
        inner = [region for region in regions if not self.nodes_of(region)]
        self.tune([region for region in regions if self.nodes_of(region)], end)
        if inner:
            runs = {node.op for node in inline_kernels(self.graph, self.tactics).nodes}
            self.tune([region for region in inner if not runs.isdisjoint(region.ops)], end)

    def follow(self) -> Sequence[Region]:
        """Use the tactics of the regions that were measured for their kin, too; those where this fails are returned."""
        database = self.context.database
        chosen = {region.kin: region.choice for region in self.variant.regions if region.choice is not None}
        kin = {one.key: one for one in self.variant.regions if one.choice is None and one.kin in chosen}
        wanted = {key: (one.body, rank) for key, one in kin.items() if (rank := chosen[one.kin].rank) is not None}
        for key, candidate in self.arriving(wanted):
            region, choice = kin[key], chosen[kin[key].kin]
            if candidate is None or candidate.rank != choice.rank:
                continue
            if candidate.rank == region.rank or self.try_first(region, candidate):
                region.choice = choice
                database.remember(key, choice)
        return [kin[key] for key in wanted if kin[key].choice is None]

    def tell(self, measured: Iterable[Measurements], end: float) -> None:
        """Tell those who wait what is left of a step, whose thread may have to end."""
        self.context.background.step()
        self.variant.work.begin(0, sum(one.left for one in measured), end - time.monotonic())

    def share_us(self, region: Region) -> float:
        """Microseconds, about, that all nodes of a region take of a call."""
        return region.expected_us * self.nodes_of(region)

    def nodes_of(self, region: Region) -> int:
        """How many nodes of the graph are of a region; 0 if they are inside of others alone."""
        return sum(self.counts[op] for op in region.ops)

    @cached_property
    def counts(self) -> Counter[str]:
        """How many nodes of the graph have each name."""
        return Counter(node.op for node in self.graph.nodes)


def _refused(region: Region, candidate: Candidate, problem: str) -> str:
    """Why a candidate with this problem is not used; of one that is wrong, what tells it from the region's others."""
    if problem == LESS_EXACT:
        return problem
    variants = [launch.aligned for launch in candidate.tactic.kernels.values()]
    blocks = " and ".join(f"{one.num_warps} warps, {one.shared} bytes of shared memory" for one in variants)
    which = f"{candidate.tactic.kind} {candidate.rank} of {region.node.op}"
    return f"{which}{f' ({blocks})' if blocks else ''} computes wrong results: {problem}"


class Measurements:
    """The measured tactics of one region.

    Attributes:
        times: microseconds, by the name of the tactic.
        pdl_kernels: by the same names, how many kernels use PDL in a CUDA graph. Measuring runs without it.
        called: the names of those whose results are no kernel's.
        loaded: by the same names, the candidates with their ranks.
        ranks: of all candidates that were tried.
        rank: of the candidate to try next.
    """

    def __init__(self, tuner: Tuner, region: Region) -> None:
        self.tuner, self.region = tuner, region
        self.times: dict[str, float] = {}
        self.pdl_kernels: dict[str, int] = {}
        self.called: set[str] = set()
        self.loaded: dict[str, tuple[LoadedTactic, int]] = {}
        self.ranks: set[int] = set()
        self.rank = 0
        self._kinds: Counter[str] = Counter()

    @property
    def left(self) -> int:
        """How many tactics may still be tried, about."""
        return MEASURED_OF_A_KIND - max(self._kinds.values(), default=0)

    @property
    def is_done(self) -> bool:
        """Enough tactics were tried."""
        return self.left <= 0 or self._is_hopeless

    @property
    def _is_hopeless(self) -> bool:
        """A library is much faster than the region's own kernel, whose configurations come next."""
        best = min(self.times, key=self.in_graph_us, default=None)
        own = [self.in_graph_us(name) for name, (tactic, _) in self.loaded.items() if tactic.kernels]
        if best not in self.loaded or self.loaded[best][0].kernels or len(own) < TRIED:
            return False
        return min(own) > HOPELESS * self.in_graph_us(best)

    @cached_property
    def _costs_us(self) -> tuple[float, float]:
        """Microseconds that a kernel saves in a CUDA graph by PDL, and those of copying what a call returns."""
        is_graph = self.tuner.of.settings.cuda_graph_strategy != "disabled"
        return PDL_SAVES_US if is_graph else 0.0, self.tuner.copied_us(self.region)

    def in_graph_us(self, name: str) -> float:
        """Microseconds of a tactic where it will run."""
        saved_us, copied_us = self._costs_us
        return self.times[name] - saved_us * self.pdl_kernels[name] + copied_us * (name in self.called)

    def add(self, candidate: Candidate) -> None:
        """Check and time a candidate; before the first one, time the engine's tactic."""
        tuner, region, op = self.tuner, self.region, self.region.node.op
        kind = candidate.tactic.kind
        is_new = candidate.rank not in self.ranks
        self.ranks.add(candidate.rank)
        self.rank = next(rank for rank in count(self.rank + 1) if rank not in self.ranks)
        if not is_new:
            return
        self._kinds[kind] += 1
        try:
            tactic = tuner.context.load(region.node, candidate)
            check = tuner.check(region.node)
            inside = {node.op: tuner.tactics[node.op] for node in kernel_nodes(region.body) if node.op in tuner.tactics}
            code = check.code(inside | {op: tactic})
            problem = check.problem(code)
            if problem is not None:
                raise KernelError(_refused(region, candidate, problem))
            if not self.times and tuner.is_native(region):
                native = tuner.tactics[op]
                self._time(f"engine {native.kind}", check, check.code(inside | {op: native}))
            name = f"{kind} {candidate.rank}"
            self._time(name, check, code)
            self.loaded[name] = tactic, candidate.rank
        except (RtxError, torch.OutOfMemoryError) as error:
            tuner.reject(region, error)

    def add_loaded(self, name: str, tactic: LoadedTactic) -> None:
        """Time a tactic of the engine. It is its own check: a file may have no calls of a kernel that others wrote."""
        tuner, region = self.tuner, self.region
        own = {region.node.op: tactic}
        try:
            check = tuner.check(region.node, own)
            code = check.code(own)
            self._time(name, check, code)
            self.loaded[name] = tactic, len(self.loaded)
        except (RtxError, torch.OutOfMemoryError) as error:
            tuner.reject(region, error)

    def use_fastest(self) -> None:
        """Use the fastest of the engine's tactics, whose ranks say nothing where they were not built."""
        if self.loaded:
            self.tuner.use(self.region, self.loaded[min(self.times, key=self.times.__getitem__)][0])

    def _time(self, name: str, check: CandidateCheck, code: Code) -> None:
        self.times[name] = self.tuner.context.time(check.runs(code, self.tuner.pool))
        kernels, nodes = launched(code.tactics), inline_kernels(code.graph, code.tactics).nodes
        self.pdl_kernels[name] = sum(bool(kernels[node.op].pdl_functions) for node in nodes if node.kind == "kernel")
        results = {value.name for value in attr_values(code.graph.outputs)}
        makers = [node for node in nodes if not results.isdisjoint(value.name for value in node.results)]
        if any(node.kind != "kernel" for node in makers):
            self.called.add(name)

    def select(self) -> None:
        """Use the fastest tactic, or the one that another rank found to be, and store the choice."""
        if not self.loaded:
            return
        database, key = self.tuner.context.database, self.region.key
        best = min(self.times, key=self.in_graph_us)
        _, rank = self.loaded.get(best, (None, None))
        own = Choice(best, rank, dict(self.times))
        choice = database.agreed(key, own)
        if choice.rank is not None and choice.name not in self.loaded:
            for _, candidate in self.tuner.arriving({key: (self.region.body, choice.rank)}):
                if candidate is not None:
                    self.add(candidate)
        if choice.name not in self.loaded and not (choice.rank is None and self.tuner.is_native(self.region)):
            choice = own  # it can't be used here
        tactic, _ = self.loaded.get(choice.name, (None, None))
        self.region.choice = choice
        database.remember(key, choice)
        if tactic is not None:
            self.tuner.use(self.region, tactic)


def is_measurable(body: Graph) -> bool:
    """Whether made-up inputs show how long a kernel takes. Those of one that others wrote may be how much there is to
    do, where they are integers."""
    types = [value.type for value in body.inputs if isinstance(value.type, TensorType)]
    return launch_in(body) is None or all(DTYPES[type_.dtype].kind == FLOAT for type_ in types)


def _nearest(sym: Sym, size: int, aligned: bool) -> int:
    """The size closest to `size` in the range of `sym` that is a multiple of 16, or with `aligned=False` is not; `size`
    itself if the range has no such size."""
    steps = (sign * step * max(sym.multiple, 1) for step in range(ALIGNMENT) for sign in (1, -1))
    fits = (n for n in (size + step for step in steps) if sym.min <= n and (sym.max is None or n <= sym.max))
    return next((n for n in fits if (n % ALIGNMENT == 0) == aligned), size)


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless it was logged before."""
    log.warning("%s", message)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Run beside the program's calls: on a stream of the tuners, in a thread that may synchronize during captures."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream(device.index)), relaxed():
        yield


@cache
def _stream(index: int) -> Any:
    """The tuners' stream on a device; one for all, since the allocator keeps memory per stream. Streams have the lowest
    priority by default."""
    return new_stream(torch.device("cuda", index))
