"""Operators on quantized tensors compute what onnxruntime does, to the last step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx_ir")

from tests.onnx.runtime import agree
from torch_rtx.onnx.ops.math import exact_matmul
from torch_rtx.onnx.ops.quantized import dequantize, quantize, saturated, values

MS = "com.microsoft"
RNG = np.random.default_rng(0)
Given = list["np.ndarray | None"]


def f32(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return RNG.standard_normal(shape).astype(np.float32)


def integers(dtype: Any, *shape: int) -> np.ndarray:
    """All numbers of a type."""
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max + 1, shape).astype(dtype)


def quantized(dtype: Any, *shape: int, scale: float = 0.05) -> Given:
    """A tensor, its scale and its zero point."""
    return [integers(dtype, *shape), np.float32(scale), np.array(3, dtype)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("axis", [None, 1, -3])
def test_quantize_and_dequantize(dtype: Any, axis: int | None) -> None:
    shape = () if axis is None else ((3,) if axis == 1 else (2,))
    scale, zero = np.array(np.abs(f32(*shape)) + 1e-3, np.float32), integers(dtype, *shape)
    x = f32(2, 3, 4) * 200
    x[0, 0, :2] = scale.flat[0] * np.array([0.5, 1.5], np.float32)  # ties
    attributes = {} if axis is None else {"axis": axis}
    agree("QuantizeLinear", [x, scale, zero], version=21, atol=0, rtol=0, **attributes)
    agree("DequantizeLinear", [integers(dtype, 2, 3, 4), scale, zero], version=21, **attributes)


@pytest.mark.parametrize("zero", [False, True])
def test_blocks(zero: bool) -> None:
    scale = np.abs(f32(2, 3, 4)) + 0.1
    points = integers(np.int8, 2, 3, 4) if zero else None
    agree("DequantizeLinear", [integers(np.int8, 2, 5, 4), scale, points], version=21, axis=1, block_size=2)
    agree("QuantizeLinear", [f32(2, 5, 4), scale, points], version=21, axis=1, block_size=2, rtol=0, atol=0)


@pytest.mark.parametrize("x", [f32(3, 4) * 9, np.zeros((2, 2), np.float32), np.full((2, 2), 7, np.float32)])
def test_dynamic_quantize_linear(x: np.ndarray) -> None:
    agree("DynamicQuantizeLinear", [x], ["y", "scale", "zero"])


@pytest.mark.parametrize("dtype", [torch.int4, torch.uint4, torch.int2, torch.uint2, torch.float4_e2m1fn_x2])
def test_types_below_a_byte(dtype: torch.dtype) -> None:
    """What a type can hold goes through it unchanged; what it can't saturates."""
    codes = torch.arange(16 if dtype in (torch.int4, torch.uint4, torch.float4_e2m1fn_x2) else 4, dtype=torch.uint8)
    if dtype in (torch.int4, torch.int2):
        codes = (codes.to(torch.int8) - len(codes) // 2).to(torch.int8)
    x = codes.view(dtype)
    again = quantize(dequantize(x, torch.tensor(0.5)), torch.tensor(0.5), None, dtype)
    assert torch.equal(again.view(codes.dtype), codes)
    ends = values(saturated(torch.tensor([-1e9, 1e9]), dtype)).float()
    assert ends.tolist() == [values(x).float().min(), values(x).float().max()]


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_float8_saturates_where_it_is_asked_to(dtype: torch.dtype) -> None:
    x, limit = torch.tensor([1e9, -1e9, 1.0]), torch.finfo(dtype).max
    assert saturated(x, dtype).float().tolist() == [limit, -limit, 1]
    assert not saturated(x, dtype, False)[:2].float().isfinite().any()


@pytest.mark.parametrize("terms", [4, 300, 5000])
def test_integer_products_are_exact(terms: int) -> None:
    a = torch.randint(-255, 256, (3, terms), dtype=torch.int32)
    b = torch.randint(-255, 256, (terms, 4), dtype=torch.int32)
    a[0], b[:, 0] = 255, -255
    assert torch.equal(exact_matmul(a, b), (a.long() @ b.long()).int())


CONVS: list[dict[str, Any]] = [{}, {"pads": [1, 2, 0, 1], "strides": [2, 1]}, {"auto_pad": "SAME_UPPER"}]


@pytest.mark.parametrize("attributes", CONVS)
@pytest.mark.parametrize("channels", [False, True])
def test_qlinear_conv(attributes: dict[str, Any], channels: bool) -> None:
    weights: Given = quantized(np.int8, 6, 2, 3, 3, scale=0.02)
    if channels:
        weights[1:] = [np.abs(f32(6)) * 0.01 + 0.01, np.zeros(6, np.int8)]
    bias = RNG.integers(-1000, 1000, 6).astype(np.int32)
    arrays = [*quantized(np.uint8, 2, 4, 7, 8), *weights, np.float32(0.3), np.array(100, np.uint8), bias]
    agree("QLinearConv", arrays, group=2, rtol=0, atol=1, **attributes)


def test_qlinear_matmul() -> None:
    arrays = [*quantized(np.uint8, 2, 3, 40), *quantized(np.int8, 40, 5, scale=0.02), np.float32(1.1)]
    agree("QLinearMatMul", [*arrays, np.array(120, np.uint8)], rtol=0, atol=0)


@pytest.mark.parametrize("zeros", [False, True])
def test_conv_integer(zeros: bool) -> None:
    points = [np.array(7, np.uint8), np.array(3, np.uint8)] if zeros else [None, None]
    arrays = [integers(np.uint8, 2, 4, 7, 8), integers(np.uint8, 6, 4, 3, 3), *points]
    agree("ConvInteger", arrays, rtol=0, atol=0, pads=[1, 1, 1, 1])


END: Given = [np.float32(0.07), np.array(5, np.uint8)]
OPERATORS: dict[str, tuple[Given, dict[str, Any]]] = {
    "QLinearAdd": ([*quantized(np.uint8, 2, 8), *quantized(np.uint8, 8, scale=0.03), *END], {}),
    "QLinearMul": ([*quantized(np.uint8, 2, 8), *quantized(np.uint8, 8, scale=0.03), *END], {}),
    "QLinearSigmoid": ([*quantized(np.uint8, 2, 8), *END], {}),
    "QLinearLeakyRelu": ([*quantized(np.uint8, 2, 8), *END], {"alpha": 0.2}),
    "QLinearGlobalAveragePool": ([*quantized(np.uint8, 2, 5, 6, 3), *END], {"channels_last": 1}),
    "QLinearAveragePool": ([*quantized(np.uint8, 2, 3, 6, 6), *END], {"kernel_shape": [2, 3], "pads": [0, 1, 0, 1]}),
    "QLinearSoftmax": ([*quantized(np.uint8, 2, 8), np.float32(1 / 256), np.array(0, np.uint8)], {"opset": 13}),
    "QLinearWhere": ([f32(2, 3) > 0, *quantized(np.uint8, 2, 3), *quantized(np.uint8, 3, scale=0.1), *END], {}),
    "QLinearConcat": ([*END, *quantized(np.uint8, 2, 3), *quantized(np.uint8, 2, 2, scale=0.1)], {"axis": 1}),
    "QGemm": (
        [*quantized(np.uint8, 3, 8), *quantized(np.int8, 5, 8), RNG.integers(-99, 99, 5).astype(np.int32), *END],
        {"transB": 1},
    ),
}


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_of_onnxruntime(op: str) -> None:
    """It uses tables and integer arithmetic, which may round to the next step."""
    arrays, attributes = OPERATORS[op]
    agree(op, arrays, domain=MS, rtol=0, atol=1, **attributes)


@pytest.mark.parametrize("columns", [False, True])
def test_products_with_float_results(columns: bool) -> None:
    scale = np.abs(f32(5)) + 0.01 if columns else np.array(0.03, np.float32)
    zero = integers(np.int8, 5) if columns else np.array(-4, np.int8)
    b = integers(np.int8, 40, 5)
    arrays = [integers(np.uint8, 3, 40), b, np.array(0.1, np.float32), scale, np.array(9, np.uint8), zero, f32(5)]
    agree("MatMulIntegerToFloat", arrays, domain=MS, rtol=1e-4, atol=1e-3)
    agree("DynamicQuantizeMatMul", [f32(3, 40), b, scale, zero, f32(5)], domain=MS, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("lengths", [None, np.array([4, 2], np.int32)])
@pytest.mark.parametrize("columns", [False, True])
def test_lstm(lengths: np.ndarray | None, columns: bool) -> None:
    """onnxruntime rounds the input and the state to 8 bits, too."""
    weights = [integers(np.int8, 2, 8, 20), integers(np.int8, 2, 5, 20)]
    points = [np.full((2, 20) if columns else (2,), 0.005, np.float32), np.zeros((2, 20) if columns else (2,), np.int8)]
    arrays = [f32(4, 2, 8), *weights, f32(2, 40), lengths, f32(2, 2, 5), f32(2, 2, 5), None, *points, *points]
    names = ["y", "h", "c"]
    agree(
        "DynamicQuantizeLSTM", arrays, names, domain=MS, hidden_size=5, direction="bidirectional", rtol=0.1, atol=0.05
    )
