"""`torch-rtx calibrate`: what data says of a model's layers, as a file with which `torch-rtx build` quantizes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_rtx.cli import calls
from torch_rtx.cli.sources import file_of, load_source
from torch_rtx.cli.terminal import Report
from torch_rtx.errors import RtxError, SettingsError
from torch_rtx.progress import stage

CONFIG = "torch_rtx.quantize"  # in the file's metadata
ENDING = ".calibration.safetensors"
OUT_HELP = f"The file; default: MODEL{ENDING}."
SOURCE_HELP = "A Hugging Face folder, or module:factory, a function that returns a model."
CONFIG_HELP = "A preset such as int8, or rules for layers as JSON."
INPUTS_HELP = "A .npz or .safetensors file with the arguments of one call, by name; repeatable."
Config = Annotated[str, typer.Option("--quantize", "-q", help=CONFIG_HELP)]
Data = Annotated[list[Path], typer.Option("--inputs", "-i", help=INPUTS_HELP)]


def calibrate(
    source: Annotated[str, typer.Argument(metavar="MODEL", help=SOURCE_HELP)],
    config: Config,
    inputs: Data,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=OUT_HELP)] = None,
    dtype: Annotated[str | None, typer.Option(help="As of `build`.")] = None,
    device: Annotated[str, typer.Option(help="The device to run the model on.")] = "cpu",
) -> Report:
    """Run a model on some of its data, and write what `build --quantize FILE` needs to know of it."""
    out = file_of(source, ENDING) if out is None else out
    if out.suffix != ".safetensors":
        raise SettingsError(f"{out} is no .safetensors file")
    calls.check_folder(out)
    stage(f"reading {source}")
    import torch
    from safetensors.torch import save_file

    from torch_rtx.quantization.model import quantize

    model = module_of(source, load_source(source, dtype=dtype).model).to(device)
    before = set(model.state_dict())
    data = [{name: x.to(device) for name, x in calls.read_tensors(file).items()} for file in inputs]

    def loop(model: torch.nn.Module) -> None:
        for arguments in data:
            model(**arguments)

    stage("running the model")
    quantize(model, config_of(config), loop)
    found = {name: x.cpu().contiguous() for name, x in model.state_dict().items() if name not in before}
    save_file(found, out, {CONFIG: config})
    return Report({"file": str(out), "tensors": len(found)}, f"wrote {out}")


def quantized(source: str, model: Any, given: str) -> Any:
    """The model with its layers quantized.

    Args:
        given: a preset or rules that need no data, or a file that `calibrate` wrote.

    Raises:
        SettingsError: the file is none that `calibrate` wrote, or `source` names no model whose layers are known.
        QuantizationError: see `torch_rtx.quantize`, or the file is of another model.
    """
    from safetensors import safe_open

    from torch_rtx.quantization.model import quantize, restore

    module_of(source, model)
    if not given.endswith(".safetensors"):
        return quantize(model, config_of(given))
    buffers = calls.read_tensors(Path(given))
    with safe_open(given, "pt") as file:
        config = (file.metadata() or {}).get(CONFIG)
    if config is None:
        raise SettingsError(f"{given} is no calibration", hint="`torch-rtx calibrate` writes them")
    try:
        return restore(model, config_of(config), {**model.state_dict(), **buffers})
    except RuntimeError as error:
        if isinstance(error, RtxError):
            raise
        raise SettingsError(f"{given} is the calibration of another model: {error}") from None


def config_of(text: str) -> Any:
    """The preset or the rules that `torch_rtx.quantize` takes."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except ValueError as error:
        raise SettingsError(f"the rules {text} are no JSON: {error}") from None


def module_of(source: str, model: Any) -> Any:
    """`model`, if it consists of layers that can be quantized.

    Raises:
        SettingsError: it does not.
    """
    from torch import nn

    if not isinstance(model, nn.Module) or source.lower().endswith(".onnx"):
        hint = "quantize it where it is made, or build it from module:factory or a Hugging Face folder"
        raise SettingsError(f"the layers of {source} can't be quantized here", hint=hint)
    return model
