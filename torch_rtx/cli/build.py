"""`torch-rtx build`: builds an engine from an ONNX model, an exported program, or a function that makes a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.cli import calls
from torch_rtx.cli.sources import is_function, is_onnx, is_program, load_source
from torch_rtx.cli.terminal import echo, errors
from torch_rtx.errors import SettingsError
from torch_rtx.platforms import ANY
from torch_rtx.settings import CompilationSettings

SIZE_HELP = (
    "A size that an ONNX model leaves open, as batch=8, or batch=1:4:16 (smallest, typical, largest); repeatable."
)
SOURCE_HELP = "model.onnx, model.pt2, or module:factory, a function that returns (model, args)."
DEVICE_HELP = "cuda or cpu, which is not needed here; default: cuda, or where an exported program was traced."
PLATFORM_HELP = "The only operating system that may load it: linux or windows; it then has kernels for `portable`."
FIX_HELP = "An input with one value in every call, as sr=16000 or sizes=[1,2]; repeatable."


def build(
    source: Annotated[str, typer.Argument(metavar="MODEL", help=SOURCE_HELP)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The engine; default: MODEL.rtx.")] = None,
    size: Annotated[list[str] | None, typer.Option("--size", "-s", help=SIZE_HELP)] = None,
    fix: Annotated[list[str] | None, typer.Option("--fix", "-f", help=FIX_HELP)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="A GPU to compile kernels for, or `portable`; repeatable; default: later."),
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Put the weights into the engine, too.")] = False,
    platform: Annotated[str, typer.Option(help=PLATFORM_HELP)] = ANY,
) -> None:
    """Build an engine; its weights stay in the model, unless --weights is given."""
    from torch_rtx.backend.build import compile  # imports torch, which other commands do without
    from torch_rtx.runtime.module import save

    with errors():
        out = out_of(source) if out is None else out
        calls.check_folder(out)
        device = "cuda" if device is None and not is_program(source) else device
        settings = CompilationSettings(device=device, strip_weights=not weights, platform=platform)
        settings = replace(settings, targets=tuple(target)) if target else settings
        found = load_source(source, values_given(fix or []))
        dynamic = found.dynamic_shapes
        if size:
            if not is_onnx(source):
                hint = "the dynamic sizes of other models are those that they are exported with"
                raise SettingsError("--size is for ONNX models", hint=hint)
            dynamic = sizes_given(size)
        save(compile(found.model, found.args, found.kwargs or None, dynamic, settings), out)
        echo(f"wrote {out}")


def out_of(source: str) -> Path:
    """The engine that is built from `source` where no name is given: beside a file, else in the current folder."""
    return Path(f"{source.rpartition(':')[2]}.rtx") if is_function(source) else Path(source).with_suffix(".rtx")


def sizes_given(given: Iterable[str]) -> dict[str, int | tuple[int, ...]]:
    """The sizes that texts such as `batch=8` or `batch=1:4:16` stand for.

    Raises:
        SettingsError: a text is none.
    """
    found: dict[str, int | tuple[int, ...]] = {}
    for text in given:
        name, _, numbers = text.rpartition("=")
        parts = numbers.split(":")
        if not name or len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
            raise SettingsError(f"{text!r} is not a size", hint="sizes look like batch=8 or batch=1:4:16")
        found[name] = int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))
    return found


def values_given(given: Iterable[str]) -> dict[str, Any]:
    """The values of inputs that texts such as `sr=16000` or `sizes=[1,2]` stand for.

    Raises:
        SettingsError: a text is none.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            name = ""
        if not name or not _is_numeric(found[name]):
            hint = "values are numbers, true, false, and lists of them: sr=16000, sizes=[1,2]"
            raise SettingsError(f"{text!r} is not the value of an input", hint=hint)
    return found


def _is_numeric(value: Any) -> bool:
    return all(map(_is_numeric, value)) if isinstance(value, list) else isinstance(value, int | float)
