"""Regions of several independent loops."""

from __future__ import annotations

from torch_rtx.lowering.kernels.families.family import Family
from torch_rtx.lowering.kernels.horizontal import horizontal_configs, horizontal_kernel
from torch_rtx.lowering.kernels.memory_model import streaming_us

FAMILY = Family(
    "horizontal",
    frozenset(),
    lambda region, arch: horizontal_configs(region),
    horizontal_kernel,
    lambda region, arch, config: streaming_us(region.moved_types, arch),
    lambda region, name, arch, us: iter(()),
)
