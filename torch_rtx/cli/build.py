"""`torch-rtx build`: an engine from an ONNX model, an exported program, a Hugging Face folder, or a function."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.cli import calls, shapes
from torch_rtx.cli.calibrate import quantized
from torch_rtx.cli.hugging_face import has_weights, inputs_named, is_folder
from torch_rtx.cli.sources import DTYPES, Source, file_of, is_onnx, is_program, load_source
from torch_rtx.cli.terminal import Report, echo
from torch_rtx.errors import SettingsError
from torch_rtx.platforms import ANY
from torch_rtx.progress import stage
from torch_rtx.settings import CompilationSettings

SOURCE_HELP = (
    "model.onnx, model.pt2, the folder of a Hugging Face model, or module:factory, a function that returns "
    "(model, args)."
)
TARGET_HELP = "GPUs to compile kernels for, as RTX4090,sm_120, or `portable`; repeatable; default: later."
DEVICE_HELP = "cuda or cpu, which is not needed here; default: cuda, or where an exported program was traced."
PLATFORM_HELP = "The only operating system that may load it: linux or windows; it then has kernels for `portable`."
FIX_HELP = "An input of an ONNX model with one value in every call, as sr=16000 or sizes=[1,2]; repeatable."
DTYPE_HELP = f"Cast floats of the model and of its inputs: {', '.join(DTYPES)}; default: its own."
QUANTIZE_HELP = "A preset such as int8_dynamic, rules for layers as JSON, or a file that `calibrate` wrote."
STRIP_HELP = "Leave the weights in the model; --no-strip, or --weights: put them into the engine, too."
OPTION_HELP = "An option of CompilationSettings, as disabled_passes=[fuse]; repeatable."


def build(
    source: Annotated[str, typer.Argument(metavar="MODEL", help=SOURCE_HELP)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The engine; default: MODEL.rtx.")] = None,
    size: shapes.Sizes = None,
    profile: shapes.Profiles = None,
    min_shapes: shapes.MinShapes = None,
    opt_shapes: shapes.OptShapes = None,
    max_shapes: shapes.MaxShapes = None,
    fix: Annotated[list[str] | None, typer.Option("--fix", "-f", help=FIX_HELP)] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    quantize: Annotated[str | None, typer.Option("--quantize", "-q", help=QUANTIZE_HELP)] = None,
    target: Annotated[list[str] | None, typer.Option("--targets", "--target", "-t", help=TARGET_HELP)] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    strip: Annotated[bool, typer.Option("--strip/--no-strip", " /--weights", help=STRIP_HELP)] = True,
    platform: Annotated[str, typer.Option(help=PLATFORM_HELP)] = ANY,
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help=OPTION_HELP)] = None,
) -> Report:
    """Build an engine; its weights stay in the model, unless --no-strip is given."""
    out = file_of(source, ".rtx") if out is None else out
    calls.check_folder(out)
    device = "cuda" if device is None and not is_program(source) else device
    settings = CompilationSettings(
        **{"device": device, "strip_weights": strip, "platform": platform} | calls.options_given(option or ())
    )
    named = [name for text in target or () for name in text.split(",")]
    settings = replace(settings, targets=tuple(named)) if named else settings
    fixed = values_given(fix or [])
    spans = shapes.spans_given(min_shapes, opt_shapes, max_shapes)
    if not strip and is_folder(source) and not has_weights(Path(source)):
        raise SettingsError(f"{source} has no weights", hint="weights are .safetensors files in that folder")
    if dtype is not None and strip:
        echo("no file has the weights that --dtype casts: --no-strip puts them into the engine", to_stderr=True)
    stage(f"reading {source}")
    from torch_rtx.runtime.garbage import uncollected

    with uncollected():  # what is read here lives until the end, nearly all of it
        from torch_rtx.backend.build import compile  # imports torch, which other commands do without
        from torch_rtx.runtime.module import save

        found = load_source(source, fixed, dtype)
    gc.freeze()  # no later collection goes through it
    if quantize is not None:
        found = replace(found, model=quantized(source, found.model, quantize))
    found = called(found, source, size, profile, spans)
    engine = compile(found.model, found.args, found.kwargs or None, found.dynamic_shapes, settings)
    stage(f"writing {out}")
    save(engine, out)
    return Report({"engine": str(out), "bytes": out.stat().st_size}, f"wrote {out}")


def called(
    source: Source,
    text: str,
    size: Sequence[str] | None,
    profile: Sequence[str] | None,
    spans: shapes.Spans,
) -> Source:
    """The model with the sizes that the command line gives to its inputs."""
    from torch_rtx.backend.onnx_models import declared_inputs

    if source.inputs:
        inputs = source.inputs
        if is_folder(text):
            ranks = {name: len(ends[0]) for given in spans for name, ends in given.items()}
            inputs = inputs_named(source.model, inputs, ranks)
        given = shapes.profiles_given(inputs, size, profile, spans)
        args = declared_inputs(inputs, given)
        if is_onnx(text):
            return replace(source, args=args)
        return replace(source, args=(), kwargs={value.name: x for value, x in zip(inputs, args, strict=True)})
    if size or profile:
        hint = "--min-shapes, --opt-shapes and --max-shapes give those of a function's model"
        hint = "the dynamic sizes of this model are those that it is exported with" if is_program(text) else hint
        flag = "--size" if size else "--profile"
        raise SettingsError(f"{flag} is for ONNX models and folders, whose sizes have names", hint=hint)
    if spans and (is_program(text) or source.dynamic_shapes is not None):
        what = "an exported program" if is_program(text) else f"the model of {text}"
        raise SettingsError(f"the shapes of {what} are given where it is made: the command line can't change them")
    return _with_shapes(source, spans) if spans else source


def _with_shapes(source: Source, spans: shapes.Spans) -> Source:
    """The example arguments, with `torch_rtx.Input`s in place of the tensors that have shapes."""
    import torch

    from torch_rtx.backend.inputs import Input, forward_names

    names = dict(zip(forward_names(source.model), source.args or (), strict=False)) | dict(source.kwargs)
    for given in spans:
        if given.keys() != spans[0].keys():
            raise SettingsError("each profile has to give shapes to the same inputs")
        unknown = [name for name in given if not isinstance(names.get(name), torch.Tensor)]
        if unknown:
            tensors = [name for name, value in names.items() if isinstance(value, torch.Tensor)]
            raise SettingsError(f"the model has no input {unknown[0]!r}", hint=f"its inputs are {', '.join(tensors)}")
    new = {name: Input(profiles=[given[name] for given in spans], dtype=names[name].dtype) for name in spans[0]}
    positional = list(names)[: len(source.args or ())]
    args = tuple(new.get(name, names[name]) for name in positional)
    return replace(source, args=args, kwargs={**source.kwargs, **{k: v for k, v in new.items() if k not in positional}})


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
