"""Checks of a call: its inputs against the types of a graph and the ranges of its symbols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.errors import InputError
from torch_rtx.ir import Dim, Expr, Graph, ScalarType, Sym, TensorType, Value, evaluate


def check_inputs(graph: Graph, inputs: Sequence[Any], device: torch.device) -> None:
    """Check a flat list of inputs against the types of `graph.inputs`.

    Raises:
        InputError: the first input that does not fit: what was expected and what came.
    """
    if len(inputs) != len(graph.inputs):
        raise InputError(f"expected {len(graph.inputs)} inputs, got {len(inputs)}")
    sizes: dict[str, tuple[int, str]] = {}
    later: list[tuple[Dim, int, str]] = []
    for value, given in zip(graph.inputs, inputs, strict=True):
        for dim, size, place in _dims(value, given, device):
            if isinstance(dim, Sym):
                _check_range(dim, size, place, sizes)
            elif isinstance(dim, Expr):
                later.append((dim, size, place))
            elif dim != size:
                raise InputError(f"{place} is {size}, the engine was built for {dim}")
    for dim, size, place in later:
        _check_derived(dim, size, place, sizes)


def _dims(value: Value, given: object, device: torch.device) -> list[tuple[Dim, int, str]]:
    """Check everything of one input but its sizes; return those as (expected, given, what it is)."""
    name, type_ = f"input {value.name!r}", value.type
    if isinstance(type_, ScalarType):
        kinds = {"int": int, "float": (int, float), "bool": bool}
        if not isinstance(given, kinds[type_.kind]):  # type: ignore[arg-type]
            raise InputError(f"{name} is a {type(given).__name__}, expected {type_.kind}")
        return [] if type_.dim is None else [(type_.dim, int(given), name)]  # type: ignore[call-overload]
    if not isinstance(given, torch.Tensor):
        raise InputError(f"{name} is a {type(given).__name__}, expected a tensor")
    if given.dtype != aten.DTYPES[type_.dtype]:
        raise InputError(f"{name} has dtype {given.dtype}, expected {aten.DTYPES[type_.dtype]}")
    expected = aten.to_torch("Device", type_.device, device)
    if given.device != expected:
        raise InputError(f"{name} is on {given.device}, expected {expected}")
    if given.dim() != len(type_.shape):
        raise InputError(f"{name} has {given.dim()} dimensions, expected {len(type_.shape)}: {_shape(type_)}")
    return [(dim, given.shape[axis], f"dimension {axis} of {name}") for axis, dim in enumerate(type_.shape)]


def _check_range(dim: Sym, size: int, place: str, sizes: dict[str, tuple[int, str]]) -> None:
    if dim.name in sizes and sizes[dim.name][0] != size:
        raise InputError(f"{place} is {size}, but {sizes[dim.name][1]} is {sizes[dim.name][0]} and both are {dim.name}")
    sizes[dim.name] = size, place
    high = math.inf if dim.max is None else dim.max
    if not dim.min <= size <= high or size % dim.multiple:
        of = f" in multiples of {dim.multiple}" if dim.multiple != 1 else ""
        raise InputError(f"{place} is {size}, outside its range {dim.name} = {dim.min}..{high}{of}")


def _check_derived(dim: Dim, size: int, place: str, sizes: dict[str, tuple[int, str]]) -> None:
    known = {name: number for name, (number, _) in sizes.items()}
    found = invert(dim, size, known)
    if found is not None:  # the only place that tells what this symbol is
        symbol, number = found
        if evaluate(dim, {**known, symbol.name: number}) != size:
            raise InputError(f"{place} is {size}, which is not of the form {dim}")
        _check_range(symbol, number, f"{place} is {size} = {dim}, so that {symbol.name}", sizes)
    expected = evaluate(dim, known)
    if expected is not None and expected != size:
        raise InputError(f"{place} is {size}, expected {dim} = {expected}")


def _shape(type_: TensorType) -> str:
    return f"[{', '.join(map(str, type_.shape))}]"


def invert(dim: Dim, size: int, sizes: dict[str, int]) -> tuple[Sym, int] | None:
    """The symbol of `dim` that `sizes` lacks, and the number that makes `dim` about `size`: what generated code does to
    bind its dims (`reference.solve`), in numbers. None where there are none or several, or `dim` does not determine it.
    """
    if isinstance(dim, Sym):
        return (dim, size) if dim.name not in sizes else None
    if isinstance(dim, int) or dim.op not in ("*", "+"):
        return None
    args = [(arg, evaluate(arg, sizes)) for arg in dim.args]
    unknown = [arg for arg, number in args if number is None]
    rest = [number for _, number in args if number is not None]
    if len(unknown) != 1 or (dim.op == "*" and 0 in rest):
        return None
    return invert(unknown[0], size - sum(rest) if dim.op == "+" else size // math.prod(rest), sizes)
