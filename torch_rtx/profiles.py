"""Optimization profiles: joint ranges of an engine's dynamic input sizes, and the sizes to optimize for.

A *profile* has a `Range` for each symbol of the inputs. A call fits a profile if all of its sizes are in the ranges. In
the graph, a symbol's range spans all profiles, and its typical value is the `opt` of the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch_rtx.errors import InvalidIR
from torch_rtx.ir import Dim, Graph, TensorType, Type, dim_syms, evaluate, type_dims


class Range(NamedTuple):
    """The sizes from `min` to `max` (None: unbounded), and the size to optimize for, `opt` (None: unknown)."""

    min: int
    opt: int | None
    max: int | None

    def __str__(self) -> str:
        return self.span if self.opt is None else f"{self.span} (opt {self.opt})"

    @property
    def span(self) -> str:
        """The range without `opt`, as text."""
        return f"{self.min}..{self.end}"

    @property
    def end(self) -> float:
        """`max` as a number."""
        return math.inf if self.max is None else self.max

    def holds(self, size: int) -> bool:
        """Whether `size` is in the range."""
        return self.min <= size <= self.end


Profile = Mapping[str, Range]  # by the name of the symbol
Shape = tuple[int | Range, ...]


def own_profile(graph: Graph) -> dict[str, Range]:
    """The profile of the ranges in a graph's own symbols; empty if all input sizes are static."""
    syms = {sym.name: sym for value in graph.inputs for dim in _sizes(value.type) for sym in dim_syms(dim)}
    return {name: Range(sym.min, sym.typical, sym.max) for name, sym in sorted(syms.items())}


def profiles_of(graph: Graph, given: Sequence[Profile]) -> tuple[Profile, ...]:
    """The profiles of an engine: those `given` by its manifest, else its graph's own, if a size is dynamic."""
    own = own_profile(graph)
    return tuple(given) or ((own,) if own else ())


def shapes(graph: Graph, profile: Profile) -> dict[str, Shape]:
    """The shape of each input in a profile, by name; (size,) for an integer input. The range of an expression goes from
    its value for the smallest sizes to its value for the largest."""
    ends = [{name: number for name, r in profile.items() if (number := r[end]) is not None} for end in range(3)]

    def size(dim: Dim) -> int | Range:
        if isinstance(dim, int):
            return dim
        low, opt, high = (evaluate(dim, known) for known in ends)
        assert low is not None  # every range has a min
        return Range(low, opt, high)

    return {value.name: tuple(map(size, _sizes(value.type))) for value in graph.inputs}


def _sizes(type_: Type) -> tuple[Dim, ...]:
    """The dims whose sizes a call determines."""
    return type_.shape if isinstance(type_, TensorType) else type_dims(type_)


def shapes_text(found: Mapping[str, Shape]) -> str:
    """The dynamic shapes in one line."""
    varying = {name: shape for name, shape in found.items() if any(isinstance(size, Range) for size in shape)}
    return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in varying.items())


def check_profiles(graph: Graph, profiles: Sequence[Profile]) -> None:
    """Raises InvalidIR unless each profile has a range for each symbol of the inputs, within the symbol's own range."""
    own = own_profile(graph)
    for number, profile in enumerate(profiles):
        if profile.keys() != own.keys() or not own:
            raise InvalidIR(f"profile {number} is of {', '.join(profile) or 'nothing'}, the inputs have {list(own)}")
        for name, found in profile.items():
            opt = found.min if found.opt is None else found.opt
            if not own[name].min <= found.min <= opt <= found.end <= own[name].end:
                raise InvalidIR(f"profile {number} has {name} = {found}, the inputs have {own[name]}")


def read_profiles(value: Any) -> tuple[dict[str, Range], ...]:
    """The profiles in the JSON of a manifest.

    Raises:
        TypeError: the JSON has another structure.
    """
    if type(value) is not list or not all(type(profile) is dict for profile in value):
        raise TypeError("expected a list of objects")
    return tuple({name: _range(numbers) for name, numbers in profile.items()} for profile in value)


def _range(numbers: Any) -> Range:
    fits = type(numbers) is list and len(numbers) == 3 and type(numbers[0]) is int
    if not fits or not all(number is None or type(number) is int for number in numbers):
        raise TypeError("expected a range [min, opt, max]")
    return Range(*numbers)
