"""The command line: `torch-rtx build model.onnx`, `torch-rtx inspect model.rtx`, `torch-rtx cache ls`."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from torch_rtx import inspection
from torch_rtx.cli import build, cache, opt, profile, refit, runtime_cache
from torch_rtx.cli.terminal import echo, echo_json, errors

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools for torch_rtx engines.")
cache.app.add_typer(runtime_cache.app, name="runtime")
app.add_typer(cache.app, name="cache")
app.command()(build.build)
app.command()(refit.refit)
app.command()(profile.profile)
app.command()(opt.opt)
File = Annotated[Path, typer.Argument(help="An engine (.rtx).")]


@app.callback()
def main() -> None:
    """Tools for torch_rtx engines."""
    # PyTorch's own, of each export.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)


@app.command()
def inspect(
    path: File,
    graph: Annotated[bool, typer.Option("--graph", help="Print the program instead of the summary.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Print a summary of an engine without loading it; needs neither torch nor a GPU."""
    if graph and as_json:
        raise typer.BadParameter("--graph prints the program as text, --json the summary: give one of them")
    with errors():
        found = inspection.inspect(path)
    if graph:
        echo(found.graph_text, end="")
    elif as_json:
        fields = asdict(found)
        del fields["graph_text"]
        echo_json(fields)
    else:
        echo(found)
