"""`torch-rtx profile`: where the time of an engine goes, for made-up inputs and, without a file of them, weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.errors import RtxError, SettingsError
from torch_rtx.ir import Graph, ScalarType, Type, dim_syms, evaluate, type_dims


def profile(
    path: Annotated[Path, typer.Argument(help="An engine (.rtx).")],
    weights: Annotated[Path | None, typer.Option(help="A .safetensors file; without one, made-up weights.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="A size that varies, as s77=8; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs; else on what it was built for.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs that are measured.")] = 20,
    modules: Annotated[int | None, typer.Option(help="Print times by module, down to this depth.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that draws the graph coloured by time.")] = None,
) -> None:
    """Say where the time of an engine goes, node by node."""
    from torch_rtx.runtime import module as modules_of  # needs torch, which `torch-rtx inspect` does without
    from torch_rtx.runtime import profiling

    try:
        module = modules_of.load(path, weights, device)
        sizes = sizes_given(module.engine.graph, size or [])
        if weights is None and module.engine.weights is None:
            named = {p.name: p.type for p in module.engine.graph.parameters if not p.constant}
            module.refit(dict(zip(named, _made_up(named.values(), sizes, module.device), strict=True)))
        inputs = _made_up((value.type for value in module.engine.graph.inputs), sizes, module.device)
        found = profiling.profile(module.session, inputs, repeats=repeats)
        print(found if modules is None else found.by_module(modules))
        for target, write in ((trace, found.trace), (html, found.html)):
            if target is not None:
                write(target)
    except (RtxError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(1) from None


def sizes_given(graph: Graph, given: Iterable[str]) -> dict[str, int]:
    """All sizes of the inputs that vary: as `given` says, or the typical ones that the engine was built with."""
    varying = {sym.name: sym for value in graph.inputs for dim in type_dims(value.type) for sym in dim_syms(dim)}
    sizes = {name: sym.typical for name, sym in varying.items() if sym.typical is not None}
    sizes |= {name: int(number) for name, _, number in (text.partition("=") for text in given) if number.isdecimal()}
    if sizes.keys() != varying.keys():
        wanted = " ".join(f"--size {s.name}={s.min}..{'' if s.max is None else s.max}" for s in varying.values())
        hint = "`torch-rtx inspect --graph` shows what they are sizes of"
        raise SettingsError(f"the sizes that vary are: {wanted or 'none'}", hint=hint)
    return sizes


def _made_up(types: Iterable[Type], sizes: Mapping[str, int], device: Any) -> list[Any]:
    """Numbers from 0 to 1, and 0 where a number may be a position; sizes as they are."""
    import torch

    from torch_rtx import aten

    made: list[Any] = []
    for type_ in types:
        if isinstance(type_, ScalarType):
            number = 0 if type_.dim is None else evaluate(type_.dim, sizes)
            made.append({"int": int, "float": float, "bool": bool}[type_.kind](number or 0))
            continue
        shape = [evaluate(dim, sizes) or 0 for dim in type_.shape]
        place = aten.to_torch("Device", type_.device, device)
        dtype = aten.DTYPES[type_.dtype]
        drawn = torch.rand(shape, device=place) if dtype.is_floating_point else torch.zeros(shape, device=place)
        made.append(drawn.to(dtype))
    return made
