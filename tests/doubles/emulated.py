"""A device that is specialized for, without a GPU: kernels are generated as for one and run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tests.doubles.interpreter import Interpreted
from torch_rtx.errors import KernelError, Unsupported
from torch_rtx.ir import Dim, Graph, kernel_nodes
from torch_rtx.kerneltable import Candidate, Launch, SplitCandidate, Variant, pack
from torch_rtx.lowering.kernels.generate import generate, library
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.split import split_in
from torch_rtx.runtime.background import Background
from torch_rtx.runtime.bind import bind_dim
from torch_rtx.runtime.job import Tools
from torch_rtx.runtime.knowledge import Knowledge
from torch_rtx.runtime.launch import Launcher, Store
from torch_rtx.runtime.trial import Run
from torch_rtx.targets import Target

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
        waits: kernels start early in CUDA graphs.
        parts: how many those regions are cut in that can be.
        builds: per build how many regions were asked for.
    """

    wrong: str | None = None
    wrong_for: Callable[[Sequence[int]], bool] = lambda scalars: True
    broken: str | None = None
    calls: float = 2.0
    waits: bool = False
    builds: list[int] = field(default_factory=list)
    kernels: dict[str, tuple[Kernel, bool]] = field(default_factory=dict)
    timed: int = 0
    parts: int = 1

    def build(self, bodies: Mapping[str, tuple[Graph, int]], sm: int) -> dict[str, Candidate]:
        if self.broken is not None:
            raise KernelError(self.broken)
        self.builds.append(len(bodies))
        found = {}
        for name, (body, config) in bodies.items():
            kernel = generate(body, name, sm, config)
            if kernel is not None:
                digest, stored = pack(repr(kernel).encode())
                self.kernels[digest] = kernel, self.wrong is not None and self.wrong in str(body)
                variant = Variant(digest, kernel.name, kernel.num_warps, 0, 32, 0)
                rival = library(body, sm)
                launch = Launch((Target(sm),), kernel.scalars, kernel.grid, kernel.wide, variant, None, rival)
                found[name] = Candidate(launch, {digest: stored}, config)
        return found

    def build_split(self, bodies: Mapping[str, tuple[Graph, int]], sm: int) -> dict[str, SplitCandidate]:
        found = {}
        for name, (body, _) in bodies.items() if self.parts > 1 else ():
            with suppress(Unsupported):  # a loop that reduces nothing
                divided = split_in(body, name, self.parts)
                inside = {node.op: (node.body, 0) for node in kernel_nodes(divided) if node.body is not None}
                found[name] = SplitCandidate(divided, self.build(inside, sm))
        return found

    def load(self, op: str, candidate: Candidate, pointers: int) -> Launcher:
        kernel, spoil = self.kernels[candidate.launch.aligned.binary]
        assert len(kernel.pointers) == pointers
        launcher = Emulated(kernel, self.wrong_for if spoil else lambda scalars: False)
        launcher.waiting = (1,) if self.waits else ()
        return launcher  # type: ignore[return-value]

    def time(self, runs: Sequence[Run]) -> float:
        self.timed += 1
        return self.calls if "_aten_" in runs[0].func.source else 1.0  # type: ignore[attr-defined]

    def tools(self, background: Background, store: Store | None = None) -> Tools:
        return Tools(Knowledge(SM, self, lambda: store), self.load, dict, self.time, background)
