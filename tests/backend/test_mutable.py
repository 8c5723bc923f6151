"""MutableModule: a model that is compiled, and follows every change of the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import innermost_fn
from torch.export import Dim

import torch_rtx
from tests.helpers.compiled import compile_rtx, same
from torch_rtx import InputError, MutableModule, SettingsError

X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.fixture(autouse=True)
def _inference(fresh_dynamo: None) -> Any:
    with torch.no_grad():
        yield


class Model(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear, self.scale, self.config = nn.Linear(4, width), 2.0, {"width": width}

    def forward(self, x: torch.Tensor, extra: Any = None) -> torch.Tensor:
        y = self.linear(x).relu() * self.scale
        return y if extra is None else y + extra["bias"][0]


def replaced(module: MutableModule) -> None:
    module.linear = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


CHANGES: list[Callable[[Any], object]] = [
    lambda module: module.linear.weight.mul_(-2),
    lambda module: module.linear.weight.data.add_(1),
    lambda module: module.load_state_dict(Model().state_dict()),
    lambda module: module.load_state_dict(Model().state_dict(), assign=True),
    lambda module: setattr(module.linear, "weight", nn.Parameter(torch.randn(4, 4))),
    lambda module: setattr(module, "scale", 3.0),
    replaced,
]


def test_changes_are_seen() -> None:
    model = Model().eval()
    module, before = MutableModule(model, min_block_size=1), torch.zeros(())
    for change in CHANGES:
        change(module)
        got = module(X)
        same(got, model(X), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(got, before)
        before = got


def test_it_is_the_model() -> None:
    model = Model().eval()
    module = MutableModule(model)
    assert module.config is model.config
    for names in (nn.Module.state_dict, nn.Module.named_parameters, nn.Module.named_children):
        assert dict(names(module)).keys() == dict(names(model)).keys()
    module.scale, module.added = 5.0, "new"
    assert (model.scale, model.added) == (5.0, "new")
    assert module.train() is module
    assert model.training
    assert module.double() is module
    assert model.linear.weight.dtype == torch.float64
    outer, other = nn.ModuleDict({"inner": module}), nn.ModuleDict({"inner": Model()}).double()
    outer.load_state_dict(other.state_dict())
    assert torch.equal(model.linear.weight, other["inner"].linear.weight)
    assert outer.state_dict().keys() == other.state_dict().keys()
    torch_rtx.refit_module_weights(module, Model().double())
    assert not torch.equal(model.linear.weight, other["inner"].linear.weight)


def test_whatever_takes_a_compiled_model() -> None:
    module = MutableModule(Model().eval())
    expected = module._orig_mod(X)
    around = compile_rtx(lambda x: module(x) * 2, fullgraph=True)
    same(around(X), expected * 2, atol=1e-5, rtol=1e-4)
    same(torch_rtx.compile(module, (X,))(X), expected, atol=1e-5, rtol=1e-4)
    with torch_rtx.runtime.enable_cudagraphs(module) as captured:
        same(captured(X), expected, atol=1e-5, rtol=1e-4)
    assert torch_rtx.explain(module, X).fallback_nodes == 0
    assert innermost_fn(module) == module._orig_mod.forward


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(how: Callable[[Any], Any]) -> None:
    module = MutableModule(Model(), min_block_size=1)
    module.set_expected_dynamic_shape_range(({0: Dim("batch")},))
    copied = how(module)
    assert type(copied) is MutableModule
    assert copied._options == {"min_block_size": 1}
    assert copied._ranges[0][0].keys() == {0}
    expected = module(X)
    module.linear.weight.zero_()
    assert torch.equal(copied(X), expected)


def test_dynamic_shapes() -> None:
    module = MutableModule(Model())
    module.set_expected_dynamic_shape_range(({0: Dim("batch", min=1, max=8)},), {"extra": {"bias": [{0: Dim.AUTO}]}})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5, 9):
            x, bias = torch.randn(batch, 4), torch.randn(batch, 4)
            same(module(x, extra={"bias": [bias]}), module._orig_mod(x, {"bias": [bias]}), atol=1e-5, rtol=1e-4)
    for wrong in (3, (3,), {"x": {0: Dim("batch")}}, ()):
        module.set_expected_dynamic_shape_range(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="write them as dynamic_shapes of torch.export"):
            module(X)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(SettingsError, match=r"enabled_precisions is an option of Torch-TensorRT[\s\S]*model.half\(\)"):
        MutableModule(Model(), enabled_precisions={torch.half})
