"""Parameters of which a rank has a part: which part of the whole tensor, as DTensor divides it.

The manifest has, by name of a parameter, the `shape` of the whole and its `splits`: pairs of a process group and the
dimension that is divided among its ranks, in the order in which they are divided. The first ranks get equal parts, and
the last ones what is left, which may be nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_rtx.ir import Parameter

Places = Mapping[str, tuple[int, int]]


class Part(NamedTuple):
    """What a rank has of a tensor of this shape."""

    shape: tuple[int, ...]
    slices: tuple[slice, ...]


def part_of(facts: Mapping[str, Any], places: Places) -> Part:
    """The part of the whole tensor that a rank has."""
    spans = [(0, size) for size in facts["shape"]]
    for group, dim in facts["splits"]:
        rank, count = places[group]
        start, end = spans[dim]
        step = -(-(end - start) // count)
        low = min(start + rank * step, end)
        spans[dim] = low, min(low + step, end)
    return Part(tuple(facts["shape"]), tuple(slice(start, end) for start, end in spans))


def parts_of(parameters: Sequence[Parameter], shards: Mapping[str, Any], places: Places) -> dict[str, Part]:
    """By every name of a parameter that is divided: its part."""
    found: dict[str, Part] = {}
    for parameter in parameters:
        if parameter.name in shards:
            part = part_of(shards[parameter.name], places)
            found |= dict.fromkeys((parameter.name, *parameter.aliases), part)
    return found


def local(tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    """`tensors`, with this rank's part of those that are whole; others may be parts already."""
    found = dict(tensors)
    for name, part in parts.items():
        if name in found and tuple(found[name].shape) == part.shape:
            found[name] = found[name][part.slices]
    return found
