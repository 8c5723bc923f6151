"""What weights come from: a module, a state dict, an ExportedProgram, safetensors files, or an ONNX model."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard, Union

import torch
from torch import nn

from torch_rtx import aten
from torch_rtx.errors import RefitError, RtxError
from torch_rtx.ir import Parameter
from torch_rtx.manifest import Manifest
from torch_rtx.onnx.framed import weights_in
from torch_rtx.runtime.shards import Part
from torch_rtx.runtime.subclasses import attached, is_special, plain_tensors
from torch_rtx.runtime.weight_files import read_weights

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from torch.export import ExportedProgram

Path = str | os.PathLike[str]
WeightSource = Union[
    nn.Module,
    Mapping[str, torch.Tensor],
    "ExportedProgram",
    Path,
    Sequence[Path],
    "onnx.ModelProto",
    "onnx_ir.Model",
]


def tensors_of(
    weights: WeightSource,
    parameters: Sequence[Parameter] = (),
    manifest: Manifest | None = None,
    parts: Mapping[str, Part] | None = None,
) -> dict[str, torch.Tensor]:
    """The named tensors of a source of weights; of a tensor subclass its inner ones, see `subclasses`.

    Args:
        parameters: what they are for. A module also gives plain attributes of these names: tensors that had no data at
            build time.
        manifest: of the engine; it says how to find the weights of an ONNX model.
        parts: of tensors in safetensors files, by name: what to read of them.

    Raises:
        EngineFormatError, FileNotFoundError: see `read_weights`.
        OnnxError, RefitError, IntegrationError: see `onnx.weights.weights_of`.
        RefitError: a module has adapters of PEFT.
        RtxError: `weights` is no source.
    """
    if is_onnx(weights):
        return _tensors_of_onnx(weights, parameters, manifest)
    if isinstance(weights, nn.Module):
        return _tensors_of_module(weights, parameters)
    if isinstance(weights, Mapping):
        inner = [name for name, given in weights.items() if isinstance(given, Mapping)]
        if inner:  # a checkpoint
            problem = f"the weights are no state dict: {', '.join(map(repr, inner[:5]))} in them are mappings"
            raise RtxError(problem, hint=f"pass the state dict, which may be weights[{inner[0]!r}]")
        return plain_tensors(weights)
    if _is_exported(weights):
        wanted = {name for p in parameters for name in (p.name, *p.aliases)}
        others = {name: tensor for name, tensor in weights.constants.items() if name in wanted}
        return plain_tensors({**weights.state_dict, **others})
    hint = "pass a module, a state dict, an ONNX model, or the path of a safetensors or ONNX file"
    if isinstance(weights, bytes) or not isinstance(weights, str | os.PathLike | Sequence):
        raise RtxError(f"weights can't be a {type(weights).__name__}", hint=hint)
    for part in [] if isinstance(weights, str | os.PathLike) else weights:
        if is_onnx(part):
            raise RtxError("an ONNX model is no part of a list of weights", hint="pass the model by itself")
        if not isinstance(part, str | os.PathLike):
            raise RtxError(f"a list of weights has paths of files, not a {type(part).__name__}", hint=hint)
    return read_weights(weights, parts)


def _is_exported(weights: object) -> TypeGuard[ExportedProgram]:
    """Imports nothing: where torch.export is not loaded, nobody has such an object."""
    return isinstance(weights, getattr(sys.modules.get("torch.export"), "ExportedProgram", ()))


def is_onnx(weights: object) -> bool:
    """Whether these are an ONNX model: a path that ends with `.onnx`, an `onnx.ModelProto`, an `onnx_ir.Model`, or what
    `from_onnx` made. Imports nothing."""
    if isinstance(weights, str | os.PathLike):
        return os.path.splitext(os.fspath(weights))[1].lower() == ".onnx"
    home, name = type(weights).__module__, type(weights).__name__
    return home.partition(".")[0] == "onnx_ir" or name == "ModelProto" or home == "torch_rtx.onnx.module"


def _tensors_of_onnx(
    weights: Any, parameters: Sequence[Parameter], manifest: Manifest | None
) -> dict[str, torch.Tensor]:
    types = [(p, (aten.DTYPES[p.type.dtype], p.type.shape)) for p in parameters]
    wanted: dict[str, Any] = {name: type_ for p, type_ in types for name in (p.name, *p.aliases)}
    program, products = (None, {}) if manifest is None else (manifest.onnx, manifest.products)
    if program is not None and program["frame"] is not None and isinstance(weights, str | os.PathLike):
        mapped = weights_in(weights, program, wanted)
        if mapped is not None:
            return mapped
    from torch_rtx.onnx.weights import weights_of  # imports onnx_ir, which is optional

    return weights_of(weights, wanted, program, products)


def _tensors_of_module(module: nn.Module, parameters: Sequence[Parameter]) -> dict[str, torch.Tensor]:
    """Also the buffers that its state dict leaves out, if `parameters` need them.

    Raises:
        RefitError: layers are inside of others, which add to what they compute.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    found = {name: tensor.detach() for name, tensor in plain_tensors(dict(named)).items()}
    for name, tensor in named:
        found |= attached(name, tensor) if is_special(tensor) else {}
    wrong: dict[str, str] = {}
    for parameter in parameters:
        with suppress(AttributeError):
            attribute = attrgetter(parameter.name)(module)
            if isinstance(attribute, torch.Tensor):
                found[parameter.name] = attribute.detach()
                wrong |= _of_a_part(module, parameter.name, attribute)
    if wrong:
        raise RefitError(mismatched=wrong)
    return found


def _of_a_part(module: nn.Module, name: str, tensor: torch.Tensor) -> dict[str, str]:
    """The problem, by `name`, if a layer passes a parameter of one of its parts off as its own, as those of PEFT do: an
    engine would compute without what the layer adds."""
    path, _, last = name.rpartition(".")
    owner = attrgetter(path)(module) if path else module
    if not isinstance(owner, nn.Module) or any(last in own for own in (owner._parameters, owner._buffers, vars(owner))):
        return {}
    if not any(tensor is part for part in owner.parameters()):
        return {}
    remedy = "remove the adapters, or refit from `plain` in `with torch_rtx.integrations.peft.merged(model) as plain:`"
    return {name: f"a {type(owner).__name__} is around it, whose adapters would be lost; {remedy}"}
