"""The work that takes one variant of a graph up the tiers: compile, check and use kernels; measure, use the fastest.

Every kernel is checked against the calls that it stands for, on this device, before it is used. Measuring is bounded in
time and in memory. What fails is logged once, and the region goes on as it ran before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from torch_rtx.errors import KernelError, RtxError
from torch_rtx.ir import Graph, Node, Sym, kernel_nodes, typical_size
from torch_rtx.kerneltable import Candidate, SplitCandidate
from torch_rtx.runtime.background import Background
from torch_rtx.runtime.bind import bind, bind_node
from torch_rtx.runtime.code import Code, undisturbed
from torch_rtx.runtime.driver import new_stream, relaxed
from torch_rtx.runtime.inline import Parts, launched
from torch_rtx.runtime.knowledge import CALLS, ENGINE, GENERATED, SPLIT, Knowledge, Tactic, region_key
from torch_rtx.runtime.launch import Launcher, Way
from torch_rtx.runtime.plan import TYPICAL
from torch_rtx.runtime.trial import Run, Trial
from torch_rtx.targets import ALIGNMENT

if TYPE_CHECKING:
    from torch_rtx.runtime.specialize import Specializer, Variant

log = logging.getLogger(__name__)
REFERENCE, PORTABLE, SPECIALIZED = "reference", "portable", "specialized"  # tiers
Offer = Candidate | SplitCandidate
RANKS = 4  # kernels of a region that are measured
EARLY = 0.4  # microseconds that an early start saves: 0.26 to 0.51 for each edge of the graphs of 11 models on an H200


@dataclass(frozen=True)
class Tools:
    """What jobs work with.

    Attributes:
        knowledge: of the device's SM version.
        load: a launcher for the kernel of a candidate; gets the op of its node and how many tensors it takes.
        jit: the kernels of the engine that the driver has to compile first.
        time: microseconds of one of some equal runs.
        background: runs the jobs.
    """

    knowledge: Knowledge
    load: Callable[[str, Candidate, int], Launcher]
    jit: Callable[[], Mapping[str, Way]]
    time: Callable[[Sequence[Run]], float]
    background: Background


@dataclass
class Region:
    """A region of a variant, and what was found out about it.

    Attributes:
        node: one of its nodes, as the variant's graph has it.
        ops: the names of all of its nodes.
        tactic: the fastest way to run it, once that is known.
        problems: why kernels are not used.
    """

    key: str
    node: Node
    ops: list[str] = field(default_factory=list)
    tactic: Tactic | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def body(self) -> Graph:
        """Its operations."""
        assert self.node.body is not None
        return self.node.body

    @property
    def kind(self) -> str | None:
        """That of its tactic; None: it is not known."""
        return None if self.tactic is None else self.tactic.kind

    def __str__(self) -> str:
        return str(self.node.loc or self.node.op)


class Job:
    """Takes `variant` up the tiers.

    Args:
        sizes: of the symbols that the variant is not for but its kernels are checked with.
    """

    def __init__(self, owner: Specializer, variant: Variant, sizes: Mapping[str, int], tools: Tools) -> None:
        self.owner, self.variant, self.tools = owner, variant, tools
        self.generic = bool(sizes)
        kernels = variant.code.kernels
        bound = bool(variant.regions) or not variant.sizes  # by the job before this one, or there is nothing to bind
        self.graph = variant.code.graph if bound else bind(owner.graph, variant.sizes)
        # Sizes that depend on data are checked with a typical one.
        self.sizes = {name: typical_size(sym, TYPICAL) for name, sym in self.graph.syms.items()} | dict(sizes)
        self.cases = [self.sizes, self.other_case()] if self.generic else [self.sizes]
        # The same objects where nothing is bound: code is made again, and CUDA graphs are dropped, only for others.
        self.kernels = dict(kernels) if bound else {op: way.bound(variant.sizes) for op, way in kernels.items()}

    def other_case(self) -> Mapping[str, int]:
        """Sizes near to those that were met which kernels have other code for: multiples of 16 if these are not."""
        aligned = all(size % ALIGNMENT == 0 for size in self.sizes.values())
        return {name: _nearest(self.graph.syms[name], size, not aligned) for name, size in self.sizes.items()}

    def compile(self) -> None:
        """Compile, check, swap. What goes wrong leaves the variant as it is then."""
        variant = self.variant
        try:
            with undisturbed(self.owner.device), _aside(self.owner.device):
                variant.regions = regions = list(self.regions())
                try:
                    self.specialize(regions)
                except KernelError as error:  # nothing can be compiled here
                    self.tools.background.step()  # or no more: the process ends
                    warn_once(f"{error}; only kernels that come with the engine are used")
                    brought = self.tools.jit().items()
                    self.kernels = {op: launcher.bound(variant.sizes) for op, launcher in brought} | self.kernels
                self.swap()
        finally:
            variant.ready = not self.generic

    def measure(self) -> None:
        """Measure, swap: what comes after `compile`, for a variant whose sizes are known."""
        with undisturbed(self.owner.device), _aside(self.owner.device):
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
        """Give every region the kernel that is known to be the fastest, or expected to be."""
        knowledge = self.tools.knowledge
        for region in regions:
            region.tactic = None if self.generic else knowledge.tactic(region.key)
        split = {region.key: region.body for region in regions if region.kind == SPLIT}
        made: dict[str, Offer] = dict(knowledge.splits(split)) if split else {}
        wanted: dict[str, tuple[Graph, int]] = {}
        for region in regions:
            at_hand = self.at_hand(region)
            if (region.kind == SPLIT and region.key not in made) or (region.kind == ENGINE and not at_hand):
                region.tactic = None  # it was found with another engine
            if region.tactic is not None and region.kind == GENERATED:
                wanted[region.key] = region.body, region.tactic.config
            elif region.kind not in (CALLS, SPLIT) and not at_hand:
                wanted[region.key] = region.body, 0
        made |= knowledge.kernels(wanted) if wanted else {}
        for region in regions:
            self.tools.background.step()
            if region.kind == CALLS:
                self.use(region, None)
            elif region.key in made:
                self.try_first(region, made[region.key])

    def at_hand(self, region: Region) -> bool:
        """Whether the engine has brought a kernel that is as good as one of rank 0."""
        if self.generic:
            return all(op in self.kernels for op in region.ops)
        return region.node.op in self.owner.native

    def try_first(self, region: Region, offer: Offer) -> None:
        """Use a kernel if it is right. One that was measured was checked before."""
        try:
            way = self.load(region, offer)
            for sizes in self.cases if region.tactic is None else ():
                trial = Trial(bind_node(region.node, sizes), self.owner.device)
                problem = trial.problem(trial.code({region.node.op: way.bound(sizes)}))
                if problem is not None:
                    raise KernelError(f"its kernel is wrong: {problem}")
            self.use(region, way)
        except (RtxError, torch.OutOfMemoryError) as error:
            self.leave(region, error)

    def load(self, region: Region, offer: Offer) -> Way:
        """What was compiled, ready to launch.

        Raises:
            KernelError: the driver refuses it.
        """
        if isinstance(offer, SplitCandidate):
            nodes = {node.op: node for node in kernel_nodes(offer.body)}
            return Parts(offer.body, {op: self._launcher(node, offer.kernels[op]) for op, node in nodes.items()})
        return self._launcher(region.node, offer)

    def _launcher(self, node: Node, candidate: Candidate) -> Launcher:
        return self.tools.load(node.op, candidate, len(node.inputs) + len(node.outputs))

    def use(self, region: Region, way: Way | None) -> None:
        """Launch the nodes of a region, or (None) call what they are made of."""
        for op in region.ops:
            self.kernels.pop(op, None)
            if way is not None:
                self.kernels[op] = way

    def leave(self, region: Region, error: Exception) -> None:
        """Note why a kernel is not used."""
        region.problems.append(str(error).splitlines()[0])
        log.warning("%s goes on as it ran: %s", region, region.problems[-1])

    def swap(self) -> None:
        """Run the variant with the kernels that were found, from its next call on."""
        variant, kernels, before = self.variant, dict(self.kernels), self.variant.code
        same = kernels.keys() == before.kernels.keys() and all(kernels[op] is before.kernels[op] for op in kernels)
        if not same or before.graph is not self.graph:
            variant.code = self.owner.compiled(self.graph, kernels)
        if kernels:
            variant.tier = PORTABLE if self.generic else SPECIALIZED
        log.debug("%d kernels of %d regions are launched now", len(kernels), len(variant.regions))

    def tune(self, regions: Sequence[Region]) -> None:
        """Measure what is not known, as long as there is time, and use the fastest."""
        end = time.monotonic() + self.owner.settings.tuning_seconds
        known = (region for region in regions if region.tactic is None and not region.body.syms)
        rivals = {region.key: Rivals(self, region) for region in known}
        first = dict.fromkeys(rivals, 0)
        knowledge = self.tools.knowledge
        try:
            for rank in range(RANKS):
                if not first or time.monotonic() >= end:
                    break
                made = knowledge.kernels({key: (rivals[key].region.body, first[key]) for key in first})
                self.compete(rivals, made, end)
                if rank == 0:
                    split = {key: rival.region.body for key, rival in rivals.items() if rival.splits}
                    self.compete(rivals, knowledge.splits(split), end)
                first = {key: candidate.config + 1 for key, candidate in made.items()}
        except KernelError as error:
            self.tools.background.step()
            warn_once(f"nothing more is measured: {error}")
        for found in rivals.values():
            found.decide()

    def compete(self, rivals: Mapping[str, Rivals], offers: Mapping[str, Offer], end: float) -> None:
        """Let kernels compete until the time `end`."""
        for key, offer in offers.items():
            self.tools.background.step()
            if time.monotonic() < end:
                rivals[key].measure(offer)


class Rivals:
    """The ways to run one region, measured against each other.

    Attributes:
        early: how many kernels of each way use PDL in a CUDA graph, see `use_programmatic_edges`; here, none does.
    """

    def __init__(self, job: Job, region: Region) -> None:
        self.job, self.region = job, region
        self.times: dict[str, float] = {}
        self.early: dict[str, int] = {}
        self.ways: dict[str, tuple[Way, int]] = {}

    @property
    def splits(self) -> bool:
        """Whether a split body may be worth a try: there is something that it has to beat."""
        return bool(self.times)

    def measure(self, offer: Offer) -> None:
        """Check and time a kernel; before the first one, what it has to beat."""
        job, region = self.job, self.region
        op = region.node.op
        name, config = (
            (SPLIT, 0) if isinstance(offer, SplitCandidate) else (f"{GENERATED} {offer.config}", offer.config)
        )
        try:
            way = job.load(region, offer)
            trial = Trial(region.node, job.owner.device)
            code = trial.code({op: way})
            problem = trial.problem(code)
            if problem is not None:
                raise KernelError(f"a kernel for it is wrong: {problem}")
            if not self.times and isinstance(offer, Candidate):
                if offer.launch.library != "none":
                    inside = {node.op for node in kernel_nodes(region.body)} & job.kernels.keys()
                    self._time(CALLS, trial, trial.code({name: job.kernels[name] for name in inside}))
                if job.at_hand(region):
                    self._time(ENGINE, trial, trial.code({op: job.kernels[op]}))
            self._time(name, trial, code)
            self.ways[name] = way, config
        except (RtxError, torch.OutOfMemoryError) as error:
            job.leave(region, error)

    def _time(self, name: str, trial: Trial, code: Code) -> None:
        """Time `code`, the way that is called `name`."""
        self.times[name] = self.job.tools.time(trial.runs(code))
        self.early[name] = sum(bool(launcher.waiting) for launcher in launched(code.kernels).values())

    def decide(self) -> None:
        """Use the fastest from now on, and remember it."""
        if not self.ways:
            return
        saved = 0.0 if self.job.owner.settings.cuda_graph_strategy == "disabled" else EARLY
        best = min(self.times, key=lambda name: self.times[name] - saved * self.early[name])
        way, config = self.ways.get(best, (None, 0))
        kind = best.split(" ")[0]
        self.region.tactic = Tactic(kind, config, dict(self.times))
        self.job.tools.knowledge.remember(self.region.key, self.region.tactic)
        if kind != ENGINE:
            self.job.use(self.region, way)


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
def _aside(device: torch.device) -> Iterator[None]:
    """Beside the calls of the program: on a stream that nobody else has, and whatever other threads capture."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream(device.index)), relaxed():
        yield


@cache
def _stream(index: int) -> Any:
    """The stream of jobs on a device: one, since the allocator keeps memory per stream. New streams are of the lowest
    priority."""
    return new_stream(torch.device("cuda", index))
