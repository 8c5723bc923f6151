"""Attention of ONNX Runtime's domain com.microsoft, as its optimizers and exporters of language models write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops.attention import (
    attend,
    both,
    causal_conv_with_state,
    join_heads,
    linear_attention,
    rotate,
    rotated,
    split_heads,
    visible,
    write,
)
from torch_rtx.onnx.ops.quantized import matmul_to_float
from torch_rtx.onnx.registry import Ints, op

MS = "com.microsoft"


def refuse(name: str, **given: Any) -> None:
    """Raises an OnnxError for attributes and inputs that are set, where only their absence is supported."""
    for what, value in given.items():
        if value is not None and (isinstance(value, Tensor) or value):
            raise OnnxError(f"{name} with {what} is not supported")


def _key_mask(mask: Tensor, queries: int, keys: int, hidden: float, dtype: torch.dtype) -> Tensor:
    """What ONNX Runtime's masks of keys add to scores: 0, or `hidden`, broadcast to (B, N, S, T).

    A mask is (B, T), (B, S, T) or (B, 1, T', T') of 0 and 1; or the numbers of keys, (B); or where the keys end and
    begin, (2 * B). The last two are told apart by the batch that they are for.
    """
    if mask.dim() == 4:
        kept = mask[..., keys - queries : keys, :keys] != 0
    elif mask.dim() == 3:
        kept = mask.unsqueeze(1) != 0
    else:
        kept = mask[:, None, None] != 0
    return torch.where(kept, 0.0, hidden).to(dtype)


def _lengths_mask(mask: Tensor, batch: int, keys: int) -> Tensor:
    """The mask (B, T) that the ends, and the beginnings if there are any, of keys stand for."""
    at = torch.arange(keys, device=mask.device)
    kept = at < mask[:batch].unsqueeze(-1)
    return kept & (at >= mask[batch:].unsqueeze(-1)) if mask.shape[0] == 2 * batch else kept


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    *,
    unidirectional: int,
    scale: float | None,
    hidden: float,
    past: int,
    stage: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of heads with a mask of keys, and a bias on scores; returns (B, S, N * E)."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is not None:
        if mask.dim() == 1:
            if mask.shape[0] not in (q.shape[0], 2 * q.shape[0]):
                raise OnnxError(f"a mask of attention of shape {tuple(mask.shape)} for {q.shape[0]} samples")
            mask = _lengths_mask(mask, q.shape[0], keys)
        added = _key_mask(mask, queries, keys, hidden, q.dtype)
        bias = added if bias is None else bias + added
    causal = bool(unidirectional) and bias is None and isinstance(past, int) and past == 0
    if unidirectional and not causal:
        bias = both(bias, visible(queries, keys, past, q.device, right=0))
    y, scores = attend(q, k, v, bias, causal=causal, scale=scale or None, stage=stage)
    return join_heads(y), scores


@op("Attention", domain=MS)
def attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Sequence[int] | None = None,
    rotary_embedding_dim: int = 0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """x (B, S, I), weights (I, q + k + v) -> (B, S, v) and keys and values (2, B, N, T, D)."""
    refuse("Attention", do_rotary=do_rotary, past_present_share_buffer=past_present_share_buffer)
    return attention_of_projections(
        x @ weights if bias is None else x @ weights + bias,
        mask_index,
        past,
        attention_bias,
        num_heads=num_heads,
        hidden=mask_filter_value,
        sizes=qkv_hidden_sizes,
        scale=scale,
        unidirectional=unidirectional,
    )


@op("QAttention", domain=MS)
def qattention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    weights_scale: Tensor,
    mask_index: Tensor | None = None,
    x_zero: Tensor | None = None,
    weights_zero: Tensor | None = None,
    past: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    past_present_share_buffer: int = 0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Attention of x (B, S, I) and weights (I, q + k + v) of 8 bits; `weights_scale` is for all or each column."""
    refuse("QAttention", do_rotary=do_rotary, past_present_share_buffer=past_present_share_buffer)
    return attention_of_projections(
        matmul_to_float(x, weights, x_scale * weights_scale, x_zero, weights_zero, bias),
        mask_index,
        past,
        None,
        num_heads=num_heads,
        hidden=mask_filter_value,
        sizes=None,
        scale=scale,
        unidirectional=unidirectional,
    )


def attention_of_projections(
    projected: Tensor,
    mask_index: Tensor | None,
    past: Tensor | None,
    attention_bias: Tensor | None,
    *,
    num_heads: int,
    hidden: float,
    sizes: Sequence[int] | None,
    scale: float | None,
    unidirectional: int,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries, keys and values that lie side by side in the last axis."""
    sizes = list(sizes or [projected.shape[-1] // 3] * 3)
    q, k, v = (split_heads(part, num_heads) for part in projected.split(sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y, _ = _attend(
        q,
        k,
        v,
        mask_index,
        attention_bias,
        unidirectional=unidirectional,
        scale=scale,
        hidden=hidden,
        past=0 if past is None else past.shape[3],
    )
    return y, torch.stack([k, v]) if k.shape == v.shape else None


@op("MultiHeadAttention", domain=MS)
def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    scale: float | None = None,
    unidirectional: int = 0,
    outputs: int = 1,
) -> tuple[Tensor | None, ...]:
    """query (B, S, N * D), key (B, T, N * D), value (B, T, N * E) -> (B, S, N * E), keys, values, weights."""
    refuse("MultiHeadAttention", past_sequence_length=past_sequence_length, cache_indirection=cache_indirection)
    if query.dim() == 5:
        query, key, value = (part.flatten(2) for part in query.unbind(3))
    elif key is not None and key.dim() == 5:
        key, value = (part.flatten(2) for part in key.unbind(3))
    if key is None or value is None:
        raise OnnxError("MultiHeadAttention lacks a key or a value")
    if bias is not None:
        at = query.shape[-1]
        query = query + bias[:at]
        if key.dim() == 3:
            key, value = key + bias[at : 2 * at], value + bias[2 * at :]
    q, k, v = split_heads(query, num_heads), split_heads(key, num_heads), split_heads(value, num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    y, scores = _attend(
        q,
        k,
        v,
        key_padding_mask,
        attention_bias,
        unidirectional=unidirectional,
        scale=scale,
        hidden=mask_filter_value,
        past=past,
        stage=3 if outputs > 3 else None,
    )
    return (y, k, v, scores)[:outputs]


@op("RotaryEmbedding", domain=MS)
def rotary_embedding(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """x (B, N, S, D) or (B, S, N * D); positions (B, S), or (1): that of the first; caches (positions, D / 2)."""
    refuse("RotaryEmbedding", is_packed_batching=is_packed_batching, scale=scale != 1)
    size = rotary_embedding_dim or 2 * cos_cache.shape[-1]
    heads = split_heads(x, num_heads or (x.shape[-1] // size if x.dim() == 3 else None))
    if position_ids.dim() == 1:
        position_ids = position_ids + torch.arange(heads.shape[2], device=x.device).unsqueeze(0)
    return rotated(x, heads, cos_cache[position_ids], sin_cache[position_ids], interleaved, size)


@dataclass
class Settings:
    """The attributes of GroupQueryAttention that are not about its heads."""

    causal: int = 1
    do_rotary: int = 0
    k_norm_epsilon: float | None = None
    k_quant_type: str = "NONE"
    kv_cache_bit_width: int = 0
    local_window_size: int = -1
    q_norm_epsilon: float | None = None
    qk_norm_epsilon: float = 1e-6
    qk_output: int = 0
    rotary_interleaved: int = 0
    scale: float | None = None
    sliding_window_cache: int = 0
    smooth_softmax: int = 0
    softcap: float = 0.0
    v_quant_type: str = "NONE"

    def __post_init__(self) -> None:
        refuse(
            "GroupQueryAttention",
            k_quant_type=self.k_quant_type != "NONE",
            v_quant_type=self.v_quant_type != "NONE",
            qk_output=self.qk_output,
            sliding_window_cache=self.sliding_window_cache,
        )

    @property
    def plain(self) -> bool:
        """Whether queries see all that is before them, and nothing else."""
        return bool(self.causal) and self.local_window_size <= 0

    def mask(self, q: Tensor, k: Tensor, first: Tensor, seqlens_k: Tensor, bias: Tensor | None) -> Tensor | None:
        """The mask (B, 1, S, P) of queries, the first of which is at position `first`; with the bias."""
        queries, keys = q.shape[2], k.shape[2]
        left = self.local_window_size - 1 if self.local_window_size > 0 else -1
        seen: Tensor | None = torch.arange(keys, device=q.device) <= seqlens_k.view(-1, 1, 1, 1)
        if self.causal:
            seen = visible(queries, keys, first.view(-1, 1, 1, 1), q.device, left=left, right=0)
        return both(None if bias is None else F.pad(bias, (0, keys - bias.shape[-1])), seen)


def _unpacked(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of queries, keys and values, all of which `query` may hold."""
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * kv_heads)
        query, key, value = query.split([heads * size, kv_heads * size, kv_heads * size], -1)
    return split_heads(query, heads), split_heads(key, kv_heads), split_heads(value, kv_heads)


def _first(seqlens_k: Tensor, query_seqlens: Tensor | None, queries: int) -> Tensor:
    """The position (B) of the first of the new tokens; those after a short first prompt are padding."""
    total = seqlens_k.reshape(-1).long() + 1
    return (total - queries).clamp(min=0) if query_seqlens is None else total - query_seqlens.reshape(-1)


@op("GroupQueryAttention", domain=MS, ints=("total_sequence_length",))
def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Ints,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    head_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    query_seqlens: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    **attributes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, S, N * D), key and value (B, S, M * D), or all in `query` -> (B, S, N * D), and the caches.

    Caches are (B, M, P, D). A sample's new tokens go to where they end at seqlens_k + 1: into the cache if it has
    room for `total_sequence_length` tokens, else into one that has.
    """
    settings = Settings(**attributes)
    q, k, v = _unpacked(query, key, value, num_heads, kv_num_heads)
    if q_norm_weight is not None and k_norm_weight is not None:
        q = F.rms_norm(q, q_norm_weight.shape, q_norm_weight, settings.q_norm_epsilon or settings.qk_norm_epsilon)
        k = F.rms_norm(k, k_norm_weight.shape, k_norm_weight, settings.k_norm_epsilon or settings.qk_norm_epsilon)
    first = _first(seqlens_k, query_seqlens, q.shape[2])
    if settings.do_rotary:
        if cos_cache is None or sin_cache is None:
            raise OnnxError("GroupQueryAttention with do_rotary lacks cos_cache or sin_cache")
        if position_ids is None:
            position_ids = first.unsqueeze(-1) + torch.arange(q.shape[2], device=q.device)
        cos, sin, size = cos_cache[position_ids], sin_cache[position_ids], 2 * cos_cache.shape[-1]
        q, k = (rotate(x, cos, sin, interleaved=bool(settings.rotary_interleaved), size=size) for x in (q, k))
    if past_key is not None and past_value is not None:
        more = torch.sym_max(total_sequence_length[0] - past_key.shape[2], 0)
        k, v = (write(F.pad(past, (0, 0, 0, more)), new, first) for past, new in ((past_key, k), (past_value, v)))
    plain = past_key is None and attention_bias is None and settings.plain
    mask = None if plain else settings.mask(q, k, first, seqlens_k, attention_bias)
    sink = q.new_zeros(num_heads) if head_sink is None and settings.smooth_softmax > 0 else head_sink
    y, _ = attend(q, k, v, mask, causal=plain, scale=settings.scale or None, softcap=settings.softcap, sink=sink)
    return join_heads(y), k, v


@op("LinearAttention", domain=MS)
def ms_linear_attention(*inputs: Tensor | None, state_window: int = 0, **attributes: Any) -> tuple[Tensor, Tensor]:
    """ONNX's operator."""
    refuse("LinearAttention", state_window=state_window)
    return linear_attention(*inputs, **attributes)  # type: ignore[arg-type]


@op("CausalConvWithState", domain=MS)
def ms_causal_conv_with_state(
    *inputs: Tensor | None,
    activation: str = "none",
    dilation: int = 1,
    ndim: int = 1,
    state_channels_last: int = -1,
    **attributes: Any,
) -> tuple[Tensor, Tensor]:
    """ONNX's operator."""
    differs = {"dilation": dilation != 1, "ndim": ndim != 1, "state_channels_last": state_channels_last > 0}
    refuse("CausalConvWithState", **differs, **attributes)
    return causal_conv_with_state(*inputs, activation=activation)  # type: ignore[arg-type]
