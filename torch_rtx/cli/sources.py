"""What a command builds from: an ONNX model, an exported program (.pt2), or a function of Python that makes a model."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_rtx.errors import SettingsError

HINT = "sources are model.onnx, model.pt2, and module:factory, a function of an importable module"
TAKEN = ("model", "args", "kwargs", "dynamic_shapes")


@dataclass(frozen=True)
class Source:
    """A model and how it is called, as `torch_rtx.compile` takes them; `args` is None where the model says it."""

    model: Any
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None


def load_source(text: str, fixed: Mapping[str, Any] | None = None) -> Source:
    """The model that `text` names.

    Args:
        text: a path with the ending .onnx or .pt2, or `module:factory`. The function gets no arguments and returns a
            model, or a tuple (model, args), (model, args, kwargs) or (model, args, kwargs, dynamic_shapes).
        fixed: values of inputs of an ONNX model, by name.

    Raises:
        SettingsError: `text` names nothing of these, or the module can't be imported.
        OnnxError: see `from_onnx`.
        OSError: a file can't be read.
    """
    if fixed and not is_onnx(text):
        raise SettingsError("--fix is for ONNX models", hint="fix an argument of another model where it is exported")
    if is_onnx(text):
        from torch_rtx.onnx.module import from_onnx

        return Source(from_onnx(text, dict(fixed or {})))
    if is_program(text):
        return Source(_exported(Path(text)))
    if not is_function(text):
        raise SettingsError(f"{text!r} is no model", hint=HINT)
    name, _, attribute = text.rpartition(":")
    return _made(_imported(name, attribute)(), text)


def is_onnx(text: str) -> bool:
    """`text` is the path of an ONNX model."""
    return Path(text).suffix.lower() == ".onnx"


def is_program(text: str) -> bool:
    """`text` is the path of an exported program."""
    return Path(text).suffix.lower() == ".pt2"


def is_function(text: str) -> bool:
    """`text` names a function, as `module:factory`."""
    name, colon, attribute = text.rpartition(":")
    return bool(colon) and all(part.isidentifier() for part in (*name.split("."), attribute))


def _exported(path: Path) -> Any:
    import torch

    with path.open("rb"):  # the error of a file that is not there
        pass
    try:
        return torch.export.load(path)
    except Exception as error:  # of whatever the damage leads to
        problem = f"{path} is no exported program: {type(error).__name__}: {str(error).partition(os.linesep)[0]}"
        raise SettingsError(problem, hint="torch.export.save writes them") from None


def _imported(name: str, attribute: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:  # as `python -m` has it
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # of a module that the user's imports
        raise SettingsError(f"there is no module {error.name!r}", hint=HINT) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        raise SettingsError(f"the module {name} has no function {attribute!r}", hint=HINT)
    return found


def _made(made: Any, text: str) -> Source:
    from torch import nn

    parts = made if isinstance(made, tuple) else (made,)
    if not parts or not isinstance(parts[0], nn.Module) or len(parts) > len(TAKEN):
        raise SettingsError(f"{text} returned no model", hint=f"it returns a model, or ({', '.join(TAKEN)})")
    return Source(*parts)
