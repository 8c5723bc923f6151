"""The process that compiles kernels for a running program, so that its threads don't wait for the interpreter lock.

It reads requests from its input and writes answers to its output, both pickled: it talks to the process that started it
and to nobody else. Kernels come in ranks: those of rank 0 are expected to be the best that fit the target, those of
higher ranks are there to be measured.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import BinaryIO

from torch_rtx.errors import RtxError
from torch_rtx.ir import kernel_nodes
from torch_rtx.kerneltable import Candidate, Launch, Request, SplitCandidate, Variant, pack
from torch_rtx.lowering.kernels.aot import Built, Code, compile_kernels
from torch_rtx.lowering.kernels.generate import generate, library
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.split import split
from torch_rtx.targets import Target, arch_of

MAYBE = 0.75  # a split form is measured if it is expected to be this much faster: expectations may be wrong
NICENESS = 10  # the program that waits for nobody comes first


def build(request: Request) -> dict[str, Candidate]:
    """Per kernel the first configuration that fits, from the given one on; those that have none are left out.

    Raises:
        KernelError: see `compile_kernels`.
    """
    target = arch_of(request.sm).target
    found: dict[str, Candidate] = {}
    pending = {name: first for name, (_, first) in request.bodies.items()}
    while pending:
        made = {
            name: generate(request.bodies[name][0], name, target.arch.sm, config) for name, config in pending.items()
        }
        kernels = {name: kernel for name, kernel in made.items() if kernel is not None}
        built = compile_kernels((kernel, target) for kernel in kernels.values())
        for name, kernel in kernels.items():
            result = built[kernel, target]
            if result.problem is None:
                rival = library(request.bodies[name][0], target.arch.sm)
                found[name] = Candidate(*launch_of(kernel, result, target, rival), pending[name])
        pending = {name: pending[name] + 1 for name in kernels if name not in found}
    return found


def build_split(request: Request) -> dict[str, SplitCandidate]:
    """Per kernel its split body, if it has one that may be faster, and all kernels in it fit.

    Raises:
        KernelError: see `compile_kernels`.
    """
    sm = arch_of(request.sm).target.arch.sm
    divided = {name: split(body, name, sm, MAYBE) for name, (body, _) in request.bodies.items()}
    bodies = {name: body for name, body in divided.items() if body is not None}
    inside = {name: {node.op: node.body for node in kernel_nodes(body)} for name, body in bodies.items()}
    wanted = {op: (body, 0) for found in inside.values() for op, body in found.items() if body is not None}
    built = build(Request(wanted, request.sm))
    return {
        name: SplitCandidate(bodies[name], {op: built[op] for op in found})
        for name, found in inside.items()
        if found.keys() <= built.keys()
    }


def launch_of(kernel: Kernel, built: Built, target: Target, rival: str) -> tuple[Launch, dict[str, bytes]]:
    """How a kernel is launched on the target that it was built for, and its binaries.

    Args:
        rival: what the library call of the region is, see `Launch.library`.
    """
    binaries: dict[str, bytes] = {}

    def variant(code: Code) -> Variant:
        digest, stored = pack(code.ptx if target.ptx else code.cubin)
        binaries[digest] = stored
        return code.variant(digest)

    assert built.aligned is not None  # it fits
    generic = None if built.generic is None else variant(built.generic)
    aligned = variant(built.aligned)
    return Launch((target,), kernel.scalars, kernel.grid, kernel.wide, aligned, generic, rival), binaries


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more: with what `build` or `build_split` returns, or with the error that it
    raised."""
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        answer: dict[str, Candidate] | dict[str, SplitCandidate] | str
        try:
            answer = build_split(request) if request.split else build(request)
        except (RtxError, OSError) as error:
            answer = str(error)
        except Exception as error:  # a bug, which the other process logs
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """The process."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a compiler prints must not get between the answers
    serve(sys.stdin.buffer, pipe)
