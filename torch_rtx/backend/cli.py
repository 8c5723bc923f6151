"""The command line: `torch-rtx build model.onnx`, `torch-rtx inspect model.rtx`, `torch-rtx cache ls`."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from torch_rtx import inspection
from torch_rtx.backend import build_cli, cache_cli, opt_cli, profile_cli, refit_cli, runtime_cache_cli
from torch_rtx.backend.terminal import echo, echo_json

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools for torch_rtx engines.")
cache_cli.app.add_typer(runtime_cache_cli.app, name="runtime")
app.add_typer(cache_cli.app, name="cache")
app.command()(build_cli.build)
app.command()(refit_cli.refit)
app.command()(profile_cli.profile)
app.command()(opt_cli.opt)
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
    with cache_cli.errors():
        found = inspection.inspect(path)
    if graph:
        echo(found.graph_text, end="")
    elif as_json:
        fields = asdict(found)
        del fields["graph_text"]
        echo_json(fields)
    else:
        echo(found)
