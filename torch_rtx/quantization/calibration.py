"""What calibration data says about layers: amax of their inputs, scales of their channels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from torch_rtx.errors import QuantizationError
from torch_rtx.quantization.config import LayerConfig
from torch_rtx.quantization.formats import Format, amax_of, codes_of, fake_quantize, scale_of
from torch_rtx.quantization.layers import clone, weight_axes

BINS = 2048
ROWS, ROWS_OF_CALL = 512, 64  # of inputs that are kept to try scales on
ForwardLoop = Callable[[nn.Module], Any]


@dataclass
class Histogram:
    """Counts of magnitudes in bins of equal width from 0 to `limit`, which doubles as larger ones come."""

    limit: float = 0.0
    counts: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the magnitudes of a tensor of finite numbers."""
        x = x.detach().abs().flatten().float()
        most = float(x.max()) if x.numel() else 0.0
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64)
        if most == 0:
            self.counts[0] += x.numel()
            return
        if not self.limit:
            self.limit = most
        while most > self.limit:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat((pairs, torch.zeros_like(pairs)))
            self.limit *= 2
        self.counts += torch.histc(x, BINS, 0, self.limit).double().cpu()

    def edges(self) -> Tensor:
        """The upper ends of the bins, f64[BINS]."""
        return torch.arange(1, BINS + 1, dtype=torch.float64) * (self.limit / BINS)


def percentile_amax(histogram: Histogram, percent: float) -> float:
    """The upper end of the bin in which that percent of all magnitudes is reached."""
    assert histogram.counts is not None
    reached = histogram.counts.cumsum(0) / histogram.counts.sum()
    # Sums of counts are exact; the quotient is not.
    place = int((reached < percent / 100 - 1e-12).sum())
    return float(histogram.edges()[min(place, BINS - 1)])


def mse_amax(histogram: Histogram, form: Format) -> float:
    """The amax of least square error, of magnitudes at the centres of bins."""
    assert histogram.counts is not None
    centres = histogram.edges() - histogram.limit / BINS / 2
    candidates = histogram.limit * torch.arange(1, 201, dtype=torch.float64) / 200
    errors = []
    for amax in candidates:
        scale = scale_of(amax, form)
        values = codes_of(centres / scale, form).double() * scale
        errors.append(float((histogram.counts * (values - centres) ** 2).sum()))
    return float(candidates[errors.index(min(errors))])


def entropy_amax(histogram: Histogram, form: Format) -> float:
    """The amax whose quantized histogram has the least Kullback-Leibler divergence from the histogram with its tail
    added to the last bin. Levels cover equal numbers of bins; the count of a level spreads over its nonzero bins."""
    assert histogram.counts is not None
    levels = int(form.codes.most) + 1
    counts, best = histogram.counts, (float("inf"), BINS)
    places = torch.arange(BINS)
    for kept in range(levels, BINS + 1, max(1, levels // 16)):
        part = counts[:kept]
        reference = part.clone()
        reference[-1] += counts[kept:].sum()
        level = places[:kept] * levels // kept
        sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, part)
        filled = torch.zeros_like(sums).index_add_(0, level, (reference > 0).double())
        spread = torch.where(reference > 0, (sums / filled.clamp(min=1))[level], 0)
        p, q = reference / reference.sum(), spread / spread.sum()
        # A bin that the candidate gives nothing counts as if it had next to nothing.
        divergence = float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q.clamp(min=1e-12))).sum())
        best = min(best, (divergence, kept))
    return float(histogram.edges()[best[1] - 1])


@dataclass
class Observer:
    """What was seen of a layer's inputs.

    Attributes:
        layer: a quantized clone of the layer, without what is calibrated.
        calls: how often the layer ran.
        amax: the largest magnitude, f32[]; NaN once a NaN was seen.
        rows: inputs to try scales on, f32[n, in_features].
        sums, count: sums of magnitudes by channel, and the number of rows of which they are.
    """

    layer: Any
    calls: int = 0
    amax: Tensor | None = None
    histogram: Histogram = field(default_factory=Histogram)
    rows: list[Tensor] = field(default_factory=list)
    sums: Tensor | None = None
    count: int = 0

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take a call's input into account."""
        config: LayerConfig = self.layer.quantization
        self.calls += 1
        x = x.detach().float()
        if not x.numel():
            return
        amax = x.abs().amax() if config.awq else self.layer.smoothed_input(x).abs().amax()
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax.to(self.amax.device))
        if config.awq:
            rows = x.flatten(0, -2)
            sums = rows.abs().sum(0)
            self.sums = sums if self.sums is None else self.sums + sums.to(self.sums.device)
            self.count += len(rows)
            if sum(map(len, self.rows)) < ROWS:
                self.rows.append(rows[:: -(-len(rows) // ROWS_OF_CALL)])
        elif config.input and config.input.calibration != "max" and self.amax.isfinite():
            self.histogram.add(self.layer.smoothed_input(x))

    def found(self) -> dict[str, Tensor]:
        """The buffers of the layer."""
        config, weight = self.layer.quantization, self.layer.weight
        buffers = {}
        if config.awq:
            buffers["input_scale"] = awq_scale(self)
            self.layer.register_buffer("input_scale", buffers["input_scale"])
        if config.input and not config.input.dynamic:
            assert self.amax is not None
            buffers["input_amax"] = self._amax(config.input).to(weight.device)
        if config.weight.calibration == "mse":
            importance = self.power() / buffers["input_scale"].square() if config.awq else None
            buffers["weight_clip"] = weight_clip(self.layer.smoothed_weight(), config.weight, importance)
        return buffers

    def kept_rows(self) -> Tensor:
        """Inputs to try scales on, where the weight is."""
        return torch.cat([rows.to(self.layer.weight.device) for rows in self.rows])[:ROWS]

    def power(self) -> Tensor:
        """The mean square of each channel of these inputs."""
        return self.kept_rows().square().mean(0)

    def _amax(self, form: Format) -> Tensor:
        assert self.amax is not None
        if form.calibration == "max":
            return self.amax.clone()
        if form.calibration == "percentile":
            value = percentile_amax(self.histogram, form.percentile)
        else:
            value = (mse_amax if form.calibration == "mse" else entropy_amax)(self.histogram, form)
        # The histogram ends beyond the largest magnitude.
        return self.amax.clamp(max=value)


@torch.no_grad()
def weight_clip(weight: Tensor, form: Format, importance: Tensor | None = None) -> Tensor:
    """The part of each amax of a weight, 0.5 to 1, that gives the least square error, in the shape of the amax;
    `importance` has a factor for the error of each input channel."""
    amax = amax_of(weight, form, weight_axes(weight, form.granularity))
    best = torch.full_like(amax, torch.inf)
    clip = torch.ones_like(amax)
    for step in range(21):
        part = 1 - step / 40
        error = (fake_quantize(weight, amax * part, form).to(amax.dtype) - weight).square()
        error = error if importance is None else error * importance
        if form.two_levels:
            error = error.sum()
        elif form.block:
            error = error.unflatten(-1, (-1, form.block)).sum(-1, keepdim=True)
        else:
            error = error.sum(weight_axes(weight, form.granularity), keepdim=True)
        better = error < best
        clip, best = torch.where(better, part, clip), torch.where(better, error, best)
    return clip.float()


@torch.no_grad()
def awq_scale(seen: Observer) -> Tensor:
    """The factors of input channels, powers of the mean magnitude, that give the layer's output the least error."""
    assert seen.sums is not None
    layer, form = seen.layer, seen.layer.quantization.weight
    weight = (layer.weight.t() if layer.weight_is_transposed else layer.weight).float()
    rows = seen.kept_rows()
    mean = (seen.sums.to(weight.device) / seen.count).clamp(min=1e-6)
    best = (float("inf"), torch.ones_like(mean))
    for step in range(21):
        scale = mean ** (step / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scaled = weight * scale
        quantized = fake_quantize(scaled, amax_of(scaled, form, weight_axes(scaled, form.granularity)), form)
        error = float((rows @ (quantized / scale - weight).t()).square().mean())
        if error < best[0]:
            best = error, scale
    return best[1]


def calibrate(
    model: nn.Module, plan: Mapping[str, LayerConfig], forward_loop: ForwardLoop | None
) -> dict[str, dict[str, Tensor]]:
    """The buffers of each layer of the plan. The model runs in evaluation mode, without gradients.

    Raises:
        QuantizationError: layers need data and there is none, or none reached them, or it is not finite, or all zeros.
    """
    seen = {name: Observer(clone(model.get_submodule(name), config, {})) for name, config in plan.items()}
    needing = [name for name, config in plan.items() if config.needs_data]
    if needing:
        if forward_loop is None:
            hint = "give quantize() a forward_loop, which calls the model with some of its data, or a dynamic preset"
            raise QuantizationError("calibration needs data", layers=needing, hint=hint)
        watched = {name: model.get_submodule(name) for name in needing}
        with watching(watched, lambda name, layer, x, y: seen[name].see(x)):
            run(model, forward_loop)
        _check_data({name: seen[name] for name in needing})
    hidden = not sys.stderr.isatty() or len(plan) < 2
    console = Console(stderr=True)
    names = track(plan, "Calibrating", disable=hidden, console=console, transient=True)
    return {name: seen[name].found() for name in names}


def _check_data(seen: Mapping[str, Observer]) -> None:
    if missed := [name for name, observer in seen.items() if observer.amax is None]:
        if len(missed) == len(seen):
            raise QuantizationError("the forward_loop ran none of the layers", hint="it has to call the model it gets")
        hint = 'give data that reaches them, or leave them as they are by rules such as {"*expert*": None}'
        raise QuantizationError("no calibration data reached layers", layers=missed, hint=hint)
    if bad := [name for name, observer in seen.items() if not observer.amax.isfinite()]:  # type: ignore[union-attr]
        raise QuantizationError("calibration data has NaN or infinity at the inputs of layers", layers=bad)
    if zero := [name for name, observer in seen.items() if not observer.amax]:
        hint = "all that is not zero would be clipped: give other data, or leave the layers as they are by rules"
        raise QuantizationError("calibration data is zero at the inputs of layers", layers=zero, hint=hint)


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `see(name, layer, input, output)` is called after each call of the layers."""

    def hook(name: str) -> Callable[..., None]:
        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
            see(name, layer, args[0] if args else next(iter(kwargs.values())), result)

        return after

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: nn.Module, forward_loop: ForwardLoop) -> None:
    """Run the loop with the model in evaluation mode; modes are as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        forward_loop(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
