"""Attention with modified scores, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch_rtx.chips import ATTENTION_REACHED
from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.attention import attention_of
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, operands_of
from torch_rtx.lowering.kernels.attention_flex import flex_configs, flex_kernel
from torch_rtx.lowering.kernels.attention_flex_backward import gradient_configs, gradient_kernel
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.families.family import Family, Offer, splits
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.memory_model import streaming_us, typical
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.split import split_anchor
from torch_rtx.lowering.kernels.split_kv import best_kv_splits, combine_attention, split_flex
from torch_rtx.op_work import ANCHORS, FLEX, FLEX_PARTIAL, flops
from torch_rtx.targets import Arch

FORWARDS = (FLEX, FLEX_PARTIAL)
SEEN = 0.5  # of the keys, where a mask hides some: lists are data


def flex_split(body: Graph, name: str, num_splits: int) -> Graph:
    """`body`, of the kernel `name`, with its keys in `num_splits` shares; see `split_anchor`."""
    anchor = next(node for node in body.nodes if node.op == FLEX)
    return split_anchor(body, name, anchor, num_splits, split_flex, combine_attention, ())


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    """A split form for few queries; no library has the call."""
    anchor = region.anchor
    if anchor is not None and anchor.op == FLEX:
        num_splits, split_us, _ = best_kv_splits(attention_of(region), type_of(argument(anchor, "key")).shape[-2], arch)
        yield from splits(flex_split, region.body, name, num_splits, split_us, us)


def _expected_us(region: Region, arch: Arch, config: AttentionConfig) -> float:
    attn, anchor = attention_of(region), region.anchor
    assert anchor is not None
    assert attn.modified is not None
    work = flops(anchor, typical) * (SEEN if attn.modified.lists else 1)
    compute_us = arch.chip.launch + work / (arch.chip.rate(operands_of(attn, config)) * ATTENTION_REACHED * 1e6)
    unsplit_us = best_kv_splits(attn, type_of(argument(anchor, "key")).shape[-2], arch)[2] if anchor.op == FLEX else 0.0
    return max(compute_us, streaming_us(region.memory_types, arch), unsplit_us)


def _configs(region: Region, arch: Arch) -> Sequence[AttentionConfig]:
    assert region.anchor is not None
    return flex_configs(region, arch) if region.anchor.op in FORWARDS else gradient_configs(region, arch)


def _kernel(region: Region, name: str, config: AttentionConfig) -> Kernel:
    assert region.anchor is not None
    return (flex_kernel if region.anchor.op in FORWARDS else gradient_kernel)(region, name, config)


OPS = frozenset(op for op, kind in ANCHORS.items() if kind == "attention_flex")
FAMILY = Family("attention_flex", OPS, _configs, _kernel, _expected_us, _others)
