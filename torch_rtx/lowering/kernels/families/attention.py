"""Attention: softmax(q k^T * scale + mask) v."""

from __future__ import annotations

from collections.abc import Iterator

from torch_rtx.chips import ATTENTION_LEAST_US, ATTENTION_REACHED, FASTER, MANY_KEYS, SLOWER
from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.attention import attention_of
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, attention_configs, operands_of
from torch_rtx.lowering.kernels.attention_forward import attention_kernel
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.families.family import Family, Offer, splits
from torch_rtx.lowering.kernels.memory_model import streaming_us, typical
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.split import split_anchor
from torch_rtx.lowering.kernels.split_kv import best_kv_splits, combine_attention, split_attention
from torch_rtx.op_work import ANCHORS, ATTENTION, ATTENTION_FORWARD, flops
from torch_rtx.targets import Arch


def attention_split(body: Graph, name: str, num_splits: int) -> Graph:
    """`body`, of the kernel `name`, with its keys split into `num_splits` (split-KV); see `split_anchor`."""
    anchor = next(node for node in body.nodes if node.op in OPS)
    return split_anchor(body, name, anchor, num_splits, split_attention, combine_attention, ("sink",))


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    anchor = region.anchor
    assert anchor is not None
    keys = type_of(argument(anchor, "key")).shape[-2]
    if anchor.op != ATTENTION_FORWARD:  # whose statistic a split form would have to combine, too
        num_splits, split_us, _ = best_kv_splits(attention_of(region), keys, arch)
        yield from splits(attention_split, region.body, name, num_splits, split_us, us)
    if anchor.op == ATTENTION:
        return  # no library has it
    is_faster = (
        "wgmma" in arch.features
        and flops(anchor, typical) > ATTENTION_LEAST_US * arch.chip.tensor * 1e6
        and typical(keys) > MANY_KEYS
        and not anchor.arg("is_causal", False)
    )
    yield Offer("library", (FASTER if is_faster else SLOWER) * us)


def _expected_us(region: Region, arch: Arch, config: AttentionConfig) -> float:
    found, anchor = attention_of(region), region.anchor
    assert anchor is not None
    keys = type_of(argument(anchor, "key")).shape[-2]
    share = 0.5 if found.causal else 1.0
    if found.band is not None:  # the blocks of keys that a block of rows sees
        share = min((found.band[1] - found.band[0] + config.rows + config.keys) / typical(keys), 1.0)
    work = share * flops(anchor, typical)
    _, _, unsplit_us = best_kv_splits(found, keys, arch)
    compute_us = arch.chip.launch + work / (arch.chip.rate(operands_of(found, config)) * ATTENTION_REACHED * 1e6)
    return max(compute_us, streaming_us(region.memory_types, arch), unsplit_us)


OPS = frozenset(op for op, kind in ANCHORS.items() if kind == "attention")
FAMILY = Family("attention", OPS, attention_configs, attention_kernel, _expected_us, _others)
