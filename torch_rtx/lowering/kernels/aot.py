"""Compiles kernels for targets in parallel, without a GPU, and checks the result against the target's limits.

A kernel has up to two variants with one launch: `aligned`, for scalars that are multiples of 16, and `generic`, left
out if scalars always are. Both may assume 16-byte aligned pointers, which the launch guarantees, so that aligned rows
keep vector loads for any batch size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch_rtx.artefacts import NO_FILES, Artefacts
from torch_rtx.errors import KernelError
from torch_rtx.lowering.kernels.index import multiple
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.toolchain import KEPT, Code, Job, disassemble, lower, lower_to_ttir
from torch_rtx.lowering.kernels.turing import NoTensorCores
from torch_rtx.targets import ALIGNMENT, Target, lacks

MAX_SPILLS = 128  # bytes of spill stores per thread; spilling up to this beats a smaller tile
TENSOR_MEMORY = 512  # columns of a multiprocessor
Wanted = tuple[Kernel, Target]
Done = Code | NoTensorCores | KernelError  # the error: of a kernel that others wrote


@dataclass(frozen=True)
class Built:
    """The result of compiling a kernel for a target.

    Attributes:
        aligned, generic: the code of the variants; None if there is no such variant, or the kernel does not fit.
        problem: why the kernel does not fit the target; None if it does. A kernel that only spills has code as well.
    """

    aligned: Code | None
    generic: Code | None
    problem: str | None

    @property
    def codes(self) -> tuple[Code, ...]:
        """The code of all variants."""
        return tuple(code for code in (self.aligned, self.generic) if code is not None)

    @property
    def spills(self) -> int:
        """Bytes of spill stores per thread, of the variant with more."""
        return max((code.spills for code in self.codes), default=0)


class Compilations:
    """Compilations in threads, which begin as soon as a kernel is known. Equal code is compiled once.

    Args:
        workers: number of threads; None: one per core.
        elsewhere: compiles a job as `toolchain.lower` does; None: that does.
    """

    def __init__(self, workers: int | None = None, elsewhere: Callable[[Job], Code] | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers or len(cores()), "torch_rtx build")
        self._lower = elsewhere or lower
        self._futures: dict[Job, Future[Code]] = {}
        self._targets: dict[Kernel, list[Target]] = {}

    def __enter__(self) -> Compilations:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, kernel: Kernel, target: Target) -> None:
        """Compile a kernel before all are known that share its code. Nothing is wasted where the oldest target of each
        generation comes first."""
        if _missing(kernel, target) is None:
            targets = self._targets.setdefault(kernel, [])
            targets.append(target)
            for job in _jobs(kernel, target, targets, NO_FILES):
                self._future(job)

    def run(self, jobs: Collection[Job], progress: Callable[[int, int], object] | None) -> Mapping[Job, Done]:
        """The results of jobs; see `compile_kernels`."""
        done: dict[Job, Done] = {}
        futures = {self._future(job): job for job in jobs}
        for future in as_completed(futures):
            job, error = futures[future], future.exception()
            if error is None:
                done[job] = future.result()
            elif isinstance(error, NoTensorCores) or (isinstance(error, KernelError) and job.foreign is not None):
                done[job] = error
            else:
                raise error
            if progress is not None:
                progress(len(done), len(futures))
        return done

    def first(self, wanted: Mapping[str, Collection[Kernel]], target: Target) -> list[str]:
        """The names of those whose kernels have been compiled, or were refused. Waits until there is one."""
        futures = {
            name: [self._future(job) for kernel in kernels for job in _jobs_of(kernel, target)]
            for name, kernels in wanted.items()
        }
        while not (found := [name for name, each in futures.items() if all(future.done() for future in each)]):
            wait([future for each in futures.values() for future in each if not future.done()], None, FIRST_COMPLETED)
        return found

    @property
    def waiting(self) -> int:
        """How many compilations have not ended."""
        return sum(not future.done() for future in self._futures.values())

    def forget(self) -> None:
        """Drop errors and the oldest results. The others are asked for soon: a cache has them as well, but whatever
        else waits to be compiled would come first."""
        done = [job for job, future in self._futures.items() if future.done()]
        for place, job in enumerate(done, KEPT - len(done)):
            if place < 0 or self._futures[job].exception() is not None:
                del self._futures[job]
        self._targets.clear()

    def _future(self, job: Job) -> Future[Code]:
        if job not in self._futures:
            self._futures[job] = self._pool.submit(self._lower, job)
        return self._futures[job]


def compile_kernels(
    wanted: Iterable[Wanted],
    progress: Callable[[int, int], object] | None = None,
    artefacts: Mapping[Wanted, Artefacts] | None = None,
    compilations: Compilations | None = None,
) -> dict[Wanted, Built]:
    """Compile kernels, each for a target. Equal code is compiled once per process.

    Args:
        progress: called in this thread with the number of finished compilations and of all.
        artefacts: where stages are written and overridden, also if the code is cached.
        compilations: which run them, and may have begun; None: new ones.

    Raises:
        KernelError: Triton can't be used, it or ptxas rejects a kernel, or an override can't be read. A kernel that
            does not fit is not an error; see `Built.problem`.
    """
    pairs = list(dict.fromkeys(wanted))
    files = artefacts or {}
    targets: dict[Kernel, list[Target]] = {}
    for kernel, target in pairs:
        targets.setdefault(kernel, []).append(target)
    jobs = {
        (kernel, target): _jobs(kernel, target, targets[kernel], files.get((kernel, target), NO_FILES))
        for kernel, target in pairs
        if _missing(kernel, target) is None
    }
    shown = [pair for pair in jobs if pair in files]
    for pair in shown:  # before it is compiled: a compiler may reject it
        if jobs[pair][0].source:
            files[pair].write("py", jobs[pair][0].source)
    unique = dict.fromkeys(job for both in jobs.values() for job in both)
    with Compilations() if compilations is None else nullcontext(compilations) as running:
        done = running.run(unique, progress)
    for pair in shown:
        _write(files[pair], jobs[pair], done)
    return {pair: _built(*pair, [done[job] for job in jobs.get(pair, ())]) for pair in pairs}


def _missing(kernel: Kernel, target: Target) -> str | None:
    """A dtype of the kernel that the target lacks; None if there is none."""
    return next((dtype for dtype in kernel.pointers if lacks(target.arch, dtype)), None)


def cores() -> Collection[int]:
    """The CPU cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _code_sm(kernel: Kernel, target: Target, targets: Iterable[Target]) -> int:
    """The SM version whose code `target` runs: the oldest of `targets` in its generation.

    Code for sm_80 also runs on sm_86 and sm_89. Code for these differs little, so one shared binary saves two thirds of
    the size.
    """
    if target.ptx or target.arch.exact:
        return target.arch.sm
    of_generation = [t.sm for t in targets if not t.ptx and t.sm // 10 == target.sm // 10]
    return min(sm for sm in of_generation if _missing(kernel, Target(sm)) is None)


def _jobs(kernel: Kernel, target: Target, targets: Iterable[Target], artefacts: Artefacts) -> tuple[Job, ...]:
    """The jobs of the aligned variant and, if there is one, the generic variant, with their overrides.

    Args:
        targets: all of the kernel.
    """
    sm, portable = _code_sm(kernel, target, targets), target.ptx and target.arch.exact
    always = tuple(multiple(dim) % ALIGNMENT == 0 for dim in kernel.scalars)
    cases = dict.fromkeys(((True,) * len(always), always))
    wide, warps, stages = kernel.wide, kernel.num_warps, kernel.num_stages
    if kernel.foreign is not None:
        first = Job(kernel.name, "", (), (), wide, warps, stages, sm, portable=portable, foreign=kernel.foreign)
        made = (replace(first, **{kernel.foreign.form: text}) for text in kernel.foreign.texts)  # type: ignore[arg-type]
        return tuple(replace(job, scalars=case) for case, job in zip(cases, made, strict=False))
    edited = artefacts.read("py")
    source = kernel.source if edited is None else edited
    return tuple(
        Job(kernel.name, source, kernel.pointers, case, wide, warps, stages, sm, kernel.trigger_early, portable, *texts)
        for case, texts in zip(cases, ((a.read("ttir"), a.read("ptx")) for a in _cases(artefacts)), strict=False)
    )


def _jobs_of(kernel: Kernel, target: Target) -> tuple[Job, ...]:
    """The jobs of a kernel for one target; none if the target lacks a dtype."""
    return () if _missing(kernel, target) is not None else _jobs(kernel, target, [target], NO_FILES)


def _cases(artefacts: Artefacts) -> tuple[Artefacts, Artefacts]:
    """The files of the aligned and the generic variant."""
    return artefacts, artefacts.of("generic")


def _write(artefacts: Artefacts, jobs: Iterable[Job], done: Mapping[Job, Done]) -> None:
    """Write the stages after the source."""
    for job, files in zip(jobs, _cases(artefacts), strict=False):
        code = done[job]
        if job.source or job.ttir is not None:
            files.write("ttir", lower_to_ttir(job))
        if isinstance(code, Code):
            files.write("ptx", code.ptx.decode())
            sass = disassemble(code.cubin)
            if sass is not None:
                files.write("sass", sass)


def _built(kernel: Kernel, target: Target, results: list[Done]) -> Built:
    codes = [result for result in results if isinstance(result, Code)]
    if not results:
        return Built(None, None, f"{target} lacks {_missing(kernel, target)}")
    for result in results:
        if isinstance(result, NoTensorCores):
            return Built(None, None, f"{target} has no instruction like {result}")
        if isinstance(result, KernelError):
            return Built(None, None, result.message)
    problem = next((text for code in codes if (text := _too_large(code, target))), None)
    if problem is not None:
        return Built(None, None, problem)
    found = Built(codes[0], codes[1] if len(codes) > 1 else None, None)
    if found.spills > MAX_SPILLS:
        return Built(found.aligned, found.generic, f"each thread spills {found.spills} bytes")
    return found


def _too_large(code: Code, target: Target) -> str | None:
    """Why the target can't launch a block of the kernel, which Triton does not check; None if it can."""
    if code.shared > target.shared:
        return f"a block needs {code.shared} bytes of shared memory, {target} has {target.shared}"
    registers = code.num_warps * 32 * math.ceil(code.registers / 8) * 8  # in units of 8 per thread
    if registers > target.arch.registers:
        return f"a block needs {registers} registers, {target} has {target.arch.registers}"
    if code.tensor_memory > TENSOR_MEMORY:  # Triton makes a kernel of it that traps
        return f"a block needs {code.tensor_memory} columns of tensor memory, {target} has {TENSOR_MEMORY}"
    return None
