"""Regions without an anchor: pointwise operations, reductions, and additions in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from torch_rtx import accumulation
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, attr_values
from torch_rtx.lowering.kernels.body_builder import kernel, needed
from torch_rtx.lowering.kernels.families.family import Family, Offer, splits
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.loops import LoopConfig, loop_configs, loop_kernel, loop_operations
from torch_rtx.lowering.kernels.memory_model import streaming_us, typical
from torch_rtx.lowering.kernels.region import Region, region, tensor_type
from torch_rtx.lowering.kernels.row_blocks import BlockConfig, block_configs, block_kernel, row_blocks
from torch_rtx.lowering.kernels.row_model import ranked
from torch_rtx.lowering.kernels.split_columns import (
    PROGRAMS_PER_PROCESSOR,
    best_block,
    best_pixels,
    separate_columns,
    split_columns,
    sums_rows,
)
from torch_rtx.lowering.kernels.split_reduction import best_chunks, reduces, split_by_blocks, split_reductions
from torch_rtx.targets import Arch

SORT_LAUNCHES = 8  # of a library call that adds at positions: it sorts these first
BLOCKED = 0.9  # times as long as chunks of channels take blocks of pixels, whose elements are neighbours in memory
PUT_LAUNCHES = 2  # of one that puts values there: it copies what it starts from first


def _with_calls(body: Graph, name: str) -> Graph | None:
    """`body`, of the kernel `name`, with additions in memory as calls after a kernel for all else but positions; None
    if additions are all that it computes."""
    calls = [node for node in body.nodes if accumulation.scatters(node)]
    positions = needed(body.nodes, [node.arg(key) for node in calls for key in ("index", "indices")])
    apart = [node for node in body.nodes if node in calls or node in positions]
    read = {value.name for node in apart for value in node.inputs} | {v.name for v in attr_values(body.outputs)}
    rest = [node for node in body.nodes if node not in apart]
    results = tuple(value for node in rest for value in node.results if value.name in read)
    if not results:
        return None
    first = kernel(f"{name}_before", body.inputs, needed(body.nodes, results), results)
    return Graph("import", body.inputs, nodes=(first, *apart), outputs=body.outputs)


def _calls_us(found: Region, arch: Arch) -> float:
    """What additions take as calls: those that make a new tensor copy all of it first."""
    calls = [node for node in found.body.nodes if accumulation.scatters(node)]
    copied = [tensor_type(value) for node in calls if not node.writes for value in node.results]
    launches = (SORT_LAUNCHES if accumulation.accumulates(node) else PUT_LAUNCHES - node.writes for node in calls)
    return streaming_us(copied, arch) + sum(launches) * arch.chip.launch


def _configs(found: Region, arch: Arch) -> Sequence[LoopConfig]:
    """None for a loop over rows and sums over these, which no single kernel computes."""
    if accumulation.starts(found.body):
        return loop_configs(found)
    mixed = len({max(one.axes) == len(one.shape) - 1 for one in found.reductions}) > 1
    try:
        if mixed:  # of a transposed tensor, rows are columns
            loop_operations(found)
        loops = loop_configs(found)
    except Unsupported:
        return () if mixed and any(map(sums_rows, found.body.nodes)) else block_configs(found)
    return [*block_configs(found), *loops] if _fills(found, arch) else ranked(found, loops, arch)


def _fills(found: Region, arch: Arch) -> bool:
    """Blocks of rows, where loops are possible as well, are enough for all processors."""
    try:
        blocks = row_blocks(found)
    except Unsupported:
        return False
    return typical(blocks.number) * blocks.tiles >= PROGRAMS_PER_PROCESSOR * arch.chip.processors


def _kernel(found: Region, name: str, config: LoopConfig) -> Kernel:
    return block_kernel(found, name, config) if isinstance(config, BlockConfig) else loop_kernel(found, name, config)


def _others(found: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    if accumulation.starts(found.body):
        yield Offer("library", us + _calls_us(found, arch), _with_calls(found.body, name))
        return
    if us == inf:
        yield from _with_columns(found.body, name, arch)
        return
    chunks = best_chunks(found, arch)
    if chunks is not None:
        yield from splits(split_reductions, found.body, name, chunks[0], chunks[1], us)
        pixels = best_pixels(found.body, arch)
        if pixels is not None:
            yield from splits(split_by_blocks, found.body, name, pixels, BLOCKED * chunks[1], us)
    if all(sums_rows(node) for node in found.body.nodes if reduces(node)):
        block = best_block(found.body, arch)
        if block is not None:
            yield from splits(split_columns, found.body, name, *block, us)


def _with_columns(body: Graph, name: str, arch: Arch) -> Iterator[Offer]:
    """The tactics of a loop over rows and sums over these."""
    form = separate_columns(body, name)
    rows, columns = form.nodes
    assert rows.body is not None
    assert columns.body is not None
    us, chunks = _expected_us(region(rows.body), arch, None), best_chunks(region(columns.body), arch)
    if chunks is not None and chunks[0] > 1 and chunks[1] < chunks[2]:
        us += chunks[1]
        form = replace(form, nodes=(rows, *split_reductions(columns.body, columns.op, chunks[0]).nodes))
    else:
        us += _expected_us(region(columns.body), arch, None)
    yield Offer("separate", us, form)
    block = best_block(body, arch)
    if block is not None:
        yield Offer("split", block[1], split_columns(body, name, block[0]))


def _expected_us(found: Region, arch: Arch, config: object) -> float:
    chunks = None if accumulation.starts(found.body) else best_chunks(found, arch)
    return streaming_us(found.moved_types, arch) if chunks is None else chunks[2]


FAMILY = Family("loop", frozenset(), _configs, _kernel, _expected_us, _others)
