"""ONNX models in place of modules: `compile("model.onnx")`, and the inputs that a model declares."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
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
    from torch_rtx.onnx.module import OnnxInput

Span = tuple[int, int, int]


def imported(model: Any, args: Any, dynamic_shapes: Any) -> tuple[Any, Any, Any]:
    """The module, the arguments and their dynamic shapes of an ONNX model: a path, an `onnx.ModelProto`, an
    `onnx_ir.Model`, or what `from_onnx` made. Any other model stays as it is, and loads none of these packages."""
    if not isinstance(model, str | os.PathLike) and not is_onnx(model):
        return model, args, dynamic_shapes
    module: Any = model if isinstance(model, nn.Module) else import_module("torch_rtx.onnx.module").from_onnx(model)
    if args is not None:
        return module, args, dynamic_shapes
    return module, declared_inputs(module.inputs, dynamic_shapes), None


def onnx_facts(model: Any, program: ExportedProgram) -> dict[str, Any]:
    """What an engine keeps to find its weights in ONNX models: fields of the manifest."""
    products = products_of(program)
    if not is_onnx(model):
        return {"products": products}
    weights = import_module("torch_rtx.onnx.weights")
    modules = weights.modules_of(model)
    named = {name: {**fact, "module": modules.get(name)} for name, fact in products.items()}
    return {"products": named, "onnx": weights.program_of(model)}


def declared_inputs(inputs: Iterable[OnnxInput], sizes: Any) -> tuple[Input, ...]:
    """The inputs that a model needs, of the types and shapes that it says.

    Args:
        inputs: what the model says of them.
        sizes: for each name of a size in the model: a size, a tuple of the smallest, the typical and the largest, or a
            `torch.export.Dim` with a range. A size without a name is `<input>_<axis>`. A list has the sizes of several
            optimization profiles.

    Raises:
        InputError: a size is missing, not one of the model's, or not a size.
    """
    needed = [given for given in inputs if not given.optional]
    profiles = [_spans(needed, given) for given in (sizes if isinstance(sizes, list) else [sizes or {}])]
    return tuple(_input(value, profiles) for value in needed)


def _spans(needed: Sequence[OnnxInput], sizes: Any) -> dict[str, Span]:
    """The smallest, the typical and the largest size by name, in one profile."""
    if not isinstance(sizes, Mapping):
        raise InputError(
            "without args, dynamic_shapes must give sizes by their names in the ONNX model", hint="{'batch': (1, 4, 8)}"
        )
    given = {str(name): _span(str(name), size) for name, size in sizes.items()}
    names = {name: None for value in needed for name in names_of_axes(value) if isinstance(name, str)}
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
    return given


def names_of_axes(value: OnnxInput) -> list[int | str]:
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


def _input(value: OnnxInput, profiles: Sequence[Mapping[str, Span]]) -> Input:
    names = names_of_axes(value)
    spans = [[(name, name, name) if isinstance(name, int) else given[name] for name in names] for given in profiles]
    shared = {axis: _identifier(name) for axis, name in enumerate(names) if isinstance(name, str)}
    return Input(
        profiles=[tuple(tuple(span[end] for span in axes) for end in range(3)) for axes in spans],  # type: ignore[misc]
        dtype=value.dtype,  # type: ignore[arg-type]
        name=value.argument if is_name(value.argument) else None,
        shared_dims=shared,
    )


def _identifier(name: str) -> str:
    """The name of a size as a name of `torch.export.Dim`."""
    found = re.sub(r"\W", "_", name, flags=re.ASCII)
    return found if is_name(found) else f"size_{found}"
