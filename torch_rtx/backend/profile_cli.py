"""`torch-rtx profile`: profiles an engine with random inputs and, without a weights file, random weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.backend.cache_cli import errors
from torch_rtx.backend.terminal import echo
from torch_rtx.errors import SettingsError
from torch_rtx.ir import Graph, ScalarType, Type, dim_syms, evaluate, type_dims


def profile(
    path: Annotated[Path, typer.Argument(help="An engine (.rtx).")],
    weights: Annotated[Path | None, typer.Option(help="A .safetensors file; default: random weights.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="A dynamic size, as s77=8; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="The device; default: the one that it was built for.")] = None,
    trust_binaries: Annotated[bool, typer.Option(help="Run the GPU kernels in the file, which you trust.")] = False,
    repeats: Annotated[int, typer.Option(help="Number of measured runs.")] = 20,
    modules: Annotated[int | None, typer.Option(help="Print times by module, down to this depth.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that draws the graph coloured by time.")] = None,
) -> None:
    """Measure the time of each node of an engine."""
    from torch_rtx.runtime import module as modules_of  # needs torch, which `torch-rtx inspect` does without
    from torch_rtx.runtime import profiling

    with errors():
        module = modules_of.load(path, weights, device, trust_binaries=trust_binaries)
        sizes = sizes_given(module.engine.graph, size or [])
        if weights is None and module.engine.weights is None:
            named = {p.name: p.type for p in module.engine.graph.parameters if not p.constant}
            module.refit(dict(zip(named, _random(named.values(), sizes, module.device), strict=True)))
        inputs = _random((value.type for value in module.engine.graph.inputs), sizes, module.device)
        found = profiling.profile(module.session, inputs, repeats=repeats)
        echo(found if modules is None else found.by_module(modules))
        for target, write in ((trace, found.trace), (html, found.html)):
            if target is not None:
                write(target)


def sizes_given(graph: Graph, given: Iterable[str]) -> dict[str, int]:
    """All dynamic sizes of the inputs, by symbol: those in `given`, else the engine's typical ones.

    Raises:
        SettingsError: a size is missing, or is not one of the engine's.
    """
    varying = {sym.name: sym for value in graph.inputs for dim in type_dims(value.type) for sym in dim_syms(dim)}
    sizes = {name: sym.typical for name, sym in varying.items() if sym.typical is not None}
    sizes |= {name: int(number) for name, _, number in (text.partition("=") for text in given) if number.isdecimal()}
    if sizes.keys() != varying.keys():
        wanted = " ".join(f"--size {s.name}={s.min}..{'' if s.max is None else s.max}" for s in varying.values())
        hint = "`torch-rtx inspect --graph` shows the tensors with these sizes"
        raise SettingsError(f"the dynamic sizes are: {wanted or 'none'}", hint=hint)
    return sizes


def _random(types: Iterable[Type], sizes: Mapping[str, int], device: Any) -> list[Any]:
    """Uniform random floats in [0, 1); zeros for integers, which may be indices; sizes from `sizes`."""
    import torch

    from torch_rtx import aten

    values: list[Any] = []
    for type_ in types:
        if isinstance(type_, ScalarType):
            number = 0 if type_.dim is None else evaluate(type_.dim, sizes)
            values.append({"int": int, "float": float, "bool": bool}[type_.kind](number or 0))
            continue
        shape = [evaluate(dim, sizes) or 0 for dim in type_.shape]
        dtype = aten.DTYPES[type_.dtype]
        fill = torch.rand if dtype.is_floating_point else torch.zeros
        values.append(fill(shape, device=aten.to_torch("Device", type_.device, device)).to(dtype))
    return values
