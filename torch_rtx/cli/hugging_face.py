"""Folders of Hugging Face models, with `config.json` and weights as safetensors: the model, and the inputs it takes.

Of the packages that torch_rtx works with, this module alone imports transformers.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_rtx.errors import SettingsError

CONFIG = "config.json"


@dataclass(frozen=True)
class ModelInput:
    """An input of a model, as `backend.onnx_models.declared_inputs` takes it; a name in `shape` is an open size."""

    name: str
    dtype: Any
    shape: tuple[int | str, ...]
    optional: bool = False

    @property
    def argument(self) -> str:
        """The parameter of `forward`."""
        return self.name

    @property
    def kind(self) -> Any:
        """Its class."""
        import torch

        return torch.Tensor


def is_folder(text: str) -> bool:
    """`text` is the path of a folder with a model."""
    return Path(text, CONFIG).is_file()


def has_weights(folder: Path) -> bool:
    """The folder has weights as safetensors: others, which are pickles, are not read."""
    return any(folder.glob("*.safetensors"))


def model_of(folder: Path, dtype: Any) -> tuple[Any, list[ModelInput]]:
    """The model in a folder, in evaluation mode, and its inputs. Its weights are random if the folder has none.

    Args:
        dtype: of the model; None: the one that the folder says.

    Raises:
        SettingsError: transformers is not installed, or the folder has no model of it, or none whose inputs are known.
        OSError: a file can't be read.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        hint = "pip install transformers"
        raise SettingsError(f"{folder} is a model of transformers, which is not installed", hint=hint) from None
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        says = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{folder / CONFIG} can't be read: {error}") from None
    names = says.get("architectures") or [] if isinstance(says, dict) else []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if kind is None:
        what = f"of the architecture {names[0]!r}, which this transformers lacks" if names else "without architectures"
        hint = "build a model of another library from module:factory, a function that makes it"
        raise SettingsError(f"{folder / CONFIG} describes a model {what}", hint=hint)
    try:
        model = _made(kind, folder, dtype)
    except OSError:
        raise
    except Exception as error:  # of whatever the folder leads to
        problem = f"transformers can't make the model of {folder}: {type(error).__name__}: {error}"
        raise SettingsError(problem) from error
    return model, list(_inputs(model, folder))


def _made(kind: Any, folder: Path, dtype: Any) -> Any:
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # `torch.export` can't return a cache of keys and values
    if has_weights(folder):
        given = {"local_files_only": True, "use_safetensors": True, "dtype": dtype or "auto"}
        return kind.from_pretrained(folder, config=config, **given).eval()
    return kind(config).to(dtype or config.dtype).eval()


def _inputs(model: Any, folder: Path) -> Iterator[ModelInput]:
    import torch

    taken, config, main = inspect.signature(model.forward).parameters, model.config, model.main_input_name
    if main == "pixel_values":
        size = _of(config, "image_size")
        if size is not None:
            height, width = size if isinstance(size, list | tuple) else (size, size)
            yield ModelInput(main, model.dtype, ("batch", _of(config, "num_channels") or 3, height, width))
            return
        yield ModelInput(main, model.dtype, ("batch", _of(config, "num_channels") or 3, "height", "width"))
    elif main == "input_ids":
        yield ModelInput(main, torch.int64, ("batch", "sequence"))
        if "attention_mask" in taken:
            yield ModelInput("attention_mask", torch.int64, ("batch", "sequence"))
        if "decoder_input_ids" in taken:
            yield ModelInput("decoder_input_ids", torch.int64, ("batch", "decoder_sequence"))
    elif main == "input_values":
        yield ModelInput(main, model.dtype, ("batch", "samples"))
    else:
        hint = "build it from module:factory, a function that returns the model and example arguments"
        raise SettingsError(f"the inputs of {folder} ({main}) are not known", hint=hint)


def inputs_named(model: Any, declared: Sequence[ModelInput], ranks: Mapping[str, int]) -> list[ModelInput]:
    """The inputs of a model, and those which the command line gives shapes of these ranks.

    Raises:
        SettingsError: the model takes no such input.
    """
    import torch

    known, taken = {value.name for value in declared}, inspect.signature(model.forward).parameters
    more = []
    for name, rank in ranks.items():
        if name not in taken:
            raise SettingsError(f"the model has no input {name!r}", hint=f"it takes {', '.join(taken)}")
        if name not in known:
            dtype = torch.int64 if name.endswith(("_ids", "_mask")) else model.dtype
            more.append(ModelInput(name, dtype, tuple(f"{name}_{axis}" for axis in range(rank))))
    return [*declared, *more]


def _of(config: Any, name: str) -> Any:
    """A value of a configuration, or of that of its vision model."""
    found = getattr(config, name, None)
    return getattr(getattr(config, "vision_config", None), name, None) if found is None else found
