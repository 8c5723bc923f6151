"""Kernels ahead of time: every kernel for every target, without a GPU, checked against the target's limits.

Each kernel is compiled for two cases that share everything but code: `aligned`, where all scalars are multiples of 16,
and `generic`. Where the first always holds there is no second. All addresses are multiples of 16 in both: the launch
sees to that, so that rows which start at such addresses keep their vector loads whatever the batch size is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from torch_rtx.ir import Dim, Expr, Sym
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.toolchain import Code, Job, lower
from torch_rtx.lowering.kernels.turing import NoTensorCores
from torch_rtx.targets import ALIGNMENT, Target, lacks

MAX_SPILLS = 128  # bytes of spill stores per thread; up to this much costs less than a smaller tile
Wanted = tuple[Kernel, Target]


@dataclass(frozen=True)
class Built:
    """What became of a kernel for a target.

    Attributes:
        aligned, generic: see the head of this file; None where there is no such case, or where compiling failed.
        problem: why the kernel does not fit the target; None if it does. One that only spills has its code as well.
    """

    aligned: Code | None
    generic: Code | None
    problem: str | None

    @property
    def codes(self) -> tuple[Code, ...]:
        """What was compiled."""
        return tuple(code for code in (self.aligned, self.generic) if code is not None)

    @property
    def spills(self) -> int:
        """Bytes of spill stores per thread, of the worse case."""
        return max((code.spills for code in self.codes), default=0)


def compile_kernels(
    wanted: Iterable[Wanted], workers: int | None = None, progress: Callable[[int, int], object] | None = None
) -> dict[Wanted, Built]:
    """Compile kernels, each for a target. Equal code is compiled once, also over several calls in one process.

    Args:
        workers: threads; None: one per core. Triton gives the interpreter free, and ptxas is a process of its own.
        progress: called in this thread with how many compilations are done and how many there are.

    Raises:
        KernelError: Triton can't be used, or it or ptxas refuses a kernel. That a kernel does not fit is a result.
    """
    pairs = list(dict.fromkeys(wanted))
    targets: dict[Kernel, list[Target]] = {}
    for kernel, target in pairs:
        targets.setdefault(kernel, []).append(target)
    jobs = {
        (kernel, target): _jobs(kernel, _code_sm(kernel, target, targets[kernel]), target.ptx and target.arch.exact)
        for kernel, target in pairs
        if not any(lacks(target, dtype) for dtype in kernel.pointers)
    }
    done = _run(dict.fromkeys(job for both in jobs.values() for job in both), workers, progress)
    return {pair: _built(*pair, [done[job] for job in jobs.get(pair, ())]) for pair in pairs}


def _run(
    jobs: Collection[Job], workers: int | None, progress: Callable[[int, int], object] | None
) -> Mapping[Job, Code | NoTensorCores]:
    done: dict[Job, Code | NoTensorCores] = {}
    with ThreadPoolExecutor(workers or len(_cores()), "torch_rtx build") as pool:
        futures = {pool.submit(lower, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, NoTensorCores):
                    raise error
                done[futures[future]] = future.result() if error is None else error
                if progress is not None:
                    progress(len(done), len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first error is the answer
            raise
    return done


def _cores() -> Collection[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _code_sm(kernel: Kernel, target: Target, targets: Iterable[Target]) -> int:
    """The SM version whose code `target` runs: the oldest wanted one of its generation.

    Code for sm_80 runs on sm_86 and sm_89 as well. What Triton and ptxas make for the three differs by the order of
    instructions and a few registers, in either direction: one binary saves two thirds of the size.
    """
    if target.ptx or target.arch.exact:
        return target.arch.sm
    of_generation = [t.sm for t in targets if not t.ptx and t.sm // 10 == target.sm // 10]
    return min(sm for sm in of_generation if not any(lacks(Target(sm), dtype) for dtype in kernel.pointers))


def _jobs(kernel: Kernel, sm: int, portable: bool = False) -> tuple[Job, ...]:
    """The job of the aligned case, and that of the generic one if there is such a case."""
    always = tuple(multiple(dim) % ALIGNMENT == 0 for dim in kernel.scalars)
    cases = dict.fromkeys(((True,) * len(always), always))
    wide, warps, stages = kernel.wide, kernel.num_warps, kernel.num_stages
    return tuple(
        Job(kernel.name, kernel.source, kernel.pointers, case, wide, warps, stages, sm, kernel.early, portable)
        for case in cases
    )


def multiple(dim: Dim) -> int:
    """A number that `dim` is always a multiple of; 0 if the dim is always 0."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Sym):
        return dim.multiple
    if dim.op == "*":
        return math.prod(map(multiple, dim.args))
    if isinstance(dim, Expr) and dim.op in ("+", "min", "max"):
        return math.gcd(*map(multiple, dim.args))
    return 1


def _built(kernel: Kernel, target: Target, results: list[Code | NoTensorCores]) -> Built:
    codes = [result for result in results if isinstance(result, Code)]
    if not results:
        dtype = next(dtype for dtype in kernel.pointers if lacks(target, dtype))
        return Built(None, None, f"{target} lacks {dtype}")
    for result in results:
        if isinstance(result, NoTensorCores):
            return Built(None, None, f"{target} has no instruction like {result}")
    problem = next((text for code in codes if (text := _too_large(code, target))), None)
    if problem is not None:
        return Built(None, None, problem)
    found = Built(codes[0], codes[1] if len(codes) > 1 else None, None)
    if found.spills > MAX_SPILLS:
        return Built(found.aligned, found.generic, f"each thread spills {found.spills} bytes")
    return found


def _too_large(code: Code, target: Target) -> str | None:
    """Why no block of the kernel can start on the target; Triton does not check it."""
    if code.shared > target.shared:
        return f"a block needs {code.shared} bytes of shared memory, {target} has {target.shared}"
    registers = code.num_warps * 32 * math.ceil(code.registers / 8) * 8  # in units of 8 per thread
    if registers > target.arch.registers:
        return f"a block needs {registers} registers, {target} has {target.arch.registers}"
    return None
