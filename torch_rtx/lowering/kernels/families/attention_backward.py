"""The gradients of attention to few keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch_rtx.chips import LATENCY_US, SLOWER
from torch_rtx.ir import TensorType
from torch_rtx.lowering.kernels.attention_backward import (
    backward_configs,
    backward_kernel,
    backward_of,
    registers,
    row_blocks,
    shared_memory,
)
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.families.family import Family, Offer
from torch_rtx.lowering.kernels.memory_model import streaming_us, typical
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.op_work import ATTENTION_BACKWARD
from torch_rtx.targets import Arch

FASTER = 0.95  # a library call relative to the kernel of more keys than this, whose tiles leave few rows to a block
MANY_KEYS = 128
STEP_US = 3.0  # of a block of rows: five products and two sums over keys, most of which wait for the one before
OTHER_REGISTERS = 48  # of a thread: addresses, operands, and what a product needs twice


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    keys = backward_of(region).keys.number or 0
    yield Offer("library", (FASTER if "wgmma" in arch.features and keys > MANY_KEYS else SLOWER) * us)


def _expected_us(region: Region, arch: Arch, config: AttentionConfig) -> float:
    attn = backward_of(region)
    steps = row_blocks(attn, config) or math.ceil(typical(attn.rows) / config.rows)
    held = 32 * config.num_warps * (registers(attn, config) + OTHER_REGISTERS)
    resident = max(1, min(arch.registers // held, arch.shared // shared_memory(attn, config)))
    turns = math.ceil(math.prod(map(typical, attn.groups)) / (arch.chip.processors * resident))
    return max(arch.chip.launch + turns * (2 * LATENCY_US + steps * STEP_US), streaming_us(_moved(region), arch))


def _moved(region: Region) -> list[TensorType]:
    """The types of what the kernel reads and writes: not what the forward saved."""
    anchor = region.anchor
    assert anchor is not None
    unread = {anchor.arg("out"), anchor.arg("logsumexp")}
    return [*(tensor_type(value) for value in region.body.inputs if value not in unread), *region.types]


FAMILY = Family(
    "attention_backward", frozenset((ATTENTION_BACKWARD,)), backward_configs, backward_kernel, _expected_us, _others
)
