"""Attention in a band: a mask by which queries see only keys near their own position, as in sliding windows, becomes
two numbers. The kernel skips blocks of keys outside of the band, and reads or computes no mask.

Masks are evaluated; those of open sizes stay. So do bands of more than half of the keys, where libraries may be faster,
and those of few queries, whose keys are split.
"""

from __future__ import annotations

import math

import torch

from torch_rtx.ir import Dim, Graph, Node, Value
from torch_rtx.lowering.constants import Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.attention import DTYPES, MAX_WIDTH
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.split_kv import MAX_QUERIES
from torch_rtx.lowering.passes.simplify_masks import visible_keys
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.op_work import ATTENTION, SDPA

GAIN = 2  # times as many keys as the band has


def attend_in_bands(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    constants, known = Constants(graph), dict[tuple[str, Dim, Dim], tuple[int, int] | None]()

    def band_of(node: Node) -> tuple[int, int] | None:
        """The band that the mask of a call is, computed once for all layers."""
        mask, asked = node.arg("attn_mask"), any(node.arg(name) for name in ("is_causal", "dropout_p", "band"))
        if asked or not isinstance(mask, Value) or not (node.arg("bias") is node.arg("fill") is None):
            return None
        queries, keys = (type_of(argument(node, name)).shape[-2] for name in ("query", "key"))
        key = mask.name, queries, keys
        if key not in known:
            known[key] = _band(constants.find(mask), queries, keys)
        return known[key]

    def visit(node: Node, rewriter: Rewriter) -> bool:
        band = band_of(node) if node.op in (SDPA, ATTENTION) else None
        if band is None:
            return False
        query, scale = type_of(argument(node, "query")), node.arg("scale")
        width = query.shape[-1]
        if query.dtype not in DTYPES or not isinstance(width, int) or not 0 < width <= MAX_WIDTH:
            return False
        given = {
            **{name: argument(node, name) for name in ("query", "key", "value")},
            "scale": 1 / math.sqrt(width) if scale is None else scale,
            **{name: attr for name in ("enable_gqa", "sink") if (attr := node.arg(name))},
            "band": band,
        }
        current = {k: rewriter.current(v) if isinstance(v, Value) else v for k, v in given.items()}
        rewriter.keep(Node("op", ATTENTION, tuple(current.items()), node.outputs, None, node.loc))
        return True

    return rewrite(graph, infer, visit)


def _band(mask: torch.Tensor | None, queries: Dim, keys: Dim) -> tuple[int, int] | None:
    """The band that a mask is, if it lets each query see a key, and adds nothing to the scores of keys."""
    if mask is None or not isinstance(queries, int) or not isinstance(keys, int) or queries <= MAX_QUERIES:
        return None
    if mask.shape[-2:] != (queries, keys) or mask.numel() != queries * keys:
        return None
    mask = mask.reshape(queries, keys)
    seen = visible_keys(mask)
    if not bool(seen.any(-1).all()) or (mask.dtype != torch.bool and bool((mask[seen] != 0).any())):
        return None
    rows, ones = torch.arange(queries), seen.to(torch.uint8)
    first = int((ones.argmax(-1) - rows).min())
    last = int((keys - 1 - ones.flip(-1).argmax(-1) - rows).max())
    is_band = seen.equal(torch.ones_like(seen).tril(last).triu(first))
    return (first, last) if is_band and GAIN * (last - first + 1) <= keys else None
