"""Regions without an anchor: pointwise operations and reductions."""

from __future__ import annotations

from collections.abc import Iterator

from torch_rtx.lowering.kernels.families.family import Family, Offer, splits
from torch_rtx.lowering.kernels.gemm_perf_model import streaming_us
from torch_rtx.lowering.kernels.loops import LoopConfig, loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.split_reduction import best_chunks, split_reductions
from torch_rtx.targets import Arch


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    found = best_chunks(region, arch)
    if found is not None:
        chunks, split_us, _ = found
        yield from splits(split_reductions, region.body, name, chunks, split_us, us)


def _expected_us(region: Region, arch: Arch, config: LoopConfig) -> float:
    found = best_chunks(region, arch)
    if found is not None:
        return found[2]
    return streaming_us(region.memory_types, arch)


FAMILY = Family("loop", frozenset(), lambda region, arch: loop_configs(region), loop_kernel, _expected_us, _others)
