"""Attention, and what models put around it: rotary positions, caches, linear attention, causal convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import op


def split_heads(x: Tensor, heads: int | None) -> Tensor:
    """(B, S, heads * D) -> (B, heads, S, D); what has four axes stays."""
    if x.dim() == 4:
        return x
    if not heads:
        raise OnnxError("attention on tensors of three dimensions lacks the number of its heads")
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, S, D) -> (B, S, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def visible(
    queries: int, keys: int, offset: int | Tensor, device: torch.device, *, left: int = -1, right: int = -1
) -> Tensor | None:
    """Which keys each query sees, bool, (queries, keys) or as `offset` broadcasts; None: all.

    Query i is at position `offset` + i, and sees `left` keys before and `right` keys after it; -1 is no limit.
    """
    if left < 0 and right < 0:
        return None
    if left < 0 and isinstance(queries, int) and queries == 1 and not isinstance(offset, Tensor) and offset == keys - 1:
        return None  # the last position alone
    rows = torch.arange(queries, device=device).unsqueeze(-1) + offset
    columns = torch.arange(keys, device=device)
    seen = columns <= rows + right if right >= 0 else columns >= rows - left
    return seen & (columns >= rows - left) if left >= 0 and right >= 0 else seen


def both(mask: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """A mask, bool or added to scores, that also hides what is not `seen`."""
    if mask is None or seen is None:
        return seen if mask is None else mask
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -math.inf)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    precision: torch.dtype | None = None,
    sink: Tensor | None = None,
    stage: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T) v, of q (B, N, S, D), k (B, M, T, D) and v (B, M, T, E), where M divides N -> (B, N, S, E).

    Args:
        mask: bool, True where a key is seen, or added to the scores; broadcasts to (B, N, S, T).
        causal: query i sees keys up to i; there is no mask.
        sink: (N), a score that takes part in the softmax and has no value.
        stage: which scores to return, too: 0 products, 1 with softcap, 2 with mask, 3 after softmax.
    """
    repeats = q.shape[1] // k.shape[1]
    enough = precision is None or precision.itemsize >= q.dtype.itemsize
    if softcap == 0 and sink is None and stage is None and v.dtype == q.dtype and enough:
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=repeats > 1)
        return y, None
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if causal:
        mask = visible(q.shape[2], k.shape[2], 0, q.device, right=0)
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = (q * root) @ (k * root).mT
    stages = [scores]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    stages.append(scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    stages.append(scores)
    wide = scores.to(precision or scores.dtype)
    if sink is None:
        weights = torch._safe_softmax(wide, -1)  # zeros where no key is seen
    else:
        none = sink.to(wide.dtype).view(-1, 1, 1).expand(*wide.shape[:-1], 1)
        weights = torch.cat([wide, none], -1).softmax(-1)[..., :-1]
    weights = weights.to(q.dtype)
    stages.append(weights)
    return (weights.to(v.dtype) @ v).to(q.dtype), None if stage is None else stages[stage]


# ONNX's numbers of the types that a softmax may be computed in
PRECISIONS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


@op("Attention", since=23)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> tuple[Tensor | None, ...]:
    """q (B, N, S, D) or (B, S, N * D), k and v likewise -> the result, keys and values with the past, and scores."""
    packed = q.dim() == 3
    q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    offset: int | Tensor = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    queries, keys = q.shape[2], k.shape[2]
    seen = None
    if nonpad_kv_seqlen is not None:
        lengths = nonpad_kv_seqlen.view(-1, 1, 1, 1)
        offset = lengths - queries
        seen = torch.arange(keys, device=q.device) < lengths
    right = 0 if is_causal else right_window_size
    # what PyTorch knows as causal, without a mask
    causal = right == 0 and left_window_size < 0 and attn_mask is None and past_key is None and seen is None
    if not causal:
        near = visible(queries, keys, offset, q.device, left=left_window_size, right=right)
        seen = both(seen, near)
    if attn_mask is not None:
        hidden = False if attn_mask.dtype == torch.bool else -math.inf
        short = keys - attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, short), value=hidden) if attn_mask.shape[-1] != 1 else attn_mask
    y, scores = attend(
        q,
        k,
        v,
        both(attn_mask, seen),
        causal=causal,
        scale=scale,
        softcap=softcap,
        precision=None if softmax_precision is None else PRECISIONS[softmax_precision],
        stage=qk_matmul_output_mode if outputs > 3 else None,
    )
    return (join_heads(y) if packed else y, k, v, scores)[:outputs]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, size: int = 0) -> Tensor:
    """Turns pairs of the first `size` (0: all) elements of heads: x (B, N, S, D), cos and sin (B or 1, S, size / 2)."""
    size = size or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    real, imaginary = first * cos - second * sin, first * sin + second * cos
    turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    return turned if size == x.shape[-1] else torch.cat([turned, rest], -1)


def rotated(x: Tensor, heads: Tensor, cos: Tensor, sin: Tensor, interleaved: int, size: int) -> Tensor:
    """The heads of x, `rotate`d, in the shape of x."""
    y = rotate(heads, cos, sin, interleaved=bool(interleaved), size=size)
    return join_heads(y) if x.dim() == 3 else y


@op("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """x (B, N, S, D) or (B, S, N * D); the caches (positions, D / 2), or (B, S, D / 2) without `position_ids`."""
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    heads = split_heads(x, num_heads)
    return rotated(x, heads, cos_cache, sin_cache, interleaved, rotary_embedding_dim)


def write(cache: Tensor, update: Tensor, at: Tensor, axis: int = -2, *, circular: bool = False) -> Tensor:
    """A copy of `cache` in which `update` begins at position `at`, (B), of an axis."""
    axis %= cache.dim()
    positions = at.view(-1, 1) + torch.arange(update.shape[axis], device=cache.device)
    if circular:
        positions = positions % cache.shape[axis]
    shape = [1] * cache.dim()
    shape[0], shape[axis] = positions.shape
    return cache.scatter(axis, positions.reshape(shape).expand(update.shape), update)


@op("TensorScatter", since=24)
def tensor_scatter(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """past_cache (B, ..., positions, ...) with `update` from each sample's index on."""
    if write_indices is None:
        write_indices = torch.zeros(past_cache.shape[:1], dtype=torch.int64, device=past_cache.device)
    return write(past_cache, update, write_indices.long(), axis, circular=mode == "circular")


@op("LinearAttention", since=27)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    update_rule: str = "gated_delta",
    scale: float = 0.0,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """query (B, T, N * D), key (B, T, M * D), value (B, T, M * E), state (B, M, D, E) -> (B, T, N * E), state."""
    if update_rule not in ("linear", "gated", "delta", "gated_delta"):
        raise OnnxError(f"LinearAttention with update_rule {update_rule!r}")
    wide = torch.promote_types(query.dtype, torch.float32)
    q = split_heads(query, q_num_heads).to(wide)
    k, v = split_heads(key, kv_num_heads).to(wide), split_heads(value, kv_num_heads).to(wide)
    q = q.unflatten(1, (kv_num_heads, -1)) * (scale or 1 / math.sqrt(q.shape[-1]))
    state = k.new_zeros(k.shape[0], k.shape[1], k.shape[3], v.shape[3]) if past_state is None else past_state.to(wide)
    forget = split_heads(decay, kv_num_heads).to(wide).exp().unsqueeze(-1) if decay is not None else None
    rate = None
    if beta is not None:
        rate = beta.transpose(1, 2).unsqueeze(-1).unsqueeze(-1).to(wide)
    results = []
    for t in range(k.shape[2]):
        if "gated" in update_rule and forget is not None:
            state = state * forget[:, :, t]
        added = v[:, :, t].unsqueeze(2)
        if "delta" in update_rule and rate is not None:
            added = (added - k[:, :, t].unsqueeze(2) @ state) * rate[:, :, t]
        state = state + k[:, :, t].unsqueeze(3) * added
        results.append(q[:, :, :, t] @ state)
    y = torch.stack(results, 1).flatten(2)
    return y.to(query.dtype), state.to(query.dtype if past_state is None else past_state.dtype)


@op("CausalConvWithState", since=27)
def causal_conv_with_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """x (B, C, L), weight (C, 1, K), state (B, C, K - 1) -> (B, C, L) and the last K - 1 elements."""
    before = weight.shape[-1] - 1
    whole = F.pad(x, (before, 0)) if past_state is None else torch.cat([past_state.to(x.dtype), x], -1)
    y = F.conv1d(whole, weight, bias, groups=weight.shape[0])
    if activation in ("silu", "swish"):
        y = F.silu(y)
    elif activation != "none":
        raise OnnxError(f"CausalConvWithState with activation {activation!r}")
    return y, whole[..., whole.shape[-1] - before :]
