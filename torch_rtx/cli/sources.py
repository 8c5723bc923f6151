"""What a command builds from: an ONNX model, an exported program (.pt2), a folder of a Hugging Face model, or a
function of Python that makes a model."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch_rtx.cli.hugging_face import is_folder, model_of
from torch_rtx.errors import SettingsError

HINT = "models are model.onnx, model.pt2, a folder with config.json, and module:factory, a function to import"
TAKEN = ("model", "args", "kwargs", "dynamic_shapes")
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Source:
    """A model and how it is called, as `torch_rtx.compile` takes them.

    Attributes:
        args: None where the model says what it takes.
        inputs: what it says: values with `name`, `dtype` and `shape`.
    """

    model: Any
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    inputs: Sequence[Any] = ()


def load_source(text: str, fixed: Mapping[str, Any] | None = None, dtype: str | None = None) -> Source:
    """The model that `text` names.

    Args:
        text: a path with the ending .onnx or .pt2, a folder with config.json, or `module:factory`. The function gets no
            arguments and returns a model, or a tuple (model, args), (model, args, kwargs) or (model, args, kwargs,
            dynamic_shapes).
        fixed: values of inputs of an ONNX model, by name.
        dtype: one of `DTYPES`, to which floats of the model and of its inputs are cast; None: they stay.

    Raises:
        SettingsError: `text` names nothing of these, the module can't be imported, or an exported program can't be
            cast.
        OnnxError: see `from_onnx`.
        OSError: a file can't be read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"{dtype!r} is no dtype of models", hint=f"dtypes are {', '.join(DTYPES)}")
    if fixed and not is_onnx(text):
        raise SettingsError("--fix is for ONNX models", hint="fix an argument of another model where it is exported")
    if is_folder(text):
        import torch

        model, inputs = model_of(Path(text), dtype and getattr(torch, dtype))
        return Source(model, inputs=inputs)
    if is_program(text):
        if dtype is not None:
            raise SettingsError("an exported program has its dtypes", hint="cast the model before it is exported")
        return Source(_exported(Path(text)))
    if is_onnx(text):
        from torch_rtx.onnx.module import from_onnx

        model = from_onnx(text, dict(fixed or {}))
        found = Source(model, inputs=model.inputs)
    elif is_function(text):
        name, _, attribute = text.rpartition(":")
        found = _made(_imported(name, attribute)(), text)
    else:
        raise SettingsError(f"{text!r} is no model", hint=HINT)
    return found if dtype is None else _cast(found, dtype)


def _cast(source: Source, name: str) -> Source:
    """The model and the example arguments with other floats."""
    import torch
    from torch.utils import _pytree as pytree

    dtype = getattr(torch, name)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    args, kwargs = pytree.tree_map_only(torch.Tensor, cast, (source.args, source.kwargs))
    model = source.model.to(dtype)
    return replace(source, model=model, args=args, kwargs=kwargs, inputs=getattr(model, "inputs", ()))


def file_of(source: str, suffix: str) -> Path:
    """What is made of `source` where no name is given: beside a file or folder, else in the current folder."""
    if is_folder(source):
        folder = Path(source)
        return Path(f"{folder.resolve() if folder.name in ('', '..') else folder}{suffix}")
    return Path(f"{source.rpartition(':')[2]}{suffix}") if is_function(source) else Path(source).with_suffix(suffix)


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
