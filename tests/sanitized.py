"""What `make sanitize` runs below compute-sanitizer: the kernels of small models, launched once each, and checked.

    compute-sanitizer --tool racecheck python -m tests.sanitized [MODEL ...]

No pytest, no CUDA graphs and no other process: the sanitizer sees every launch, and does not survive pytest's workers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence

import torch

import torch_rtx
from benchmarks import models
from benchmarks.numerics import assert_right, in_float64
from torch_rtx.runtime.inline import launched
from torch_rtx.settings import CompilationSettings, RuntimeSettings

TACTICS = ("kernel", "split")


def main(names: Sequence[str]) -> None:
    """Compile and run the models `names` (or all) for this GPU, with every kernel whole and with every kernel split."""
    for name in names or models.names():
        model, args, kwargs = models.build(name, "small", dtype=torch.float16, device="cuda")
        exact = in_float64(model, args, kwargs)
        with torch.no_grad():
            eager = copy.deepcopy(model)(*args, **kwargs)
        for tactics in TACTICS:
            settings = RuntimeSettings(tactics=tactics, specialization_strategy="none", cuda_graph_strategy="disabled")
            target = CompilationSettings(targets="current")
            module = torch_rtx.compile(copy.deepcopy(model), args, kwargs, None, target, settings)
            worst = assert_right(module(*args, **kwargs), eager, exact)
            print(
                f"{name} {tactics}: {len(launched(module.session.tactics))} kernels, {worst:.2f} of the error allowed",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
