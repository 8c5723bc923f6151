"""Fused, packed and older operators of com.microsoft: against onnxruntime where its CPU runs them, else by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("onnx_ir")

from tests.onnx.runtime import agree, model_of, ours
from torch_rtx.errors import OnnxError

RNG = np.random.default_rng(0)
MS = "com.microsoft"


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def u8(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def i32(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def result(op: str, *arrays: np.ndarray | None, outputs: int = 1, **attributes: Any) -> Any:
    """The results of the operator as tensors."""
    names = [f"y{number}" for number in range(outputs)]
    found = [torch.from_numpy(y) for y in ours(model_of(op, arrays, names, MS, **attributes), arrays)]
    return found[0] if outputs == 1 else found


# ---- what onnxruntime's CPU runs -------------------------------------------------------------------------------------

BOXES = np.array([[0.1, 0.2, 0.7, 0.9], [-0.2, 0, 1.2, 0.5], [0.6, 0.6, 0.2, 0.1]], np.float32)
PLACES = np.stack([np.arange(5)[None].repeat(2, 0) + first for first in (0, 3, 6)])
SCALES = [np.float32(0.02 * number) for number in range(1, 6)]
ZEROS = [np.uint8(100 + number) for number in range(5)]
BLOCKS = {"K": 32, "N": 5, "block_size": 16}
CASES: dict[str, tuple[str, list[np.ndarray | None], int, dict[str, Any]]] = {
    "trilu": ("Trilu", [f32(3, 4), np.array(1)], 1, {"upper": 0}),
    "gather nd": ("GatherND", [f32(3, 4), np.array([[0, 1], [2, 3]])], 1, {}),
    "pad": ("Pad", [f32(3, 4), np.array([0, 1, 2, 0]), np.array(3, np.float32)], 1, {}),
    "range": ("Range", [np.float32(1), np.float32(5)], 1, {}),
    "range with steps": ("Range", [np.int32(1), np.int32(9), np.int32(2)], 1, {}),
    "grid sample": ("GridSample", [f32(1, 2, 4, 4), f32(1, 3, 3, 2) / 2], 1, {}),
    "unique": ("Unique", [np.array([2, 1, 1, 3, 4, 3], np.float32)], 3, {}),
    "expand dims": ("ExpandDims", [f32(3, 4), np.int32(-1)], 1, {}),
    "inverse": ("Inverse", [f32(2, 3, 3) + 3 * np.eye(3, dtype=np.float32)], 1, {}),
    "transposed convolution": (
        "ConvTransposeWithDynamicPads", [f32(1, 2, 4, 4), f32(2, 3, 3, 3), np.array([1, 1, 0, 1]), f32(3)], 1,
        {"strides": [2, 2]},
    ),
    "unfold": ("UnfoldTensor", [f32(3, 7)], 1, {"dim": 1, "size": 3, "step": 2}),
    "scaled silu": ("ScaledSiLU", [f32(3, 8)], 1, {"alpha": 2.0}),
    "distances": ("CDist", [f32(3, 4), f32(5, 4)], 1, {"metric": "euclidean"}),
    "repeated grams": (
        "NGramRepeatBlock", [np.array([[1, 2, 3, 1, 2], [5, 4, 5, 4, 5]]), f32(2, 7)], 1, {"ngram_size": 3},
    ),
    "three positions": (
        "MRotaryEmbedding", [f32(2, 5, 32), PLACES, f32(20, 8), f32(20, 8)], 1,
        {"mrope_section": [2, 3, 3], "num_heads": 2},
    ),
    "three positions interleaved": (
        "MRotaryEmbedding", [f32(2, 5, 32), PLACES, f32(20, 8), f32(20, 8)], 1,
        {"mrope_section": [3, 3, 2], "num_heads": 2, "mrope_layout": 1, "interleaved": 1},
    ),
    "gated norm": ("GatedRMSNorm", [f32(2, 3, 8), f32(4), f32(2, 3, 8)], 1, {}),
    "gates": ("LinearAttentionGate", [f32(2, 3, 4), f32(4), f32(4), f32(2, 3, 4)], 2, {}),
    "16 bits": (
        "MatMulInteger16", [RNG.integers(-999, 999, shape).astype(np.int16) for shape in ((3, 4), (4, 5))], 1, {},
    ),
    "quantized embedding": (
        "QEmbedLayerNormalization",
        [
            i32([0, 1, 2], [3, 1, 0]), i32([0, 1, 1], [0, 0, 1]), u8(6, 4), u8(5, 4), u8(2, 4), u8(4), u8(4),
            i32([1, 1, 0], [1, 1, 1]), *SCALES, *ZEROS,
        ],
        2, {},
    ),
    "crop": ("CropAndResize", [f32(2, 3, 6, 7), BOXES, i32(0, 1, 0), i32(4, 3)], 1, {"extrapolation_value": 7.0}),
    "crop of one": ("CropAndResize", [f32(2, 3, 6, 7), BOXES, i32(0, 1, 0), i32(1, 1)], 1, {"mode": "nearest"}),
    "cross attention": (
        "DecoderMaskedMultiHeadAttention", [f32(2, 1, 8), f32(2, 2, 3, 4), f32(2, 2, 3, 4)], 1, {"num_heads": 2},
    ),
    "FP4": ("MatMulBnb4", [f32(3, 32), u8(80), np.abs(f32(10))], 1, {**BLOCKS, "quant_type": 0}),
    "NF4": ("MatMulBnb4", [f32(3, 32), u8(80), np.abs(f32(10))], 1, {**BLOCKS, "quant_type": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_onnxruntime(name: str) -> None:
    op, arrays, outputs, attributes = CASES[name]
    agree(op, arrays, [f"y{number}" for number in range(outputs)], domain=MS, **attributes)


def experts(bits: int, rows: int | None, zero: bool) -> list[np.ndarray | None]:
    """Four experts from 32 to 64 and back; scales for rows, or for blocks of 16."""
    parts: list[np.ndarray | None] = []
    zeros: list[np.ndarray | None] = [None] * 3
    for out, size in ((128 if rows else 64, 32), (32, 64)):
        blocks = [] if rows else [size // 16]
        scales = np.abs(f32(4, out, *blocks)) / 100
        parts += [u8(4, out, size * bits // 8), scales, f32(4, out) if rows else None]
        packed = -(-out * bits // 8) if rows else -(-size // 16 * bits // 8)
        zeros.append(u8(4, packed) if rows else u8(4, out, packed))
    return [f32(6, 32), f32(6, 4), *parts, *(zeros if zero else [])]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts(bits: int, rows: int | None, zero: bool) -> None:
    """onnxruntime rounds the activations of weights of 8 bits."""
    attributes = {"k": 2, "expert_weight_bits": bits, "weights_prepacked": 0, "normalize_routing_weights": 1}
    attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1} if rows else {"block_size": 16}
    attributes |= {} if rows else {"activation_type": "silu"}
    near = 4e-2 if bits == 8 else 2e-3
    agree("QMoE", experts(bits, rows, zero), domain=MS, rtol=near, atol=near, **attributes)


@pytest.mark.parametrize("normalized", [0, 1])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
def test_experts(activation: str, normalized: int) -> None:
    arrays = [f32(6, 8), f32(6, 4), f32(4, 16, 8), f32(4, 16), f32(4, 8, 16), f32(4, 8)]
    how = {"activation_type": activation, "k": 2, "normalize_routing_weights": normalized}
    agree("MoE", arrays, domain=MS, atol=1e-4, **how)


def test_experts_with_gates() -> None:
    """The same products in three ways: two weights, or one with their rows alternating or after one another."""
    x, router, gate, up, down = f32(2, 3, 8), f32(6, 4), f32(4, 16, 8), f32(4, 16, 8), f32(4, 8, 16)
    how = {"activation_type": "swiglu", "k": 2, "activation_alpha": 1.7, "activation_beta": 1.0, "swiglu_limit": 2.0}
    apart = result("MoE", x, router, gate, None, down, None, up, **how)
    turns = np.stack([gate, up], 2).reshape(4, 32, 8)
    halves = np.concatenate([gate, up], 1)
    for fusion, fused in ((1, turns), (2, halves)):
        torch.testing.assert_close(
            result("MoE", x, router, fused, None, down, None, swiglu_fusion=fusion, **how), apart
        )


ROWS, COLUMNS = i32([0, 1, 3, 5, 8], [0, 1, 3, 6, 9]), i32([0, 0, 1, 1, 2, 1, 2, 3, -1], [0, 0, 1, 0, 1, 2, 0, 2, 3])


@pytest.mark.parametrize(("new", "rotary"), [(50, 0), (50, 1), (1, 1)])
def test_sparse_attention(new: int, rotary: int) -> None:
    """onnxruntime writes the caches in place."""
    onnxruntime = pytest.importorskip("onnxruntime")
    caches = [f32(2, 2, 64, 16), f32(2, 2, 64, 16)] if new == 1 else [np.zeros((2, 2, 64, 16), np.float32)] * 2
    arrays = [f32(2, new, 64), f32(2, new, 32), f32(2, new, 32), *caches, ROWS, COLUMNS, i32(50), i32(50, 50)]
    arrays += [f32(64, 8), f32(64, 8)] if rotary else []
    how = {"num_heads": 4, "kv_num_heads": 2, "sparse_block_size": 16, "do_rotary": rotary, "scale": 0.25}
    model = model_of("SparseAttention", arrays, ["y", "k", "v"], MS, **how)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding, given = session.io_binding(), [onnxruntime.OrtValue.ortvalue_from_numpy(x.copy()) for x in arrays]
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type(arrays[0].shape, np.float32)
    for number, held in enumerate(given):
        binding.bind_ortvalue_input(f"x{number}", held)
    for name, held in (("y", y), ("k", given[3]), ("v", given[4])):
        binding.bind_ortvalue_output(name, held)
    session.run_with_iobinding(binding)
    for found, wanted in zip(ours(model, arrays), (y, given[3], given[4]), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


# ---- what it has on GPUs alone ---------------------------------------------------------------------------------------

COUNTS = i32(1, 2, 4)
OFFSETS = i32([0, 4, 5, 8], [9, 10, 11, 1], [2, 3, 6, 7])


def test_padding() -> None:
    x = f32(3, 4, 5)
    tokens, offsets, ends, longest = result("RemovePadding", x, COUNTS, outputs=4)
    assert offsets.tolist() == OFFSETS.tolist()
    assert (ends.tolist(), longest.tolist()) == ([0, 1, 3, 7], [4])
    assert torch.equal(
        tokens, torch.from_numpy(np.concatenate([row[:count] for row, count in zip(x, COUNTS, strict=True)]))
    )
    real = (np.arange(4) < COUNTS[:, None])[..., None]
    assert np.array_equal(result("RestorePadding", tokens.numpy(), OFFSETS).numpy(), np.where(real, x, 0))


@pytest.mark.parametrize("op", ["PackedAttention", "PackedMultiHeadAttention"])
def test_packed_attention(op: str) -> None:
    """Each sample by itself gives the same."""
    x, weights, bias, ends = f32(7, 8), f32(8, 24), f32(24), i32(0, 1, 3, 7)
    q, k, v = np.split(x @ weights + bias, 3, 1)
    given = [x, weights, bias] if op == "PackedAttention" else [q, k, v, None]
    found = result(op, *given, OFFSETS, ends, num_heads=2)
    heads = [torch.from_numpy(part).reshape(7, 2, 4).transpose(0, 1) for part in (q, k, v)]
    parts = [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
    wanted = [
        F.scaled_dot_product_attention(*(head[:, part] for head in heads)).transpose(0, 1).flatten(1) for part in parts
    ]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)
    if op == "PackedMultiHeadAttention":
        stacked = np.stack([part.reshape(7, 2, 4) for part in (q, k, v)], 2)
        torch.testing.assert_close(result(op, stacked, None, None, None, OFFSETS, ends, num_heads=2), found)


@pytest.mark.parametrize("both", [0, 1])
def test_relative_position_bias(both: int) -> None:
    """T5's buckets: near distances have their own, far ones share, up to the largest."""
    table = np.arange(16, dtype=np.float32).reshape(8, 2)
    found = result("RelativePositionBias", table, np.array(9), np.array(9), max_distance=6, is_bidirectional=both)
    assert found.shape == (1, 2, 9, 9)
    buckets = (found[0, 0] / 2).int().tolist()
    before = [row[0] for row in buckets]
    if both:  # four for each side, two of them near
        assert buckets[0] == [0, 5, 6, 6, 7, 7, 7, 7, 7]
        assert before == [0, 1, 2, 2, 3, 3, 3, 3, 3]
    else:
        assert buckets[0] == [0] * 9
        assert before == [0, 1, 2, 3, 4, 6, 7, 7, 7]


def test_gated_relative_position_bias() -> None:
    query, bias, positions, weight, shift, eco = (
        f32(2, 3, 8),
        f32(8),
        f32(1, 2, 3, 3),
        f32(4, 8),
        f32(8),
        f32(1, 2, 1, 1),
    )
    found = result("GatedRelativePositionBias", query, bias, positions, weight, shift, eco, num_heads=2)
    heads = (query + bias).reshape(2, 3, 2, 4).transpose(0, 2, 1, 3) @ weight + shift
    u, r = np.split(1 / (1 + np.exp(-heads.reshape(2, 2, 3, 2, 4).sum(-1))), 2, -1)
    np.testing.assert_allclose(found.numpy(), (u * (r * eco - 1) + 2) * positions, atol=1e-5)


def test_one_new_token() -> None:
    """DecoderMaskedMultiHeadAttention is MultiHeadAttention; all three may lie side by side."""
    q, k, v, past = f32(2, 1, 8), f32(2, 1, 8), f32(2, 1, 8), [f32(2, 2, 3, 4), f32(2, 2, 3, 4)]
    wanted = result("MultiHeadAttention", q, k, v, None, None, None, *past, outputs=3, num_heads=2)
    for given in ([q, k, v], [np.concatenate([q, k, v], -1), None, None]):
        found = result("DecoderMaskedMultiHeadAttention", *given, None, None, *past, outputs=3, num_heads=2)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def packed(rows: int) -> list[np.ndarray]:
    return [u8(rows, 2, 16), np.abs(f32(rows, 2)) / 20]


def test_products_after_a_norm() -> None:
    x, skip, scale, q, k, v = f32(2, 64), f32(2, 64), f32(64), packed(6), packed(4), packed(4)
    how: dict[str, Any] = {"K": 64, "bits": 4, "block_size": 32}
    total = torch.from_numpy(x + skip)
    normal = F.rms_norm(total, (64,), torch.from_numpy(scale), 1e-6).numpy()
    found = result("MatMulNBitsQkv", x, skip, scale, *q, None, *k, None, *v, outputs=4, Nq=6, Nkv=4, **how)
    for one, (weight, scales) in zip(found, (q, k, v), strict=False):
        wanted = result("MatMulNBits", normal, weight, scales, N=len(weight), **how)
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[3], total)
    other = packed(6)
    gate, up = (result("MatMulNBits", x, *part, N=6, **how) for part in (q, other))
    mlp = result("MatMulNBitsMlp", x, None, None, *q, None, *other, N=6, activation="silu", **how)
    torch.testing.assert_close(mlp, F.silu(gate) * up, atol=1e-5, rtol=1e-5)


def test_small_ones() -> None:
    x, y, bias = f32(3, 4), f32(3, 4), f32(4)
    w = f32(4, 5)
    a, b, c = (torch.from_numpy(part) for part in (x, y, bias))
    wanted = {
        "GemmFastGelu": (
            result("GemmFastGelu", x, w, f5 := f32(5)),
            F.gelu(a @ torch.from_numpy(w) + torch.from_numpy(f5), approximate="tanh"),
        ),
        "BiasDropout": (result("BiasDropout", x, bias, y), a + c + b),
        "FusedMatMulActivation": (
            result("FusedMatMulActivation", x, w, activation="LeakyRelu", activation_alpha=0.3, alpha=2.0),
            F.leaky_relu(2 * a @ torch.from_numpy(w), 0.3),
        ),
        "SwiGLU": (
            result("SwiGLU", x, y, limit=1.0, activation_beta=1.0),
            F.silu(a.clamp(max=1)) * (b.clamp(-1, 1) + 1),
        ),
        "SwiGLU of halves": (result("SwiGLU", x), F.silu(a[:, :2]) * a[:, 2:]),
        "ComplexMul": (
            torch.view_as_complex(result("ComplexMul", x.reshape(6, 2), y.reshape(6, 2))),
            torch.view_as_complex(a.reshape(6, 2)) * torch.view_as_complex(b.reshape(6, 2)),
        ),
        "ComplexMulConj": (
            torch.view_as_complex(result("ComplexMulConj", x.reshape(6, 2), y.reshape(6, 2))),
            torch.view_as_complex(a.reshape(6, 2)) * torch.view_as_complex(b.reshape(6, 2)).conj(),
        ),
        "Irfft": (result("Irfft", result("Rfft", x).numpy(), signal_ndim=1), a),
        "IsAllFinite": (result("IsAllFinite", x, y), torch.tensor(True)),
        "TorchEmbedding": (result("TorchEmbedding", x, np.array([[2, 0]])), a[[2, 0]][None]),
        "MulInteger": (
            result("MulInteger", np.uint8([3, 9]), np.uint8(4), np.uint8([5, 6])),
            torch.tensor([-5, 30]).int(),
        ),
        "ReduceSumInteger": (
            result("ReduceSumInteger", np.int8([[3, -9]]), axes=[1], keepdims=0),
            torch.tensor([-6]).int(),
        ),
        "QLinearReduceMean": (
            result(
                "QLinearReduceMean",
                np.uint8([[3, 9]]),
                np.float32(2),
                np.uint8(1),
                np.float32(5),
                np.uint8(7),
                axes=[1],
                keepdims=1,
            ),
            torch.tensor([[9]], dtype=torch.uint8),
        ),
    }
    for name, (found, right) in wanted.items():
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    emb, parts = f32(2, 3, 4), [f32(2, 2, 3, 4) for _ in range(4)]
    found = result("GemmaRotaryEmbedding", emb, *parts, outputs=2)
    sine, cosine = np.sin(emb)[:, None], np.cos(emb)[:, None]
    np.testing.assert_allclose(found[0].numpy(), parts[0] * cosine + parts[1] * sine, atol=1e-5)


@pytest.mark.parametrize(("shape", "inner"), [((2, 1, 1, 5), 1), ((2, 5), 1), ((1, 1, 4, 5), 0), ((4, 5), 0)])
def test_bias_softmax(shape: tuple[int, ...], inner: int) -> None:
    """The bias has the first axes and those behind the last of the others, or the last ones alone."""
    x, bias = f32(2, 3, 4, 5), f32(*shape)
    found = result("BiasSoftmax", x, bias, axis=3, is_inner_broadcast=inner)
    whole = bias.reshape(2, 1, 1, 5) if inner else bias
    torch.testing.assert_close(found, torch.from_numpy(x + whole).softmax(-1))


@pytest.mark.parametrize(
    ("op", "arrays", "attributes", "message"),
    [
        ("BeamSearch", [i32([1])] * 5, {}, "export the decoder alone"),
        ("PagedAttention", [f32(2)] * 8, {}, "a server's own cache"),
        ("CDist", [f32(2, 2), f32(2, 2)], {"metric": "cosine"}, "metric 'cosine'"),
        ("Rfft", [f32(2, 4)], {"normalized": 1}, "one axis"),
        (
            "MoE",
            [f32(6, 8), f32(6, 4), f32(4, 16, 8), None, f32(4, 8, 16)],
            {"use_sparse_mixer": 1},
            "use_sparse_mixer",
        ),
        ("QMoE", experts(4, None, False), {"quant_type": "fp8"}, "QMoE of this layout"),
    ],
)
def test_what_is_refused(op: str, arrays: list[Any], attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(OnnxError, match=message):
        result(op, *arrays, **attributes)
