"""Attention in a band: a mask by which queries see only keys near their own position, as in sliding windows, becomes
two numbers. The kernel skips blocks of keys outside of the band, and no mask is left but what else hides keys.

Masks are formulas of positions, for any sizes, or are evaluated. Bands of more than half of the keys stay masks, since
libraries may be faster there, and so do those in float32, where they are, and of few queries, whose keys are split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from torch_rtx.dtypes import HALVES
from torch_rtx.ir import Dim, Graph, Node, Value
from torch_rtx.lowering.constants import Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.attention import DTYPES, MAX_WIDTH
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.index import from_dim, is_natural
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.lowering.kernels.split_kv import MAX_QUERIES
from torch_rtx.lowering.passes.simplify_masks import CONJUNCTIONS, condition_of, visible_keys
from torch_rtx.lowering.positions import AtLeastZero, Positions
from torch_rtx.lowering.rewrite import Rewriter, rewrite
from torch_rtx.op_work import ATTENTION, SDPA

EXPAND = "aten.expand.default"
GAIN = 2  # times as many keys as the band has
KEPT = ("query", "key", "value", "scale", "enable_gqa", "sink")  # arguments of both calls


@dataclass
class _Band:
    """What a mask hides.

    Attributes:
        first, last: as in `torch_rtx.attention`.
        others: masks that hide more.
        rest: all these as one, once it is computed.
    """

    first: int
    last: int
    others: list[Value]
    rest: Value | None = None

    def mask(self, node: Node, rewriter: Rewriter) -> dict[str, Value]:
        """The argument of `node` for the masks that hide more."""
        if self.rest is None and self.others:
            first, *others = self.others
            rest = rewriter.current(first)
            for other in others:
                rest = rewriter.emit(CONJUNCTIONS[0], node.loc, self=rest, other=rewriter.current(other))
            assert isinstance(rest, Value)
            self.rest = rest
        return {} if self.rest is None else {"attn_mask": self.rest}


def attend_in_bands(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    masks, found = _Masks(graph), dict[tuple[object, ...], _Band | None]()

    def band_of(node: Node) -> _Band | None:
        """The band of a call, evaluated once for all layers."""
        mask, asked = node.arg("attn_mask"), any(node.arg(name) for name in ("is_causal", "dropout_p", "band"))
        if asked or not isinstance(mask, Value) or not (node.arg("bias") is node.arg("fill") is None):
            return None
        zeros = node.op == SDPA or node.arg("sink") is not None
        queries, keys = (type_of(argument(node, name)).shape[-2] for name in ("query", "key"))
        key = mask.name, queries, keys, zeros
        if key not in found:
            found[key] = masks.band(mask, queries, keys, zeros)
        return found[key]

    def visit(node: Node, rewriter: Rewriter) -> bool:
        band = band_of(node) if node.op in (SDPA, ATTENTION) else None
        if band is None:
            return False
        query, value = (type_of(argument(node, name)) for name in ("query", "value"))
        width, wide = query.shape[-1], value.shape[-1]
        if not isinstance(width, int) or not isinstance(wide, int) or not 0 < width <= MAX_WIDTH or wide > MAX_WIDTH:
            return False
        if query.dtype not in (HALVES if node.op == SDPA else DTYPES):
            return False
        given = {name: attr for name, attr in node.args if name in KEPT and attr is not None}
        given = {"scale": 1 / math.sqrt(width), **given, **band.mask(node, rewriter), "band": (band.first, band.last)}
        args = tuple((name, given[name]) for name in (*KEPT[:3], "attn_mask", *KEPT[3:], "band") if name in given)
        rewriter.keep(Node("op", ATTENTION, args, node.outputs, None, node.loc))
        return True

    return rewrite(graph, infer, visit)


class _Masks:
    """What is known of the masks of a graph."""

    def __init__(self, graph: Graph) -> None:
        self._constants, self._positions = Constants(graph), Positions(graph)

    def band(self, mask: Value, queries: Dim, keys: Dim, zeros: bool) -> _Band | None:
        """The band that `mask`, or a part of it, is; None if there is none, or if it hides too little.

        Args:
            zeros: a query that sees no key is 0, rather than NaN.
        """
        first, last, others = -math.inf, math.inf, list[Value]()
        condition, _ = condition_of(mask, self._constants)
        for part in self._parts(condition):
            ends = self._ends(part, queries, keys)
            if ends is None:
                others.append(part)
            else:
                first, last = max(first, ends[0]), min(last, ends[1])
        is_narrow = 0 < GAIN * (last - first + 1) <= typical(keys) and typical(queries) > MAX_QUERIES
        ahead = from_dim(keys) - from_dim(queries)
        most = ahead.number if ahead.number is not None else 0 if is_natural(ahead) else -math.inf
        sees_some = not others and last >= 0 and first <= most  # each query
        is_same = sees_some or (zeros and type_of(mask).dtype == "bool")
        return _Band(int(first), int(last), others) if is_narrow and is_same else None

    def _parts(self, mask: Value) -> Iterator[Value]:
        """The masks that together are `mask`."""
        node, parts = self._constants.producer.get(mask.name), [mask]
        if node is not None and node.op in (EXPAND, *CONJUNCTIONS):
            operands = [value for name in ("self", "other") if isinstance(value := node.arg(name), Value)]
            same = [type_of(one).shape[-2:] for one in operands] == [type_of(mask).shape[-2:]]
            both = [type_of(one).dtype for one in operands] == ["bool", "bool"]
            parts = operands if (same if node.op == EXPAND else both) else parts
        for part in parts:
            yield from (part,) if part is mask else self._parts(part)

    def _ends(self, mask: Value, queries: Dim, keys: Dim) -> tuple[float, float] | None:
        """The ends of the band that a mask is, if it adds nothing to the scores of keys in it. One that hides nothing
        has infinite ends."""
        position, element = self._positions.element(mask) if type_of(mask).dtype == "bool" else ((), None)
        if element == ONE:
            return -math.inf, math.inf
        if isinstance(element, AtLeastZero) and type_of(mask).shape[-2:] == (queries, keys):
            distance = position[-1] - position[-2]
            first, last = (ZERO - (element.index - distance)).number, (element.index + distance).number
            if first is not None:
                return first, math.inf
            if last is not None:
                return -math.inf, last
        known = self._constants.find(mask)
        return None if known is None else _ends_of(known, queries, keys)


def _ends_of(mask: torch.Tensor, queries: Dim, keys: Dim) -> tuple[float, float] | None:
    """As `_Masks._ends`, of a mask whose elements are known."""
    if mask.dtype == torch.bool and bool(mask.all()):
        return -math.inf, math.inf
    if mask.shape[-2:] != (queries, keys) or mask.numel() != mask.shape[-2] * mask.shape[-1]:
        return None
    mask = mask.reshape(mask.shape[-2:])
    seen = visible_keys(mask)
    some = seen.any(-1)
    if not bool(some.any()) or (mask.dtype != torch.bool and bool((mask[seen] != 0).any())):
        return None
    rows, ones = torch.arange(len(seen)), seen.to(torch.uint8)
    first = int((ones.argmax(-1) - rows)[some].min())
    last = int((seen.shape[1] - 1 - ones.flip(-1).argmax(-1) - rows)[some].max())
    return (first, last) if seen.equal(torch.ones_like(seen).tril(last).triu(first)) else None
