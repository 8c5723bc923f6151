"""Milliseconds that the key of an engine takes, against Inductor's `compiled_fx_graph_hash`, on the same graphs.

    python -m benchmarks.cache_key [--repeats 15] [--out results.json] [MODEL ...]

Both keys are taken of the graph that AOTAutograd makes for inference, in turn, in one process; the first of each is
left out. Weights are random, and what is compiled is never run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext
from torch._inductor.codecache import compiled_fx_graph_hash

from benchmarks import models
from torch_rtx.backend.capture import capture
from torch_rtx.backend.compiler import device_of
from torch_rtx.backend.fx_hash import graph_key
from torch_rtx.lowering.from_fx import Role
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.settings import CompilationSettings

LIMIT = 10.0
MODELS = ("resnet50", "gpt2", "sam2")


class Done(Exception):
    """Ends the compilation as soon as the keys are measured."""


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the zoo at its published size, or SAM 2 (Hiera tiny) with one point on one image."""
    if name != "sam2":
        return models.build(name, "full")
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(0)
    model = Sam2Model(Sam2Config()).eval()
    size = model.config.vision_config.backbone_config.image_size
    inputs = {
        "pixel_values": torch.randn(1, 3, *size),
        "input_points": torch.tensor([[[[100.0, 200.0]]]]),
        "input_labels": torch.ones(1, 1, 1, dtype=torch.int64),
    }
    return model, (), inputs


def measure(name: str, repeats: int = 15) -> dict[str, float]:
    """Nodes of the graph, milliseconds of both keys (medians), and the median of the ratios of neighbours."""
    found: dict[str, float] = {}

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        context = TracingContext.get()
        static = context.fw_metadata.static_input_indices if context.fw_metadata else []
        kinds = ["parameter" if index in static else "input" for index in range(len(example_inputs))]
        roles = [Role(kind, f"x{index}") for index, kind in enumerate(kinds)]
        settings = CompilationSettings()

        def ours() -> None:
            graph_key(gm, roles, settings, Symbols(device_of(gm)))

        def theirs() -> None:
            compiled_fx_graph_hash(gm, example_inputs, {"static_input_idxs": static}, [])

        pairs = [(_milliseconds(ours), _milliseconds(theirs)) for _ in range(repeats + 1)][1:]
        mine, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        found.update(nodes=len(gm.graph.nodes), rtx_ms=mine, inductor_ms=peer, ratio=ratio)
        raise Done

    torch._dynamo.reset()
    model, args, kwargs = build(name)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(gm, example_inputs, compiler, compiler)

    with torch.no_grad(), suppress(BackendCompilerFailed):
        torch.compile(model, backend=backend)(*args, **kwargs)
    return found


def _milliseconds(call: Callable[[], None]) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    finally:
        gc.enable()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'model':12}{'nodes':>7}{'rtx ms':>9}{'Inductor ms':>13}{'ratio':>8}")
    for name in options.models:
        row = rows[name] = measure(name, options.repeats)
        print(f"{name:12}{row['nodes']:7}{row['rtx_ms']:9.2f}{row['inductor_ms']:13.1f}{row['ratio']:8.1f}", flush=True)
    print(f"least ratio {min(row['ratio'] for row in rows.values()):.1f}, wanted {LIMIT:.0f}")
    if options.out:
        record = {"torch": torch.__version__, "repeats": options.repeats, "models": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
