"""The tensors that callers give for the parameters of a graph: found by name, and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from torch_rtx import aten
from torch_rtx.errors import RefitError
from torch_rtx.ir import Parameter, TensorType
from torch_rtx.onnx.framed import aligned
from torch_rtx.runtime.subclasses import outer_name
from torch_rtx.runtime.watch import same_bits


def match(
    parameters: Sequence[Parameter], sources: Mapping[str, torch.Tensor], unused: Collection[str] | None
) -> list[torch.Tensor]:
    """The tensor of each parameter, in order. Indices and masks that no parameter has are ignored: nobody learns them.

    Args:
        unused: names to ignore in `sources`; None: ignore all that no parameter has.

    Raises:
        RefitError: lists all names that are missing, are unexpected or do not fit.
    """
    found, missing, mismatched = [], [], {}
    for parameter in parameters:
        given = [name for name in (parameter.name, *parameter.aliases) if name in sources]
        if not given:
            whole = outer_name(parameter.name)
            if whole != parameter.name and whole in sources:
                mismatched[whole] = (
                    "is not quantized as in the engine: quantize it with the tool that the model was built with"
                )
            else:
                missing.append(parameter.name)
            continue
        tensor = sources[given[0]]
        problem = _problem(tensor, parameter.type)
        for other in given[1:]:
            if problem is None and not _same(tensor, sources[other]):
                problem = f"is tied to {other}, which has other values"
        if problem is not None:
            mismatched[given[0]] = problem
        found.append(tensor)
    known = {*mismatched, *(unused or ()), *(name for p in parameters for name in (p.name, *p.aliases))}
    unlearnt = torch.int64, torch.bool
    unexpected = tuple(n for n in sources if n not in known and getattr(sources[n], "dtype", None) not in unlearnt)
    if missing or mismatched or (unexpected and unused is not None):
        raise RefitError(tuple(missing), unexpected, mismatched)
    return found


def check(parameters: Sequence[Parameter], tensors: Sequence[torch.Tensor]) -> None:
    """Check each tensor against its parameter.

    Raises:
        RefitError: lists all that do not fit.
    """
    problems = {p.name: _problem(tensor, p.type) for p, tensor in zip(parameters, tensors, strict=True)}
    mismatched = {name: problem for name, problem in problems.items() if problem is not None}
    if mismatched:
        raise RefitError((), (), mismatched)


def _problem(tensor: object, type_: TensorType) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"expected a tensor, got {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"expected a dense tensor, got a {'nested' if tensor.is_nested else tensor.layout} one"
    if tuple(tensor.shape) != type_.shape:
        return f"expected shape {list(type_.shape)}, got {list(tensor.shape)}"
    if tensor.dtype != aten.DTYPES[type_.dtype]:
        return f"expected dtype {aten.DTYPES[type_.dtype]}, got {tensor.dtype}"
    return "is on the meta device and has no values" if tensor.is_meta else None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()):
        return True
    return a.shape == b.shape and a.dtype == b.dtype and same_bits(aligned(a), aligned(b.to(a.device)))
