"""What a model's kernels take to be compiled for one GPU at run time, and with a warm runtime cache. Needs no GPU.

    python -m benchmarks.jit [--models bert_base,resnet50] [--sm 90]

Cold: the process that compiles is started and asked for every region. Warm: the same regions, by a cache that was
opened anew, from its file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import torch_rtx
from benchmarks import models
from torch_rtx.cache.runtime import DeviceKey, RuntimeCache
from torch_rtx.ir import Graph, kernel_nodes
from torch_rtx.runtime.compile_client import COMPILE_CLIENT
from torch_rtx.runtime.region_keys import plain, region_key
from torch_rtx.runtime.tuning_db import TuningDatabase
from torch_rtx.settings import CompilationSettings

app = typer.Typer(add_completion=False)


def regions(name: str) -> dict[str, Graph]:
    """The bodies of a full-size model's kernels, by key."""
    model, args, kwargs = models.build(name, "full", dtype=torch.float16)
    settings = CompilationSettings(device="cuda", targets="later", reuse_cached_engines=False)
    graph = torch_rtx.compile(model, args, kwargs, settings=settings).engine.graph
    return {region_key(node.body): plain(node.body) for node in kernel_nodes(graph) if node.body is not None}


@app.command()
def main(
    of: Annotated[str, typer.Option("--models", help="names, with commas")] = "bert_base,resnet50",
    sm: Annotated[int, typer.Option(help="SM version")] = 90,
) -> None:
    """Compile, and load what was compiled."""
    device = DeviceKey("benchmark", sm, 13000, "benchmark")
    print(f"{'model':12} regions  cold s  warm ms  ratio")
    for name in of.split(","):
        wanted = {key: (body, 0) for key, body in regions(name).items()}
        with tempfile.TemporaryDirectory() as folder:
            spent = []
            for _ in range(2):
                start = time.perf_counter()
                cache = RuntimeCache(Path(folder) / "runtime.sqlite", device)
                found = TuningDatabase(sm, COMPILE_CLIENT, lambda cache=cache: cache).candidates(wanted)  # type: ignore[misc]
                spent.append(time.perf_counter() - start)
                assert found.keys() == wanted.keys()
                cache.close()
        COMPILE_CLIENT.close()
        cold, warm = spent
        print(f"{name:12} {len(wanted):7} {cold:7.2f} {1e3 * warm:8.1f} {cold / warm:6.0f}")


if __name__ == "__main__":
    app()
