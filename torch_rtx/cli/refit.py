"""`torch-rtx refit`: puts weights into an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from torch_rtx import engine as engine_file
from torch_rtx.cli import calls
from torch_rtx.cli.terminal import Report

WEIGHTS_HELP = "An .onnx or .safetensors file, or a folder of the latter; repeatable, for several shards."


def refit(
    path: calls.EngineFile,
    weights: Annotated[list[Path], typer.Option("--weights", "-w", help=WEIGHTS_HELP)],
    strict: Annotated[bool, typer.Option(help="Refuse weights that the engine does not have.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new engine; default: ENGINE.")] = None,
) -> Report:
    """Write an engine with the weights of a file in it. If any does not fit, nothing is written."""
    from torch_rtx.runtime.weight_match import match
    from torch_rtx.runtime.weight_sources import tensors_of  # imports torch, which other commands do without

    out = path if out is None else out
    calls.check_folder(out)
    engine = engine_file.load(path)
    parameters = [parameter for parameter in engine.graph.parameters if not parameter.constant]
    given = tensors_of(weights[0] if len(weights) == 1 else weights, parameters, engine.manifest)
    found = match(parameters, given, engine.manifest.unused_names if strict else None)
    named = {parameter.name: tensor for parameter, tensor in zip(parameters, found, strict=True)}
    engine_file.save(replace(engine, weights=named), out)
    return Report({"engine": str(out), "weights": len(named)}, f"wrote {out}")
