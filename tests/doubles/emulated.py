"""A device that is specialized for, without a GPU: kernels are generated as for one and run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tests.doubles.interpreter import Interpreted
from tests.helpers.splits import split_in
from torch_rtx.artefacts import Artefacts
from torch_rtx.binaries import named
from torch_rtx.errors import KernelError, Unsupported
from torch_rtx.ir import Dim, Graph, Node
from torch_rtx.lowering.kernels.generate import generate, tactics
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.runtime.background import Background
from torch_rtx.runtime.benchmark import Run
from torch_rtx.runtime.bind import bind_dim
from torch_rtx.runtime.launch import LoadedTactic, Store
from torch_rtx.runtime.tuner import TuningContext
from torch_rtx.runtime.tuning_db import TuningDatabase
from torch_rtx.tactics import Candidate, Launch, Tactic, Variant
from torch_rtx.targets import Target, arch_of

SM = 80


class Emulated(Interpreted):
    """A launcher that interprets; `spoil` says which scalars make its results wrong."""

    def __init__(self, kernel: Kernel, spoil: Callable[[Sequence[int]], bool]) -> None:
        super().__init__(kernel)
        self.spoil = spoil
        self.target = Target(SM)

    def bound(self, sizes: Mapping[str, int]) -> Emulated:
        other = Emulated(self.kernel, self.spoil)
        dims: Callable[[Dim], Dim] = lambda dim: bind_dim(dim, sizes)  # noqa: E731
        other.scalars = tuple(map(dims, self.scalars))
        x, y, z = map(dims, self.grid)
        other.grid = x, y, z
        return other

    def is_for(self, sm: int) -> bool:
        return sm == SM

    def __call__(self, pointers: Sequence[int], scalars: Sequence[int], grid: tuple[int, int, int]) -> None:
        if not self.spoil(scalars):
            super().__call__(pointers, scalars, grid)


@dataclass
class Device:
    """What happens on the emulated device.

    Attributes:
        wrong: regions (by a part of their text) whose kernels compute nothing.
        wrong_for: the scalars for which they do so.
        broken: what building raises, if anything.
        calls: microseconds of runs that call libraries; launches take 1.
        pdl: kernels start early in CUDA graphs.
        parts: how many those regions are cut in that can be.
        builds: per build how many regions were asked for.
    """

    wrong: str | None = None
    wrong_for: Callable[[Sequence[int]], bool] = lambda scalars: True
    broken: str | None = None
    calls: float = 2.0
    pdl: bool = False
    builds: list[int] = field(default_factory=list)
    kernels: dict[str, tuple[Kernel, bool]] = field(default_factory=dict)
    timed: int = 0
    parts: int = 1

    def build(
        self, bodies: Mapping[str, tuple[Graph, int]], sm: int, artefacts: Artefacts | None = None, *_: object
    ) -> dict[str, Candidate]:
        if self.broken is not None:
            raise KernelError(self.broken)
        self.builds.append(len(bodies))
        found = {}
        for name, (body, first) in bodies.items():
            offered = next(islice(self.offered(body, name, sm), first, None), None)
            if offered is not None:
                binaries: dict[str, bytes] = {}
                spoiled = self.wrong is not None and self.wrong in str(body)

                def launch(op: str, kernel: Kernel, stored: dict[str, bytes] = binaries, bad: bool = spoiled) -> Launch:
                    digest, stored[digest] = (packed := named(repr(kernel).encode()))[0], packed[1]
                    self.kernels[digest] = kernel, bad
                    variant = Variant(digest, kernel.name, kernel.num_warps, 0, 32, 0)
                    return Launch(kernel.scalars, kernel.grid, kernel.wide, variant, None)

                found[name] = Candidate(offered.with_kernels(launch), first, binaries)
        return found

    def some(self, bodies: Mapping[str, tuple[Graph, int]], sm: int, *_: object) -> dict[str, Candidate | None]:
        """All are ready at once."""
        return {**dict.fromkeys(bodies), **self.build(bodies, sm)}

    def offered(self, body: Graph, name: str, sm: int) -> Iterator[Tactic[Kernel]]:
        """What code generation offers, but for split bodies and calls that only a GPU has: in place of the first, one
        in `parts`."""
        known = [one for one in tactics(body, name, arch_of(sm)) if one.kind in ("kernel", "library")]
        if not known:  # no kernel alone computes the body
            yield from tactics(body, name, arch_of(sm))
            return
        own, *others = sorted(known, key=lambda one: one.kind != "kernel")
        yield own
        yield from (one for one in others if one.kind == "library")
        try:
            divided = split_in(body, name, self.parts) if self.parts > 1 else None
        except Unsupported:  # a loop that reduces nothing
            divided = None
        if divided is not None:
            inside = {node.op: generate(node.body, node.op, arch_of(sm), 0) for node in divided.nodes if node.body}
            yield Tactic("split", own.expected_us, {op: kernel for op, kernel in inside.items() if kernel}, divided)
        yield from (one for one in others if one.kind == "kernel")

    def load(self, node: Node, candidate: Candidate) -> LoadedTactic:
        nodes = candidate.tactic.nodes(node)

        def launcher(op: str, launch: Launch) -> Emulated:
            kernel, spoil = self.kernels[launch.aligned.binary]
            assert len(kernel.pointers) == len(nodes[op].inputs) + len(nodes[op].outputs)
            found = Emulated(kernel, self.wrong_for if spoil else lambda scalars: False)
            found.pdl_functions = (1,) if self.pdl else ()
            return found

        return candidate.tactic.with_kernels(launcher)  # type: ignore[return-value]

    def time(self, runs: Sequence[Run]) -> float:
        self.timed += 1
        return self.calls if "_aten_" in runs[0].func.source else 1.0  # type: ignore[attr-defined]

    def context(self, background: Background, store: Store | None = None) -> TuningContext:
        return TuningContext(TuningDatabase(SM, self, lambda: store), self.load, dict, self.time, background)
