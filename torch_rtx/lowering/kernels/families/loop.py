"""Regions without an anchor: pointwise operations, reductions, and additions in memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch_rtx import accumulation
from torch_rtx.ir import Graph, attr_values
from torch_rtx.lowering.kernels.body_builder import kernel, needed
from torch_rtx.lowering.kernels.families.family import Family, Offer, splits
from torch_rtx.lowering.kernels.gemm_perf_model import LAUNCH_US, streaming_us
from torch_rtx.lowering.kernels.loops import LoopConfig, loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.split_reduction import best_chunks, split_reductions
from torch_rtx.targets import Arch

SORT_LAUNCHES = 8  # of a library call that adds at positions: it sorts these first


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    if accumulation.starts(region.body):
        library_us = us + streaming_us(region.memory_types, arch) + SORT_LAUNCHES * LAUNCH_US
        yield Offer("library", library_us, _with_calls(region.body, name))
        return
    found = best_chunks(region, arch)
    if found is not None:
        chunks, split_us, _ = found
        yield from splits(split_reductions, region.body, name, chunks, split_us, us)


def _with_calls(body: Graph, name: str) -> Graph | None:
    """`body`, of the kernel `name`, with additions in memory as calls after a kernel for all else but positions; None
    if additions are all that it computes."""
    calls = [node for node in body.nodes if accumulation.accumulates(node)]
    positions = needed(body.nodes, [node.arg(key) for node in calls for key in ("index", "indices")])
    apart = [node for node in body.nodes if node in calls or node in positions]
    read = {value.name for node in apart for value in node.inputs} | {v.name for v in attr_values(body.outputs)}
    rest = [node for node in body.nodes if node not in apart]
    results = tuple(value for node in rest for value in node.results if value.name in read)
    if not results:
        return None
    first = kernel(f"{name}_before", body.inputs, needed(body.nodes, results), results)
    return Graph("import", body.inputs, nodes=(first, *apart), outputs=body.outputs)


def _expected_us(region: Region, arch: Arch, config: LoopConfig) -> float:
    found = None if accumulation.starts(region.body) else best_chunks(region, arch)
    if found is not None:
        return found[2]
    return streaming_us(region.moved_types, arch)


FAMILY = Family("loop", frozenset(), lambda region, arch: loop_configs(region), loop_kernel, _expected_us, _others)
