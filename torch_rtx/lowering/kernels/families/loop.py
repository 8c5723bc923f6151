"""Loops over elements or rows: pointwise operations and reductions, without an anchor."""

from __future__ import annotations

from collections.abc import Iterator

from torch_rtx.lowering.kernels.cost import LAUNCH, bytes_of
from torch_rtx.lowering.kernels.families.family import Family, Offer, splits
from torch_rtx.lowering.kernels.loops import LoopConfig, loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.lowering.kernels.split_reduction import best_chunks, split_reductions
from torch_rtx.targets import Arch


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    found = best_chunks(region, arch)
    if found is not None:
        parts, split_us, _ = found
        yield from splits(split_reductions, region.body, name, parts, split_us, us)


def _expected_us(region: Region, arch: Arch, config: LoopConfig) -> float:
    found = best_chunks(region, arch)
    if found is not None:
        return found[2]
    types = [tensor_type(value) for value in region.body.inputs] + list(region.types)
    return LAUNCH + sum(map(bytes_of, types)) / (arch.chip.memory * 1e3)


FAMILY = Family(
    "loop", frozenset(), lambda region, arch: loop_configs(region), loop_kernel, _expected_us, split_reductions, _others
)
