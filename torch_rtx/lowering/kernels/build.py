"""Kernel builds, ahead of time and just in time: per region the first tactic whose kernels fit the target.

An ahead-of-time build asks for every kind of tactic of every kernel node on every target; the compile worker for the
tactics of some regions from a rank on. Neither torch nor a GPU is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

from torch_rtx.artefacts import NO_FILES, Artefacts
from torch_rtx.binaries import named
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, kernel_nodes
from torch_rtx.lowering.kernels.aot import Built, Compilations, compile_kernels
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.toolchain import Code
from torch_rtx.tactics import Launch, Tactic, Variant
from torch_rtx.targets import Target

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
Ranked = tuple[int, Tactic[Kernel]]  # a tactic with its rank
Wanted = tuple[Key, Iterator[Ranked], Target]
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Result:
    """A tactic that was built.

    Attributes:
        rank: of the tactic, in the order of trial.
        built: the compiled kernels, by their keys in the tactic.
    """

    rank: int
    tactic: Tactic[Kernel]
    target: Target
    built: Mapping[str, Built]

    @property
    def problem(self) -> str | None:
        """Why a kernel does not fit the target; None if all do."""
        return next((one.problem for one in self.built.values() if one.problem is not None), None)

    @property
    def runs(self) -> bool:
        """The target can run all kernels, though some may spill too much."""
        return all(one.codes for one in self.built.values())

    @property
    def spills(self) -> int:
        """Bytes of spill stores per thread, summed over kernels."""
        return sum(one.spills for one in self.built.values())


def build(
    wanted: Iterable[Wanted[Key]],
    progress: Progress | None = None,
    artefacts: Artefacts = NO_FILES,
    compilations: Compilations | None = None,
) -> tuple[dict[Key, Result], dict[Key, list[Result]]]:
    """(the tactic chosen per key, all that were tried per key).

    Chosen is the first tactic whose kernels fit the target, else the one that spills least.

    Args:
        wanted: the tactics of each key in the order of trial, and the target. Read one by one, and the kernels of each
            compile while the next tactics are found.
        progress: see `compile_kernels`; restarts with each round of tactics.
        artefacts: where the stages of kernels are written and overridden.
        compilations: which run them, and may have begun; None: new ones.

    Raises:
        KernelError: see `compile_kernels`.
    """
    chosen: dict[Key, Result] = {}
    tried: dict[Key, list[Result]] = {}
    with Compilations() if compilations is None else nullcontext(compilations) as running:
        while True:
            unfit = []
            for one, result in _next_built(wanted, running, progress, artefacts):
                key = one[0]
                results = tried.setdefault(key, [])
                if result is None:
                    continue
                results.append(result)
                if result.problem is not None:
                    names = ", ".join(kernel.name for kernel in result.tactic.kernels.values())
                    log.debug("%s does not fit %s: %s", names, result.target, result.problem)
                if result.runs and (key not in chosen or result.spills < chosen[key].spills):
                    chosen[key] = result
                if key not in chosen or chosen[key].problem is not None:
                    unfit.append(one)
            if not unfit:
                return chosen, tried
            wanted = unfit


def _next_built(
    wanted: Iterable[Wanted[Key]], compilations: Compilations, progress: Progress | None, artefacts: Artefacts
) -> list[tuple[Wanted[Key], Result | None]]:
    """The next tactic of each that is wanted; None: there are no more."""
    offers = []
    for one in wanted:
        _, ranked, target = one
        offer = next(ranked, None)
        offers.append((one, offer))
        if offer is not None and not artefacts:  # which may override what is compiled
            for kernel in offer[1].kernels.values():
                compilations.begin(kernel, target)
    files = {
        (kernel, target): artefacts.of(kernel.name, target, f"rank{offer[0]}" if offer[0] else "")
        for (_, _, target), offer in offers
        if offer is not None
        for kernel in offer[1].kernels.values()
    }
    shown = files if artefacts else None
    compiled = compile_kernels(files, progress=progress, artefacts=shown, compilations=compilations)
    results = list[tuple[Wanted[Key], Result | None]]()
    for one, offer in offers:
        target = one[2]
        built = {} if offer is None else {op: compiled[kernel, target] for op, kernel in offer[1].kernels.items()}
        results.append((one, None if offer is None else Result(*offer, target, built)))
    return results


def show_offers(artefacts: Artefacts, name: str, body: Graph, target: Target, offers: Iterable[Ranked]) -> None:
    """Write the region of the kernel `name`, those of the kernels in its tactics, and the ranking."""
    _show_region(artefacts.of(name), body)
    lines = ["rank  expected us  tactic"]
    for rank, tactic in offers:
        kernels = (f"{k.name} ({k.num_warps} warps, {k.num_stages} stages)" for k in tactic.kernels.values())
        lines.append(f"{rank:4}  {tactic.expected_us:11.2f}  {tactic.kind:8} {', '.join(kernels)}".rstrip())
        for node in () if tactic.body is None else kernel_nodes(tactic.body):
            if node.body is not None:
                _show_region(artefacts.of(node.op), node.body)
    artefacts.of(name, target).write("ranking", "\n".join(lines) + "\n")


def _show_region(files: Artefacts, body: Graph) -> None:
    files.write("region", str(body))
    try:
        files.write("kir", str(region(body)))
    except Unsupported:
        return  # not a kernel: it runs call by call


def show_results(artefacts: Artefacts, name: str, target: Target, results: Iterable[Result]) -> None:
    """Append the results to the ranking of the kernel `name`."""
    lines = []
    for result in results:
        codes = [(result.tactic.kernels[op].name, code) for op, built in result.built.items() for code in built.codes]
        used = [f"{op}: {c.registers} registers, {c.spills} B spilled, {c.shared} B shared" for op, c in codes]
        lines.append(f"built {result.tactic.kind} {result.rank}: {'; '.join((result.problem or 'fits', *used))}\n")
    artefacts.of(name, target).write("ranking", "".join(lines), append=True)


@dataclass
class Binaries:
    """The binaries of launches, by name."""

    stored: dict[str, bytes] = field(default_factory=dict)

    def tactic(self, result: Result) -> Tactic[Launch]:
        """The tactic with launches in place of kernels."""
        return result.tactic.with_kernels(lambda op, kernel: self._launch(kernel, result.built[op], result.target))

    def _launch(self, kernel: Kernel, built: Built, target: Target) -> Launch:
        assert built.aligned is not None  # only results that run are chosen
        generic = None if built.generic is None else self._variant(built.generic, target)
        aligned = self._variant(built.aligned, target)
        slots, block = (None, None) if kernel.foreign is None else (kernel.foreign.slots, kernel.foreign.block)
        return Launch(kernel.scalars, kernel.grid, kernel.wide, aligned, generic, slots, block)

    def _variant(self, code: Code, target: Target) -> Variant:
        name, binary = named(code.ptx if target.ptx else code.cubin)
        self.stored[name] = binary
        return code.variant(name)
