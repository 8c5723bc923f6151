"""`torch-rtx profile`: profiles an engine with random inputs and, without a weights file, random weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from torch_rtx.cli import calls
from torch_rtx.cli.terminal import Report
from torch_rtx.progress import stage


def profile(
    path: calls.EngineFile,
    weights: calls.Weights = None,
    inputs: calls.InputFiles = None,
    size: calls.Sizes = None,
    shapes: calls.Shapes = None,
    seed: calls.Seed = 0,
    device: calls.Device = None,
    trust_binaries: calls.Trust = False,
    option: calls.Options = None,
    repeats: Annotated[int, typer.Option(help="Number of measured runs.")] = 20,
    modules: Annotated[int | None, typer.Option(help="Print times by module, down to this depth.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that draws the graph coloured by time.")] = None,
) -> Report:
    """Measure the time of each node of an engine."""
    for target in (trace, html):  # before minutes of measuring, not after
        if target is not None:
            calls.check_folder(target)
    module = calls.opened(path, weights, device, trust_binaries, option)
    from torch_rtx.runtime import profiling  # needs torch, which `torch-rtx inspect` does without

    values = calls.inputs_given(module, inputs, size, shapes, seed)
    if not weights and module.engine.weights is None:
        calls.fill_in_weights(module, seed)
    stage("measuring each node")
    found = profiling.profile(module.session, values, repeats=repeats)
    found = replace(found, about={**found.about, "model": path.name})
    for target, write in ((trace, found.trace), (html, found.html)):
        if target is not None:
            write(target)
    if modules is not None:
        table = found.by_module(modules)
        return Report(table, table)
    rows = [asdict(row) | {"us": row.us, "runs_as": row.runs_as, "where": row.where} for row in found.rows]
    return Report(asdict(replace(found, rows=())) | {"us": found.us, "rows": rows}, found)
