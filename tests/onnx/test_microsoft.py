"""Operators of the domain com.microsoft compute what onnxruntime does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from tests.onnx.runtime import agree, model_of, ours, reference
from torch_rtx.errors import OnnxError

MS = "com.microsoft"
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return RNG.standard_normal(shape).astype(np.float32)


def i32(*values: Any) -> np.ndarray:
    """An int32 array."""
    return np.array(values, np.int32)


POINTWISE: dict[str, tuple[str, list[np.ndarray | None], dict[str, Any]]] = {
    "gelu": ("Gelu", [f32(2, 8)], {}),
    "bias gelu": ("BiasGelu", [f32(2, 8), f32(8)], {}),
    "fast gelu": ("FastGelu", [f32(2, 8), f32(8)], {}),
    "fast gelu without bias": ("FastGelu", [f32(2, 8)], {}),
    "quick gelu": ("QuickGelu", [f32(2, 8)], {"alpha": 1.5}),
    "matmul": ("FusedMatMul", [f32(3, 4, 5), f32(3, 5, 2)], {"alpha": 0.5}),
    "matmul transposed": ("FusedMatMul", [f32(3, 5, 4), f32(3, 2, 5)], {"transA": 1, "transB": 1}),
    "matmul of batches transposed": ("FusedMatMul", [f32(4, 3, 5), f32(3, 5, 2)], {"transBatchA": 1}),
    "gemm": ("FusedGemm", [f32(3, 4), f32(5, 4), f32(5)], {"transB": 1, "activation": "Relu", "beta": 2.0}),
    "gemm leaky": ("FusedGemm", [f32(3, 4), f32(4, 5)], {"activation": "LeakyRelu", "activation_alpha": 0.3}),
    "conv": ("FusedConv", [f32(1, 4, 6, 6), f32(3, 4, 3, 3), f32(3)], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
    "conv and sum": (
        "FusedConv",
        [f32(1, 4, 6, 6), f32(3, 4, 3, 3), f32(3), f32(1, 3, 4, 4)],
        {"activation": "Clip", "activation_params": [-0.5, 0.5]},
    ),
    "skip layer norm": ("SkipLayerNormalization", [f32(2, 3, 8), f32(2, 3, 8), f32(8), f32(8), f32(8)], {}),
    "skip layer norm broadcast": ("SkipLayerNormalization", [f32(2, 3, 8), f32(3, 8), f32(8)], {"epsilon": 1e-3}),
    "skip rms norm": ("SkipSimplifiedLayerNormalization", [f32(2, 3, 8), f32(2, 3, 8), f32(8)], {}),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str) -> None:
    op, arrays, attributes = POINTWISE[name]
    agree(op, arrays, domain=MS, **attributes)


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_the_sum_is_the_fourth_output(op: str) -> None:
    agree(op, [f32(2, 3, 8), f32(2, 3, 8), f32(8)], ["y", "", "", "sum"], domain=MS)


def test_rms_norm_of_the_domain_of_onnx() -> None:
    agree("SimplifiedLayerNormalization", [f32(2, 3, 8), f32(8)], axis=-1, epsilon=1e-5, stash_type=1)


@pytest.mark.parametrize("mask", [None, i32([1, 1, 1, 0], [1, 1, 0, 1])])
def test_embed_layer_norm(mask: np.ndarray | None) -> None:
    ids, segments = i32([1, 2, 3, 0], [4, 4, 1, 2]), i32([0, 0, 1, 1], [1, 0, 0, 0])
    arrays = [ids, segments, f32(5, 8), f32(6, 8), f32(2, 8), f32(8), f32(8), mask]
    agree("EmbedLayerNormalization", arrays, ["y", "index", "sum"], domain=MS)


@pytest.mark.parametrize(
    ("bits", "zeros"), [(4, "none"), (4, "packed"), (4, "float"), (8, "none"), (8, "packed"), (2, "packed")]
)
def test_matmul_nbits(bits: int, zeros: str) -> None:
    n, k, block = 6, 80, 32  # the last block is not full
    blocks = -(-k // block)
    weights = RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8)
    points = {
        "none": None,
        "packed": RNG.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8),
        "float": RNG.uniform(0, 15, (n, blocks)).astype(np.float32),
    }[zeros]
    arrays = [f32(2, 3, k), weights, RNG.uniform(0.01, 0.02, (n, blocks)).astype(np.float32), points, None, f32(n)]
    agree("MatMulNBits", arrays, domain=MS, K=k, N=n, block_size=block, bits=bits, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_gather_block_quantized(bits: int, zeros: bool) -> None:
    table = RNG.integers(0, 256, (5, 48 * bits // 8)).astype(np.uint8)
    points = RNG.integers(0, 256, (5, -(-3 * bits // 8))).astype(np.uint8) if zeros else None
    arrays = [table, np.array([[0, 4], [-1, 2]], np.int64), f32(5, 3), points]
    agree("GatherBlockQuantized", arrays, domain=MS, bits=bits, block_size=16, quantize_axis=1)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", [np.array([3]), np.array([[3, 4, 5], [0, 1, 2]])])
def test_rotary_embedding(interleaved: int, positions: np.ndarray) -> None:
    arrays = [f32(2, 3, 32), positions, f32(10, 4), f32(10, 4)]
    agree("RotaryEmbedding", arrays, domain=MS, interleaved=interleaved)


def test_partial_rotary_embedding() -> None:
    arrays = [f32(2, 3, 32), np.array([[3, 4, 5], [0, 1, 2]]), f32(10, 4), f32(10, 4)]
    agree("RotaryEmbedding", arrays, domain=MS, num_heads=2, rotary_embedding_dim=8)


MASKS = {
    "none": None,
    "keys": i32([1, 1, 1, 0, 1], [1, 1, 0, 0, 0]),
    "all pairs": RNG.integers(0, 2, (2, 5, 5)).astype(np.int32),
    "ends": i32(5, 3),
    "ends and beginnings": i32(5, 4, 1, 2),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_attention(mask: str, unidirectional: int) -> None:
    arrays = [f32(2, 5, 8), f32(8, 24), f32(24), MASKS[mask]]
    agree("Attention", arrays, domain=MS, num_heads=2, unidirectional=unidirectional)


@pytest.mark.parametrize("columns", [False, True])
def test_qattention(columns: bool) -> None:
    x, weights = (RNG.integers(0, 256, shape).astype(np.uint8) for shape in ((2, 5, 8), (8, 24)))
    scale = np.full(24 if columns else (), 0.01, np.float32)
    zero = np.full(24 if columns else (), 120, np.uint8)
    arrays = [x, weights, f32(24), np.array(0.01, np.float32), scale, i32(5, 3), np.array(128, np.uint8), zero]
    agree("QAttention", arrays, domain=MS, num_heads=2)


def test_attention_with_a_past() -> None:
    arrays = [f32(2, 2, 8), f32(8, 24), f32(24), i32([1, 1, 1, 0, 1], [1, 1, 1, 1, 1]), f32(2, 2, 2, 3, 4)]
    agree("Attention", arrays, ["y", "present"], domain=MS, num_heads=2, unidirectional=1)


def test_attention_of_other_sizes() -> None:
    arrays = [f32(2, 3, 8), f32(8, 8 + 8 + 4), f32(20), None, None, f32(1, 2, 3, 3)]
    agree("Attention", arrays, domain=MS, num_heads=2, qkv_hidden_sizes=[8, 8, 4], scale=0.3)


HEADS: dict[str, list[np.ndarray | None]] = {
    "self": [f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8)],
    "bias": [f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8), f32(24)],
    "cross": [f32(2, 3, 8), f32(2, 5, 8), f32(2, 5, 12)],
    "keys of a past": [f32(2, 3, 8), f32(2, 2, 5, 4), f32(2, 2, 5, 4)],
    "mask": [f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8), None, i32([1, 1, 1, 1, 0], [1, 1, 0, 0, 0])],
    "attention bias": [f32(2, 5, 8), f32(2, 5, 8), f32(2, 5, 8), None, None, f32(1, 2, 5, 5)],
}


@pytest.mark.parametrize("name", HEADS)
def test_multi_head_attention(name: str) -> None:
    agree("MultiHeadAttention", HEADS[name], domain=MS, num_heads=2)


def test_packed_heads() -> None:
    """onnxruntime has them on GPUs alone."""
    q, k, v = f32(2, 5, 2, 4), f32(2, 5, 2, 4), f32(2, 5, 2, 4)
    results = [
        ours(model_of("MultiHeadAttention", arrays, domain=MS, num_heads=2), arrays)[0]
        for arrays in (
            [x.reshape(2, 5, 8) for x in (q, k, v)],
            [q.reshape(2, 5, 8), np.stack([k, v], 3)],
            [np.stack([q, k, v], 3)],
        )
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-6)


def test_multi_head_attention_with_a_past() -> None:
    arrays = [f32(2, 2, 8), f32(2, 2, 8), f32(2, 2, 8), None, None, None, f32(2, 2, 3, 4), f32(2, 2, 3, 4)]
    agree("MultiHeadAttention", arrays, ["y", "k", "v"], domain=MS, num_heads=2, unidirectional=1)


def gqa(
    new: int, past: int | None, lengths: list[int], total: int, heads: int = 4, kv: int = 2, size: int = 16
) -> list:
    """Inputs of GroupQueryAttention; `lengths` are those of the samples with their new tokens."""
    batch = len(lengths)
    cache = [None, None] if past is None else [f32(batch, kv, past, size), f32(batch, kv, past, size)]
    query = [f32(batch, new, heads * size), f32(batch, new, kv * size), f32(batch, new, kv * size)]
    return [*query, *cache, i32(*[n - 1 for n in lengths]), np.array(total, np.int32)]


ROTARY = [f32(32, 8), f32(32, 8)]
GROUPS: dict[str, tuple[list[np.ndarray | None], dict[str, Any]]] = {
    "prompt": (gqa(5, None, [5, 5], 5), {}),
    "rotary": ([*gqa(5, None, [5, 5], 5), *ROTARY], {"do_rotary": 1}),
    "rotary interleaved": ([*gqa(5, None, [5, 5], 5), *ROTARY], {"do_rotary": 1, "rotary_interleaved": 1}),
    "first of a growing cache": ([*gqa(5, 0, [5, 5], 5), *ROTARY], {"do_rotary": 1}),
    "growing cache": ([*gqa(1, 5, [6, 6], 6), *ROTARY], {"do_rotary": 1}),
    "window": (gqa(6, None, [6, 6], 6), {"local_window_size": 3}),
    "window over a cache": (gqa(1, 7, [8, 8], 8), {"local_window_size": 3}),
    "softcap": (gqa(5, None, [5, 5], 5), {"softcap": 2.0, "scale": 0.7}),
    "smooth": (gqa(5, None, [5, 5], 5), {"smooth_softmax": 1}),
    "sink": ([*gqa(5, None, [5], 5), None, None, None, None, f32(4)], {}),
    "bias": ([*gqa(5, None, [5], 5), None, None, None, f32(1, 1, 5, 5)], {}),
    "several new": ([*gqa(3, 4, [7], 7), *ROTARY], {"do_rotary": 1}),
}


@pytest.mark.parametrize("name", GROUPS)
def test_group_query_attention(name: str) -> None:
    arrays, attributes = GROUPS[name]
    agree(
        "GroupQueryAttention", arrays, ["y", "k", "v"], domain=MS, num_heads=4, kv_num_heads=2, atol=1e-4, **attributes
    )


RAGGED: dict[str, tuple[int, int, list[int], int, list[int] | None]] = {
    "growing cache": (1, 6, [7, 4], 7, None),
    "cache with room": (1, 16, [7, 4], 7, None),
    "padded prompt": (5, 0, [5, 3], 5, None),
    "padded chunk": (3, 8, [6, 3], 6, [2, 3]),
}


@pytest.mark.parametrize("name", RAGGED)
def test_samples_of_different_lengths(name: str) -> None:
    """What is after the end of a sample is not specified."""
    new, past, lengths, total, chunks = RAGGED[name]
    arrays = [*gqa(new, past, lengths, total), *ROTARY]
    if chunks is not None:
        arrays += [None] * 7 + [i32(*chunks)]
    model = model_of("GroupQueryAttention", arrays, ["y", "k", "v"], MS, num_heads=4, kv_num_heads=2, do_rotary=1)
    for found, wanted in zip(ours(model, arrays), reference(model, arrays), strict=True):
        assert found.shape == wanted.shape
        for sample, length in enumerate(lengths):
            rows = (chunks[sample] if chunks else min(new, length)) if found.ndim == 3 else length
            one, other = (x[sample, ..., :rows, :] for x in (found, wanted))
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_group_query_attention_packed() -> None:
    q, k, v, *rest = gqa(5, None, [5, 5], 5)
    arrays = [np.concatenate([q, k, v], -1), None, None, *rest, *ROTARY]
    agree("GroupQueryAttention", arrays, ["y", "k", "v"], domain=MS, num_heads=4, kv_num_heads=2, do_rotary=1)


def test_linear_attention() -> None:
    arrays = [f32(2, 3, 16), f32(2, 3, 8), f32(2, 3, 12), None, -np.abs(f32(2, 3, 2)), np.abs(f32(2, 3, 2))]
    agree("LinearAttention", arrays, ["y", "state"], domain=MS, q_num_heads=4, kv_num_heads=2)


@pytest.mark.parametrize("past", [None, f32(2, 4, 2)])
def test_causal_conv(past: np.ndarray | None) -> None:
    arrays = [f32(2, 4, 5), f32(4, 1, 3), f32(4), past]
    agree("CausalConvWithState", arrays, ["y", "state"], domain=MS, activation="silu", ndim=1)


@pytest.mark.parametrize("skip", [f32(2, 4, 4, 6), f32(2, 6)])
def test_group_norm(skip: np.ndarray) -> None:
    """onnxruntime has it on GPUs alone; so are the others here."""
    x, gamma, beta, bias = f32(2, 4, 4, 6), f32(6), f32(6), f32(6)
    total = x + (skip if skip.ndim == 4 else skip[:, None, None]) + bias
    arrays: list[np.ndarray | None] = [x, gamma, beta, skip, bias]
    found, added = ours(model_of("SkipGroupNorm", arrays, ["y", "s"], MS, groups=3, activation=1), arrays)
    groups = total.reshape(2, 16, 3, 2)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    wanted = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * gamma + beta
    np.testing.assert_allclose(added, total, atol=1e-6)
    np.testing.assert_allclose(found, wanted / (1 + np.exp(-wanted)), atol=1e-5)


def test_bias_split_gelu() -> None:
    x, bias = f32(2, 3, 8), f32(8)
    (found,) = ours(model_of("BiasSplitGelu", [x, bias], domain=MS), [x, bias])
    left, right = np.split(x + bias, 2, -1)
    (gelu,) = ours(model_of("Gelu", [right], domain=MS), [right])
    np.testing.assert_allclose(found, left * gelu, atol=1e-6)


def test_nhwc_conv() -> None:
    x, w = f32(2, 5, 6, 4), f32(3, 4, 3, 3)
    (found,) = ours(model_of("NhwcConv", [x, w], domain=MS, pads=[1, 1, 1, 1]), [x, w])
    turned = x.transpose(0, 3, 1, 2).copy()
    (wanted,) = ours(model_of("Conv", [turned, w], pads=[1, 1, 1, 1]), [turned, w])
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 3, 1), atol=1e-5)


def test_nhwc_forms_of_fused_operators() -> None:
    x, w, z = f32(2, 5, 6, 4), f32(3, 4, 3, 3), f32(2, 3, 4, 3)
    arrays: list[np.ndarray | None] = [x, w, None, z]
    (found,) = ours(model_of("NhwcFusedConv", arrays, domain=MS, activation="Relu"), arrays)
    arrays = [x.transpose(0, 3, 1, 2).copy(), w, None, z.transpose(0, 3, 1, 2).copy()]
    (wanted,) = ours(model_of("FusedConv", arrays, domain=MS, activation="Relu"), arrays)
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 3, 1), atol=1e-5)
    images = RNG.integers(0, 256, (2, 5, 6, 4)).astype(np.uint8)
    agree("NhwcMaxPool", [images], domain=MS, kernel_shape=[2, 2], strides=[2, 2])


def test_bias_add() -> None:
    x, bias, skip = f32(2, 3, 4), f32(4), f32(2, 3, 4)
    (found,) = ours(model_of("BiasAdd", [x, bias, skip], domain=MS), [x, bias, skip])
    np.testing.assert_allclose(found, x + bias + skip, atol=1e-6)


def test_quantized_cache_is_refused() -> None:
    arrays = gqa(5, None, [5], 5)
    model = model_of(
        "GroupQueryAttention", arrays, ["y", "k", "v"], MS, num_heads=4, kv_num_heads=2, k_quant_type="PER_TENSOR"
    )
    with pytest.raises(OnnxError, match="k_quant_type"):
        ours(model, arrays)
