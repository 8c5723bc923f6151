"""Scales of quantization that are no finite numbers: results would be NaN, and nothing would say why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_rtx.backend.fake_quantization import FAKE_QUANTIZATION
from torch_rtx.backend.quantized_ops import definitions
from torch_rtx.errors import CaptureError
from torch_rtx.lowering.location import Locations
from torch_rtx.runtime.subclasses import inner

SCALES = frozenset(("scale", "scales", "amax", "absmax", "row_stats", "col_stats", "stats"))  # names of arguments
_VIEWS = frozenset(("detach", "alias", "view", "reshape", "unsqueeze", "squeeze", "to", "_to_copy"))


def check_scales(program: ExportedProgram, tensors: Mapping[str, Any]) -> None:
    """Raises CaptureError if a tensor of a model that is a scale holds NaN or infinity: an argument of an operator of
    quantization, or a part of a quantized weight.

    Args:
        program: not decomposed.
        tensors: of the model, by name.
    """
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor) and not all(map(_is_finite, inner(tensor))):
            raise _not_finite(name, name.rpartition(".")[0])
    named = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    known, locations = {*definitions(), *FAKE_QUANTIZATION}, Locations()
    for node in program.graph.nodes:
        for source in _scales(node) if node.target in known else ():
            name = named.get(source.name) or ""
            if not _is_finite(tensors.get(name)):
                loc = locations.of(node)
                raise _not_finite(name, loc.module if loc is not None else "")


def _scales(node: fx.Node) -> Iterator[fx.Node]:
    """What the scales of a call are computed from, through views and casts."""
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    given = {**dict(zip((argument.name for argument in arguments), node.args, strict=False)), **node.kwargs}
    for name in SCALES & given.keys():
        value: Any = given[name]
        while isinstance(value, fx.Node) and _is_view(value):
            value = value.args[0]
        if isinstance(value, fx.Node):
            yield value


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket.__name__ in _VIEWS


def _is_finite(tensor: object) -> bool:
    """Whether all elements are; True for integers, 8-bit floats, and where there is no data."""
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return True
    with unset_fake_temporarily():
        return not tensor.is_floating_point() or tensor.itemsize == 1 or bool(tensor.isfinite().all())


def _not_finite(name: str, layer: str) -> CaptureError:
    where = f", in layer {layer}" if layer else ""
    return CaptureError(
        f"{name} has scales of quantization that are NaN or infinite{where}",
        hint="calibrate the model with finite inputs, and quantize it again",
    )
