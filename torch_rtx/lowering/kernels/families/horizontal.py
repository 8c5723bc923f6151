"""Regions of several independent loops."""

from __future__ import annotations

from torch_rtx.lowering.kernels.families.family import Family
from torch_rtx.lowering.kernels.horizontal import horizontal_kernel, part_configs
from torch_rtx.lowering.kernels.memory_model import streaming_us

FAMILY = Family(
    "horizontal",
    frozenset(),
    lambda region, arch: part_configs(region.parts[0]),
    horizontal_kernel,
    lambda region, arch, config: streaming_us(region.memory_types, arch),
    lambda region, name, arch, us: iter(()),
)
