"""A call whose weights are streamed from host memory, against the resident call and the copies alone.

    python -m benchmarks.streaming [llama-b1-l512] [--budget 50%]

Prints milliseconds of each, and the ratio to whichever is longer, the resident call or the copies.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_model

import torch_rtx
from benchmarks import models
from benchmarks.cases import workloads
from torch_rtx.settings import RuntimeSettings

PIECE = 64 << 20  # bytes of a copy that the bandwidth is measured with
app = typer.Typer(add_completion=False)


def seconds(call: Callable[[], object], count: int) -> float:
    """Seconds of a call in a row of them."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def bandwidth() -> float:
    """Bytes per second from pinned host memory to the device."""
    host, target = torch.empty(PIECE, dtype=torch.uint8).pin_memory(), torch.empty(PIECE, dtype=torch.uint8).cuda()
    return PIECE / seconds(lambda: target.copy_(host, non_blocking=True), 20)


@app.command()
def main(
    workload: Annotated[
        str, typer.Argument(help="a model at one shape, see `python -m benchmarks list`")
    ] = "llama-b1-l512",
    budget: Annotated[str, typer.Option(help="device memory for weights: bytes or a share")] = "50%",
) -> None:
    """Measure."""
    w = workloads([workload], "full", "cuda")[0]
    model, args, kwargs = models.build(
        w.model, w.size, batch=w.batch, length=w.length, dtype=getattr(torch, w.dtype), device="cuda"
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        engine, weights = Path(folder) / "model.rtx", Path(folder) / "model.safetensors"
        torch_rtx.save(torch_rtx.compile(model, args, kwargs), engine)
        save_model(model, str(weights))
        del model
        times, streamed = [], 0
        for share in (None, budget):
            given = RuntimeSettings(weight_streaming_budget=share)
            module = torch_rtx.load(engine, weights, "cuda", given, trust_binaries=True)
            for _ in range(3):
                module(*args, **kwargs)
                module.session.wait()
            times.append(seconds(lambda module=module: module(*args, **kwargs), 20))  # type: ignore[misc]
            if module.session.streamer is not None:
                streamed = module.session.streamer.summary.streamed
                print(module.session.streamer.summary)
    rate = bandwidth()
    copies, (resident, with_copies) = streamed / rate, times
    print(f"resident {1e3 * resident:.2f} ms, copies {1e3 * copies:.2f} ms at {rate / 1e9:.1f} GB/s")
    print(f"{budget}: {1e3 * with_copies:.2f} ms, {with_copies / max(resident, copies):.3f} of the longer one")


if __name__ == "__main__":
    app()
