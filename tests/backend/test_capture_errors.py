"""What keeps a model from being captured ahead of time is a CaptureError: what, at which line, and what to do."""

from __future__ import annotations

import logging
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_rtx
from tests.helpers.ahead import Function
from torch_rtx.errors import CaptureError

X = torch.ones(2, 4)


class Recurrent(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, 2, dropout=dropout)

    def forward(self, x):
        return self.rnn(x)[0]


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), X),
        (nn.AlphaDropout(0.5), X),
        (nn.Dropout2d(0.5), X.view(1, 2, 2, 2)),
        (nn.BatchNorm1d(4), X),
        (nn.InstanceNorm1d(2, track_running_stats=True), X.view(1, 2, 4)),
        (nn.RReLU(), X),
        (Recurrent(0.5), X),
        (Attention(), X),
    ],
    ids=lambda value: type(value).__name__,
)
def test_training_mode(model, x):
    with pytest.raises(CaptureError, match=r"the model is in training mode: aten\.\w+\.\w+ at .*:\d+") as caught:
        torch_rtx.compile(model, (x,))
    assert "call model.eval() first" in caught.value.hint
    torch_rtx.compile(model.eval(), (x,))


def test_training_mode_that_changes_nothing(caplog):
    """Also what is active in evaluation mode is the user's will; an exported program is taken as it is."""
    for model in (
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.ReLU()),
        nn.BatchNorm1d(4, track_running_stats=False),
        Recurrent(0.0),
        Function(torch.rand_like),
        Function(F.dropout).eval(),
        nn.Sequential(nn.ReLU(), nn.Dropout(0.5).eval()),
    ):
        torch_rtx.compile(model, (X,))
    assert "training mode" not in caplog.text
    program = torch.export.export(nn.Dropout(0.5), (X,))
    with caplog.at_level(logging.WARNING, "torch_rtx"):
        module = torch_rtx.compile(program)
    assert "exported in training mode, which the engine keeps: aten.native_dropout" in caplog.text
    assert not torch.equal(module(X), X)


class DynamicCache:
    """As transformers has one: no pytree."""


def branches(x):
    return x.exp() if x.sum() > 0 else x


def counts(x):
    for _ in range(int(x.sum())):
        x = x + 1
    return x


def raises(x):
    raise KeyError("of the model")


def through_numpy(x):
    return torch.from_numpy(x.numpy())


def returns_an_object(x):
    return DynamicCache()


def is_quantized(x):
    raise AttributeError("__torch__.torch.classes.P does not have a field with name '__obj_flatten__'")  # as PyTorch


def wrong_shapes(x):
    return x @ x


@pytest.mark.parametrize(
    ("function", "message", "hint", "line"),
    [
        (branches, "decides something in Python by the values of a tensor", "torch.cond", 1),
        (counts, "decides something in Python by the values of a tensor", "torch.cond", 1),
        (raises, "KeyError: 'of the model'", "model(*args) raises the same", 1),
        (through_numpy, r"RuntimeError: .numpy\(\) is not supported", "breaks the graph", 1),
        (returns_an_object, "the model returns a .*DynamicCache", "use_cache=False", None),
        (is_quantized, "script object, such as the packed weights of a quantized module", "before it is quantized", 1),
        (wrong_shapes, "RuntimeError: a and b must have same reduction dim", "model(*args) raises the same", 1),
    ],
)
def test_models(function, message, hint, line):
    with pytest.raises(CaptureError, match=message) as caught:
        torch_rtx.compile(Function(function), (X,))
    assert hint in caught.value.hint
    if line is not None:
        assert caught.value.loc == f"{__file__}:{function.__code__.co_firstlineno + line}"
    of_torch = [f for f in traceback.extract_tb(caught.value.__cause__.__traceback__) if "/torch/" in f.filename]
    assert of_torch == []
    assert len(traceback.format_exception(caught.value)) < 30


def test_compiled_modules():
    model = nn.Linear(4, 4)
    module = torch_rtx.compile(torch.compile(model), (X,))
    assert [parameter.name for parameter in module.engine.graph.parameters] == ["weight", "bias"]
    assert torch.equal(module(X), model(X).detach())
    with pytest.raises(CaptureError, match="compiled already\n  compile the model that it was built from"):
        torch_rtx.compile(module, (X,))  # its weights would be constants


def test_script_module():
    with pytest.raises(
        CaptureError, match="a ScriptModule can't be captured\n  compile the module that it was made of"
    ):
        torch_rtx.compile(torch.jit.trace(nn.Linear(4, 4), X), (X,))


@pytest.mark.parametrize(
    ("args", "kwargs", "dynamic_shapes", "message"),
    [
        ((), {}, None, r"missing a required argument: 'input'\n  it is forward\(input: torch.Tensor\)"),
        ((X,), {"scale": 2}, None, "unexpected keyword argument 'scale'"),
        ((X,), {}, ({1: torch.export.Dim("width")},), r"the model does not take all sizes.*\n  declare width = 4"),
        ((X,), {}, (None, None), "`inputs` has 1 elements, but `dynamic_shapes` has 2 elements"),
    ],
)
def test_arguments(args, kwargs, dynamic_shapes, message):
    with pytest.raises(CaptureError, match=message):
        torch_rtx.compile(nn.Linear(4, 4), args, kwargs, dynamic_shapes=dynamic_shapes)
