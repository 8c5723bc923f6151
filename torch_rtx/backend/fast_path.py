"""Decomposes PyTorch's fast path of `nn.TransformerEncoderLayer` in inference.

Dynamo captures the layer as one operator, which would be opaque to fusion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.backend.decompositions import DECOMPOSITIONS
from torch_rtx.backend.losses import LOSSES


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    """Same arguments as the operator. Nonzero elements of `mask` are masked out; `mask_type` 1 is a key padding mask,
    [batch, keys], all others broadcast to the scores."""
    if src.is_nested:
        return NotImplemented
    keep = None
    if mask is not None:
        keep = mask.to(torch.bool).logical_not()
        keep = keep[:, None, None, :] if mask_type == 1 else keep

    def attention(x: Tensor) -> Tensor:
        qkv = F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        query, key, value = (tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tensor in qkv)
        result = F.scaled_dot_product_attention(query, key, value, keep)
        return F.linear(result.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        activation = F.gelu if use_gelu else F.relu
        return F.linear(activation(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))


FAST_PATH: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
    torch.ops.aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    **DECOMPOSITIONS,
    **LOSSES,
}
