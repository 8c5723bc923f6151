"""The build of kernels, ahead of time and just in time: of the tactics that code generation offers the first that fits.

One loop serves both: a build ahead of time asks for every kind of tactic of every kernel node on every target, the
compile worker for the tactics of some regions from a rank on. It needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch_rtx.lowering.kernels.aot import Built, compile_kernels
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.toolchain import Code
from torch_rtx.tactics import Launch, Tactic, Variant, pack
from torch_rtx.targets import Target

Key = TypeVar("Key", bound=Hashable)
Ranked = tuple[int, Tactic[Kernel]]  # a tactic with its rank
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Result:
    """A tactic that was built.

    Attributes:
        rank: the tactic's.
        built: its kernels as compiled for the target, by their keys in the tactic.
    """

    rank: int
    tactic: Tactic[Kernel]
    target: Target
    built: Mapping[str, Built]

    @property
    def problem(self) -> str | None:
        """Why a kernel does not fit the target; None: all do."""
        return next((one.problem for one in self.built.values() if one.problem is not None), None)

    @property
    def runs(self) -> bool:
        """The target can run all kernels, though some may spill."""
        return all(one.codes for one in self.built.values())

    @property
    def spills(self) -> int:
        """Bytes of spill stores per thread, of all kernels."""
        return sum(one.spills for one in self.built.values())


def build(
    wanted: Mapping[Key, tuple[Iterator[Ranked], Target]], progress: Progress | None = None
) -> tuple[dict[Key, Result], dict[Key, list[str]]]:
    """Per key the first of its tactics whose kernels fit the target. Where tactics only spill too much, the one that
    spills least. And per key what is wrong with the others.

    Args:
        progress: see `compile_kernels`; starts again with each round of tactics.

    Raises:
        KernelError: see `compile_kernels`.
    """
    chosen: dict[Key, Result] = {}
    reasons: dict[Key, list[str]] = {key: [] for key in wanted}
    pending = list(wanted)
    while pending:
        offered = {key: ranked for key in pending if (ranked := next(wanted[key][0], None)) is not None}
        kernels = [(kernel, wanted[key][1]) for key, (_, one) in offered.items() for kernel in one.kernels.values()]
        compiled = compile_kernels(kernels, progress=progress)
        for key, (rank, tactic) in offered.items():
            target = wanted[key][1]
            built = {op: compiled[kernel, target] for op, kernel in tactic.kernels.items()}
            result = Result(rank, tactic, target, built)
            if result.problem is not None:
                reasons[key].append(result.problem)
            if result.runs and (key not in chosen or result.spills < chosen[key].spills):
                chosen[key] = result
        pending = [key for key in offered if key not in chosen or chosen[key].problem is not None]
    return chosen, reasons


@dataclass
class Binaries:
    """The binaries of launches, each stored once: by digest of the compressed bytes."""

    stored: dict[str, bytes] = field(default_factory=dict)
    _digests: dict[bytes, str] = field(default_factory=dict)

    def tactic(self, result: Result) -> Tactic[Launch]:
        """What was built as it is launched."""
        return result.tactic.with_kernels(lambda op, kernel: self._launch(kernel, result.built[op], result.target))

    def _launch(self, kernel: Kernel, built: Built, target: Target) -> Launch:
        assert built.aligned is not None  # what does not run is not chosen
        generic = None if built.generic is None else self._variant(built.generic, target)
        aligned = self._variant(built.aligned, target)
        return Launch(kernel.scalars, kernel.grid, kernel.wide, aligned, generic)

    def _variant(self, code: Code, target: Target) -> Variant:
        binary = code.ptx if target.ptx else code.cubin
        if binary not in self._digests:
            self._digests[binary], stored = pack(binary)
            self.stored[self._digests[binary]] = stored
        return code.variant(self._digests[binary])
