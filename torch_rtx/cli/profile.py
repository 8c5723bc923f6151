"""`torch-rtx profile`: profiles an engine with random inputs and, without a weights file, random weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.cli.terminal import echo, errors
from torch_rtx.engine import Engine, names_of_sizes
from torch_rtx.errors import SettingsError
from torch_rtx.ir import OBJECT, ScalarType, Type, dim_syms, evaluate, type_dims
from torch_rtx.profiles import Range


def profile(
    path: Annotated[Path, typer.Argument(help="An engine (.rtx).")],
    weights: Annotated[Path | None, typer.Option(help="A .safetensors or .onnx file; default: random weights.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="A dynamic size, as batch=8; may be repeated.")] = None,
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
        for target in (trace, html):  # before minutes of measuring, not after
            if target is not None and not target.absolute().parent.is_dir():
                raise SettingsError(f"{target} can't be written: there is no such folder")
        module = modules_of.load(path, weights, device, trust_binaries=trust_binaries)
        sizes = sizes_given(module.engine, size or [])
        if weights is None and module.engine.weights is None:
            named = {p.name: p.type for p in module.engine.graph.parameters if not p.constant}
            module.refit(dict(zip(named, _random(named.values(), sizes, module.device), strict=True)))
        inputs = _random((value.type for value in module.engine.graph.inputs), sizes, module.device)
        found = profiling.profile(module.session, inputs, repeats=repeats)
        echo(found if modules is None else found.by_module(modules))
        for target, write in ((trace, found.trace), (html, found.html)):
            if target is not None:
                write(target)


def sizes_given(engine: Engine, given: Iterable[str]) -> dict[str, int]:
    """All dynamic sizes of the inputs, by symbol: those in `given`, else the engine's typical ones.

    Args:
        given: such as `batch=8`, with the name of a `Dim`, or a symbol.

    Raises:
        SettingsError: a size is missing, out of its range, or not one of the engine's.
    """
    varying = {sym.name: sym for value in engine.graph.inputs for dim in type_dims(value.type) for sym in dim_syms(dim)}
    ranges = {sym.name: Range(sym.min, None, sym.max) for sym in varying.values()}
    sizes = {name: sym.typical for name, sym in varying.items() if sym.typical is not None}
    names = names_of_sizes(engine.manifest.signature)
    symbols = {name: symbol for symbol, name in names.items()}
    problem = None
    for text in given:
        named, _, number = text.partition("=")
        name = symbols.get(named, named)
        if name not in varying or not number.isdecimal() or not ranges[name].holds(int(number)):
            problem = f"--size {text} is no size of this engine; "
            break
        sizes[name] = int(number)
    if problem is not None or sizes.keys() != varying.keys():
        wanted = " ".join(f"--size {names.get(name, name)}={found}" for name, found in ranges.items())
        hint = "`torch-rtx inspect --graph` shows the tensors with these sizes"
        raise SettingsError(f"{problem or ''}the dynamic sizes are: {wanted or 'none'}", hint=hint)
    return sizes


def _random(types: Iterable[Type], sizes: Mapping[str, int], device: Any) -> list[Any]:
    """Uniform random floats in [0, 1); zeros for integers, which may be indices; sizes from `sizes`."""
    import torch

    from torch_rtx import aten

    values: list[Any] = []
    for type_ in types:
        if type_ == OBJECT:
            hint = "`torch_rtx.profile` takes the arguments of a call"
            raise SettingsError("an input is a Python object, which can't be drawn at random", hint=hint)
        if isinstance(type_, ScalarType):
            number = 0 if type_.dim is None else evaluate(type_.dim, sizes)
            values.append({"int": int, "float": float, "bool": bool}[type_.kind](number or 0))
            continue
        shape = [evaluate(dim, sizes) or 0 for dim in type_.shape]
        dtype = aten.DTYPES[type_.dtype]
        fill = torch.rand if dtype.is_floating_point else torch.zeros
        values.append(fill(shape, device=aten.to_torch("Device", type_.device, device)).to(dtype))
    return values
