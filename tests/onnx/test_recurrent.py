"""LSTM, GRU and RNN in all their forms compute what onnxruntime does, and stay calls of PyTorch's where it has them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx_ir")

from tests.onnx.operators import call
from tests.onnx.runtime import agree, model_of, ours
from torch_rtx.errors import OnnxError
from torch_rtx.onnx.module import from_onnx

RNG = np.random.default_rng(0)
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
STEPS, BATCH, INPUT, HIDDEN = 5, 3, 4, 2


def f32(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return RNG.standard_normal(shape).astype(np.float32)


def arrays_of(
    op: str, directions: int, *, bias: bool = True, lengths: bool = False, states: bool = True
) -> list[np.ndarray | None]:
    """Inputs of a node, up to the initial states."""
    gates = GATES[op] * HIDDEN
    arrays = [f32(STEPS, BATCH, INPUT), f32(directions, gates, INPUT), f32(directions, gates, HIDDEN)]
    optional = [
        f32(directions, 2 * gates) if bias else None,
        np.array([5, 2, 3], np.int32) if lengths else None,
        *[f32(directions, BATCH, HIDDEN) if states else None] * (2 if op == "LSTM" else 1),
    ]
    return [*arrays, *optional]


def check(op: str, arrays: list[np.ndarray | None], **attributes: Any) -> None:
    """Compares all outputs."""
    outputs = ["y", "h", "c"] if op == "LSTM" else ["y", "h"]
    agree(op, arrays, outputs, hidden_size=HIDDEN, **attributes)


@pytest.mark.parametrize(
    ("op", "direction", "lengths"), [*product(GATES, ["forward", "reverse", "bidirectional"], [False, True])]
)
@pytest.mark.parametrize("full", [False, True])
def test_directions(op: str, direction: str, lengths: bool, full: bool) -> None:
    directions = 2 if direction == "bidirectional" else 1
    arrays = arrays_of(op, directions, bias=full, lengths=lengths, states=full)
    check(op, arrays, direction=direction)
    if op == "GRU":
        check(op, arrays, direction=direction, linear_before_reset=1)


@pytest.mark.parametrize("op", GATES)
def test_clip(op: str) -> None:
    check(op, arrays_of(op, 2, lengths=True), direction="bidirectional", clip=0.3)


@pytest.mark.parametrize("op", GATES)
def test_activations(op: str) -> None:
    names = {"RNN": ["LeakyRelu"], "GRU": ["HardSigmoid", "Softsign"], "LSTM": ["HardSigmoid", "ScaledTanh", "Relu"]}
    alphas = {"RNN": [0.1], "GRU": [0.3], "LSTM": [0.3, 0.7]}
    betas = {"RNN": [], "GRU": [0.4], "LSTM": [0.4, 0.9]}
    given = {"activation_alpha": alphas[op], **({"activation_beta": betas[op]} if betas[op] else {})}
    check(op, arrays_of(op, 1), activations=names[op], **given)


def test_relu_of_both_directions() -> None:
    check("RNN", arrays_of("RNN", 2), activations=["Relu", "Relu"], direction="bidirectional")


@pytest.mark.parametrize("lengths", [False, True])
def test_peepholes(lengths: bool) -> None:
    check("LSTM", [*arrays_of("LSTM", 1, lengths=lengths), f32(1, 3 * HIDDEN)])


def test_input_forget() -> None:
    check("LSTM", arrays_of("LSTM", 1), input_forget=1)


@pytest.mark.parametrize("op", GATES)
def test_empty_sequences_keep_their_state(op: str) -> None:
    arrays = arrays_of(op, 2, lengths=True)
    arrays[4] = np.array([0, 5, 1], np.int32)
    outputs = ["y", "h", "c"] if op == "LSTM" else ["y", "h"]
    y, *states = ours(
        model_of(op, arrays, outputs, hidden_size=HIDDEN, direction="bidirectional", linear_before_reset=1)
        if op == "GRU"
        else model_of(op, arrays, outputs, hidden_size=HIDDEN, direction="bidirectional"),
        arrays,
    )
    assert not y[:, :, 0].any()
    for state, begin in zip(states, arrays[5:], strict=True):
        assert begin is not None
        np.testing.assert_array_equal(state[:, 0], begin[:, 0])


def test_batch_first() -> None:
    """onnxruntime has `layout=0` alone."""
    arrays = arrays_of("LSTM", 2)
    y, h, c = ours(model_of("LSTM", arrays, ["y", "h", "c"], hidden_size=HIDDEN, direction="bidirectional"), arrays)
    turned = [arrays[0].swapaxes(0, 1), *arrays[1:5], arrays[5].swapaxes(0, 1), arrays[6].swapaxes(0, 1)]
    model = model_of("LSTM", turned, ["y", "h", "c"], hidden_size=HIDDEN, direction="bidirectional", layout=1)
    for found, wanted in zip(ours(model, turned), (y.transpose(2, 0, 1, 3), h, c), strict=True):
        np.testing.assert_allclose(found, wanted if wanted.ndim == 4 else wanted.swapaxes(0, 1), atol=1e-6)


def test_unknown_activation_is_refused() -> None:
    arrays = arrays_of("RNN", 1)
    with pytest.raises(OnnxError, match="no activation 'sine'"):
        ours(model_of("RNN", arrays, ["y", "h"], hidden_size=HIDDEN, activations=["Sine"]), arrays)


CALLS = {"RNN": "aten.rnn_tanh.input", "GRU": "aten.gru.input", "LSTM": "aten.lstm.input"}


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("lengths", [False, True])
def test_a_standard_form_is_a_call_of_the_library(op: str, lengths: bool) -> None:
    arrays = arrays_of(op, 1, lengths=lengths)
    attributes = {"linear_before_reset": 1} if op == "GRU" else {}
    module = from_onnx(model_of(op, arrays, ["y", "h"], hidden_size=HIDDEN, **attributes))
    given = tuple(torch.from_numpy(array) for array in arrays if array is not None)
    calls = [str(node.target) for node in torch.export.export(module, given).graph.nodes]
    assert calls.count(CALLS[op]) == 1
    assert "aten.sigmoid.default" not in calls


@pytest.mark.parametrize("op", GATES)
def test_gradients(op: str) -> None:
    arrays = arrays_of(op, 2, lengths=True)
    model = model_of(op, arrays, ["y", "h"], hidden_size=HIDDEN, direction="bidirectional")
    given = [torch.from_numpy(array).requires_grad_(array.dtype == np.float32) for array in arrays if array is not None]
    y, h = from_onnx(model)(*given)
    (y.sum() + h.sum()).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in given if x.requires_grad)


@pytest.mark.parametrize(
    ("wrong", "shape", "message"),
    [
        (0, (3, 2, 5), r"X has the shape \[3, 2, 5\], not \[3, 2, 4\]"),
        (0, (1, 3, 2, 4), "X has the shape"),
        (1, (2, 12, 4), r"W has the shape \[2, 12, 4\], not \[1, 12, 4\]"),
        (2, (1, 9, 3), "R has the shape"),
        (3, (1, 12), r"B has the shape \[1, 12\], not \[1, 24\]"),
        (5, (1, 1, 3), r"initial state 0 has the shape \[1, 1, 3\], not \[1, 2, 3\]"),
    ],
)
def test_shapes_that_do_not_fit(wrong: int, shape: tuple[int, ...], message: str) -> None:
    """The library would read behind the end of a tensor."""
    shapes: list[tuple[int, ...] | None] = [(3, 2, 4), (1, 12, 4), (1, 12, 3), (1, 24), None, (1, 2, 3)]
    shapes[wrong] = shape
    with pytest.raises(OnnxError, match=message):
        call("LSTM", 14, *(size if size is None else torch.ones(size) for size in shapes), hidden_size=3)
