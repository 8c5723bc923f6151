"""Attention: softmax(q k^T * scale + mask) v."""

from __future__ import annotations

from collections.abc import Iterator

from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.attention import AttentionConfig, attention_configs, attention_kernel, attention_of
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.cost import LAUNCH, bytes_of, typical
from torch_rtx.lowering.kernels.families.family import SLOWER, Family, Offer, splits
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.lowering.kernels.split import split_anchor
from torch_rtx.lowering.kernels.split_kv import best_kv_splits, combine_attention, split_attention
from torch_rtx.op_work import ANCHORS, flops
from torch_rtx.targets import Arch

REACHED = 0.6  # of the rate of products: weights are computed between them
FASTER = 0.95  # times the kernel's: a library call, where it was measured to be faster


def attention_split(body: Graph, name: str, parts: int) -> Graph:
    """`body`, of the kernel `name`, with the keys of its attention in `parts` ranges (split-KV); see `split_anchor`."""
    anchor = next(node for node in body.nodes if node.op in OPS)
    return split_anchor(body, name, anchor, parts, split_attention, combine_attention, "bias")


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    anchor = region.anchor
    assert anchor is not None
    keys = type_of(argument(anchor, "key")).shape[-2]
    parts, split_us, _ = best_kv_splits(attention_of(region), keys, arch)
    yield from splits(attention_split, region.body, name, parts, split_us, us)
    rates = arch.library
    is_faster = (
        rates is not None
        and flops(anchor, typical) > rates.large["attention"]
        and typical(keys) > rates.many_keys
        and not anchor.arg("is_causal", False)
    )
    yield Offer("library", (FASTER if is_faster else SLOWER) * us)


def _expected_us(region: Region, arch: Arch, config: AttentionConfig) -> float:
    found, anchor = attention_of(region), region.anchor
    assert anchor is not None
    types = [tensor_type(value) for value in region.body.inputs] + list(region.types)
    work = flops(anchor, typical) / (2 if found.causal else 1)
    rate = arch.chip.plain if found.dtype == "f32" else arch.chip.tensor
    us = LAUNCH + max(work / (rate * REACHED * 1e6), sum(map(bytes_of, types)) / (arch.chip.memory * 1e3))
    return max(us, best_kv_splits(found, type_of(argument(anchor, "key")).shape[-2], arch)[2])


OPS = frozenset(op for op, kind in ANCHORS.items() if kind == "attention")
FAMILY = Family("attention", OPS, attention_configs, attention_kernel, _expected_us, attention_split, _others)
