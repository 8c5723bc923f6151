"""ResNet-50, BERT and GPT-2 at their published sizes through everything that torch_rtx does today.

    make demo

For each model: compile it with `torch.compile(backend="rtx")` and check the result against eager; build an engine ahead
of time and save it without its weights; then, in a new process that knows nothing of the model, load the engine, refit
it from a safetensors file and check again. Weights are random, nothing is downloaded. Exit status 1 if a check fails.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from torch import nn
from torch.utils import _pytree as pytree

import torch_rtx

warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)  # torch.export's own
MODELS = {"resnet50": "ResNet-50", "bert_base": "BERT-base", "gpt2": "GPT-2"}
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if ON_GPU else ("cpu", torch.float32)
CALLS = 3 if ON_GPU else 1  # on the GPU a call runs plain code, the next captures a CUDA graph, the third replays it
FLOAT32_LIMIT, FLOAT16_LIMIT = 1e-4, 1e-3
Tensors = list[torch.Tensor]


def backend() -> Any:
    """`"rtx"`, where torch_rtx is installed; `make demo` also takes an environment with a GPU in which it is not."""
    if "rtx" in torch.compiler.list_backends():
        return "rtx"
    from torch_rtx.backend.entry import rtx

    return rtx


def tensors(result: Any) -> Tensors:
    """The tensors of a model's result, in order."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def relative_error(got: Tensors, reference: Tensors) -> float:
    """The largest difference of any element, relative to the largest element of its tensor; infinite for NaN."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in reference]:
        return float("inf")
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, reference, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def worst_error(call: Callable[[], Any], reference: Tensors) -> float:
    """The worst error of several calls in a row, which do not all run the same code on the GPU."""
    return max(relative_error(tensors(call()), reference) for _ in range(CALLS))


def what_is_right(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensors, float]:
    """The result to compare with, in float64, and how far from it a right one may be.

    In float32 that is eager's result. In float16 eager is itself too far off to judge by: the model runs in float64 and
    a result may be at most twice as wrong as eager's.
    """
    eager = tensors(model(*args, **kwargs))
    if not ON_GPU:
        return [tensor.double() for tensor in eager], FLOAT32_LIMIT
    wide = [x.double() if x.is_floating_point() else x for x in args]
    reference = tensors(copy.deepcopy(model).double()(*wide, **kwargs))
    return reference, max(2 * relative_error(eager, reference), FLOAT16_LIMIT)


def build(name: str, folder: Path) -> dict[str, Any]:
    """Compile the model both ways; leave its engine, weights and an example in `folder`. Returns a row of the table."""
    from benchmarks import models

    model, args, kwargs = models.build(name, "full", batch=1, dtype=DTYPE, device=DEVICE)
    kwargs["return_dict"] = False  # plain tuples: whoever loads the engine needs no class of transformers
    reference, limit = what_is_right(model, args, kwargs)

    start = time.perf_counter()
    compiled = torch.compile(model, backend=backend())
    compiled(*args, **kwargs)
    compile_seconds = time.perf_counter() - start
    error = worst_error(lambda: compiled(*args, **kwargs), reference)

    start = time.perf_counter()
    exported = torch_rtx.compile(model, args, kwargs)
    export_seconds = time.perf_counter() - start
    torch_rtx.save(exported, folder / "model.rtx")

    save_model(model, str(folder / "weights.safetensors"))
    torch.save({"args": args, "kwargs": kwargs, "reference": reference}, folder / "example.pt")
    found = torch_rtx.inspect(folder / "model.rtx")
    fallback = found.kinds.get("fallback", 0)
    return {
        "nodes": sum(found.kinds.values()) - fallback,
        "fallback": fallback,
        "engine_bytes": found.engine_bytes,
        "weight_bytes": found.weight_bytes,
        "compile_seconds": compile_seconds,
        "export_seconds": export_seconds,
        "error": error,
        "limit": limit,
    }


def check(folder: Path) -> None:
    """The new process: load, refit, run; prints JSON. It needs neither the model's code nor the compiler."""
    example = torch.load(folder / "example.pt", weights_only=True)
    start = time.perf_counter()
    module = torch_rtx.load(folder / "model.rtx", trust_binaries=True)  # this example built it
    module.refit(folder / "weights.safetensors")
    seconds = time.perf_counter() - start
    error = worst_error(lambda: module(*example["args"], **example["kwargs"]), example["reference"])
    assert not {"transformers", "torch_rtx.backend", "torch_rtx.lowering"} & sys.modules.keys()
    print(json.dumps({"load_seconds": seconds, "loaded_error": error}))


def in_new_process(folder: Path) -> dict[str, float]:
    """What `check` prints, run by a new interpreter; its own messages go to the terminal."""
    command = [sys.executable, __file__, "check", str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def first_use_seconds() -> float:
    """Seconds of the very first compilation of a process, which imports PyTorch's compiler and more."""
    start = time.perf_counter()
    torch.compile(nn.Linear(2, 2, device=DEVICE), backend=backend())(torch.ones(1, 2, device=DEVICE))
    return time.perf_counter() - start


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="compiled, and loaded in a new process: batch 1", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    sizes = ("nodes in\nengine", "fall\nback", "engine\nKiB", "weights\nMiB")
    for head in (*sizes, "compile\ns", "build\ns", "load,\nrefit s", "error:\ncompiled", "\nloaded", "\nlimit"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for name, row in rows.items():
        errors = [row["error"], row["loaded_error"]]
        table.add_row(
            MODELS[name],
            str(row["nodes"]),
            str(row["fallback"]),
            f"{row['engine_bytes'] / 2**10:.0f}",
            f"{row['weight_bytes'] / 2**20:.0f}",
            *(f"{row[key]:.1f}" for key in ("compile_seconds", "export_seconds", "load_seconds")),
            *(f"{error:.1e}" for error in (*errors, row["limit"])),
            "[green]ok[/]" if max(errors) <= row["limit"] else "[red]WRONG[/]",
        )
    return table


def main() -> int:
    """Run the demo, or one `check DIR` of it. Returns the exit status."""
    if sys.argv[1:2] == ["check"]:
        with torch.no_grad():
            check(Path(sys.argv[2]))
        return 0
    sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks`, which has the models, is not installed
    console = Console(width=max(104, Console().width))
    place = torch.cuda.get_device_name() if ON_GPU else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    versions = f"torch_rtx {torch_rtx.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    console.print(f"{place}, {str(DTYPE).removeprefix('torch.')}; {versions}", highlight=False)
    console.print(f"first use of the compiler in this process: {first_use_seconds():.1f} s", highlight=False)
    rows = {}
    for name, title in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            os.environ["TORCH_RTX_CACHE_DIR"] = folder  # each model is built, whatever was built before
            console.print(f"{title} ...")
            rows[name] = build(name, Path(folder))
            rows[name] |= in_new_process(Path(folder))
        torch._dynamo.reset()
    console.print(table_of(rows))
    wrong = [name for name, row in rows.items() if max(row["error"], row["loaded_error"]) > row["limit"]]
    console.print(f"[red]wrong: {', '.join(wrong)}[/]" if wrong else "every result agrees with eager")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
