"""Arithmetic, activations, reductions, casts and random numbers: what the node cases of the onnx package lack."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx_ir")

from onnx import TensorProto

from tests.onnx.models import graph, model, node, value
from tests.onnx.operators import call
from torch_rtx.errors import OnnxError
from torch_rtx.onnx.module import from_onnx

X = torch.arange(24.0).reshape(2, 3, 4) / 7 - 1
INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]


def edges(name: str) -> list[int]:
    """Values of an integer type where arithmetic in another type goes wrong."""
    info = np.iinfo(name)
    middle = info.max // 2
    found = {info.min, info.min + 1, 0, 1, 2, 3, 7, middle, middle + 1, info.max - 1, info.max}
    return sorted(value for value in found | {-1, -2, -7} if value >= info.min)


def of(values: Any, name: str) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=name))


def wrapped(value: int, name: str) -> int:
    info = np.iinfo(name)
    return (value - info.min) % (info.max - info.min + 1) + info.min


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_every_type(name: str) -> None:
    """Against Python's integers, on all pairs of edges."""
    pairs = list(itertools.product(edges(name), repeat=2))
    a, b = of([pair[0] for pair in pairs], name), of([pair[1] for pair in pairs], name)
    expected: dict[str, Any] = {
        "Add": lambda x, y: wrapped(x + y, name),
        "Sub": lambda x, y: wrapped(x - y, name),
        "Mul": lambda x, y: wrapped(x * y, name),
        "Less": lambda x, y: x < y,
        "GreaterOrEqual": lambda x, y: x >= y,
        "Equal": lambda x, y: x == y,
        "Max": max,
        "Min": min,
        "BitwiseXor": lambda x, y: x ^ y,
    }
    for op, function in expected.items():
        found = call(op, 18, a, b)
        assert found.tolist() == [function(x, y) for x, y in pairs], op
        assert found.dtype in (a.dtype, torch.bool)
    pairs = [pair for pair in pairs if pair[1] != 0 and pair != (np.iinfo(name).min, -1)]
    a, b = of([pair[0] for pair in pairs], name), of([pair[1] for pair in pairs], name)
    quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]
    assert call("Div", 14, a, b).tolist() == quotients
    assert call("Mod", 13, a, b).tolist() == [x % y for x, y in pairs]
    assert call("Mod", 13, a, b, fmod=1).tolist() == [x - q * y for (x, y), q in zip(pairs, quotients, strict=True)]


@pytest.mark.parametrize("name", INTEGERS)
def test_shifts_beyond_the_width(name: str) -> None:
    bits = np.iinfo(name).bits
    counts = [count for count in (0, 1, bits - 1, bits, bits + 1, -1) if np.iinfo(name).min <= count]
    pairs = list(itertools.product(edges(name), counts))
    x, y = of([pair[0] for pair in pairs], name), of([pair[1] for pair in pairs], name)
    left = [wrapped(value << count, name) if 0 <= count < bits else 0 for value, count in pairs]
    right = [value >> count if 0 <= count < bits else -(value < 0) for value, count in pairs]
    assert call("BitShift", 28, x, y, direction="LEFT").tolist() == left
    assert call("BitShift", 28, x, y, direction="RIGHT").tolist() == right


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow"])
def test_broadcast_from_an_axis(op: str) -> None:
    """Before opset 7 the second input's axes are at `axis` of the first."""
    y = torch.arange(1.0, 4)
    assert torch.equal(call(op, 6, X + 2, y, axis=1, broadcast=1), call(op, 7, X + 2, y[:, None]))


def test_a_zero_remainder_has_the_sign_of_the_divisor() -> None:
    found = call("Mod", 28, torch.tensor([6.0, -6, 6, -7, torch.inf, 1]), torch.tensor([3.0, 3, -3, 3, 3, torch.inf]))
    assert torch.equal(found[:4], torch.tensor([0.0, 0, 0, 2]))
    assert torch.signbit(found[:4]).tolist() == [False, False, True, False]
    assert torch.isnan(found[4])
    assert found[5] == 1


def test_powers_have_the_type_of_the_base() -> None:
    found = call("Pow", 15, torch.tensor([2, 3], dtype=torch.int32), torch.tensor([0.5, 2.5]))
    assert found.dtype == torch.int32
    assert found.tolist() == [1, 15]


@pytest.mark.parametrize("zero", [None, 7])
def test_products_of_bytes_are_exact(zero: int | None) -> None:
    """A depth whose sums are beyond the integers of float32."""
    generator = np.random.default_rng(0)
    a = generator.integers(200, 256, (2, 3, 1000)).astype(np.uint8)
    b = generator.integers(100, 128, (1000, 4)).astype(np.int8)
    zeros = (None, None) if zero is None else (np.array(zero, np.uint8), np.arange(4, dtype=np.int8))
    expected = (a.astype(np.int64) - (zero or 0)) @ (b.astype(np.int64) - (0 if zero is None else np.arange(4)))
    found = call("MatMulInteger", 10, torch.from_numpy(a), torch.from_numpy(b), *zeros)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
def test_distributions_before_opset_13_flatten(op: str) -> None:
    function = {
        "Softmax": torch.softmax,
        "LogSoftmax": torch.log_softmax,
        "Hardmax": lambda x, axis: torch.nn.functional.one_hot(x.argmax(axis), x.shape[axis]).float(),
    }[op]
    for axis, rows in ((0, 1), (1, 2), (-1, 6)):
        assert torch.equal(call(op, 11, X, axis=axis), function(X.reshape(rows, -1), 1).reshape(X.shape))
    assert torch.equal(call(op, 11, X), call(op, 11, X, axis=1))
    assert torch.equal(call(op, 13, X), function(X, -1))


def test_prelu_before_opset_7_has_a_slope_for_each_channel() -> None:
    slope = torch.tensor([0.5, 2, 3])
    assert torch.equal(call("PRelu", 6, X, slope), torch.where(X < 0, X * slope[:, None], X))
    assert torch.equal(call("PRelu", 6, X, slope[:1]), torch.where(X < 0, X / 2, X))


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("ReduceL1", torch.abs),
        ("ReduceL2", torch.abs),
        ("ReduceLogSum", torch.log),
        ("ReduceSumSquare", torch.square),
        ("ReduceMax", lambda x: x),
    ],
)
def test_a_reduction_along_no_axis_keeps_what_surrounds_it(op: str, function: Any) -> None:
    x = X.abs() + 1
    no_axes = np.zeros(0, np.int64)
    torch.testing.assert_close(call(op, 18, x, no_axes, noop_with_empty_axes=1), function(x))
    torch.testing.assert_close(call(op, 18, x, no_axes), call(op, 11, x))
    torch.testing.assert_close(
        call(op, 18, x, np.array([0, -1]), keepdims=0), call(op, 11, x, axes=[0, -1], keepdims=0)
    )
    torch.testing.assert_close(call(op, 18, x[0, 0, 0]), function(x[0, 0, 0]))


@pytest.mark.parametrize("name", ["float32", "int64", "uint64"])
@pytest.mark.parametrize("largest", [0, 1])
def test_the_first_of_equal_elements_are_on_top(name: str, largest: int) -> None:
    x = of(np.random.default_rng(0).integers(0, 4, (3, 50)), name)
    values, places = call("TopK", 11, x, np.array([20]), outputs=2, largest=largest)
    order = np.argsort(-x.numpy().astype(np.int64) if largest else x.numpy(), axis=1, kind="stable")[:, :20]
    assert places.tolist() == order.tolist()
    assert values.tolist() == np.take_along_axis(x.numpy(), order, 1).tolist()


def test_cumulative_sums_leave_out_infinities_that_they_exclude() -> None:
    x = torch.tensor([1.0, 2, torch.inf])
    assert call("CumSum", 14, x, np.array(0), exclusive=1).tolist() == [0, 1, 3]
    assert call("CumProd", 26, x, np.array(-1), exclusive=1, reverse=1).tolist() == [torch.inf, torch.inf, 1]


def test_integers_of_few_bits() -> None:
    x = torch.arange(-9, 18)
    signed, unsigned = (call("Cast", 28, x, to=kind) for kind in (TensorProto.INT4, TensorProto.UINT4))
    assert call("Cast", 28, signed, to=TensorProto.INT64).tolist() == [(v + 8) % 16 - 8 for v in x.tolist()]
    assert call("Cast", 28, unsigned, to=TensorProto.INT64).tolist() == [v % 16 for v in x.tolist()]
    assert torch.equal(call("BitCast", 26, signed, to=TensorProto.UINT4).view(torch.uint8), unsigned.view(torch.uint8))
    assert torch.equal(call("BitCast", 26, unsigned, to=TensorProto.INT4).view(torch.int8), signed.view(torch.int8))
    with pytest.raises(OnnxError, match="bits"):
        call("BitCast", 26, signed, to=TensorProto.INT8)


def test_every_float4_survives() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    values = call("Cast", 28, codes, to=TensorProto.FLOAT)
    assert values.tolist() == [s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
    assert torch.equal(call("Cast", 28, values, to=TensorProto.FLOAT4E2M1).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("saturate", [0, 1])
def test_float8_at_its_end(saturate: int) -> None:
    """Half a step above the largest value is rounded down; more is out of range."""
    x = torch.tensor([448.0, 464, 464.1, -1e9, torch.inf])
    found = call("Cast", 28, x, to=TensorProto.FLOAT8E4M3FN, saturate=saturate).float().tolist()
    assert found[:2] == [448, 448]
    assert found[2:] == [448, -448, 448] if saturate else all(map(math.isnan, found[2:]))


def test_dropout_in_training() -> None:
    x = torch.full((4000,), 3.0, dtype=torch.float16)
    y, mask = call("Dropout", 22, x, np.float32(0.25), np.array(True), outputs=2)
    assert mask.dtype == torch.bool
    assert torch.equal(y, torch.where(mask, torch.tensor(4.0, dtype=torch.float16), 0))
    assert 0.7 < mask.float().mean() < 0.8
    for opset in (7, 10, 12):
        y, mask = call("Dropout", opset, x, outputs=2)
        assert torch.equal(y, x)
        assert mask.all()
        assert mask.dtype == (x.dtype if opset < 10 else torch.bool)


def test_random_numbers() -> None:
    torch.manual_seed(0)
    x = call("RandomNormal", 22, shape=[2, 3000], mean=5.0, scale=0.5, dtype=TensorProto.DOUBLE)
    assert x.dtype == torch.float64
    assert abs(x.mean() - 5) < 0.1
    assert abs(x.std() - 0.5) < 0.1
    x = call("RandomUniformLike", 22, torch.zeros(3, 1000, dtype=torch.float16), low=2.0, high=3.0)
    assert x.dtype == torch.float16
    assert x.min() >= 2
    assert x.max() <= 3
    x = call("Multinomial", 22, torch.tensor([[0.0, -torch.inf, 0.0]]), sample_size=200, dtype=TensorProto.INT64)
    assert x.dtype == torch.int64
    assert set(x.flatten().tolist()) == {0, 2}
    x = call("Bernoulli", 22, torch.tensor([0.0, 1.0]), dtype=TensorProto.INT32)
    assert x.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("op", "opset", "inputs", "attributes"),
    [
        ("Gelu", 20, (), {"approximate": "tanh"}),
        ("Softplus", 22, (), {}),
        ("Celu", 12, (), {"alpha": 0.7}),
        ("Clip", 13, (np.float64(-0.9), np.float64(1.7)), {}),
        ("ReduceLogSumExp", 18, (np.array([1]),), {}),
        ("Resize", 19, (None, None, np.array([2, 5, 7])), {"mode": "cubic"}),
        ("Pad", 19, (np.array([0, 1, 2, 0, 1, 1]),), {"mode": "reflect"}),
        ("GatherND", 13, (np.array([[0, 1], [1, 2], [0, 1]]),), {}),
        ("CumProd", 26, (np.array(1),), {}),
        ("DFT", 20, (None, np.array(1)), {}),
    ],
)
def test_gradients(op: str, opset: int, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> None:
    x = X.double()[..., :1] if op == "DFT" else X.double()
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(op, opset, x, *inputs, **attributes), x)


def test_lone_numbers_are_no_tensors() -> None:
    """Constant nodes hold Python's numbers in a capture; a weight can be refitted, and so stays one."""
    nodes = [
        node("Constant", "", "two", value_float=2.0),
        node("Constant", "", "row", value_floats=[3.0]),
        node("Mul", "two x", "a"),
        node("Div", "a row", "b"),
        node("Pow", "b power", "c"),
        node("Clip", "c - most", "d"),
        node("Add", "d weight", "y"),
    ]
    weights = {"power": np.float32(2), "most": np.float32(0.5), "weight": np.float32(4)}
    made = from_onnx(model(graph(nodes, [value("x", [2, 3, 4])], [value("y", [2, 3, 4])], weights)))
    program = torch.export.export(made, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), (2 * X / 3).square().clamp(max=0.5) + 4)
    assert list(made.state_dict()) == ["weight"]
    calls = {str(call.target): call.args[1:] for call in program.graph.nodes if call.op == "call_function"}
    assert calls["aten.mul.Tensor"] == (2.0,)
    assert calls["aten.div.Tensor"] == (3.0,)
    assert calls["aten.pow.Tensor_Scalar"] == (2.0,)
    assert calls["aten.clamp.default"] == (None, 0.5)
