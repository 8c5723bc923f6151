"""Rotations that earlier layers take over: where they may, and that the model computes the same with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_rtx
from torch_rtx.quantization import quantize, restore
from torch_rtx.quantization.layers import spec_of

X = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
VECTOR = torch.rand(128)
MASK = torch.rand(2, 6, 6)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded."""
    monkeypatch.setattr("torch_rtx.quantization.layers.fake_quantize", lambda x, amax, form: x)


class Two(nn.Module):
    """Two layers, and something between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(128, 128), nn.Linear(128, 128), between

    def forward(self, x: Tensor) -> object:
        return self.two(self.between(self.one(x)))


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.view(2, 6, count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(2, 6, 128)


COMMUTING = {
    "nothing": lambda x: x,
    "scaled": lambda x: -x * 3 / 2,
    "scaled by rows": lambda x: x * MASK[..., :1],
    "other dtype": lambda x: x.double().float(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "rows moved": lambda x: x.transpose(0, 1)[1:, None].permute(2, 0, 1, 3).squeeze(2),
    "rows repeated": lambda x: torch.cat((x.repeat(2, 1, 1), x[:1]), 0),
    "sum with itself": lambda x: x[:, :3] + 2 * x[:, 3:],
    "heads": lambda x: joined(MASK[:, None] @ heads(x)),
    "attention": lambda x: joined(F.scaled_dot_product_attention(heads(X), heads(X), heads(x))),
}
OTHER = {
    "relu": lambda x: x.relu(),
    "in place": lambda x: x.relu_(),
    "shifted": lambda x: x + 1,
    "a bias": lambda x: x + VECTOR,
    "a gain": lambda x: x * VECTOR,
    "an input": lambda x: x + X,
    "whole numbers": lambda x: (100 * x).int().float(),
    "rounded": lambda x: x.div(0.1, rounding_mode="floor"),
    "itself": lambda x: x * x,
    "normalized": lambda x: F.layer_norm(x, (128,)),
    "channels moved": lambda x: x.flip(-1),
    "channels turned": lambda x: torch.cat((-x[..., 64:], x[..., :64]), -1),
    "channels swapped with rows": lambda x: x[:, :2].reshape(2, 128, 2).transpose(1, 2),
    "bits": lambda x: x.view(torch.int32).view(torch.float32),
    "query": lambda x: joined(F.scaled_dot_product_attention(heads(x), heads(X), heads(X))),
    "narrow heads": lambda x: joined(MASK[:, None] @ heads(x, 8)) if len(x) == 2 else x,
    "small change": lambda x: x + 1e-3 * x.detach().sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", [*COMMUTING, *OTHER])
def test_between(name: str, exact: None) -> None:
    """The second layer gets its input rotated if and only if what is between treats all channels alike."""
    model = Two((COMMUTING | OTHER)[name]).eval()
    wanted = model(X)
    quantize(model, "int8_rotated", lambda model: model(X))
    assert (spec_of(model.one.spec).rotates_output, spec_of(model.two.spec).rotates_input) == (
        (True, False) if name in COMMUTING else (False, True)
    )
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """Attention with shared heads, a residual stream, and a chain of layers; `shown` is also a result."""

    def __init__(self, shown: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(128, 128), nn.Linear(128, 64), nn.Linear(128, 64)
        self.o, self.shown = nn.Linear(128, 128), shown
        self.down, self.up = nn.Linear(128, 64, bias=False), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> object:
        k, v = (layer(x)[:, None].expand(2, 2, 6, 64) for layer in (self.k, self.v))
        y = x + self.o(joined(F.scaled_dot_product_attention(heads(self.q(x)), k, v)))
        narrow = self.down(y)
        y = self.up(narrow)
        return (y, narrow) if self.shown else y


@pytest.mark.parametrize("shown", [True, False])
def test_blocks(shown: bool, exact: None) -> None:
    model = Block(shown).eval()
    wanted = model(X)
    quantize(model, "int8_rotated", lambda model: model(X))
    fused = {name for name, layer in model.named_children() if not spec_of(layer.spec).rotates_input}
    assert fused == ({"o"} if shown else {"o", "up"})
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-4)


def test_layers_that_can_not_take_part(exact: None) -> None:
    """One that is not quantized can't rotate its output; one that is not rotated needs the input as it is."""
    for rules in (
        {"*": "int8_rotated", "down": None},
        {"*": "int8_rotated", "up": "int8_dynamic"},
        {"up": "int8_rotated"},
    ):
        model = Block().eval()
        wanted = model(X)
        quantize(model, rules, lambda model: model(X))
        assert not hasattr(model.up, "input_rotation")
        torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-4)


def test_all_calls_count(exact: None) -> None:
    """A path that only some calls take."""
    model = Two(lambda x: x.relu() if len(x) == 1 else x).eval()
    quantize(model, "int8_rotated", lambda model: (model(X), model(X[:1])))
    assert spec_of(model.two.spec).rotates_input


def test_shared_layers(exact: None) -> None:
    """A layer that is called twice has one rotation."""

    class Shared(Block):
        def forward(self, x: Tensor) -> object:
            return self.up(self.down(x)) + self.up(self.k(x).relu())

    model = Shared().eval()
    rules = {"up": "int8_rotated", "down": "int8_rotated", "k": "int8_rotated"}
    quantize(model, rules, lambda model: model(X))
    assert spec_of(model.up.spec).rotates_input
    assert not spec_of(model.down.spec).rotates_output


def test_state_compilation_and_error() -> None:
    """Fused rotations are in the state dict, compile, and are as good as others."""
    plain, online = Block().eval(), Block().eval()
    online.load_state_dict(plain.state_dict())
    wanted = plain(X)
    quantize(online, "int8_rotated")
    model = quantize(plain, "int8_rotated", lambda model: model(X))
    again = restore(Block().eval(), "int8_rotated", model.state_dict())
    assert torch.equal(again(X), model(X))
    engine = torch_rtx.compile(model.double().float(), (X,))
    # One matrix of each size, 128 and 64, for all layers, also after they were moved.
    assert len(engine.engine.constants) == 2
    torch.testing.assert_close(engine(X), model(X))
    engine.refit(model.state_dict())
    torch.testing.assert_close(engine(X), model(X))
    assert (model(X) - wanted).norm() < 1.2 * (online(X) - wanted).norm()
