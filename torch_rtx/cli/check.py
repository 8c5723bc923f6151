"""`torch-rtx check`: whether an engine file is fit for this machine, or for another GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from torch_rtx.cli.calls import EngineFile
from torch_rtx.cli.terminal import Report
from torch_rtx.validity import Validity, check_engine


def check(
    path: EngineFile,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Another GPU, as 'RTX 4090'; default: this machine.")] = None,
) -> Report:
    """Say by its header whether an engine is VALID, SUBOPTIMAL or INVALID, and why; the last is exit status 1."""
    found = check_engine(path, gpu)
    return Report(found.as_dict(), found, "the engine can't run" if found.validity is Validity.INVALID else None)
