"""Many calls of one engine at changing sizes: does memory grow?

    python -m benchmarks.soak --calls 200000 [--device cuda]

There are more sizes than may have kernels, or CUDA graphs, of their own. Prints the time, and the memory of the process
and of the device, after a tenth of the calls and after all of them, and exits with 1 if memory grew by more than one
percent.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Annotated

import torch
import typer
from torch import nn

import torch_rtx
from torch_rtx.settings import CompilationSettings, RuntimeSettings

SIZES = 24
TOLERANCE = 1.01
app = typer.Typer(add_completion=False)


def host_bytes() -> int:
    """What the process has in memory now; where the system does not say that, the most that it had."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def module(device: str) -> torch_rtx.CompiledModule:
    """A small network for any batch size, whose kernels are compiled and measured while it is called."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64)).to(device).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    settings = CompilationSettings(targets="later") if device == "cuda" else None
    runtime = RuntimeSettings(specialization_strategy="lazy", specialized_shapes=8)
    return torch_rtx.compile(model, (torch.randn(4, 64, device=device),), None, shapes, settings, runtime)


@app.command()
def main(
    calls: Annotated[int, typer.Option(help="how many calls")] = 200_000,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Call, and compare memory."""
    made = module(device)
    inputs = [torch.randn(2 + size, 64, device=device) for size in range(SIZES)]
    measured: list[tuple[int, int]] = []
    start = time.perf_counter()
    for index in range(calls):
        made(inputs[(7 * index) % SIZES])
        if index + 1 in (calls // 10, calls):
            made.session.wait()
            if device == "cuda":
                torch.cuda.synchronize()
            measured.append((host_bytes(), torch.cuda.memory_allocated() if device == "cuda" else 0))
            host, used = measured[-1]
            memory = f"{host / 2**20:.1f} MiB of the host, {used / 2**20:.1f} MiB of the device"
            print(f"{index + 1:>9,} calls, {time.perf_counter() - start:.1f} s: {memory}")
    grown = any(after > TOLERANCE * before for before, after in zip(*measured, strict=True))
    sys.exit(int(grown))


if __name__ == "__main__":
    app()
