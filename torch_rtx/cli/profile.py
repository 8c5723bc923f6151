"""`torch-rtx profile`: profiles an engine with random inputs and, without a weights file, random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from torch_rtx.cli import calls
from torch_rtx.cli.terminal import echo, errors


def profile(
    path: calls.EngineFile,
    weights: calls.Weights = None,
    size: calls.Sizes = None,
    seed: calls.Seed = 0,
    device: calls.Device = None,
    trust_binaries: calls.Trust = False,
    repeats: Annotated[int, typer.Option(help="Number of measured runs.")] = 20,
    modules: Annotated[int | None, typer.Option(help="Print times by module, down to this depth.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that draws the graph coloured by time.")] = None,
) -> None:
    """Measure the time of each node of an engine."""
    from torch_rtx.runtime import profiling  # needs torch, which `torch-rtx inspect` does without

    with errors():
        for target in (trace, html):  # before minutes of measuring, not after
            if target is not None:
                calls.check_folder(target)
        module = calls.opened(path, weights, device, trust_binaries)
        sizes = calls.sizes_given(module.engine, size or [])
        if not weights and module.engine.weights is None:
            calls.fill_in_weights(module, sizes, seed)
        inputs = calls.drawn((value.type for value in module.engine.graph.inputs), sizes, module.device, seed)
        found = profiling.profile(module.session, inputs, repeats=repeats)
        echo(found if modules is None else found.by_module(modules))
        for target, write in ((trace, found.trace), (html, partial(found.html, model=path.name))):
            if target is not None:
                write(target)
