"""Attention of few queries over ranges of the keys (Flash-Decoding, Dao et al. 2023).

The first kernel computes, for each range, the weighted sum of its values without the division by the weights' sum, that
sum, and the largest score, which all weights are relative to. The second weights the ranges against each other. Both
are ATen calls here; `as_attention` finds the calls of the first again and makes them the one call that attention
kernels are generated for.

Ranges are equally long. Where the number of keys is no multiple of theirs, what is missing is added, and masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Dim, Graph, Node, TensorType, Value, contiguous, dim_expr
from torch_rtx.lowering.kernels.attention import LEAST, Attention
from torch_rtx.lowering.kernels.calls import Calls, needed, type_of
from torch_rtx.lowering.kernels.cost import BARRIER, CLEAR, LATENCY, LAUNCH, PARTS, typical
from torch_rtx.lowering.kernels.product import argument
from torch_rtx.targets import Arch

FEW_QUERIES = 16
STEP = 64  # keys that a program of few rows takes at once
RESIDENT = 4  # such programs on a processor
SDPA = "aten.scaled_dot_product_attention.default"


def keys_in_parts(found: Attention, keys: Dim, arch: Arch, gain: float = CLEAR) -> int:
    """In how many ranges the keys of an attention are best cut, so that they fill the chip; 1: in none, which is also
    the answer where the gain would be less than `gain`."""
    on = arch.chip
    if found.causal or not isinstance(found.queries, int) or found.queries > FEW_QUERIES:
        return 1
    width = (found.width + found.value_width) * (4 if found.dtype == "f32" else 2)
    groups, count = math.prod(map(typical, found.groups)), typical(keys)
    result = 4 * groups * typical(found.rows) * (found.value_width + 2)

    def time(parts: int) -> float:
        """Of one kernel: each step waits for the one before; programs on one processor hide that, and share its way to
        memory."""
        programs = groups * parts / on.processors
        together = min(math.ceil(programs), RESIDENT)
        step = BARRIER + max(LATENCY, together * STEP * width / (32e3 * on.clock))
        steps = math.ceil(programs / RESIDENT) * math.ceil(count / parts / STEP)
        return LAUNCH + LATENCY + max(steps * step, groups * count * width / (on.memory * 1e3))

    def both(parts: int) -> float:
        return time(parts) + LAUNCH + LATENCY + 2 * parts * result / (on.memory * 1e3)

    return min([(time(1) / gain, 1), *((both(parts), parts) for parts in PARTS)])[1]


# ---- the two kernels -------------------------------------------------------------------------------------------------


def partial_attention(calls: Calls, anchor: Node, parts: int) -> tuple[Value, ...]:
    """For each range: sums of values, the largest scores and the sums of weights, as [parts, *heads, queries, ...].
    Query heads that share keys and values have a dimension of their own behind these."""
    query, key, value = (argument(anchor, name) for name in ("query", "key", "value"))
    rank, keys = len(type_of(query).shape), type_of(key).shape[-2]
    if anchor.arg("is_causal") or rank < 3 or any(len(type_of(one).shape) != rank for one in (key, value)):
        raise Unsupported("causal attention in parts, or without heads, or of operands of different rank")
    size = dim_expr("//", dim_expr("+", keys, parts - 1), parts)
    extra = dim_expr("+", dim_expr("*", parts, size), dim_expr("*", -1, keys))
    mask = _mask(calls, anchor, keys, extra)
    shared = bool(anchor.arg("enable_gqa"))
    sides = []
    for side, axis in ((key, rank - 2), (value, rank - 2), *([(mask, len(type_of(mask).shape) - 1)] if mask else [])):
        if side is not mask:
            side = _padded(calls, side, (0, 0, 0, extra), 0.0)
        side = calls.first(calls.divided(side, axis, parts, size), axis)
        for _ in range(rank + 1 - len(type_of(side).shape)):
            side = calls.unsqueezed(side, 1)
        sides.append(side)
    query = calls.unsqueezed(query, 0)
    if shared:
        heads = type_of(key).shape[-3]
        assert isinstance(heads, int)
        query = calls.divided(query, rank - 2, heads)
        sides = [_grouped(calls, side, rank - 2, heads) for side in sides]
    key, value = (calls.cast(side, "f32") for side in sides[:2])
    scale, width = anchor.arg("scale"), type_of(query).shape[-1]
    assert isinstance(width, int)  # `attention_of` takes no others
    scale = 1 / math.sqrt(width) if scale is None else scale
    return _weighted(calls, calls.cast(query, "f32"), key, value, sides[2] if mask else None, scale)


def _mask(calls: Calls, anchor: Node, keys: Dim, extra: Dim) -> Value | None:
    """The mask, as long as the ranges together; None if nothing is masked."""
    mask = anchor.arg("attn_mask")
    whole = dim_expr("+", keys, extra)
    if not isinstance(mask, Value):
        if extra == 0:
            return None
        places = calls.call("arange.default", TensorType("i64", (whole,), (1,)), end=whole, device="main")
        return calls.call("lt.Scalar", TensorType("bool", (whole,), (1,)), self=places, other=keys)
    old = type_of(mask)
    if old.shape[-1] != keys:
        shape = (*old.shape[:-1], keys)
        mask = calls.call("expand.default", TensorType(old.dtype, shape, (*old.strides[:-1], 0)), self=mask, size=shape)
    return _padded(calls, mask, (0, extra), False if old.dtype == "bool" else -math.inf)


def _padded(calls: Calls, value: Value, pad: tuple[Dim, ...], filled: float) -> Value:
    old = type_of(value)
    if pad[-1] == 0:
        return value
    axis = len(old.shape) - len(pad) // 2
    shape = tuple(dim_expr("+", size, pad[-1]) if at == axis else size for at, size in enumerate(old.shape))
    type_ = TensorType(old.dtype, shape, contiguous(shape))
    return calls.call("constant_pad_nd.default", type_, self=value, pad=pad, value=filled)


def _grouped(calls: Calls, side: Value, axis: int, heads: int) -> Value:
    """Keys, values or masks with the query heads that share a head of keys as a dimension behind these."""
    if type_of(side).shape[axis] in (1, heads):
        return calls.unsqueezed(side, axis + 1)
    return calls.divided(side, axis, heads)


def _weighted(
    calls: Calls, query: Value, key: Value, value: Value, mask: Value | None, scale: Attr
) -> tuple[Value, Value, Value]:
    rank = len(type_of(query).shape)
    pairs = zip(type_of(query).shape[:-2], type_of(key).shape[:-2], strict=True)
    lead, queries = [a if b == 1 else b for a, b in pairs], type_of(query).shape[-2]

    def type_to(last: Dim) -> TensorType:
        shape = (*lead, queries, last)
        return TensorType("f32", shape, contiguous(shape))

    turned = calls.permuted(key, (*range(rank - 2), rank - 1, rank - 2))
    scores = calls.call("matmul.default", type_to(type_of(key).shape[-2]), self=query, other=turned)
    scores = calls.same("mul.Scalar", scores, other=scale)
    if mask is not None and type_of(mask).dtype == "bool":
        hidden = calls.same("logical_not.default", mask)
        scores = calls.same("masked_fill.Scalar", scores, mask=hidden, value=-math.inf)
    elif mask is not None:
        scores = calls.same("add.Tensor", scores, other=mask)
    top = calls.call("amax.default", type_to(1), self=scores, dim=(-1,), keepdim=True)
    top = calls.same("clamp_min.default", top, min=LEAST)  # finite, so that ranges without a key give no NaN
    weights = calls.same("exp.default", calls.same("sub.Tensor", scores, other=top))
    total = calls.call("sum.dim_IntList", type_to(1), self=weights, dim=(-1,), keepdim=True)
    sums = calls.call("matmul.default", type_to(type_of(value).shape[-1]), self=weights, other=value)
    return sums, top, total


def attention_sum(calls: Calls, anchor: Node, partials: tuple[Value, ...]) -> Value:
    """The result of attention in f32, from those of its ranges."""
    (result,) = anchor.outputs
    assert result is not None
    sums, tops, totals = (calls.unbound(partial, 0) for partial in partials)
    top = tops[0]
    for other in tops[1:]:
        top = calls.same("maximum.default", top, other=other)
    parts = []
    for one, peak, total in zip(sums, tops, totals, strict=True):
        weight = calls.same("exp.default", calls.same("sub.Tensor", peak, other=top))
        parts.append([calls.same("mul.Tensor", value, other=weight) for value in (one, total)])
    whole, total = parts[0]
    for one, other in parts[1:]:
        whole = calls.same("add.Tensor", whole, other=one)
        total = calls.same("add.Tensor", total, other=other)
    # Rows that see no key at all are 0, as in PyTorch.
    none = calls.call("eq.Scalar", replace(type_of(total), dtype="bool"), self=total, other=0)
    total = calls.same("masked_fill.Scalar", total, mask=none, value=1.0)
    return calls.reshaped(calls.same("div.Tensor", whole, other=total), type_of(result).shape)


# ---- the way back ----------------------------------------------------------------------------------------------------

BEFORE = ("permute.default", "matmul.default", "mul.Scalar")
MASKED = ((), ("add.Tensor",), ("logical_not.default", "masked_fill.Scalar"))
AFTER = ("amax.default", "clamp_min.default", "sub.Tensor", "exp.default", "sum.dim_IntList", "matmul.default")


def as_attention(body: Graph) -> Graph:
    """`body` with the calls of `partial_attention` as one of attention, whose further results are the largest scores
    and the sums of weights; any other body as it is."""
    for masked in MASKED:
        ops = [f"aten.{op}" for op in (*BEFORE, *masked, *AFTER)]
        kept, tail = body.nodes[: -len(ops)], body.nodes[-len(ops) :]
        if [node.op for node in tail] == ops:
            return _recognized(body, kept, tail, bool(masked)) or body
    return body


def _recognized(body: Graph, kept: tuple[Node, ...], tail: tuple[Node, ...], masked: bool) -> Graph | None:
    query, key, value = tail[1].arg("self"), tail[0].arg("self"), tail[-1].arg("other")
    mask = tail[3].arg("self" if tail[3].op == "aten.logical_not.default" else "other") if masked else None
    operands = [one for one in (query, key, value) if isinstance(one, Value)]
    if len(operands) < 3 or not (mask is None or isinstance(mask, Value)):
        return None
    # Whatever was read from them, the calls must be those that are made of it.
    again = Calls({value.name for value in body.values()} | body.syms.keys())
    results = _weighted(again, operands[0], operands[1], operands[2], mask, tail[2].arg("other"))
    names = dict(_renamed(again.nodes, tail))
    if None in names.values() or tuple(names[one.name] for one in results) != body.outputs:
        return None
    made = {one.name: node for node in kept for one in node.outputs if one is not None}
    casts = [made.get(one.name) for one in operands]
    if all(node is not None and node.op == "aten._to_copy.default" for node in casts):
        operands = [node.inputs[0] for node in casts if node is not None]  # as the products of tensor cores take them
    given = dict(zip(("query", "key", "value"), operands, strict=True))
    args = {**given, **({"attn_mask": mask} if mask else {}), "scale": tail[2].arg("other")}
    outputs = tuple(one for one in body.outputs if isinstance(one, Value))
    anchor = Node("op", SDPA, tuple(args.items()), outputs)
    return replace(body, nodes=(*needed(kept, args.values()), anchor))


def _renamed(ours: Sequence[Node], theirs: Sequence[Node]) -> Iterator[tuple[str, Value | None]]:
    """By name of each of our results theirs; None where a call is another one."""
    names: dict[str, Value] = {}
    for one, other in zip(ours, theirs, strict=True):
        args = one.map_inputs(lambda value: names.get(value.name, value))
        for value, found in zip(one.outputs, other.outputs, strict=True):
            assert value is not None
            same = found is not None and found.type == value.type and (one.op, args) == (other.op, other.args)
            yield value.name, found if same else None
            names[value.name] = found if found is not None else value
