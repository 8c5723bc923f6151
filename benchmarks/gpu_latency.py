"""Latency on the GPU: eager, torch.compile(backend="rtx") and an exported engine, all with CUDA graphs where ours.

    python -m benchmarks.gpu_latency [--out results.json] [MODEL ...]

The engine goes the way of a deployment: built, saved, loaded and refitted. Inputs rotate among four sets. Medians of
device time (events around each call, after a warm-up), the repeats of all three interleaved; and the host time of a
replayed call of the engine, beside that of a bare `CUDAGraph.replay()` of the same graph.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_rtx
from benchmarks import models
from torch_rtx.backend.entry import rtx

BF16 = {"llama", "qwen3", "t5", "llama_prefill", "llama_decode"}
HOST_LIMIT_US = 25
Call = Callable[[], Any]


def device_ms(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Milliseconds per call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for step in range(repeats + 5):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            if step >= 5:  # the first calls compile and capture
                times[name].append(start.elapsed_time(end))
    return times


def host_us(call: Call, repeats: int = 300) -> float:
    """Median microseconds until `call` returns to the host, the device idle before it."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def deployed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch_rtx.CompiledModule:
    """The model as an application gets it: from a weight-stripped file, with weights of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.rtx"
        torch_rtx.save(torch_rtx.compile(model, args, kwargs), path)
        loaded = torch_rtx.load(path)
    loaded.refit(model)
    return loaded


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row: median milliseconds per way to run the model, and what they are relative to eager."""
    dtype = torch.bfloat16 if name in BF16 else torch.float16
    model, args, kwargs = models.build(name, "full", dtype=dtype, device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend=rtx, fullgraph=True)
    exported = deployed(model, args, kwargs)
    sets = itertools.cycle([models.inputs(name, "full", dtype=dtype, device="cuda", seed=seed) for seed in range(4)])

    def on_next_inputs(run: Callable[..., Any]) -> Call:
        def call() -> Any:
            args, kwargs = next(sets)
            return run(*args, **kwargs)

        return call

    calls = {
        key: on_next_inputs(run) for key, run in (("eager", model), ("compiled", compiled), ("exported", exported))
    }
    with torch.no_grad():
        times = device_ms(calls, repeats)
        row: dict[str, Any] = {f"{key}_ms": statistics.median(values) for key, values in times.items()}
        row["dtype"] = str(dtype)
        row["ratio"] = max(row["compiled_ms"], row["exported_ms"]) / row["eager_ms"]
        pool = exported.session.pool
        captured = list(pool.captured.values()) if pool else []
        row["graphs"] = len(captured)
        if captured:
            bare = captured[0].graph.replay
            row["host_us"] = host_us(calls["exported"])
            row["bare_replay_us"] = host_us(bare)
            row["eager_host_us"] = host_us(calls["eager"], 50)
    return row


def main() -> None:
    """Print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=models.names())
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'model':18}{'eager ms':>10}{'compiled':>10}{'exported':>10}{'ratio':>7}{'host us':>9}{'bare':>7}")
    for name in options.models:
        row = rows[name] = measure(name, options.repeats)
        host = f"{row.get('host_us', float('nan')):9.1f}{row.get('bare_replay_us', float('nan')):7.1f}"
        times = "".join(f"{row[key]:10.3f}" for key in ("eager_ms", "compiled_ms", "exported_ms"))
        print(f"{name:18}{times}{row['ratio']:7.2f}{host}", flush=True)
        torch.cuda.empty_cache()
    print(f"slowest against eager: {max(row['ratio'] for row in rows.values()):.2f}")
    if "bert_base" in rows:
        over = rows["bert_base"]["host_us"] - rows["bert_base"]["bare_replay_us"]
        print(f"bert_base: {over:.1f} us of host time over a bare replay, limit {HOST_LIMIT_US}")
    if options.out:
        versions = {"torch": torch.__version__, "torch_rtx": torch_rtx.__version__, "cuda": torch.version.cuda}
        record = {"device": torch.cuda.get_device_name(), **versions, "repeats": options.repeats, "models": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
