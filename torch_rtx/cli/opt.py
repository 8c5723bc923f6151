"""`torch-rtx opt graph.rtxir -p fuse`: runs passes over a graph in its text form."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from torch_rtx.cli.terminal import Report
from torch_rtx.errors import RtxError, SettingsError
from torch_rtx.ir import verify
from torch_rtx.irparse import parse
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import parse_targets


class Verify(StrEnum):
    """Which graphs are checked: the input and the result of each pass, the input alone, or none."""

    EACH = "each"
    INPUT = "input"
    NONE = "none"


def opt(
    file: Annotated[str, typer.Argument(help="A graph as text, as TORCH_RTX_DUMP writes it; - for stdin.")] = "-",
    passes: Annotated[list[str] | None, typer.Option("--pass", "-p", help="A pass to run; may be repeated.")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="A GPU to form kernels for.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file, not to stdout.")] = None,
    check: Annotated[Verify, typer.Option("--verify", help="Graphs to check by the rules of the IR.")] = Verify.EACH,
    names: Annotated[bool, typer.Option("--list", help="Print the names of the passes, in their order.")] = False,
) -> Report:
    """Run passes over a graph in its text form, in the given order, and print the graph that they leave."""
    if names:
        from torch_rtx.lowering.pipeline import PASSES  # imports torch, as in `run`

        return Report(list(PASSES), "\n".join(PASSES))
    try:
        source = sys.stdin.read() if file == "-" else Path(file).read_text()
        text = run(source, passes or (), target or ["portable"], check)
    except (RtxError, OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    if out is None:
        return Report({"graph": text}, text)
    out.write_text(text)
    return Report({"file": str(out)}, "")


def run(text: str, passes: Sequence[str], targets: Sequence[str], check: Verify) -> str:
    """The text of the graph that `passes` make of the graph `text`.

    Raises:
        SettingsError: no pass or target has such a name.
        InvalidIR: the text is no graph, with the line; or a graph breaks a rule.
        LoweringError: a pass failed, or changed the inputs or the types of the results.
    """
    from torch_rtx import aten
    from torch_rtx.lowering.infer import Inference
    from torch_rtx.lowering.pipeline import PASSES, Context

    unknown = [name for name in passes if name not in PASSES]
    if unknown:
        raise SettingsError(f"unknown passes {', '.join(unknown)}", hint=f"the passes are {', '.join(PASSES)}")
    graph, infer, context = parse(text), Inference(), Context(CompilationSettings(), parse_targets(targets))
    if check != Verify.NONE:
        verify(graph, aten.ALLOWED)
    for name in passes:
        graph = PASSES[name](graph, infer, context, checked=check == Verify.EACH)
    return str(graph)
