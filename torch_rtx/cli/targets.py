"""`torch-rtx targets`: the GPUs that engines can be built for, and this machine's."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from torch_rtx.cli.terminal import Report
from torch_rtx.targets import ARCHES, DTYPE_FEATURES, PORTABLE, gpus_of, lacks, parse_targets


def targets(
    name: Annotated[str | None, typer.Argument(help="A GPU, as 'RTX 4090': print its targets alone.")] = None,
) -> Report:
    """List the targets, with names of GPUs that mean them and what their kernels can compute with."""
    asked = ARCHES.keys() if name is None else {target.sm for target in parse_targets(name)}
    rows = [_row(sm) for sm in ARCHES if sm in asked]
    here = _here()
    lines = []
    for row in rows:
        marks = [text for text, holds in (("portable", row["portable"]), ("as PTX", row["ptx"])) if holds]
        lines.append(f"{row['target']}" + f" ({', '.join(marks)})" * bool(marks) + f": {', '.join(row['gpus'])}")
        lines.append(f"    computes with {', '.join(row['dtypes'])}")
    if name is None:
        lines.append(f"this machine: {', '.join(f'{gpu} (sm_{sm})' for gpu, sm in here) or 'no CUDA GPU'}")
    return Report({"targets": rows, "here": here}, "\n".join(lines))


def _row(sm: int) -> dict[str, Any]:
    arch = ARCHES[sm]
    special = [dtype for dtype in DTYPE_FEATURES if not lacks(arch, dtype)]
    return {
        "target": f"sm_{sm}",
        "gpus": list(gpus_of(sm)),
        "dtypes": ["f16", "i8", *special],
        "portable": any(target.sm == sm and not target.ptx for target in PORTABLE),
        "ptx": arch.like is not None,
    }


def _here() -> list[tuple[str, int]]:
    """The GPUs of this machine and their SM versions."""
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [(gpu.name, gpu.major * 10 + gpu.minor) for gpu in found]
