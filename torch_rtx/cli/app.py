"""The command line: `torch-rtx build model.onnx`, `torch-rtx inspect model.rtx`, `torch-rtx cache ls`."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict
from typing import Annotated

import typer

from torch_rtx import inspection
from torch_rtx.cli import bench, build, cache, calls, check, doctor, opt, profile, refit, run, runtime_cache, targets
from torch_rtx.cli.terminal import echo, echo_json, errors
from torch_rtx.version import __version__

app = typer.Typer(no_args_is_help=True, help="Tools for torch_rtx engines.")
cache.app.add_typer(runtime_cache.app, name="runtime")
app.add_typer(cache.app, name="cache")
app.command()(build.build)
app.command()(refit.refit)
app.command()(run.run)
app.command()(bench.bench)
app.command()(profile.profile)
app.command()(opt.opt)
app.command()(check.check)
app.command()(targets.targets)
app.command()(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        echo(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log what happens; -vv: in detail.")]


@app.callback()
def main(
    version: Version = False,
    verbose: Verbose = 0,
) -> None:
    """Tools for torch_rtx engines."""
    if verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("torch_rtx").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    # PyTorch's own, of each export.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)


@app.command()
def inspect(
    path: calls.EngineFile,
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
