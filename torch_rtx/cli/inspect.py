"""`torch-rtx inspect`: what is in an engine; needs neither torch nor a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer

from torch_rtx import inspection
from torch_rtx.cli import calls
from torch_rtx.cli.terminal import Report

SHOWN = 40  # layers and parameters that are printed
GRAPH_HELP = "Print the program instead of the summary."
LAYERS_HELP = "Print the layers alone: products, convolutions and attention."
SEARCH_HELP = "Only layers and parameters with this text in their lines."
LIMIT_HELP = "Most layers and parameters to print; 0: all. JSON has all of them."


def inspect(
    path: calls.EngineFile,
    graph: Annotated[bool, typer.Option("--graph", help=GRAPH_HELP)] = False,
    layers: Annotated[bool, typer.Option("--layers", help=LAYERS_HELP)] = False,
    search: Annotated[str, typer.Option("--search", help=SEARCH_HELP, show_default=False)] = "",
    limit: Annotated[int, typer.Option("--limit", min=0, help=LIMIT_HELP)] = SHOWN,
) -> Report:
    """Print a summary of an engine without loading it; needs neither torch nor a GPU."""
    if graph and layers:
        raise typer.BadParameter("--graph prints the program, --layers its layers: give one of them")
    found = inspection.inspect(path)
    if graph:
        text = with_names(found.graph_text, found.sizes)
        return Report({"graph": text}, text)
    if layers:
        lines = inspection.listed("layers", found.layers, limit or None, search)
        return Report([asdict(layer) for layer in found.layers if search in str(layer)], "\n".join(lines))
    fields = asdict(found)
    del fields["graph_text"]
    for name in ("layers", "parameters"):
        kept = zip(getattr(found, name), fields[name], strict=True)
        fields[name] = [values for item, values in kept if search in str(item)]
    return Report(fields, found.text(limit or None, search))


def with_names(text: str, sizes: Mapping[str, str]) -> str:
    """The text of a program with the user's names of sizes, as `batch`, in place of its own, as `s77`. A name that the
    program has for something else is not taken: the text stays one that `torch-rtx opt` reads."""
    words = set(re.findall(r"\w+", text))
    free = {symbol: name for symbol, name in sizes.items() if name not in words}
    return re.sub(r"\w+", lambda word: free.get(word[0], word[0]), text)
