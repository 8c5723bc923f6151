"""Calibration against brute force, and data that can't calibrate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torch_rtx.errors import QuantizationError
from torch_rtx.quantization import Format, LayerConfig, quantize
from torch_rtx.quantization.formats import amax_of, fake_quantize
from torch_rtx.quantization.histogram import BINS, Histogram, entropy_amax, mse_amax, percentile_amax
from torch_rtx.quantization.scales import output_clip, weight_clip


def long_tailed(count: int = 20000) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(3))
    return x * (1 + (x.abs() > 3) * 2)


def histogram_of(*parts: Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def test_histogram_counts_all() -> None:
    """Parts of growing range give the counts of all at once, over the range that they came to."""
    x = long_tailed()
    parts = histogram_of(torch.zeros(7), x[:50] / 100, torch.tensor([]), x[50:900], x[900:])
    assert parts.counts is not None
    assert parts.counts.sum() == len(x) + 7
    both = torch.cat((x[:50] / 100, x[50:])).abs()
    # histc computes positions in float32: a number at the edge of a bin may be in the next one.
    wanted = torch.histc(both.double(), BINS, 0, parts.limit)
    wanted[0] += 7
    assert (parts.counts.cumsum(0) - wanted.cumsum(0)).abs().max() <= 2


@pytest.mark.parametrize("percent", [50, 99, 99.9, 100])
def test_percentile(percent: float) -> None:
    x = long_tailed()
    histogram = histogram_of(x[:100], x[100:])
    wanted = x.abs().sort().values[math.ceil(len(x) * percent / 100) - 1]
    assert abs(percentile_amax(histogram, percent) - wanted) <= histogram.limit / BINS


@pytest.mark.parametrize("form", [Format("int8"), Format("int4"), Format("float8_e4m3fn")], ids=str)
def test_mse(form: Format) -> None:
    """The error of what is found is the least of all candidates, computed of the numbers themselves."""
    x = long_tailed().double()

    def error(amax: float) -> float:
        return float((fake_quantize(x, torch.tensor(amax), form) - x).square().sum())

    least = min(error(float(x.abs().max()) * step / 100) for step in range(1, 101))
    assert error(mse_amax(histogram_of(x), form)) <= least * 1.01


def test_entropy() -> None:
    """Against the divergence by loops over bins."""
    x = long_tailed()
    x[5] = 60
    histogram, form = histogram_of(x), Format("int8")
    assert histogram.counts is not None
    counts, best = histogram.counts.tolist(), (math.inf, 0)
    for kept in range(128, BINS + 1, 8):
        p = counts[:kept]
        p[-1] += sum(counts[kept:])
        q = [0.0] * kept
        for level in range(128):
            places = [at for at in range(kept) if at * 128 // kept == level]
            filled = [at for at in places if p[at]]
            for at in filled:
                q[at] = sum(counts[place] for place in places) / len(filled)
        terms = zip(p, q, strict=True)
        divergence = sum(a / sum(p) * math.log(a / sum(p) / max(b / sum(q), 1e-12)) for a, b in terms if a)
        best = min(best, (divergence, kept))
        if kept > 600:  # the loops are slow, and the minimum is before
            break
    assert entropy_amax(histogram, form) == best[1] * histogram.limit / BINS
    assert best[1] < 600


@pytest.mark.parametrize("calibration", ["max", "percentile", "entropy", "mse"])
def test_calibrated_layers(calibration: str) -> None:
    """The buffer is the calibrator's choice of what the loop showed, over several calls and devices of data."""
    layer, x = nn.Linear(4, 2), long_tailed().view(-1, 4)
    loop = lambda model: [model(part) for part in x.split(1000)]  # noqa: E731
    quantize(layer, {"*": {"preset": "int8", "input": {"calibration": calibration}, "smooth": False}}, loop)
    histogram = histogram_of(*x.split(1000))
    largest = float(x.abs().max())
    wanted = {
        "max": largest,
        "percentile": percentile_amax(histogram, 99.99),
        "entropy": entropy_amax(histogram, Format("int8")),
        "mse": mse_amax(histogram, Format("int8")),
    }
    assert float(layer.input_amax) == pytest.approx(min(wanted[calibration], largest))
    assert layer.input_amax.dtype == torch.float32


@pytest.mark.parametrize(
    "form",
    [
        Format("int4", "block", 16, calibration="mse"),
        Format("int4", "channel", calibration="mse"),
        Format("int4", calibration="mse"),
        Format("float4_e2m1", "block", 16, calibration="mse"),
    ],
    ids=str,
)
def test_weight_clip(form: Format) -> None:
    """No other part of the amax gives a scale's own weights a smaller error."""
    weight = long_tailed(6 * 64).view(6, 64)
    axes = (1,) if form.granularity == "channel" else (0, 1)
    amax, clip = amax_of(weight, form, axes), weight_clip(weight, form)

    def errors(part: Tensor | float) -> Tensor:
        error = (fake_quantize(weight, amax * part, form) - weight).square()
        return error.view(6, -1, 16 if form.block else 64).sum(-1) if amax.numel() > 1 else error.sum()

    found = errors(clip)
    assert clip.shape == amax.shape
    assert all((found <= errors(part) + 1e-6).all() for part in torch.linspace(1, 0.5, 41).tolist())
    assert found.sum() < errors(1.0).sum()


def test_awq_spares_channels_that_matter() -> None:
    x = torch.randn(256, 512)
    x[:, :4] *= 30
    layers = {name: nn.Linear(512, 64) for name in ("int4_awq", "int4_weight_only", "plain")}
    nn.init.normal_(layers["plain"].weight)
    wanted = layers["plain"](x)
    errors = {}
    for name in ("int4_awq", "int4_weight_only"):
        layers[name].load_state_dict(layers["plain"].state_dict())
        errors[name] = float((quantize(layers[name], name, lambda model: model(x))(x) - wanted).detach().norm())
    assert errors["int4_awq"] < 0.7 * errors["int4_weight_only"]


class Experts(nn.Module):
    """Two layers of which one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


X = torch.randn(3, 4)
BAD = [
    ("calibration needs data", None, ("one", "two")),
    ("the forward_loop ran none of the layers", lambda model: None, ()),
    ("no calibration data reached layers", lambda model: model(X), ("two",)),
    ("has NaN or infinity", lambda model: (model(X.log()), model.two(X)), ("one",)),
    ("has NaN or infinity", lambda model: (model(X), model.two(X / 0)), ("two",)),
    ("data is zero", lambda model: (model(X), model.two(X * 0)), ("two",)),
    ("ran none", lambda model: (model(X[:0]), model.two(X[:0])), ()),
]


@pytest.mark.quick
@pytest.mark.parametrize("calibration", ["max", "entropy"])
@pytest.mark.parametrize(("message", "loop", "layers"), BAD)
def test_data_that_does_not_calibrate(message: str, loop: object, layers: tuple[str, ...], calibration: str) -> None:
    model = Experts()
    config = LayerConfig(input=Format("int8", calibration=calibration))
    with pytest.raises(QuantizationError, match=message) as caught:
        quantize(model, config, loop)  # type: ignore[arg-type]
    assert caught.value.layers == layers
    assert type(model.one) is nn.Linear
    assert not model.one._forward_hooks


def test_the_loop_runs_in_evaluation_mode() -> None:
    """Running statistics stay, modes come back, no graph of gradients is made; an error of the loop arrives."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].eval()
    seen = []
    quantize(model, "int8", lambda model: seen.append(model(X)))
    assert model.training
    assert not model[0].training
    assert not model[0].num_batches_tracked
    assert not seen[0].requires_grad
    other = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ZeroDivisionError):
        quantize(other, "int8", lambda model: 1 / 0)
    assert not other[0]._forward_hooks


def test_output_clip() -> None:
    """Errors of inputs that vary together cancel: the output has less error than with clips for the weight alone."""
    x = torch.randn(512, 4) @ torch.randn(4, 64) + 0.1 * torch.randn(512, 64)
    weight = torch.randn(16, 64)
    for form in (Format("int4", "block", 16, calibration="mse"), Format("int4", "channel", calibration="mse")):
        amax = amax_of(weight, form, (1,))

        def error(clip: Tensor) -> float:
            return float((x @ (fake_quantize(weight, amax * clip, form) - weight).t()).square().mean())  # noqa: B023

        found = output_clip(weight, form, x.t() @ x / len(x))
        assert found.shape == amax.shape
        assert error(found) < 0.7 * error(weight_clip(weight, form))
        one = found.clone()
        one[3] = 0.8
        assert error(found) <= error(one) * (1 + 1e-5)
