"""quantize(): rules, layers of every kind, state, refit, compilation, mistakes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import is_parametrized

import torch_rtx
from torch_rtx.errors import QuantizationError
from torch_rtx.quantization import PRESETS, Format, LayerConfig, quantize, restore
from torch_rtx.quantization.layers import QuantizedLayer

IDS = torch.randint(24, (3, 5), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A little of everything, with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(24, 128)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)
        self.head = nn.Linear(128, 24, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.words(ids)).relu()))


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def loop(model: nn.Module) -> None:
    model(IDS)


def of(model: nn.Module) -> dict[str, str]:
    """What is quantized how."""
    return {name: str(m.quantization) for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


# ---- rules -----------------------------------------------------------------------------------------------------------

INT8, WEIGHTS = str(PRESETS["int8_dynamic"]), str(PRESETS["int8_weight_only"])


@pytest.mark.quick
def test_rules() -> None:
    """The last pattern that matches counts; embeddings are matched by other patterns than `*`."""
    assert of(quantize(model(), "int8_dynamic")) == {"up": INT8, "down": INT8, "head": INT8}
    rules = {"*": "int8_dynamic", "*head*": None, "w*": "int8_weight_only"}
    assert of(quantize(model(), rules)) == {"words": WEIGHTS, "up": INT8, "down": INT8}
    assert of(quantize(model(), {"*": None, "[du]*": LayerConfig()})) == {"up": WEIGHTS, "down": WEIGHTS}
    changed = quantize(
        model(), {"up": {"preset": "int8", "input": None, "smooth": False, "weight": {"calibration": "mse"}}}
    )
    assert changed.up.quantization == LayerConfig(Format("int8", "channel", calibration="mse"))
    built = quantize(model(), {"up": {"input": {"granularity": "token", "dynamic": True}}})
    assert of(built) == {"up": INT8}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("int9", "there is no preset 'int9'(.|\n)*int8_rotated"),
        ({"*": "int8_dynamic", "*lm_head*": None}, r"pattern '\*lm_head\*' matches no layer(.|\n)*'head'"),
        ({}, "no rules"),
        (None, "config must be a preset"),
        ({"*": 8}, "settings must be"),
        ({"*": {"weights": "int8"}}, "LayerConfig has no field 'weights'"),
        ({"*": {"weight": {"bits": 8}}}, "Format has no field 'bits'"),
        ({"*": {"weight": "int8"}}, "weight must be a Format"),
        ({"*": {"weight": {"granularity": "token"}}}, "scales of weights"),
        ({"*": {"weight": {"calibration": "entropy"}}}, "scales of weights"),
        ({"*": {"input": {"granularity": "channel"}}}, "a channel is summed over"),
        ({"*": {"input": {"granularity": "token"}}}, "scales of a token of inputs are dynamic"),
        ({"*": {"preset": "int8_dynamic", "input": {"calibration": "mse"}}}, "dynamic scales are the largest"),
        ({"*": {"preset": "int8_rotated", "smooth": True}}, "either smooth or rotate"),
    ],
)
def test_mistakes_in_rules(config: object, message: str) -> None:
    m = model()
    with pytest.raises(QuantizationError, match=message):
        quantize(m, config, loop)  # type: ignore[arg-type]
    assert of(m) == {}


# ---- layers ----------------------------------------------------------------------------------------------------------


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def wrapped() -> nn.Module:
    m = nn.Sequential(nn.Linear(4, 4))
    m[0].forward = m[0].forward
    return m


def broken() -> nn.Module:
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    m[1].weight.data[2, 3] = torch.nan
    return m


@pytest.mark.parametrize(
    ("build", "config", "message", "layers"),
    [
        (lambda: quantize(model(), {"up": "int8_dynamic"}), "int8_dynamic", "quantized already", ("up",)),
        (lazy, "int8_rotated", "no weights yet", ("0",)),
        (wrapped, "int8_dynamic", "replaced the forward", ("0",)),
        (broken, "int8_dynamic", "weights have NaN or infinity", ("1",)),
        (lambda: nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn)), "int8", "16 bits or more", ("0",)),
        (lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), {"0": "int8"}, "max_norm", ("0",)),
        (lambda: nn.Sequential(nn.Linear(128, 4), nn.Linear(100, 4)), "int4_awq", "128 do not divide 100", ("1",)),
        (lambda: nn.Linear(24, 4), "nvfp4", r"16 do not divide 24(.|\n)*the model itself", ("",)),
        (lambda: nn.Sequential(nn.Conv2d(16, 16, 1)), "nvfp4", "not of convolutions", ("0",)),
        (lambda: nn.ReLU(), "int8", "matches no layer", ()),
        (lambda: nn.MultiheadAttention(8, 2), "int8", "matches no layer", ()),
    ],
)
def test_layers_that_can_not_be_quantized(
    build: Callable[[], nn.Module], config: object, message: str, layers: tuple[str, ...]
) -> None:
    m = build()
    before = of(m)
    with pytest.raises(QuantizationError, match=message) as caught:
        quantize(m, config, lambda m: None)  # type: ignore[arg-type]
    assert caught.value.layers == layers
    assert of(m) == before


def test_transposed_weights() -> None:
    """transformers' Conv1D is a linear layer of a transposed weight."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for preset in ("int8", "int4_awq", "int8_rotated"):
        ours, plain = conv1d(7, 128), nn.Linear(128, 7)
        with torch.no_grad():
            plain.weight.copy_(ours.weight.t())
            plain.bias.copy_(ours.bias)
        x = torch.randn(2, 3, 128)
        quantized = [quantize(layer, preset, lambda layer: layer(x)) for layer in (ours, plain)]  # noqa: B023
        torch.testing.assert_close(quantized[0](x), quantized[1](x))


class Named(nn.Linear):
    """A subclass with the forward of its base."""


def test_subclasses_and_hooks_stay() -> None:
    layer = Named(8, 8)
    calls: list[int] = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    quantize(layer, "int8_dynamic")
    assert isinstance(layer, Named)
    assert "quantization=int8/channel x int8/token/dynamic" in repr(layer)
    layer(torch.randn(2, 8))
    assert calls == [1]

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(QuantizationError, match="matches no layer"):
        quantize(Own(8, 8), "int8_dynamic")


@pytest.mark.parametrize("first", [True, False])
def test_parametrizations(first: bool) -> None:
    """Of a float layer and of a quantized one; they can be taken off, and copies of the layer are not concerned."""
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    other = None
    if first:
        parametrizations.weight_norm(layer)
        other = copy.deepcopy(layer)
    quantize(layer, "int8_dynamic")
    if not first:
        parametrizations.weight_norm(layer)
    assert is_parametrized(layer)
    y = layer(x)
    y.sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer, QuantizedLayer)
    torch.testing.assert_close(layer(x), y)
    assert other is None or not isinstance(other, QuantizedLayer)


def test_fused_operators_of_transformers_are_left() -> None:
    """A layer of PyTorch's that reads weights by itself in evaluation would skip the quantization."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 4, 16), torch.tensor([[False] * 4, [False] * 3 + [True]])
    plain = encoder(x, src_key_padding_mask=mask)
    quantize(encoder, {"*": {"preset": "int8_dynamic", "weight": {"dtype": "int4"}}})
    with torch.no_grad():
        quick = encoder(x, src_key_padding_mask=mask)[~mask]
    torch.testing.assert_close(quick, encoder(x, src_key_padding_mask=mask)[~mask].detach())
    assert (quick - plain[~mask]).abs().max() > 0.01


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_copies_state_and_ties(preset: str) -> None:
    rules = {"*": preset, "words": "int8_weight_only"}
    ours = quantize(model(), rules, loop)
    assert ours.head.weight is ours.words.weight
    assert set(model().state_dict()) <= set(ours.state_dict())
    saved = io.BytesIO()
    torch.save(ours.state_dict(), saved)
    saved.seek(0)
    again = restore(Model().eval(), rules, torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), again):
        assert torch.equal(other(IDS), ours(IDS))
        assert other.head.weight is other.words.weight
        assert of(other) == of(ours)


def test_restoring_needs_what_was_calibrated() -> None:
    with pytest.raises(QuantizationError, match=r"no 'up\.input_scale'"):
        restore(model(), "int8", model().state_dict())


def test_float_weights_are_quantized_anew() -> None:
    """Other float weights give what a model of these weights and the same calibration gives."""
    ours, tuned = quantize(model(), "int8", loop), model()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.5)
    missing, unexpected = ours.load_state_dict(tuned.state_dict(), strict=False)
    assert unexpected == []
    assert {name.rpartition(".")[2] for name in missing} == {"input_amax", "input_scale"}
    state = ours.state_dict()
    torch.testing.assert_close(ours(IDS), restore(tuned, "int8", state)(IDS), rtol=0, atol=0)


def test_training() -> None:
    """A quantized model learns: its loss falls, and calibrated ranges stay."""
    ours = quantize(model(), "int8", loop)
    before = ours.up.input_amax.clone()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(ours(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert torch.equal(ours.up.input_amax, before)


@pytest.mark.parametrize("preset", ["int8", "int8_rotated", "int4_awq"])
def test_autocast(preset: str) -> None:
    ours = quantize(model(), preset, loop)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(IDS)
    assert y.dtype == torch.bfloat16
    assert (y.float() - ours(IDS)).norm() < 0.05 * ours(IDS).norm()


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presets", list(zip(*[iter(PRESETS)] * 3, strict=True)), ids="+".join)
def test_engines_compute_what_eager_does(presets: tuple[str, ...]) -> None:
    """Also with other float weights, which the engine quantizes itself: a refit equals a new build."""
    rules = dict(zip(("up", "down", "head"), presets, strict=True))
    ours = quantize(model(), {**rules, "words": "int8_weight_only"}, loop)
    engine = torch_rtx.compile(ours, (IDS,))
    torch.testing.assert_close(engine(IDS), ours(IDS))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(torch.linspace(0.5, 2, parameter.shape[-1]))
    engine.refit(ours)
    torch.testing.assert_close(engine(IDS), ours(IDS))


def test_dynamo_takes_it_whole() -> None:
    """One graph, with gradients."""
    ours = quantize(model(), {"up": "int8", "down": "int4_awq", "head": "int8_rotated"}, loop)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (compiled, ours):
        ours.zero_grad()
        run(IDS).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in ours.parameters()])
    torch.testing.assert_close(*grads)


def test_dynamo_keeps_calls_whole(fresh_dynamo: None) -> None:
    """Nothing of a layer's settings is guarded but their text."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    layer = quantize(nn.Sequential(nn.Linear(8, 8)), "int8_dynamic")
    torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(2, 8))
    (gm,) = graphs
    names = [node.target.__name__ for node in gm.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["linear", "quantized_input", "quantized_weight", "smoothed_bias"]
