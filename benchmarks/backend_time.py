"""Seconds spent inside the backend, per model: torch_rtx against `aot_eager`, interleaved in one process.

    python -m benchmarks.backend_time [--size full] [--repeats 3] [--out results.json] [MODEL ...]

What is timed is the call of the backend by Dynamo: AOTAutograd's capture, and for torch_rtx all of lowering. Dynamo's
own tracing is the same for both and is left out. Engines are built anew each time: see `benchmarks.cache_warm`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from benchmarks import models

LIMIT = 1.3
COLD = {"cache_built_engines": False, "reuse_cached_engines": False}


def seconds_inside(backend: str, name: str, size: models.Size) -> float:
    """Seconds of one cold compilation of the model with `backend`, inside the backend."""
    inner, spent = lookup_backend(backend), 0.0
    options = {"options": COLD} if backend == "rtx" else {}

    def timed(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal spent
        gc.collect()
        start = time.perf_counter()
        compiled = inner(gm, example_inputs, **options)
        spent += time.perf_counter() - start
        return compiled

    torch._dynamo.reset()
    model, args, kwargs = models.build(name, size)
    with torch.no_grad():
        torch.compile(model, backend=timed)(*args, **kwargs)
    return spent


def main() -> None:
    """Print the table; exit status 1 if a model is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=models.names())
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for backend in ("aot_eager", "rtx"):
        seconds_inside(backend, "bert_base", "small")  # imports and first-use costs
    rows = {}
    print(f"{'model':18}{'aot_eager s':>12}{'rtx s':>8}{'ratio':>7}")
    for name in options.models:
        pairs = [
            (seconds_inside("aot_eager", name, options.size), seconds_inside("rtx", name, options.size))
            for _ in range(options.repeats)
        ]
        peer, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(ours / peer for peer, ours in pairs)
        rows[name] = {"aot_eager_s": peer, "rtx_s": ours, "ratio": ratio}
        print(f"{name:18}{peer:12.3f}{ours:8.3f}{ratio:7.2f}", flush=True)
    print(f"worst ratio {max(row['ratio'] for row in rows.values()):.2f}, limit {LIMIT}")
    if options.out:
        record = {"torch": torch.__version__, "size": options.size, "repeats": options.repeats, "models": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
