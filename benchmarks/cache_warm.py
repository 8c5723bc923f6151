"""Seconds inside the backend of a cold and of a warm `torch.compile(backend="rtx")`, each in a process of its own.

    python -m benchmarks.cache_warm [--size full] [--repeats 3] [--out results.json] [MODEL ...]
    python -m benchmarks.cache_warm --engines [MODEL ...]       of engines: seconds to build, to import and to load one

What is timed is the call of the backend by Dynamo, as in `benchmarks.backend_time`: what remains of the first call of a
model is Dynamo's own tracing. A cold process finds an empty cache, the warm one after it what the cold one has built.
The results of both must be the same bit for bit.

An engine is built for a GPU, which need not be there, without kernels and weights, and loaded on the CPU as an
untrusted file. Its seconds are those of the processor, which others on the machine change little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT, LIMIT_S = 0.15, 0.3
LOAD_LIMIT_S = 1.0  # of imports after PyTorch's own, and loading


def inside(name: str, size: str, folder: str) -> dict[str, Any]:
    """In this process: seconds inside the backend for one compilation, and a digest of the results."""
    import hashlib
    import time
    from collections.abc import Callable, Sequence

    import torch
    from torch._dynamo.backends.registry import lookup_backend

    from benchmarks import models

    rtx, spent = lookup_backend("rtx"), 0.0

    def timed(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal spent
        start = time.perf_counter()
        compiled = rtx(gm, example_inputs, options={"engine_cache_dir": folder})
        spent += time.perf_counter() - start
        return compiled

    model, args, kwargs = models.build(name, size)  # type: ignore[arg-type]
    with torch.no_grad():
        result = torch.compile(model, backend=timed)(*args, **kwargs)
    digest = hashlib.sha256()
    for leaf in torch.utils._pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result):
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.contiguous().view(torch.uint8).numpy().tobytes())
    return {"seconds": spent, "digest": digest.hexdigest()}


def measure(name: str, size: str = "full", repeats: int = 3) -> dict[str, float]:
    """Medians of the seconds inside the backend, cold and warm, and of the ratio of warm to cold."""
    pairs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.cache_warm", "--inside", folder, "--size", size, name]
            runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(2)]
        assert runs[0]["digest"] == runs[1]["digest"], f"{name}: a hit computes something else"
        pairs.append((runs[0]["seconds"], runs[1]["seconds"]))
    cold, warm = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"cold_s": cold, "warm_s": warm, "ratio": statistics.median(w / c for c, w in pairs)}


def built(name: str, size: str, path: str) -> dict[str, float]:
    """In this process: the seconds in which an engine is built and saved."""
    import time

    import torch

    import torch_rtx
    from benchmarks import models
    from benchmarks.cases import half

    options: dict[str, Any] = {"dtype": getattr(torch, half(name))}
    model = models.without_weights(name, size, **options)  # type: ignore[arg-type]
    args, kwargs = models.inputs(name, size, **options)  # type: ignore[arg-type]
    caches = {"cache_built_engines": False, "reuse_cached_engines": False}
    settings = torch_rtx.CompilationSettings(device="cuda", targets="later", **caches)
    start = time.process_time()
    with torch.no_grad():
        torch_rtx.save(torch_rtx.compile(model, args, kwargs, settings=settings), path)
    return {"build_s": time.process_time() - start}


def loaded(path: str) -> dict[str, float]:
    """In this process: the seconds in which torch_rtx is imported, after PyTorch, and an engine loaded."""
    import time

    import torch  # noqa: F401

    start = time.process_time()
    import torch_rtx

    load = torch_rtx.load
    imported = time.process_time()
    load(path, device="cpu")
    return {"import_s": imported - start, "load_s": time.process_time() - imported}


def measure_engine(name: str, size: str = "full", repeats: int = 3) -> dict[str, float]:
    """Seconds of `built`, and medians of those of `loaded`."""

    def run(*arguments: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.cache_warm", "--size", size, *arguments]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        found: dict[str, float] = json.loads(lines[-1])
        return found

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.rtx"
        made = run("--build", path, name)
        runs = [run("--load", path) for _ in range(repeats)]
    return made | {key: statistics.median(one[key] for one in runs) for key in runs[0]}


def engines(names: list[str], size: str, repeats: int) -> bool:
    """Print the table of engines; whether all are within the limit."""
    print(f"{'model':18}{'build s':>9}{'import s':>10}{'load s':>9}")
    within = True
    for name in names:
        row = measure_engine(name, size, repeats)
        within &= row["import_s"] + row["load_s"] <= LOAD_LIMIT_S
        print(f"{name:18}{row['build_s']:9.2f}{row['import_s']:10.3f}{row['load_s']:9.3f}", flush=True)
    print(f"limit: import and load {LOAD_LIMIT_S} s")
    return within


def main() -> None:
    """Print the table; exit status 1 if a model is over the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["bert_base"])
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engines", action="store_true")
    for hidden in ("inside", "build", "load"):
        parser.add_argument(f"--{hidden}", metavar="PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build or options.load:
        print(
            json.dumps(built(options.models[0], options.size, options.build) if options.build else loaded(options.load))
        )
        return
    if options.engines:
        sys.exit(not engines(options.models, options.size, options.repeats))
    if options.inside:
        print(json.dumps(inside(options.models[0], options.size, options.inside)))
        return
    rows = {}
    print(f"{'model':18}{'cold s':>9}{'warm s':>9}{'ratio':>8}")
    for name in options.models:
        row = rows[name] = measure(name, options.size, options.repeats)
        print(f"{name:18}{row['cold_s']:9.3f}{row['warm_s']:9.3f}{row['ratio']:8.3f}", flush=True)
    print(f"limits: ratio {LIMIT}, warm {LIMIT_S} s")
    if options.out:
        import torch

        record = {"torch": torch.__version__, "size": options.size, "repeats": options.repeats, "models": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if any(row["ratio"] > LIMIT or row["warm_s"] > LIMIT_S for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
