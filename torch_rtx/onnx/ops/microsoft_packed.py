"""Operators of com.microsoft on tokens without padding, and on biases and masks of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops.attention import attend, both, join_heads, rotate, split_heads, visible, write
from torch_rtx.onnx.ops.microsoft import MS
from torch_rtx.onnx.ops.microsoft_attention import attention_of_projections, multi_head_attention, refuse
from torch_rtx.onnx.registry import Ints, op

# ---- tokens without padding ------------------------------------------------------------------------------------------


@op("RemovePadding", domain=MS)
def remove_padding(x: Tensor, sequence_token_count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, S, H) -> its real tokens (tokens, H), where they and the padding were (B, S), where samples begin and end
    (B + 1), and the longest (1)."""
    real = torch.arange(x.shape[1], device=x.device) < sequence_token_count[:, None]
    offset = torch.argsort(~real.reshape(-1), stable=True)
    ends = F.pad(sequence_token_count.cumsum(0), (1, 0))
    kept = torch.nonzero(real.reshape(-1))[:, 0]
    places = offset.reshape(real.shape).to(torch.int32)
    return x.flatten(0, 1)[kept], places, ends.to(torch.int32), sequence_token_count.amax().reshape(1).to(torch.int32)


@op("RestorePadding", domain=MS)
def restore_padding(x: Tensor, token_offset: Tensor) -> Tensor:
    """x (tokens, H) -> (B, S, H), zeros where there is no token."""
    y = x.new_zeros(token_offset.numel(), x.shape[-1])
    return y.index_copy(0, token_offset.reshape(-1)[: x.shape[0]].long(), x).reshape(*token_offset.shape, x.shape[-1])


def _lengths(cumulative: Tensor) -> Tensor:
    return cumulative[1:] - cumulative[:-1]


def _packed_again(y: Tensor, token_offset: Tensor, tokens: int) -> Tensor:
    return y.flatten(0, 1)[token_offset.reshape(-1)[:tokens].long()]


@op("PackedAttention", domain=MS)
def packed_attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    token_offset: Tensor,
    cumulative_sequence_length: Tensor,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    qkv_hidden_sizes: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of x (tokens, I), whose samples end at cumulative_sequence_length -> (tokens, v)."""
    y, _ = attention_of_projections(
        restore_padding(x @ weights + bias, token_offset),
        _lengths(cumulative_sequence_length),
        None,
        attention_bias,
        num_heads=num_heads,
        hidden=-math.inf,
        sizes=qkv_hidden_sizes,
        scale=scale,
        unidirectional=0,
    )
    return _packed_again(y, token_offset, x.shape[0])


@op("PackedMultiHeadAttention", domain=MS)
def packed_multi_head_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    token_offset: Tensor,
    cumulative_sequence_length: Tensor,
    attention_bias: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """MultiHeadAttention of tokens (tokens, N * D), or of all three in query (tokens, N, 3, D) -> (tokens, N * E)."""
    tokens = query.shape[0]
    if query.dim() == 4:
        query, key, value = (part.flatten(1) for part in query.unbind(2))
    q, k, v = (None if x is None else restore_padding(x, token_offset) for x in (query, key, value))
    assert q is not None
    lengths = _lengths(cumulative_sequence_length)
    (y,) = multi_head_attention(
        q, k, v, bias, lengths, attention_bias, num_heads=num_heads, scale=scale, mask_filter_value=-math.inf
    )
    assert y is not None
    return _packed_again(y, token_offset, tokens)


# ---- biases ----------------------------------------------------------------------------------------------------------


@op("RelativePositionBias", domain=MS, ints=("query_length", "key_length"))
def relative_position_bias(
    bias_table: Tensor, query_length: Ints, key_length: Ints, *, is_bidirectional: int = 0, max_distance: int
) -> Tensor:
    """T5's bias: bias_table (buckets, N) -> (1, N, queries, keys)."""
    device, count = bias_table.device, bias_table.shape[0]
    keys, queries = (torch.arange(torch.sym_int(size[0]), device=device) for size in (key_length, query_length))
    apart = keys - queries[:, None]
    first = torch.zeros_like(apart)
    if is_bidirectional:
        count //= 2
        first, apart = (apart > 0) * count, apart.abs()
    else:
        apart = (-apart).clamp(min=0)
    near = count // 2
    far = torch.log(apart.clamp(min=1).float() / near) / math.log(max_distance / near) * (count - near)
    bucket = first + torch.where(apart < near, apart, (near + far.to(torch.int64)).clamp(max=count - 1))
    return F.embedding(bucket, bias_table).permute(2, 0, 1).unsqueeze(0)


@op("GatedRelativePositionBias", domain=MS)
def gated_relative_position_bias(
    query: Tensor,
    query_bias: Tensor,
    rel_pos: Tensor,
    weight: Tensor,
    bias: Tensor,
    eco_a: Tensor,
    token_offset: Tensor | None = None,
    *,
    num_heads: int,
) -> Tensor:
    """WavLM's bias: query (B, S, N * D), or without padding, rel_pos (1, N, S, S) -> (B, N, S, S)."""
    query = query + query_bias
    query = query if token_offset is None else restore_padding(query, token_offset)
    gates = split_heads(query, num_heads) @ weight + bias
    u, r = torch.sigmoid(gates.unflatten(-1, (2, -1)).sum(-1)).chunk(2, -1)
    return (u * (r * eco_a - 1.0) + 2.0) * rel_pos


# ---- decoding --------------------------------------------------------------------------------------------------------


@op("DecoderMaskedMultiHeadAttention", domain=MS, ints=("past_sequence_length", "beam_width"))
def decoder_masked_multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mask_index: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Ints | None = None,
    beam_width: Ints | None = None,
    cache_indirection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    output_qk: int = 0,
    past_present_share_buffer: int = 0,
    scale: float | None = None,
    outputs: int = 1,
) -> tuple[Tensor | None, ...]:
    """MultiHeadAttention of one new token (B, 1, N * D) -> (B, 1, N * E), keys, values, weights."""
    refuse(
        "DecoderMaskedMultiHeadAttention",
        past_present_share_buffer=past_present_share_buffer,
        cache_indirection=cache_indirection,
    )
    if key is None:
        part = (query.shape[-1] - (0 if past_value is None else num_heads * past_value.shape[-1])) // 2
        query, key, value = query.split([part, part, query.shape[-1] - 2 * part], -1)
    return multi_head_attention(
        query, key, value, bias, mask_index, attention_bias, past_key, past_value,
        mask_filter_value=mask_filter_value, num_heads=num_heads, scale=scale, outputs=outputs,
    )  # fmt: skip


@op("SparseAttention", domain=MS, ints=("total_sequence_length",))
def sparse_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    block_row_indices: Tensor,
    block_col_indices: Tensor,
    total_sequence_length: Ints,
    key_total_sequence_lengths: Tensor,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    *,
    do_rotary: int = 0,
    kv_num_heads: int,
    num_heads: int,
    rotary_interleaved: int = 0,
    scale: float | None = None,
    sparse_block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, S, N * D) sees the blocks of keys that its layout names; caches (B, M, P, D) get the new tokens."""
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = query.split([num_heads * size, kv_num_heads * size, kv_num_heads * size], -1)
    q, k, v = split_heads(query, num_heads), split_heads(key, kv_num_heads), split_heads(value, kv_num_heads)
    queries, keys = q.shape[2], past_key.shape[2]
    first = (key_total_sequence_lengths.long() - queries).clamp(min=0)
    if do_rotary:
        if cos_cache is None or sin_cache is None:
            raise OnnxError("SparseAttention with do_rotary lacks cos_cache or sin_cache")
        places = first[:, None] + torch.arange(queries, device=q.device)
        cos, sin = cos_cache[places], sin_cache[places]
        size = 2 * cos_cache.shape[-1]
        q, k = (rotate(x, cos, sin, interleaved=bool(rotary_interleaved), size=size) for x in (q, k))
    k, v = write(past_key, k, first), write(past_value, v, first)
    blocks = block_row_indices.shape[1] - 1
    at = torch.arange(block_col_indices.shape[1], device=q.device)
    row = (
        torch.searchsorted(block_row_indices.contiguous(), at.expand(len(block_row_indices), -1).int(), right=True) - 1
    )
    used = (at < block_row_indices[:, -1:]) & (block_col_indices >= 0)
    seen = torch.zeros(len(row), (blocks + 1) * blocks, device=q.device)
    flat = torch.where(used, row * blocks + block_col_indices, blocks * blocks).long()
    seen = seen.scatter(1, flat, 1.0).reshape(-1, blocks + 1, blocks)[:, :blocks] > 0  # (layouts, blocks, blocks)
    seen = seen.repeat(num_heads // len(row), 1, 1)  # layouts take turns
    of_query = (first[:, None] + torch.arange(queries, device=q.device)) // sparse_block_size
    of_key = torch.arange(keys, device=q.device) // sparse_block_size
    mask = seen[:, of_query[:, :, None], of_key].movedim(1, 0)  # (B, N, S, P)
    mask = both(mask, visible(queries, keys, first.view(-1, 1, 1, 1), q.device, right=0))  # type: ignore[assignment]
    y, _ = attend(q, k, v, mask, scale=scale or None)
    return join_heads(y), k, v
