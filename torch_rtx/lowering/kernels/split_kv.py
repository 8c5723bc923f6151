"""Split-KV attention for few queries over many keys (Flash-Decoding, Dao et al. 2023).

The keys are cut into ranges, which become a leading dimension. The first kernel is one call of
`torch_rtx.attention_partial` (see `aten`): per range the weighted sum of its values, the largest score, and the sum of
the weights, relative to that score. The second kernel rescales the ranges to their common maximum, with a sink to that
of both, adds and divides.

Ranges are equally long. Where their length does not divide the number of keys, padding is added, and masked.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch_rtx.chips import BARRIER_US, LATENCY_US, READ_BYTES
from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.kernels.attention import Attention
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, Values, argument, type_of
from torch_rtx.lowering.kernels.gemm_perf_model import NUM_SPLITS
from torch_rtx.lowering.kernels.memory_model import typical
from torch_rtx.op_work import ATTENTION, ATTENTION_PARTIAL, FLEX_PARTIAL
from torch_rtx.targets import Arch

MAX_QUERIES = 16
KEYS_PER_STEP = 64  # of a program of few rows
PROGRAMS_PER_PROCESSOR = 4


def best_kv_splits(found: Attention, keys: Dim, arch: Arch) -> tuple[int, float, float]:
    """In how many ranges the keys of an attention are best cut; and the times, in us, of the kernels for that and of
    one kernel for all keys. (1, infinity, 0) where the keys are not cut: with many queries, causal, or in a band."""
    on = arch.chip
    by_place = found.causal or found.band is not None
    if by_place or not isinstance(found.queries, int) or found.queries > MAX_QUERIES:
        return 1, math.inf, 0.0
    width = (found.width + found.value_width) * DTYPES[found.dtype].bytes
    groups, count = math.prod(map(typical, found.groups)), typical(keys)
    result = 4 * groups * typical(found.rows) * (found.value_width + 2)

    def partial_us(splits: int) -> float:
        """The time of the first kernel. A step waits for the one before; the programs of a processor hide that, and
        share its bandwidth."""
        programs = groups * splits / on.processors
        together = min(math.ceil(programs), PROGRAMS_PER_PROCESSOR)
        step = BARRIER_US + max(LATENCY_US, together * KEYS_PER_STEP * width / (READ_BYTES * 1e3 * on.clock))
        steps = math.ceil(programs / PROGRAMS_PER_PROCESSOR) * math.ceil(count / splits / KEYS_PER_STEP)
        return on.launch + LATENCY_US + max(steps * step, groups * count * width / (on.memory * 1e3))

    def both_us(splits: int) -> float:
        return partial_us(splits) + on.launch + LATENCY_US + 2 * splits * result / (on.memory * 1e3)

    split_us, splits = min((both_us(splits), splits) for splits in NUM_SPLITS)
    return splits, split_us, partial_us(1)


# ---- the two kernels -------------------------------------------------------------------------------------------------


def split_attention(body: BodyBuilder, anchor: Node, splits: int) -> Values:
    """Sums of values, largest scores and sums of weights per range of the keys: f32[splits, *heads, queries, ...].
    Query heads that share keys and values have a dimension of their own behind the heads of these."""
    query, key, value = (argument(anchor, name) for name in ("query", "key", "value"))
    rank, keys = len(type_of(query).shape), type_of(key).shape[-2]
    if anchor.arg("is_causal") or anchor.arg("band"):
        raise Unsupported("split attention that is causal, or in a band")
    if rank < 3 or any(len(type_of(one).shape) != rank for one in (key, value)):
        raise Unsupported("split attention without heads, or with operands of different rank")
    if anchor.arg("fill") is not None or anchor.arg("bias") is not None:
        raise Unsupported("split attention to all keys, those that are hidden too, or with a bias beside the mask")
    size = dim_expr("//", dim_expr("+", keys, splits - 1), splits)
    padding = dim_expr("+", dim_expr("*", splits, size), dim_expr("*", -1, keys))
    mask = _mask(body, anchor, keys, padding)
    sides = []
    for side, axis in ((key, rank - 2), (value, rank - 2), *([(mask, len(type_of(mask).shape) - 1)] if mask else [])):
        if side is not mask:
            side = _padded(body, side, (0, 0, 0, padding), 0.0)
        side = body.move_to_front(body.split_dim(side, axis, splits, size), axis)
        for _ in range(rank + 1 - len(type_of(side).shape)):
            side = body.unsqueeze(side, 1)
        sides.append(side)
    query = body.unsqueeze(query, 0)
    if anchor.arg("enable_gqa"):
        heads = type_of(key).shape[-3]
        assert isinstance(heads, int)
        query = body.split_dim(query, rank - 2, heads)
        sides = [_with_shared_heads(body, side, rank - 2, heads) for side in sides]
    scale, width = anchor.arg("scale"), type_of(query).shape[-1]
    assert isinstance(width, int)  # `attention_of` takes no others
    return _partial(body, query, sides, 1 / math.sqrt(width) if scale is None else scale)


def split_flex(body: BodyBuilder, anchor: Node, splits: int) -> Values:
    """As `split_attention`, of `flex_attention`: for each share of the listed blocks, or of the keys.

    Raises:
        Unsupported: something reads the statistics of the whole.
    """
    if any(value is not None for value in anchor.outputs[1:]) or anchor.outputs[0] is None:
        raise Unsupported("split attention with statistics")
    *rows, width = type_of(anchor.outputs[0]).shape
    shapes = [(splits, *rows, last) for last in (width, 1, 1)]
    types = [TensorType("f32", shape, contiguous(shape)) for shape in shapes]
    given = {name: attr for name, attr in anchor.args if name != "order"}
    return body.calls(FLEX_PARTIAL, types, **given, shares=splits)


def _partial(body: BodyBuilder, query: Value, sides: list[Value], scale: Attr) -> Values:
    """The call of `torch_rtx.attention_partial`; `sides` are keys, values and, if there is one, a mask."""
    pairs = zip(type_of(query).shape[:-1], (*type_of(sides[0]).shape[:-2], 1), strict=True)
    rows = [a if b == 1 else b for a, b in pairs]
    shapes = [(*rows, last) for last in (type_of(sides[1]).shape[-1], 1, 1)]
    types = [TensorType("f32", shape, contiguous(shape)) for shape in shapes]
    operands = dict(zip(("query", "key", "value", "attn_mask"), (query, *sides), strict=False))
    return body.calls(ATTENTION_PARTIAL, types, **operands, scale=scale)


def _mask(body: BodyBuilder, anchor: Node, keys: Dim, padding: Dim) -> Value | None:
    """The mask, padded as the keys are; None if nothing is masked."""
    mask = anchor.arg("attn_mask")
    padded = dim_expr("+", keys, padding)
    if not isinstance(mask, Value):
        if padding == 0:
            return None
        places = body.call("arange.default", TensorType("i64", (padded,), (1,)), end=padded, device="main")
        return body.call("lt.Scalar", TensorType("bool", (padded,), (1,)), self=places, other=keys)
    old = type_of(mask)
    if old.shape[-1] != keys:
        shape = (*old.shape[:-1], keys)
        mask = body.call("expand.default", TensorType(old.dtype, shape, (*old.strides[:-1], 0)), self=mask, size=shape)
    return _padded(body, mask, (0, padding), False if old.dtype == "bool" else -math.inf)


def _padded(body: BodyBuilder, value: Value, pad: tuple[Dim, ...], filled: float) -> Value:
    old = type_of(value)
    if pad[-1] == 0:
        return value
    axis = len(old.shape) - len(pad) // 2
    shape = tuple(dim_expr("+", size, pad[-1]) if at == axis else size for at, size in enumerate(old.shape))
    type_ = TensorType(old.dtype, shape, contiguous(shape))
    return body.call("constant_pad_nd.default", type_, self=value, pad=pad, value=filled)


def _with_shared_heads(body: BodyBuilder, side: Value, axis: int, heads: int) -> Value:
    """Keys, values or a mask with a dimension behind their heads: the query heads that share one of them."""
    if type_of(side).shape[axis] in (1, heads):
        return body.unsqueeze(side, axis + 1)
    return body.split_dim(side, axis, heads)


def combine_attention(body: BodyBuilder, anchor: Node, partials: Values) -> Value:
    """The result of attention in f32, from those of the ranges."""
    result = anchor.outputs[0]
    assert result is not None
    sums, peaks, totals = (body.unbind(partial, 0) for partial in partials)
    given, peak = anchor.arg("sink"), peaks[0]
    sink = body.reshape(given, type_of(peak).shape) if isinstance(given, Value) else None
    for other in peaks[1:] if sink is None else (*peaks[1:], sink):
        peak = body.pointwise("maximum.default", peak, other=other)
    ranges = []
    for one, own, total in zip(sums, peaks, totals, strict=True):
        decay = body.pointwise("exp.default", body.sub(own, peak))
        ranges.append((body.mul(one, decay), body.mul(total, decay)))
    weighted, total = ranges[0]
    for one, other in ranges[1:]:
        weighted, total = body.add(weighted, one), body.add(total, other)
    if sink is not None:
        rise = body.pointwise("rsub.Tensor", peak, other=sink)
        total = body.add(total, body.pointwise("exp.default", rise))
    if anchor.op != ATTENTION:  # rows without a visible key are 0
        none = body.call("eq.Scalar", replace(type_of(total), dtype="bool"), self=total, other=0)
        total = body.pointwise("masked_fill.Scalar", total, mask=none, value=1.0)
    return body.reshape(body.pointwise("div.Tensor", weighted, other=total), type_of(result).shape)
