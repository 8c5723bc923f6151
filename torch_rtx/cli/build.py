"""`torch-rtx build`: builds an engine from an ONNX model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.cli.terminal import echo, errors
from torch_rtx.errors import SettingsError
from torch_rtx.settings import CompilationSettings

SIZE_HELP = "A size that the model leaves open, as batch=8, or batch=1:4:16 (smallest, typical, largest); repeatable."
FIX_HELP = "An input with one value in every call, as sr=16000 or sizes=[1,2]; repeatable."


def build(
    path: Annotated[Path, typer.Argument(help="An ONNX model.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The engine; default: model.rtx.")] = None,
    size: Annotated[list[str] | None, typer.Option("--size", "-s", help=SIZE_HELP)] = None,
    fix: Annotated[list[str] | None, typer.Option("--fix", "-f", help=FIX_HELP)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="A GPU to compile kernels for, or `portable`; repeatable; default: later."),
    ] = None,
    device: Annotated[str, typer.Option(help="The device to build for, cuda or cpu; needs no GPU.")] = "cuda",
    weights: Annotated[bool, typer.Option("--weights", help="Put the weights into the engine, too.")] = False,
) -> None:
    """Build an engine from an ONNX model; its weights stay in the model, unless --weights is given."""
    from torch_rtx.backend.build import compile  # imports torch, which other commands do without
    from torch_rtx.onnx.module import from_onnx
    from torch_rtx.runtime.module import save

    with errors():
        out = path.with_suffix(".rtx") if out is None else out
        if not out.absolute().parent.is_dir():
            raise SettingsError(f"{out} can't be written: there is no such folder")
        settings = CompilationSettings(device=device, strip_weights=not weights)
        settings = replace(settings, targets=tuple(target)) if target else settings
        model = from_onnx(path, values_given(fix or []))
        save(compile(model, dynamic_shapes=sizes_given(size or []), settings=settings), out)
        echo(f"wrote {out}")


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
