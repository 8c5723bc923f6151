"""Convolutions, pooling and normalization in the forms that ONNX's node cases lack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx_ir")

from tests.onnx.runtime import agree, model_of, ours
from torch_rtx.errors import OnnxError
from torch_rtx.onnx.module import from_onnx
from torch_rtx.onnx.ops.attention import attention, linear_attention
from torch_rtx.onnx.ops.nn import deform_conv

RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return RNG.standard_normal(shape).astype(np.float32)


PADS: list[dict[str, Any]] = [
    {"pads": [1, 2, 1, 2]},
    {"pads": [0, 1, 2, 0], "strides": [2, 1]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [1, 1]},
    {"auto_pad": "VALID"},
    {"pads": [0, 1, 2, 0], "dilations": [2, 1]},
]


@pytest.mark.parametrize("attributes", PADS)
def test_conv(attributes: dict[str, Any]) -> None:
    agree("Conv", [f32(2, 4, 9, 8), f32(6, 2, 3, 2), f32(6)], group=2, **attributes)


@pytest.mark.parametrize("rank", [1, 3])
def test_conv_of_other_ranks(rank: int) -> None:
    agree("Conv", [f32(1, 2, *[5] * rank), f32(3, 2, *[3] * rank)], pads=[1, 0] * rank)


def test_conv_of_four_dimensions_is_refused() -> None:
    arrays = [f32(1, 1, 3, 3, 3, 3), f32(1, 1, 2, 2, 2, 2)]
    with pytest.raises(OnnxError, match="Conv of 4 spatial dimensions"):
        ours(model_of("Conv", arrays), arrays)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1, 1, 1], "strides": [2, 2], "output_padding": [1, 0]},
        {"pads": [1, 0, 0, 1], "strides": [2, 2]},
        {"pads": [0, 0, 2, 1], "strides": [2, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [3, 2]},
        {"output_shape": [11, 9], "strides": [2, 2]},
        {"output_shape": [8, 9], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"dilations": [2, 1], "pads": [1, 2, 1, 2]},
    ],
)
def test_conv_transpose(attributes: dict[str, Any]) -> None:
    agree("ConvTranspose", [f32(2, 4, 5, 4), f32(4, 3, 3, 3), f32(6)], group=2, **attributes)


POOLS: list[dict[str, Any]] = [
    *PADS[1:6],
    {"pads": [1, 1, 1, 1]},
    {"pads": [1, 1, 1, 1], "strides": [2, 3], "ceil_mode": 1},
    {"pads": [0, 1, 1, 0], "strides": [2, 3], "ceil_mode": 1},
    {"strides": [3, 3], "ceil_mode": 1},
    {"pads": [2, 0, 2, 1], "strides": [2, 2]},
    {"dilations": [2, 3], "ceil_mode": 1, "strides": [2, 2], "pads": [1, 0, 1, 0]},
]


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("order", [0, 1])
def test_max_pool(attributes: dict[str, Any], order: int) -> None:
    agree(
        "MaxPool",
        [f32(2, 3, 9, 8)],
        ["y", "indices"],
        version=12,
        kernel_shape=[3, 2],
        storage_order=order,
        **attributes,
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_max_pool_of_integers(dtype: type) -> None:
    agree(
        "MaxPool", [RNG.integers(-100 if dtype == np.int8 else 0, 100, (1, 2, 5, 5)).astype(dtype)], kernel_shape=[2, 2]
    )


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("counted", [0, 1])
def test_average_pool(attributes: dict[str, Any], counted: int) -> None:
    agree("AveragePool", [f32(2, 3, 9, 8)], version=19, kernel_shape=[3, 2], count_include_pad=counted, **attributes)


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp_pool(attributes: dict[str, Any], p: int) -> None:
    agree("LpPool", [f32(2, 3, 9, 8)], version=18, kernel_shape=[3, 2], p=p, **attributes)


@pytest.mark.parametrize("op", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
def test_global_pools(op: str) -> None:
    agree(op, [f32(2, 3, 4, 5)])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_lrn(size: int) -> None:
    """onnxruntime has odd sizes alone."""
    x = f32(2, 6, 3, 3)
    (found,) = ours(model_of("LRN", [x], size=size, alpha=0.3, beta=0.6, bias=1.5), [x])
    sums = [np.square(x[:, max(c - (size - 1) // 2, 0) : c + size // 2 + 1]).sum(1) for c in range(6)]
    np.testing.assert_allclose(found, x / (1.5 + 0.3 / size * np.stack(sums, 1)) ** 0.6, rtol=1e-5)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization(opset: int) -> None:
    agree("BatchNormalization", [f32(2, 3, 4), f32(3), f32(3), f32(3), np.abs(f32(3))], version=opset)


def test_batch_normalization_of_elements() -> None:
    """Until opset 9, with statistics for each element."""
    x, scale, bias, mean, var = f32(2, 3, 4), f32(3, 4), f32(3, 4), f32(3, 4), np.abs(f32(3, 4))
    arrays = [x, scale, bias, mean, var]
    (found,) = ours(model_of("BatchNormalization", arrays, version=7, spatial=0), arrays)
    np.testing.assert_allclose(found, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=1e-5)


@pytest.mark.parametrize("axis", [1, -1])
def test_layer_normalization(axis: int) -> None:
    shape = [3, 4][axis:] if axis < 0 else [3, 4]
    agree("LayerNormalization", [f32(2, 3, 4), f32(*shape), f32(*shape)], ["y", "mean", "inverse"], axis=axis)


def test_layer_normalization_with_weights_that_broadcast() -> None:
    x, scale = f32(2, 3, 4), f32(4)
    arrays = [x, scale]
    (found,) = ours(model_of("LayerNormalization", arrays, axis=1), arrays)
    mean, var = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
    np.testing.assert_allclose(found, (x - mean) / np.sqrt(var + 1e-5) * scale, atol=1e-5)


def test_lp_normalization_of_zeros() -> None:
    x = np.array([[0, 0], [3, 4]], np.float32)
    (found,) = ours(model_of("LpNormalization", [x], axis=1, p=2), [x])
    np.testing.assert_allclose(found, [[0, 0], [0.6, 0.8]], atol=1e-6)


@pytest.mark.parametrize("sizes", [(5, 6), (1, 6)])
def test_deform_conv_without_shifts_is_a_convolution(sizes: tuple[int, int]) -> None:
    x, w, b = torch.randn(2, 4, *sizes), torch.randn(6, 2, 3, 3), torch.randn(6)
    wanted = torch.conv2d(x, w, b, stride=2, padding=2, dilation=1, groups=2)
    found = deform_conv(
        x, w, torch.zeros(2, 36, *wanted.shape[2:]), b, group=2, offset_group=2, strides=[2, 2], pads=[2, 2, 2, 2]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_queries_that_see_nothing_have_gradients(softcap: float) -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    (y,) = attention(q, k, v, mask, softcap=softcap)
    assert isinstance(y, torch.Tensor)
    assert not y[:, :, 1].any()
    y.square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.any()


def test_linear_attention_in_two_parts() -> None:
    """The state carries what the first part of a sequence leaves for the second."""
    q, k, v = torch.randn(2, 6, 16), torch.randn(2, 6, 8), torch.randn(2, 6, 12)
    decay, beta = -torch.rand(2, 6, 2), torch.rand(2, 6, 2)
    heads = {"q_num_heads": 4, "kv_num_heads": 2}
    whole, last = linear_attention(q, k, v, None, decay, beta, **heads)
    first, state = linear_attention(*(x[:, :4] for x in (q, k, v)), None, decay[:, :4], beta[:, :4], **heads)
    second, end = linear_attention(*(x[:, 4:] for x in (q, k, v)), state, decay[:, 4:], beta[:, 4:], **heads)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


EXPORTED: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {
    "Conv": ([f32(2, 3, 8, 8), f32(4, 3, 3, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "MaxPool": ([f32(2, 3, 8, 8)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "LpPool": ([f32(2, 3, 8, 8)], {"kernel_shape": [2, 3], "strides": [3, 2], "pads": [0, 0, 1, 1]}),
    "AveragePool": ([f32(2, 3, 8, 8)], {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
}


@pytest.mark.parametrize("op", EXPORTED)
def test_windows_of_dynamic_sizes(op: str) -> None:
    """One export is right for sizes on both sides of a boundary of the stride."""
    arrays, attributes = EXPORTED[op]
    model = model_of(op, arrays, **attributes)
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim, "NCHW", strict=True):
        if name in "HW":
            dim.dim_param = name
    module = from_onnx(model)
    given = [torch.from_numpy(array) for array in arrays]
    sizes = {2: torch.export.Dim("h", min=5, max=64), 3: torch.export.Dim("w", min=5, max=64)}
    exported = torch.export.export(module, tuple(given), dynamic_shapes=(sizes, *(None for _ in given[1:])))
    for height, width in ((8, 8), (9, 12), (11, 10)):
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(exported.module()(x, *given[1:]), module(x, *given[1:]))
