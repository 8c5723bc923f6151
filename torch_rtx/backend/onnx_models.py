"""ONNX models in place of modules: `compile("model.onnx")`, and the inputs that a model declares."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from torch_rtx.backend.inputs import Input
from torch_rtx.backend.products import products_of
from torch_rtx.errors import InputError
from torch_rtx.ir import is_name
from torch_rtx.runtime.weight_sources import is_onnx

if TYPE_CHECKING:
    from torch_rtx.onnx.module import OnnxInput, OnnxModule

Span = tuple[int, int, int]


def imported(model: Any, args: Any, dynamic_shapes: Any) -> tuple[Any, Any, Any]:
    """The module, the arguments and their dynamic shapes of an ONNX model: a path, an `onnx.ModelProto`, an
    `onnx_ir.Model`, or what `from_onnx` made. Any other model stays as it is, and loads none of these packages."""
    if not isinstance(model, str | os.PathLike) and not is_onnx(model):
        return model, args, dynamic_shapes
    module: Any = model if isinstance(model, nn.Module) else import_module("torch_rtx.onnx.module").from_onnx(model)
    return (module, declared_inputs(module, dynamic_shapes), None) if args is None else (module, args, dynamic_shapes)


def onnx_facts(model: Any, program: ExportedProgram) -> dict[str, Any]:
    """What an engine keeps to find its weights in ONNX models: fields of the manifest."""
    products = products_of(program)
    if not is_onnx(model):
        return {"products": products}
    weights = import_module("torch_rtx.onnx.weights")
    modules = weights.modules_of(model)
    named = {name: {**fact, "module": modules.get(name)} for name, fact in products.items()}
    return {"products": named, "onnx": weights.program_of(model)}


def declared_inputs(module: OnnxModule, sizes: Any) -> tuple[Input, ...]:
    """The inputs that a model needs, of the types and shapes that it says.

    Args:
        sizes: for each name of a size in the model: a size, a tuple of the smallest, the typical and the largest, or a
            `torch.export.Dim` with a range. A size without a name is `<input>_<axis>`.

    Raises:
        InputError: a size is missing, not one of the model's, or not a size.
    """
    if not isinstance(sizes or {}, Mapping):
        raise InputError(
            "without args, dynamic_shapes must give sizes by their names in the ONNX model", hint="{'batch': (1, 4, 8)}"
        )
    given = {str(name): _span(str(name), size) for name, size in (sizes or {}).items()}
    needed = [given for given in module.inputs if not given.optional]
    names = {name: None for value in needed for name in _names(value) if isinstance(name, str)}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise InputError(f"the model has no size {unknown[0]!r}", hint=f"its sizes are {', '.join(names) or 'fixed'}")
    missing = [name for name in names if name not in given]
    if missing:
        example = ", ".join(f"{name!r}: (1, 4, 16)" for name in missing)
        raise InputError(
            f"the model leaves the sizes {', '.join(missing)} open",
            hint=f"give their smallest, typical and largest values: dynamic_shapes={{{example}}}, "
            f"or --size {missing[0]}=1:4:16",
        )
    return tuple(_input(value, given) for value in needed)


def _names(value: OnnxInput) -> list[int | str]:
    """The size of each axis, or its name."""
    if value.kind is not Tensor or value.shape is None or value.dtype is None:
        raise InputError(
            f"the model does not say the type and the rank of input {value.name!r}", hint="give example tensors as args"
        )
    return [f"{value.name}_{axis}" if size is None else size for axis, size in enumerate(value.shape)]


def _span(name: str, size: Any) -> Span:
    """The smallest, the typical and the largest size."""
    if isinstance(size, int):
        return size, size, size
    if isinstance(size, tuple | list) and len(size) == 3 and all(type(one) is int for one in size):
        return size[0], size[1], size[2]
    if type(size) is Dim and isinstance(size.max, int):
        return size.min, size.max, size.max
    raise InputError(f"size {name!r} is {size!r}", hint="give a number, or (smallest, typical, largest)")


def _input(value: OnnxInput, given: Mapping[str, Span]) -> Input:
    names = _names(value)
    spans = [(name, name, name) if isinstance(name, int) else given[name] for name in names]
    shared = {axis: _identifier(name) for axis, name in enumerate(names) if isinstance(name, str)}
    shapes = {key: tuple(span[number] for span in spans) for number, key in enumerate(("min", "opt", "max"))}
    return Input(
        min_shape=shapes["min"],
        opt_shape=shapes["opt"],
        max_shape=shapes["max"],
        dtype=value.dtype,  # type: ignore[arg-type]
        name=value.argument if is_name(value.argument) else None,
        shared_dims=shared,
    )


def _identifier(name: str) -> str:
    """The name of a size as a name of `torch.export.Dim`."""
    found = re.sub(r"\W", "_", name, flags=re.ASCII)
    return found if is_name(found) else f"size_{found}"
