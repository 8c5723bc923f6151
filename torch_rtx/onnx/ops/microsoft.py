"""Operators of ONNX Runtime's domain com.microsoft but for attention: fused ones, normalization, packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops import nn
from torch_rtx.onnx.ops.quantized import dequantize, values
from torch_rtx.onnx.registry import op

MS = "com.microsoft"


@op("Gelu", domain=MS)
def gelu(x: Tensor) -> Tensor:
    """The exact one."""
    return F.gelu(x)


@op("BiasGelu", domain=MS)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The exact one, of the sum."""
    return F.gelu(x + bias)


@op("FastGelu", domain=MS)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The approximation by tanh, of the sum."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@op("QuickGelu", domain=MS)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(alpha * x)


@op("BiasSplitGelu", domain=MS)
def bias_split_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The left half of the sum by the gelu of its right half."""
    left, right = (x + bias).chunk(2, -1)
    return left * F.gelu(right)


@op("BiasAdd", domain=MS)
def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """The sum of all."""
    return x + bias + skip


@op("FusedMatMul", "TransposeMatMul", domain=MS)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """alpha * a @ b; `transBatch` takes the first axis for the rows."""
    a, b = a.movedim(0, -2) if transBatchA else a, b.movedim(0, -2) if transBatchB else b
    y = (a.mT if transA and a.dim() > 1 else a) @ (b.mT if transB and b.dim() > 1 else b)
    return y if alpha == 1 else y * alpha


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "": lambda x: x,
    "Clip": lambda x, low, high: x.clamp(low, high),
    "HardSigmoid": lambda x, a=0.2, b=0.5: (x * a + b).clamp(0, 1),
    "LeakyRelu": lambda x, a=0.01: F.leaky_relu(x, a),
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def activate(x: Tensor, name: str, parameters: Sequence[float]) -> Tensor:
    """The function of a fused operator."""
    if name not in ACTIVATIONS:
        raise OnnxError(f"there is no activation {name!r}", hint=f"Known are {', '.join(filter(None, ACTIVATIONS))}.")
    return ACTIVATIONS[name](x, *parameters)


@op("FusedGemm", domain=MS)
def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """activation(alpha * a @ b + beta * c)."""
    y = fused_matmul(a, b, alpha=alpha, transA=transA, transB=transB)
    if c is not None:
        y = y + (c if beta == 1 else c * beta)
    return activate(y, activation, [p for p in (activation_alpha, activation_beta, activation_gamma) if p is not None])


@op("FusedConv", domain=MS)
def fused_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    **attributes: Any,
) -> Tensor:
    """activation(Conv(x, w, b) + z)."""
    y = nn.conv(x, w, b, **attributes)
    return activate(y if z is None else y + z, activation, activation_params)


@op("NhwcConv", domain=MS)
def nhwc_conv(x: Tensor, w: Tensor, b: Tensor | None = None, **attributes: Any) -> Tensor:
    """Conv of x (N, H, W, C) and w (M, C / group, kH, kW) -> (N, H, W, M)."""
    return nn.conv(x.movedim(-1, 1), w, b, **attributes).movedim(1, -1)


@op("NhwcFusedConv", domain=MS)
def nhwc_fused_conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None, **attributes: Any
) -> Tensor:
    """FusedConv of x and z (N, H, W, C) and w (M, C / group, kH, kW) -> (N, H, W, M)."""
    return fused_conv(x.movedim(-1, 1), w, b, z if z is None else z.movedim(-1, 1), **attributes).movedim(1, -1)


@op("NhwcMaxPool", domain=MS)
def nhwc_max_pool(x: Tensor, **attributes: Any) -> Tensor:
    """MaxPool of (N, H, W, C)."""
    y = nn.max_pool(x.movedim(-1, 1), **attributes)
    assert isinstance(y, Tensor)
    return y.movedim(1, -1)


@op("GroupNorm", domain=MS)
def group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    groups: int,
    activation: int = 0,
    channels_last: int = 1,
    epsilon: float = 1e-5,
) -> Tensor:
    """x (N, H, W, C), or (N, C, H, W); `activation` 1 is SiLU."""
    x = x.movedim(-1, 1) if channels_last else x
    y = F.group_norm(x, groups, gamma.to(x.dtype), beta.to(x.dtype), epsilon)
    y = F.silu(y) if activation else y
    return y.movedim(1, -1) if channels_last else y


@op("SkipGroupNorm", domain=MS)
def skip_group_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, skip: Tensor, bias: Tensor | None = None, **attributes: Any
) -> tuple[Tensor, Tensor]:
    """GroupNorm of the sum of x, skip and bias, and this sum."""
    if skip.dim() == 2:
        skip = skip[:, None, None]
    total = x + skip if bias is None else x + skip + bias
    return group_norm(total, gamma, beta, **attributes), total


def _skip(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    return x + skip if bias is None else x + skip + bias


@op("SkipLayerNormalization", domain=MS)
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> tuple[Tensor | None, ...]:
    """LayerNormalization of the sum of x, skip and bias, its mean and 1 / deviation, and this sum."""
    total = _skip(x, skip, bias)
    results = nn.layer_normalization(total, gamma, beta, epsilon=epsilon, outputs=min(outputs, 3))
    return (*results, *(None,) * (3 - len(results)), total)[:outputs]


@op("SkipSimplifiedLayerNormalization", domain=MS)
def skip_simplified_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> tuple[Tensor | None, ...]:
    """RMSNormalization of the sum of x, skip and bias; nothing; nothing; this sum."""
    total = _skip(x, skip, bias)
    return (nn.rms_normalization(total, gamma, epsilon=epsilon), None, None, total)[:outputs]  # type: ignore[return-value]


op("SimplifiedLayerNormalization", domain=MS)(nn.rms_normalization)
op("LayerNormalization", domain=MS)(nn.layer_normalization)


@op("EmbedLayerNormalization", domain=MS)
def embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, S) -> (B, S, H); the number of words by the mask, (B) int32; the sum."""
    if position_ids is None:
        positions = position_embedding[: input_ids.shape[1]]
    else:
        positions = F.embedding(position_ids, position_embedding)
    total = F.embedding(input_ids, word_embedding) + positions
    if segment_ids is not None and segment_embedding is not None:
        total = total + F.embedding(segment_ids, segment_embedding)
    index = input_ids.new_zeros(input_ids.shape[:1], dtype=torch.int32)
    if mask is not None:
        index = (mask != 0).sum(1).to(torch.int32)
    return F.layer_norm(total, gamma.shape, gamma, beta, epsilon), index, total


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 with several numbers in each byte, the first in the lowest bits -> one in each byte of the last axis."""
    if bits not in (2, 4, 8):
        raise OnnxError(f"weights of {bits} bits are not supported", hint="2, 4 and 8 are.")
    packed = packed.view(torch.uint8)
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return packed if bits == 8 else torch.stack(parts, -1).flatten(-2)


@op("MatMulNBits", domain=MS)
def matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    block_size: int,
    bits: int = 4,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    """a (..., K), b (N, blocks, bytes) of packed weights, scales (N, blocks), zero points packed or not -> (..., N)."""
    if weight_prepacked or g_idx is not None:
        raise OnnxError("MatMulNBits with weight_prepacked or g_idx is not supported")
    blocks = -(-K // block_size)
    weights = unpack(b.reshape(N, blocks, -1), bits).to(a.dtype)
    if zero_points is None:
        weights = weights - (1 << bits - 1)
    elif zero_points.is_floating_point():
        weights = weights - zero_points.reshape(N, blocks, 1)
    else:
        weights = weights - unpack(zero_points.reshape(N, -1), bits)[:, :blocks].unsqueeze(-1).to(a.dtype)
    weights = (weights * scales.reshape(N, blocks, 1)).flatten(1)
    return F.linear(a, weights if blocks * block_size == K else weights[:, :K], bias)


@op("GatherBlockQuantized", domain=MS)
def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    """What `indices` select of an axis of quantized data; zeros for those that are out of range."""
    gather_axis, quantize_axis = gather_axis % data.dim(), quantize_axis % data.dim()
    size = data.shape[gather_axis]
    inside = (indices >= -size) & (indices < size)
    flat = torch.where(inside, indices % size, 0).reshape(-1)

    def pick(x: Tensor) -> Tensor:
        return x if x.shape[gather_axis] == 1 < size else x.index_select(gather_axis, flat)

    packed = data.dtype == torch.uint8
    picked = pick(unpack(data, bits) if packed else values(data))
    zeros = None if zero_points is None else unpack(zero_points, bits) if packed else values(zero_points)
    if zeros is not None:
        zeros = pick(zeros.narrow(-1, 0, scales.shape[-1]))
    elif packed:
        picked = picked.to(torch.int32) - (1 << bits - 1)
    shape = [*indices.shape]
    block_size = block_size or data.shape[quantize_axis]
    y = dequantize(picked, pick(scales), zeros, axis=quantize_axis, block_size=block_size)
    y = torch.where(inside.reshape(-1, *[1] * (y.dim() - gather_axis - 1)), y, 0)
    return y.unflatten(gather_axis, shape) if shape else y.squeeze(gather_axis)
