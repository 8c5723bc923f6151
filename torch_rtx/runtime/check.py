"""Checks of a call: its inputs against the types of a graph, the ranges of its symbols and its profiles; sizes that
data decide, against what the graph says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.errors import CallError, InputError
from torch_rtx.ir import Dim, Expr, Graph, ScalarType, Sym, TensorType, Value, dim_syms, evaluate
from torch_rtx.profiles import Profile, Range


def check_inputs(graph: Graph, inputs: Sequence[Any], device: torch.device, profiles: Sequence[Profile] = ()) -> None:
    """Check a flat list of inputs against the types of `graph.inputs`.

    Args:
        profiles: one of these must hold all sizes; without profiles the ranges of the symbols must.

    Raises:
        InputError: names the first input that does not fit, what was expected and what came; or the sizes that no
            profile holds together, and the profiles.
    """
    if len(inputs) != len(graph.inputs):
        raise InputError(f"expected {len(graph.inputs)} inputs, got {len(inputs)}")
    sizes = _Sizes(profiles)
    later: list[tuple[Dim, int, str]] = []
    for value, given in zip(graph.inputs, inputs, strict=True):
        for dim, size, place in _dims(value, given, device):
            if isinstance(dim, Sym):
                sizes.bind(dim, size, place)
            elif isinstance(dim, Expr):
                later.append((dim, size, place))
            elif dim != size:
                raise InputError(f"{place} is {size}, the engine was built for {dim}")
    for dim, size, place in sorted(later, key=lambda found: needs(found[0])):
        sizes.derive(dim, size, place)
    sizes.check_profiles()


def check_layouts(graph: Graph, inputs: Sequence[Any]) -> None:
    """Check that the tensors in a flat list of inputs have strides, as all types do.

    Raises:
        InputError: names the first that has none.
    """
    for value, given in zip(graph.inputs, inputs, strict=False):
        if isinstance(given, torch.Tensor) and (given.layout != torch.strided or given.is_nested):
            layout = "nested" if given.is_nested else f"of layout {given.layout}"
            raise InputError(f"input {value.name!r} is {layout}, expected a dense tensor", hint="convert it before")


def bind_sizes(graph: Graph, inputs: Sequence[Any]) -> dict[str, int]:
    """The sizes of the symbols that `inputs` determine, by name. The inputs must fit the graph."""
    sizes: dict[str, int] = {}
    pairs: list[tuple[Dim, int]] = []
    for value, given in zip(graph.inputs, inputs, strict=True):
        if isinstance(value.type, TensorType):
            pairs += zip(value.type.shape, given.shape, strict=True)
        elif value.type.dim is not None:
            pairs.append((value.type.dim, int(given)))
    for dim, size in sorted(pairs, key=lambda pair: needs(pair[0])):
        found = invert(dim, size, sizes)
        if found is not None:
            sizes[found[0].name] = found[1]
    return sizes


def _dims(value: Value, given: object, device: torch.device) -> list[tuple[Dim, int, str]]:
    """Check one input except for its sizes, which are returned as (expected, given, description)."""
    name, type_ = f"input {value.name!r}", value.type
    if isinstance(type_, ScalarType):
        kinds = {"int": int, "float": (int, float), "bool": bool, "object": object}
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


class _Sizes:
    """The sizes of the symbols in a call, and which dimension each comes from."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self.profiles = profiles
        self.known: dict[str, int] = {}
        self.places: dict[str, str] = {}

    def bind(self, sym: Sym, size: int, place: str) -> None:
        """Bind `sym` to `size`, which dimension `place` has.

        Raises:
            InputError: another dimension says otherwise, or `size` is out of range.
        """
        name = sym.name
        if self.known.get(name, size) != size:
            raise InputError(f"{place} is {size}, but {self.places[name]} is {self.known[name]} and both are {name}")
        self.known[name], self.places[name] = size, place
        ranges = [profile[name] for profile in self.profiles] or [Range(sym.min, None, sym.max)]
        if not any(found.holds(size) for found in ranges) or size % sym.multiple:
            spans = " or ".join(dict.fromkeys(found.span for found in ranges))
            of = f" in multiples of {sym.multiple}" if sym.multiple != 1 else ""
            raise InputError(f"{place} is {size}, outside its range {name} = {spans}{of}")

    def derive(self, dim: Dim, size: int, place: str) -> None:
        """Check that `dim` is `size`, after binding the symbol that this determines, if one is unbound.

        Raises:
            InputError: it is not.
        """
        found = invert(dim, size, self.known)
        if found is not None:  # no dimension is this symbol itself
            symbol, number = found
            if evaluate(dim, {**self.known, symbol.name: number}) != size:
                raise InputError(f"{place} is {size}, which is not of the form {dim}")
            self.bind(symbol, number, f"{place} is {size} = {dim}, so that {symbol.name}")
        expected = evaluate(dim, self.known)
        if expected is not None and expected != size:
            raise InputError(f"{place} is {size}, expected {dim} = {expected}")

    def check_profiles(self) -> None:
        """Raises InputError if profiles exist and none holds all sizes."""
        known = self.known.items()
        if not self.profiles or any(all(p[name].holds(size) for name, size in known) for p in self.profiles):
            return
        given = ", ".join(f"{self.places[name]} is {size}" for name, size in known)
        lines = [
            f"profile {number}: {', '.join(f'{self.places[name]} {profile[name].span}' for name in self.known)}"
            for number, profile in enumerate(self.profiles)
        ]
        raise InputError(f"{given}: no profile holds these together", hint="\n  ".join(lines))


def _shape(type_: TensorType) -> str:
    return f"[{', '.join(map(str, type_.shape))}]"


def needs(dim: Dim) -> int:
    """How much has to be known before `dim` determines a symbol. In this order, each dim comes after those that it may
    need: a product of two scalar inputs may be the size of a tensor before them."""
    return len({sym.name for sym in dim_syms(dim)}) if isinstance(dim, Expr) else 0


def invert(dim: Dim, size: int, sizes: Mapping[str, int]) -> tuple[Sym, int] | None:
    """The one symbol of `dim` that `sizes` lacks, and its number if `dim` is `size`, rounded down. None if no symbol or
    several are missing, or `dim` does not determine it. Generated code does the same, see `code.solve`."""
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


def stated(size: Any, number: int) -> None:
    """Raises CallError if data decided another size than the type of its value, on which memory and kernels rely."""
    if not isinstance(size, int) or size != number:
        raise CallError(f"the data decide a size of {size}, and the graph has {number}")


def in_range(size: Any, low: int, high: int | None, multiple: int) -> None:
    """Raises CallError if data decided a size that its symbol excludes."""
    if not isinstance(size, int) or size < low or (high is not None and size > high) or size % multiple:
        wanted = f"from {low} to {high}" + (f", a multiple of {multiple}" if multiple > 1 else "")
        raise CallError(f"the data decide a size of {size}, which is not {wanted}")
