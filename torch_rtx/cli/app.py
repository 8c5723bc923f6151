"""The command line: `torch-rtx build model.onnx`, `torch-rtx inspect model.rtx`, `torch-rtx cache ls`."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from torch_rtx.cli import cache, runtime_cache
from torch_rtx.cli.bench import bench
from torch_rtx.cli.build import build
from torch_rtx.cli.calibrate import calibrate
from torch_rtx.cli.check import check
from torch_rtx.cli.doctor import doctor
from torch_rtx.cli.inspect import inspect
from torch_rtx.cli.measure_gpu import measure_gpu
from torch_rtx.cli.opt import opt
from torch_rtx.cli.profile import profile
from torch_rtx.cli.refit import refit
from torch_rtx.cli.run import run
from torch_rtx.cli.targets import targets
from torch_rtx.cli.terminal import Verbose, command, echo, log_to_stderr
from torch_rtx.version import __version__

app = typer.Typer(no_args_is_help=True, help="Tools for torch_rtx engines.")
for each in (build, calibrate, run, bench, profile, refit, inspect, check, targets, measure_gpu, doctor, opt):
    app.command()(command(each))
cache.app.add_typer(runtime_cache.app, name="runtime")
app.add_typer(cache.app, name="cache")


def _print_version(asked: bool) -> None:
    if asked:
        echo(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")]


@app.callback()
def main(
    version: Version = False,
    verbose: Verbose = 0,
) -> None:
    """Tools for torch_rtx engines."""
    log_to_stderr(verbose)
    # PyTorch's own, of each export.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
