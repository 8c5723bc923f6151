"""The compile worker: a process that compiles kernels for a running program, without contending for its GIL.

Requests on stdin and answers on stdout are pickled: the only peer is the process that started it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import count, islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, NoReturn

from torch_rtx.artefacts import NO_FILES, Artefacts
from torch_rtx.chips import Chip
from torch_rtx.errors import KernelError, RtxError, Unsupported
from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels import build as kernel_build
from torch_rtx.lowering.kernels.aot import Compilations, cores
from torch_rtx.lowering.kernels.compile_forks import MOST, THREADS, Forks
from torch_rtx.lowering.kernels.generate import tactics
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import Exact
from torch_rtx.lowering.kernels.toolchain import KEPT, versions
from torch_rtx.tactics import Candidate, Tactic
from torch_rtx.targets import EXACT, Arch, Float32, Target, arch_of

NICENESS = 10  # the running program has priority
BEGUN = KEPT // 4  # kernels at most that wait to be compiled, or are, before more are begun than are asked for
SOME = "some"  # what a request asks for, else "build"
Bodies = Mapping[str, tuple[Graph | Sequence[Tactic[Kernel]], int]]
Later = Sequence[tuple[str, Graph, int]]  # names, bodies and ranks


def build(
    bodies: Bodies,
    sm: int,
    artefacts: Artefacts = NO_FILES,
    chip: Chip | None = None,
    float32: Float32 = EXACT,
    *,
    running: Compilations | None = None,
) -> dict[str, Candidate]:
    """Per region the first tactic from a rank on that fits the GPU; regions without one are left out.

    Args:
        bodies: by name, with the rank of the first tactic to try. Of a kernel that others wrote: its tactics.
        sm: the SM version of the GPU.
        artefacts: where the stages of kernels are written and overridden.
        chip: the GPU; None: what stands for its SM version.
        float32: how exact products of float32 have to be.
        running: compilations that outlive this request; None: new ones.

    Raises:
        KernelError: see `compile_kernels`.
    """
    target, arch = _target(sm, chip, float32)
    for name, (body, first) in bodies.items() if artefacts.dump is not None else ():
        if first == 0 and isinstance(body, Graph):
            offers = sorted(_ranked(body, name, arch, first), key=lambda one: one[0])
            kernel_build.show_offers(artefacts, name, body, target, offers)
    found = {}
    wanted = ((name, _ranked(body, name, arch, first), target) for name, (body, first) in bodies.items())
    chosen, tried = kernel_build.build(wanted, artefacts=artefacts, compilations=running)
    for name, results in tried.items():
        kernel_build.show_results(artefacts, name, target, results)
    for name, result in chosen.items():
        binaries = kernel_build.Binaries()
        found[name] = Candidate(binaries.tactic(result), result.rank, binaries.stored)
    return found


def _ranked(body: Graph | Sequence[Tactic[Kernel]], name: str, arch: Arch, first: int) -> Iterator[kernel_build.Ranked]:
    """The tactic of rank `first`, then the later ones of its kind, then all others."""
    later = _in_order(body, name, arch, first)
    for rank, tactic in later:
        yield rank, tactic
        if isinstance(body, Graph):
            yield from sorted(later, key=lambda one: one[1].kind != tactic.kind)


def _in_order(
    body: Graph | Sequence[Tactic[Kernel]], name: str, arch: Arch, first: int
) -> Iterator[kernel_build.Ranked]:
    """The tactics from rank `first` on."""
    if isinstance(body, Graph):
        return _offers(Exact(body), name, arch).since(first)
    return islice(enumerate(body), first, None)


class _Offers:
    """The tactics of a region, generated as far as they were asked for: those of one rank after the other are."""

    def __init__(self, source: Iterable[Tactic[Kernel]]) -> None:
        self._source, self._found = iter(source), list[Tactic[Kernel]]()

    def since(self, first: int) -> Iterator[kernel_build.Ranked]:
        """Those from a rank on; none where no kernel computes the region."""
        for rank in count(first):
            with suppress(Unsupported):
                self._found.extend(islice(self._source, max(rank + 1 - len(self._found), 0)))
            if rank >= len(self._found):
                return
            yield rank, self._found[rank]


@lru_cache(maxsize=KEPT)
def _offers(key: Exact, name: str, arch: Arch) -> _Offers:
    return _Offers(tactics(key.graph, name, arch))


def some(
    bodies: Bodies,
    sm: int,
    artefacts: Artefacts = NO_FILES,
    chip: Chip | None = None,
    float32: Float32 = EXACT,
    later: Later = (),
    *,
    running: Compilations,
) -> dict[str, Candidate | None]:
    """What `build` returns, see there, of those regions that are ready first, at least one; None: no tactic fits. The
    others go on to compile, then those of `later`, which are asked for soon."""
    if not artefacts:  # which may override what is compiled
        bodies = _first(bodies, later, *_target(sm, chip, float32), running)
    found = build(bodies, sm, artefacts, chip, float32, running=running)
    return {name: found.get(name) for name in bodies}


def _first(bodies: Bodies, later: Later, target: Target, arch: Arch, running: Compilations) -> Bodies:
    """Those of `bodies` whose tactic was compiled first."""

    def begun(name: str, body: Graph | Sequence[Tactic[Kernel]], rank: int) -> Sequence[Kernel]:
        _, tactic = next(_in_order(body, name, arch, rank), (rank, None))
        kernels = () if tactic is None else tuple(tactic.kernels.values())
        for kernel in kernels:
            running.begin(kernel, target)
        return kernels

    heads = {name: begun(name, body, rank) for name, (body, rank) in bodies.items()}
    for one in later:
        if running.waiting >= BEGUN:
            break
        begun(*one)
    return {name: bodies[name] for name in running.first(heads, target)} if bodies else {}


def _target(sm: int, chip: Chip | None, float32: Float32) -> tuple[Target, Arch]:
    """What is compiled for, and what tactics are ranked by."""
    target = arch_of(sm).target
    return target, replace(target.arch, chip=chip or target.arch.chip, float32=float32)


def serve(requests: BinaryIO, answers: BinaryIO, running: Compilations) -> NoReturn:
    """Answer requests to `build` and `some`: with the result, or the text of the error. When their stream ends, the
    peer has ended, in whatever way: so does this process, in the middle of a request, too."""
    received: SimpleQueue[Any] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                received.put(pickle.load(requests))
        except EOFError:
            pass
        finally:
            _end()

    Thread(target=receive, daemon=True).start()
    while True:
        wanted, request = received.get()
        answer: Mapping[str, Candidate | None] | str
        try:
            answer = (some if wanted == SOME else build)(*request, running=running)
        except (RtxError, OSError) as error:
            answer = str(error)
        except Exception as error:  # a bug: the peer logs it
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()
        running.forget()


def _end() -> NoReturn:
    """End this process at once, and the assemblers that it has started, which are in its group."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    """The entry point of the process."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print must not mix with answers
    serve(sys.stdin.buffer, pipe, _compilations((0, pipe.fileno())))


def _compilations(inherited: Sequence[int]) -> Compilations:
    """Compilations in forks if there are many cores, see `Forks`, else in threads."""
    count = min(len(cores()), MOST)
    if count <= THREADS or not hasattr(os, "fork"):
        return Compilations()
    with suppress(KernelError):  # Triton can't be used, as each request is told
        versions()  # forks have it then
    return Compilations(count, Forks(count, inherited, _end).lower)
