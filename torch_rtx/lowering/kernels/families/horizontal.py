"""Regions of several independent loops, or of equal products of different matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch_rtx.chips import MODEL_ERROR
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.families import gemm
from torch_rtx.lowering.kernels.families.family import Family, Offer
from torch_rtx.lowering.kernels.gemm_perf_model import config_us, ranked_configs
from torch_rtx.lowering.kernels.horizontal import horizontal_kernel, loops, loops_configs
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.memory_model import streaming_us
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.targets import Arch


def _is_of_products(region: Region) -> bool:
    return region.parts[0].anchor is not None


def _configs(region: Region, arch: Arch) -> Sequence[Any]:
    if not _is_of_products(region):
        return loops_configs(region)
    part, *others = region.parts
    if any(other.body != part.body for other in others):
        raise Unsupported("products of different sizes in one kernel")
    return ranked_configs(part, gemm.gemm_contraction(part), arch, region)


def _kernel(region: Region, name: str, config: Any) -> Kernel:
    if not _is_of_products(region):
        return horizontal_kernel(region, name, loops(region, config))
    writers = [gemm.gemm_writer(part, config) for part in region.parts]
    return horizontal_kernel(region, name, [(one.function(), one.programs) for one in writers], config.gemv)


def _expected_us(region: Region, arch: Arch, config: Any) -> float:
    if not _is_of_products(region):
        return streaming_us(region.moved_types, arch)
    part = region.parts[0]
    return MODEL_ERROR * config_us(part, gemm.gemm_contraction(part), arch, config, region)


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    """Products one after another, by kernels and by library calls."""
    if not _is_of_products(region):
        return
    (part, *_), family, count = region.parts, gemm.FAMILY, len(region.parts)
    configs = family.configs(part, arch)
    if not configs:  # no tile of one fits
        return
    alone_us = family.expected_us(part, arch, configs[0])
    yield Offer("apart", count * alone_us, region.body)
    for offer in family.others(part, name, arch, alone_us):
        if offer.body is None:
            yield Offer(offer.kind, count * offer.expected_us)


FAMILY = Family("horizontal", frozenset(), _configs, _kernel, _expected_us, _others)
