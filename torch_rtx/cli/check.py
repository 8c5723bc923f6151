"""`torch-rtx check`: whether an engine file is fit for this machine, or for another GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from torch_rtx.cli.calls import EngineFile
from torch_rtx.cli.terminal import echo, echo_json, errors
from torch_rtx.validity import Validity, check_engine


def check(
    path: EngineFile,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Another GPU, as 'RTX 4090'; default: this machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say by its header whether an engine is VALID, SUBOPTIMAL or INVALID, and why; the last is exit status 1."""
    with errors():
        found = check_engine(path, gpu)
    echo_json(found.as_dict()) if as_json else echo(found)
    if found.validity is Validity.INVALID:
        raise typer.Exit(1)
