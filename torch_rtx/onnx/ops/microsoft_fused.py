"""Operators of com.microsoft that graph optimizers fuse, or that came before ONNX's own of the same name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops import indexing, nn, sampling, tensors, vision
from torch_rtx.onnx.ops.attention import rotated, split_heads
from torch_rtx.onnx.ops.microsoft import MS, activate, embed_layer_normalization, fast_gelu, fused_matmul
from torch_rtx.onnx.ops.quantized import centered, dequantize, quantize
from torch_rtx.onnx.registry import Ints, Numbers, op

# ---- as ONNX's own ---------------------------------------------------------------------------------------------------

op("Trilu", domain=MS, ints=("k",))(tensors.trilu)
op("GatherND", domain=MS)(indexing.gather_nd)


@op("Pad", domain=MS, ints=("pads", "value"))
def pad(x: Tensor, pads: Numbers, value: Numbers | None = None, *, mode: str = "constant") -> Tensor:
    """ONNX's Pad."""
    return tensors.pad(x, pads, value, mode=mode)


@op("Range", domain=MS, ints=("start", "limit", "delta"))
def range_(
    start: Numbers,
    limit: Numbers,
    delta: Numbers | None = None,
    *,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> Tensor:
    """ONNX's Range, in steps of 1 if none are given."""
    return tensors.range_(start, limit, delta or [1], dtypes=dtypes, device=device)


@op("GridSample", domain=MS)
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Tensor:
    """ONNX's GridSample of images."""
    return vision.grid_sample(x, grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)


@op("Unique", domain=MS)
def unique(x: Tensor) -> tuple[Tensor, ...]:
    """Different elements in the order in which they come, which each element is, and how many there are."""
    values, _, inverse, counts = indexing.unique(x, sorted=0)
    return values, inverse, counts


@op("ExpandDims", domain=MS, ints=("axis",))
def expand_dims(x: Tensor, axis: Ints) -> Tensor:
    """A new axis."""
    return x.unsqueeze(int(axis[0]))


@op("Inverse", domain=MS)
def inverse(x: Tensor) -> Tensor:
    """The inverse of each matrix."""
    return torch.linalg.inv(x.float()).to(x.dtype)


@op("ConvTransposeWithDynamicPads", domain=MS, ints=("pads",))
def conv_transpose_with_dynamic_pads(
    x: Tensor, w: Tensor, pads: Ints | None = None, b: Tensor | None = None, **attributes: Any
) -> Tensor:
    """ONNX's ConvTranspose, whose pads are an input."""
    if pads is not None:
        attributes["pads"] = list(pads)
    return nn.conv_transpose(x, w, b, **attributes)


@op("UnfoldTensor", domain=MS)
def unfold_tensor(x: Tensor, *, dim: int = -1, size: int, step: int = 1) -> Tensor:
    """Slices of an axis, `step` apart, of which a new last axis has the elements."""
    return x.unfold(dim, size, step)


# ---- Fourier transforms and complex numbers, whose last axis has two parts -------------------------------------------


def _check_transform(signal_ndim: int, normalized: int, onesided: int) -> None:
    if normalized or not onesided or signal_ndim != 1:
        raise OnnxError("only transforms of one axis, one-sided and not normalized, are supported")


@op("Rfft", domain=MS)
def rfft(x: Tensor, *, normalized: int = 0, onesided: int = 1, signal_ndim: int = 1) -> Tensor:
    """(..., n) -> (..., n // 2 + 1, 2)."""
    _check_transform(signal_ndim, normalized, onesided)
    return torch.view_as_real(torch.fft.rfft(x.float())).to(x.dtype)


@op("Irfft", domain=MS)
def irfft(x: Tensor, *, normalized: int = 0, onesided: int = 1, signal_ndim: int) -> Tensor:
    """(..., n // 2 + 1, 2) -> (..., n), of an even n."""
    _check_transform(signal_ndim, normalized, onesided)
    return torch.fft.irfft(torch.view_as_complex(x.float().contiguous())).to(x.dtype)


@op("ComplexMul", domain=MS)
def complex_mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)


@op("ComplexMulConj", domain=MS)
def complex_mul_conj(a: Tensor, b: Tensor) -> Tensor:
    """a by the conjugate of b."""
    return complex_mul(a, torch.stack([b[..., 0], -b[..., 1]], -1))


# ---- sums and products with what surrounds them ----------------------------------------------------------------------


@op("BiasSoftmax", domain=MS)
def bias_softmax(x: Tensor, bias: Tensor, *, axis: int = 1, is_inner_broadcast: int) -> Tensor:
    """Softmax over all axes from `axis` on of a sum; the bias lacks the axes just before `axis`, or the first ones."""
    axis = axis % x.dim()
    if is_inner_broadcast and bias.dim() < x.dim():
        bias = bias[(slice(None),) * (bias.dim() - x.dim() + axis) + (None,) * (x.dim() - bias.dim())]
    total = x + bias
    return torch.softmax(total.flatten(axis), -1).reshape(total.shape)


@op("BiasDropout", domain=MS, ints=("ratio", "training_mode"))
def bias_dropout(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    ratio: Ints | None = None,
    training_mode: Ints | None = None,
    *,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout of the sum of x and bias, and then the residual."""
    y, mask = sampling.dropout(x + bias, ratio, training_mode, seed=seed)
    return y if residual is None else y + residual, mask


@op("GemmFastGelu", domain=MS)
def gemm_fast_gelu(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """FastGelu of x @ w + bias."""
    return fast_gelu(x @ w, bias)


@op("FusedMatMulActivation", domain=MS)
def fused_matmul_activation(
    a: Tensor,
    b: Tensor,
    *,
    activation: str,
    activation_alpha: float | None = None,
    activation_axis: int | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    **attributes: Any,
) -> Tensor:
    """The activation of FusedMatMul."""
    given = [value for value in (activation_alpha, activation_beta, activation_gamma) if value is not None]
    y = fused_matmul(a, b, **attributes)
    if activation == "Softmax":
        return torch.softmax(y, -1 if activation_axis is None else activation_axis)
    return activate(y, activation, given)


@op("SwiGLU", domain=MS)
def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    limit: float = 0.0,
    round_activation: int = 0,
) -> Tensor:
    """silu of the gate by the other half, of which both are clamped if there is a limit."""
    dtype = gate.dtype
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    gate, up = gate.float(), up.float()
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    active = gate * torch.sigmoid(activation_alpha * gate)
    active = active.to(dtype).float() if round_activation else active
    return (active * (up + activation_beta if activation_beta else up)).to(dtype)


@op("ScaledSiLU", domain=MS)
def scaled_silu(x: Tensor, scale: Tensor | None = None, *, alpha: float = 1.0) -> Tensor:
    """silu of x by a number."""
    scaled = (x.float() * (alpha if scale is None else scale.float())).to(x.dtype)
    return scaled * torch.sigmoid(scaled.float()).to(x.dtype)


@op("IsAllFinite", domain=MS)
def is_all_finite(*tensors: Tensor, isinf_only: int = 0, isnan_only: int = 0) -> Tensor:
    """Whether no element is infinite or NaN, or one of the two alone."""
    bad = [torch.isinf(x) if isinf_only else torch.isnan(x) if isnan_only else ~torch.isfinite(x) for x in tensors]
    return ~torch.stack([part.any() for part in bad]).any()


@op("CDist", domain=MS)
def cdist(a: Tensor, b: Tensor, *, metric: str = "sqeuclidean") -> Tensor:
    """The distances of a (M, N) and b (K, N), (M, K)."""
    if metric not in ("euclidean", "sqeuclidean"):
        raise OnnxError(f"metric {metric!r}", hint="'euclidean' and 'sqeuclidean' are supported")
    squares = (a[:, None] - b).square().sum(-1)
    return squares if metric == "sqeuclidean" else squares.sqrt()


@op("TorchEmbedding", domain=MS)
def torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: Tensor | None = None, scale_grad_by_freq: Tensor | None = None
) -> Tensor:
    """Rows of a table; the other inputs are about its gradient."""
    return F.embedding(indices, weight)


@op("NGramRepeatBlock", domain=MS)
def ngram_repeat_block(input_ids: Tensor, scores: Tensor, *, ngram_size: int) -> Tensor:
    """scores (B, V), -inf for words that would make an n-gram that input_ids (B, S) has already."""
    if input_ids.shape[1] < ngram_size:
        return scores
    grams = input_ids.unfold(1, ngram_size, 1)
    last = input_ids[:, input_ids.shape[1] - ngram_size + 1 :]
    repeated = (grams[..., :-1] == last[:, None]).all(-1)
    found = torch.zeros_like(scores).scatter_add(1, grams[..., -1].long(), repeated.to(scores.dtype))
    return scores.masked_fill(found > 0, -math.inf)


# ---- positions and gates ---------------------------------------------------------------------------------------------


@op("GemmaRotaryEmbedding", domain=MS)
def gemma_rotary_embedding(emb: Tensor, q: Tensor, q_rot: Tensor, k: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Angles emb (B, S, D), and q and k (B, N, S, D) with their halves turned."""
    sine, cosine = emb.sin().to(q.dtype).unsqueeze(1), emb.cos().to(q.dtype).unsqueeze(1)
    return q * cosine + q_rot * sine, k * cosine + k_rot * sine


@op("MRotaryEmbedding", domain=MS)
def m_rotary_embedding(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    mrope_layout: int = 0,
    mrope_section: Sequence[int],
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """RotaryEmbedding with positions (3, B, S) in time, height and width, each for a section of the angles."""
    if is_packed_batching or scale != 1:
        raise OnnxError("MRotaryEmbedding with is_packed_batching or scale is not supported")
    size = rotary_embedding_dim or 2 * cos_cache.shape[-1]
    angle = torch.arange(size // 2, device=x.device)
    if mrope_layout:
        kind = angle % 3
        kind = torch.where(angle < torch.tensor([0, *mrope_section[1:]], device=x.device)[kind] * 3, kind, 0)
    else:
        kind = (angle >= mrope_section[0]).long() + (angle >= mrope_section[0] + mrope_section[1]).long()
    heads = split_heads(x, num_heads or (x.shape[-1] // size if x.dim() == 3 else None))
    cos, sin = (cache[position_ids[kind].movedim(0, -1), angle] for cache in (cos_cache, sin_cache))
    return rotated(x, heads, cos, sin, interleaved, size)


def _rms(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, True) + epsilon)


@op("GatedRMSNorm", domain=MS)
def gated_rms_norm(
    x: Tensor, scale: Tensor, gate: Tensor, *, activation: str = "silu", epsilon: float = 1e-6
) -> Tensor:
    """x (..., H * C), normalized in groups as large as scale (C), by the activation of the gate."""
    functions: dict[str, Any] = {"silu": F.silu, "swish": F.silu, "sigmoid": torch.sigmoid}
    if activation not in functions:
        raise OnnxError(f"activation {activation!r} is none of {', '.join(functions)}")
    parts = x.float().unflatten(-1, (-1, scale.shape[0]))
    y = (_rms(parts, epsilon) * scale.float()).flatten(-2)
    return (y * functions[activation](gate.float())).to(x.dtype)


@op("LinearAttentionGate", domain=MS)
def linear_attention_gate(
    a: Tensor, dt_bias: Tensor, decay_scale: Tensor, b: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What LinearAttention decays by, (B, T, H), and how much it updates."""
    decay = (decay_scale * F.softplus(a.float() + dt_bias, threshold=88)).to(a.dtype)
    return (decay,) if b is None else (decay, torch.sigmoid(b.float()).to(b.dtype))


# ---- quantized -------------------------------------------------------------------------------------------------------


@op("MulInteger", domain=MS)
def mul_integer(a: Tensor, a_zero: Tensor | None, b: Tensor, b_zero: Tensor | None = None) -> Tensor:
    """The int32 product of bytes less their zero points."""
    return centered(a, a_zero) * centered(b, b_zero)


@op("MatMulInteger16", domain=MS)
def matmul_integer16(a: Tensor, b: Tensor) -> Tensor:
    """The int32 product of matrices of int16."""
    return (a.double() @ b.double()).to(torch.int64).to(torch.int32)


@op("ReduceSumInteger", domain=MS)
def reduce_sum_integer(x: Tensor, *, axes: Sequence[int], keepdims: int) -> Tensor:
    """The sum of bytes over axes, in 32 bits."""
    total = centered(x, None).sum(list(axes), bool(keepdims))
    return total.to(torch.int32 if x.dtype == torch.int8 else torch.uint32)


@op("QLinearReduceMean", domain=MS)
def qlinear_reduce_mean(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axes: Sequence[int],
    keepdims: int,
) -> Tensor:
    """The mean over axes of a quantized tensor."""
    return quantize(dequantize(x, x_scale, x_zero).mean(list(axes), bool(keepdims)), scale, zero, x.dtype)


@op("QEmbedLayerNormalization", domain=MS)
def qembed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    *parameters: Tensor | None,
    epsilon: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """EmbedLayerNormalization of quantized tables; parameters are the scales of the five, then their zero points."""
    quantized: Any = (word_embedding, position_embedding, segment_embedding, gamma, beta)
    tables: list[Any] = [
        table if table is None or scale is None else dequantize(table, scale, zero)
        for table, scale, zero in zip(quantized, parameters[:5], parameters[5:], strict=True)
    ]
    words, positions, segments, scale, shift = tables
    y, index, _ = embed_layer_normalization(
        input_ids, segment_ids, words, positions, segments, scale, shift, mask, epsilon=epsilon
    )
    return y, index


@op("CropAndResize", domain=MS, ints=("crop_size",))
def crop_and_resize(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    crop_size: Ints,
    *,
    extrapolation_value: float = 0.0,
    mode: str = "bilinear",
) -> Tensor:
    """Boxes (R, 4), from y1, x1 to y2, x2 of sizes of 1, of images x (N, C, H, W), resized -> (R, C, h, w)."""
    if mode not in ("bilinear", "nearest"):
        raise OnnxError(f"mode {mode!r} is neither 'bilinear' nor 'nearest'")
    places, inside = [], []
    for axis, count in enumerate(crop_size):
        first, last, end = rois[:, axis, None], rois[:, axis + 2, None], x.shape[axis + 2] - 1
        if isinstance(count, int) and count == 1:
            place = (first + last) / 2 * end
        else:
            steps = torch.arange(torch.sym_int(count), device=x.device)
            place = first * end + steps * ((last - first) * end / (count - 1))
        inside.append((place >= 0) & (place <= end))
        places.append(place.clamp(0, end))
    if mode == "nearest":
        y, x_ = (torch.floor(place + 0.5).long() for place in places)
        crops = x[batch_indices.long()[:, None, None], :, y[:, :, None], x_[:, None]].movedim(-1, 1)
    else:
        crops = _interpolated(x[batch_indices], places)
    seen = inside[0][:, :, None] & inside[1][:, None]
    return torch.where(seen[:, None], crops, extrapolation_value)


def _interpolated(x: Tensor, places: Sequence[Tensor]) -> Tensor:
    """x (R, C, H, W) between its elements, at rows (R, h) and columns (R, w)."""
    grid = [2 * place / max(x.shape[axis + 2] - 1, 1) - 1 for axis, place in enumerate(places)]
    spread = torch.stack(torch.broadcast_tensors(grid[1][:, None], grid[0][:, :, None]), -1).to(x.dtype)
    return F.grid_sample(x, spread, mode="bilinear", padding_mode="border", align_corners=True)
