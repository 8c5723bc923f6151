"""Tables of tactics with something wrong in them, whose kernels a stand-in for the driver launches."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from unittest.mock import patch

import torch

from tests.doubles.fake_driver import FakeDriver
from tests.fuzz.files import Parts
from tests.fuzz.mutants import change_tactics, originals
from tests.fuzz.trial import Bug, size_of, typed
from torch_rtx import engine
from torch_rtx.ir import Graph, evaluate
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import Launcher, gpu_of, load_tactics
from torch_rtx.targets import ALIGNMENT, GRID

DEVICE = torch.device("cuda", 0)
CAPABILITIES = ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0), (15, 0))
MAX_THREADS, MAX_SHARED = 1024, 256 << 10


def with_kernels(rng: Random) -> tuple[str, bytes]:
    """The name of a file with kernels, and the file."""
    name = rng.choice([name for name in originals() if name.endswith(("kernel", "split"))])
    return name, originals()[name]


def hostile_table(rng: Random) -> tuple[str, bytes]:
    """The name of a file with kernels, and the file with other tactics."""
    name, content = with_kernels(rng)
    parts = Parts.of(content)
    change_tactics(parts, rng, rng.choice((1, 2, 4)))
    return name, parts.join()


def launches(path: str, rng: Random, say: Callable[[str], None]) -> str:
    """Load the file, and launch every kernel that it describes for sizes at random.

    Raises:
        Bug: the driver is given what no GPU can run, or an error has no type of ours.
    """
    say("load")
    found = typed(lambda: engine.load(path), "load")
    if found is None:
        return "refused"
    say("launch")
    driver = _Driver((), rng.choice(CAPABILITIES))
    gpu_of.cache_clear()
    with patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True):
        tactics = typed(lambda: load_tactics(found.kernels, found.graph, DEVICE, driver=driver), "launch")
        for launcher in launched(tactics or {}).values():
            typed(lambda launcher=launcher: _launch(driver, launcher, found.graph, rng), "launch")
    return "launched" if driver.launched else "none launched"


class _Driver(FakeDriver):
    """It checks what it is asked to launch, as a real one does."""

    def cuLaunchKernel(self, function, x, y, z, bx, by, bz, shared, *rest):  # type: ignore[no-untyped-def]
        if not all(0 < size <= limit for size, limit in zip((x, y, z), GRID, strict=True)):
            raise Bug(f"launch: a grid of {x} x {y} x {z}")
        if not 0 < bx <= MAX_THREADS or (by, bz) != (1, 1) or not 0 <= shared <= MAX_SHARED:
            raise Bug(f"launch: {bx} threads, {shared} bytes of shared memory")
        return super().cuLaunchKernel(function, x, y, z, bx, by, bz, shared, *rest)


def _launch(driver: _Driver, launcher: Launcher, graph: Graph, rng: Random) -> None:
    sizes = {name: size_of(sym, rng) for name, sym in graph.syms.items()}
    try:
        scalars = [evaluate(dim, sizes) for dim in launcher.scalars]
        x, y, z = (evaluate(dim, sizes) for dim in launcher.grid)
    except ZeroDivisionError:
        return  # where the code of a graph divides by zero, `files` shows
    if None in (*scalars, x, y, z):
        return
    if launcher._order is not None:
        return  # a kernel that others wrote: files of the fuzzer have none
    wide = "q" in launcher._pack.__self__.format  # type: ignore[attr-defined]
    driver.sizes = (*[8] * len(launcher.pointers), *[8 if wide else 4] * len(scalars), 8, 8)
    pointers = [ALIGNMENT * (index + 1) for index in range(len(launcher.pointers))]
    launcher(pointers, [int(one or 0) for one in scalars], (int(x or 0), int(y or 0), int(z or 0)))
    if driver.launched:
        values = driver.launched[-1].parameters
        mask = 2**64 - 1 if wide else -1
        expected = (*pointers, *(int(one or 0) & mask for one in scalars), 0, 0)
        if values != expected:
            raise Bug("launch: other parameters than those that were asked for")
