"""The gradients of attention to few keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch_rtx.ir import TensorType
from torch_rtx.lowering.kernels.attention import Attention
from torch_rtx.lowering.kernels.attention_backward import (
    backward_configs,
    backward_kernel,
    backward_of,
    programs,
    registers,
    row_blocks,
    shared_memory,
)
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.families.family import SLOWER, Family, Offer, splits
from torch_rtx.lowering.kernels.gemm_perf_model import LATENCY_US, LAUNCH_US, streaming_us, typical
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.lowering.kernels.split_queries import split_queries
from torch_rtx.op_work import BACKWARDS
from torch_rtx.targets import Arch

FASTER = 0.95  # a library call relative to the kernel of more keys than this, whose tiles leave few rows to a block
MANY_KEYS = 128
STEP_US = 3.0  # of a block of rows: five products and two sums over keys, most of which wait for the one before
NUM_SPLITS = (2, 4, 8, 16)


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    attn = backward_of(region)
    if attn.range_rows is not None:
        return  # no library has it
    config = backward_configs(region, arch)[0]
    split_us, num_splits = min((_split_us(attn, arch, config, count), count) for count in NUM_SPLITS)
    yield from splits(split_queries, region.body, name, num_splits, split_us, us)
    is_faster = arch.library is not None and (attn.keys.number or 0) > MANY_KEYS
    yield Offer("library", (FASTER if is_faster else SLOWER) * us)


def _expected_us(region: Region, arch: Arch, config: AttentionConfig) -> float:
    attn = backward_of(region)
    steps = row_blocks(attn, config) or math.ceil(typical(attn.rows) / config.rows)
    groups = math.prod(map(typical, programs(attn)))
    return max(_programs_us(attn, arch, config, groups, steps), streaming_us(_moved(region), arch))


def _programs_us(attn: Attention, arch: Arch, config: AttentionConfig, count: int, steps: int) -> float:
    """The time of `count` programs of so many blocks of rows. Those of a multiprocessor hide each other's waiting."""
    held = 32 * config.num_warps * registers(attn, config)
    resident = max(1, min(arch.registers // held, arch.shared // shared_memory(attn, config)))
    turns = math.ceil(count / (arch.chip.processors * resident))
    return LAUNCH_US + turns * (2 * LATENCY_US + steps * STEP_US)


def _split_us(attn: Attention, arch: Arch, config: AttentionConfig, num_splits: int) -> float:
    """The time of both kernels with the queries in ranges."""
    groups, blocks = math.prod(map(typical, attn.groups)), math.ceil(typical(attn.rows) / config.rows)
    steps, keys = math.ceil(blocks / num_splits), attn.keys.number or 0
    parts = math.ceil(blocks / steps)
    sums = 4 * parts * groups * keys * (attn.width + attn.value_width)  # bytes, written and read
    sum_us = LAUNCH_US + LATENCY_US + 2 * sums / (arch.chip.memory * 1e3)
    return _programs_us(attn, arch, config, parts * groups, steps) + sum_us


def _moved(region: Region) -> list[TensorType]:
    """The types of what the kernel reads and writes: not what the forward saved."""
    anchor = region.anchor
    assert anchor is not None
    unread = {anchor.arg("out"), anchor.arg("logsumexp")}
    return [*(tensor_type(value) for value in region.body.inputs if value not in unread), *region.types]


FAMILY = Family("attention_backward", frozenset(BACKWARDS), backward_configs, backward_kernel, _expected_us, _others)
