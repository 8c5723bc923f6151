"""What `make sanitize` runs below compute-sanitizer: the kernels of small models, launched once each, and checked.

    compute-sanitizer --tool racecheck python -m tests.sanitized [--only inference|training] [MODEL ...]

No pytest, no CUDA graphs and no other process: the sanitizer sees every launch, and does not survive pytest's workers.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator, Sequence

import torch

import torch_rtx
from benchmarks import models, training
from benchmarks.cases import Job, Workload
from benchmarks.numerics import assert_right, in_float64
from benchmarks.suites import SUITES
from torch_rtx.backend.entry import rtx
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.session import Session
from torch_rtx.settings import CompilationSettings, RuntimeSettings

TACTICS = ("kernel", "split")  # every kernel whole, and every kernel split
TARGET = {"targets": "current"}
ONCE = {"specialization_strategy": "none", "cuda_graph_strategy": "disabled"}


def inference(name: str, device: str) -> Iterator[str]:
    """Call an engine of a model in half precision; what ran."""
    model, args, kwargs = models.build(name, "small", dtype=torch.float16, device=device)
    exact = in_float64(model, args, kwargs)
    with torch.no_grad():
        eager = copy.deepcopy(model)(*args, **kwargs)
    for tactics in TACTICS:
        target, settings = CompilationSettings(**TARGET), RuntimeSettings(tactics=tactics, **ONCE)
        module = torch_rtx.compile(copy.deepcopy(model), args, kwargs, None, target, settings)
        worst = assert_right(module(*args, **kwargs), eager, exact)
        kernels = len(launched(module.session.tactics))
        yield f"{name} {tactics}: {kernels} kernels, {worst:.2f} of the error allowed"


def trained(name: str, device: str) -> Iterator[str]:
    """A training step of a model, in bfloat16 autocast on a GPU; what ran. Nothing for models that are not trained."""
    workload = Workload(name, size="small")
    if SUITES["train"].why_not("rtx", workload, device) is not None:
        return
    with training.set_up(Job("train", workload, ("rtx",), device, rounds=1)) as lesson:
        for tactics in TACTICS:
            torch._dynamo.reset()
            before = loaded()
            own = copy.deepcopy(lesson.model)
            options = {"tactics": tactics, **TARGET, **ONCE}
            lesson.check(lesson.gradients(torch.compile(own, backend=rtx, fullgraph=True, options=options), own))
            yield f"{name} {tactics}, training: {len(loaded() - before)} kernels, gradients are right"


def loaded() -> set[int]:
    """The kernels of all sessions that are alive, each by an identity of its own."""
    gc.collect()
    sessions = [found for found in gc.get_objects() if type(found) is Session]
    return {id(kernel) for session in sessions for kernel in launched(session.tactics).values()}


KINDS: dict[str, Callable[[str, str], Iterator[str]]] = {"inference": inference, "training": trained}


def main(arguments: Sequence[str] | None = None, device: str = "cuda") -> None:
    """Compile and run models, all of the zoo unless some are named, for this GPU."""
    parser = argparse.ArgumentParser("python -m tests.sanitized")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("--only", choices=tuple(KINDS), help="default: both")
    options = parser.parse_args(arguments)
    for name in options.models or models.names():
        for kind, run in KINDS.items():
            if options.only in (None, kind):
                for line in run(name, device):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
