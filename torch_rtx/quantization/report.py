"""What quantization did to each layer, or would do: tables for people, errors for decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_rtx.errors import IntegrationError, QuantizationError
from torch_rtx.quantization.calibration import ForwardLoop, calibrate, run, watching
from torch_rtx.quantization.config import Config, LayerConfig, Settings, settings_of
from torch_rtx.quantization.formats import Format, amax_of
from torch_rtx.quantization.layers import (
    clone,
    kind_of,
    quantized_layers,
    weight_axes,
    weight_of,
)
from torch_rtx.quantization.model import apply, planned


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def quantized_bytes(weight: Tensor, form: Format) -> int:
    """Bytes of a weight's codes and scales."""
    blocks = weight.numel() // form.block if form.block else 0
    scales = weight.shape[0] if form.granularity == "channel" else 1
    scale_bytes = blocks + 4 if form.two_levels else 4 * (blocks or scales)
    return -(-weight.numel() * form.codes.bits // 8) + scale_bytes


@torch.no_grad()
def summary(model: nn.Module) -> str:
    """A table of the quantized layers: kind, formats of weight and input, bits of a weight, the range of the weight's
    amax, the calibrated amax of the input, bytes of the weight before and after; and totals.

    Raises:
        QuantizationError: no layer is quantized.
    """
    rows, before, after, counted = [], 0, 0, set[int]()
    for name, layer in quantized_layers(model):
        config, weight = layer.quantization, layer.smoothed_weight()
        amax = amax_of(weight, config.weight, weight_axes(weight, config.weight.granularity))
        low, high = (f"{float(value):.3g}" for value in (amax.min(), amax.max()))
        old, new = weight.numel() * weight.itemsize, quantized_bytes(weight, config.weight)
        static = getattr(layer, "input_amax", None)
        extras = "+".join(extra for extra in ("rotate", "smooth") if getattr(config, extra)) or "-"
        if id(weight_of(layer)) not in counted:  # tied weights are stored once
            counted.add(id(weight_of(layer)))
            before, after = before + old, after + new
        rows.append(
            [
                *(name or "(model)", str(kind_of(layer)), str(config.weight), str(config.input or "-"), extras),
                *(f"{config.weight.bits:g}", low if low == high else f"{low}..{high}"),
                *("-" if static is None else f"{float(static):.3g}", f"{old:,}", f"{new:,}"),
            ]
        )
    if not rows:
        raise QuantizationError("no layer of the model is quantized", hint="torch_rtx.quantize(model, config)")
    head = ["layer", "kind", "weight", "input", "with", "bits", "weight amax", "input amax", "bytes", "quantized"]
    total = f"{len(rows)} layers: {before:,} bytes of weights become {after:,} ({after / max(before, 1):.0%})"
    return f"{text_table(head, rows)}\n{total}"


def print_summary(model: nn.Module) -> None:
    """Print `summary(model)`."""
    print(summary(model))


@dataclass
class LayerError:
    """The error of a layer's output if its weight and input alone are quantized.

    Attributes:
        name, config: the layer, and how it is quantized.
        elements: of its weight.
        signal, noise: sums of squares of the output and of its error, over all calls.
    """

    name: str
    config: LayerConfig
    elements: int
    signal: float = 0.0
    noise: float = 0.0

    @property
    def relative_error(self) -> float:
        """The norm of the error by the norm of the output."""
        if not self.signal:
            return 0.0 if self.noise == 0 else inf
        return (self.noise / self.signal) ** 0.5

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in dB."""
        error = self.relative_error
        return -20 * log10(error) if error else inf


@dataclass
class Sensitivity:
    """Errors of layers, the largest first.

    Attributes:
        rows: a `LayerError` for each layer.
    """

    rows: list[LayerError] = field(default_factory=list)

    def table(self) -> str:
        """The errors as text: layer, formats, relative error, SQNR in dB, elements of the weight."""
        head = ["layer", "quantization", "relative error", "SQNR [dB]", "elements"]
        cells = [
            [
                row.name or "(model)",
                str(row.config),
                f"{row.relative_error:.4f}",
                f"{row.sqnr:.1f}",
                f"{row.elements:,}",
            ]
            for row in self.rows
        ]
        return text_table(head, cells)

    def plot(self, path: str | Path) -> None:
        """Write bars of the relative errors as an image, whose type is the path's suffix.

        Raises:
            IntegrationError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            hint = "pip install matplotlib, or print table()"
            raise IntegrationError("a plot needs matplotlib, which is not installed", hint=hint) from error
        figure = Figure(figsize=(8, 1.5 + 0.22 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh([row.name or "(model)" for row in self.rows], [row.relative_error for row in self.rows])
        axes.invert_yaxis()
        axes.set_xlabel("relative error of the layer's output")
        figure.savefig(path)

    def __str__(self) -> str:
        return self.table()


def sensitivity(model: nn.Module, config: Config, forward_loop: ForwardLoop) -> Sensitivity:
    """How much each layer's output changes if it alone is quantized; the model stays as it is.

    The loop runs twice where layers are calibrated, once otherwise. Each layer is given its float inputs, and its
    output is compared with the float one. All outputs count the same, whether or not a task depends on them.

    Raises:
        QuantizationError: as `quantize`, or no data reached some layers.
    """
    plan = planned(model, config)
    buffers = calibrate(model, plan, forward_loop)
    return Sensitivity(measured(model, plan, buffers, forward_loop))


def measured(
    model: nn.Module,
    plan: Mapping[str, LayerConfig],
    buffers: Mapping[str, Mapping[str, Tensor]],
    forward_loop: ForwardLoop,
) -> list[LayerError]:
    """The errors of calibrated layers, the largest first."""
    originals = {name: model.get_submodule(name) for name in plan}
    copies: dict[str, Any] = {name: clone(originals[name], plan[name], dict(buffers[name])) for name in plan}
    errors = {name: LayerError(name, plan[name], weight_of(layer).numel()) for name, layer in originals.items()}
    calls = dict.fromkeys(plan, 0)

    def see(name: str, layer: nn.Module, x: Tensor, result: Tensor) -> None:
        wanted = result.double()
        errors[name].signal += float(wanted.square().sum())
        errors[name].noise += float((copies[name].forward(x).double() - wanted).square().sum())
        calls[name] += 1

    with watching(originals, see):
        run(model, forward_loop)
    if missed := [name for name, count in calls.items() if not count]:
        raise QuantizationError("no data reached layers", layers=missed, hint="leave them as they are by rules")
    if bad := [row.name for row in errors.values() if not isfinite(row.signal)]:
        raise QuantizationError("outputs of layers have NaN or infinity", layers=bad)
    return sorted(errors.values(), key=lambda row: -row.relative_error)


def auto_quantize(
    model: nn.Module,
    candidates: Sequence[Settings],
    forward_loop: ForwardLoop,
    *,
    effective_bits: float | None = None,
    max_error: float | None = None,
    exclude: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, LayerConfig | None]]:
    """Quantize each layer by one of several settings, in place, under a budget of bits or of error.

    Args:
        model: as of `quantize`.
        candidates: presets or `LayerConfig`s. Layers may also stay float, with the bits of their dtype.
        forward_loop: as of `quantize`; it runs twice for each candidate.
        effective_bits: the most bits of a weight on average, over all weights, with the scales of blocks. The choice of
            small error, in the sum of squared relative errors of layer outputs.
        max_error: the largest relative error of each layer's output. Of what is within, the fewest bits.
        exclude: patterns of layers that stay float and are in no budget.

    Returns:
        The model, and what was chosen for each layer: a config of `quantize`.

    Raises:
        QuantizationError: not one of both budgets is given, no choice fits the bits, or as `quantize`.
    """
    if (effective_bits is None) == (max_error is None):
        raise QuantizationError("auto_quantize needs either effective_bits or max_error")
    options = _options(model, candidates, forward_loop, exclude)
    if max_error is not None:
        chosen = {name: min((o for o in some if o.error <= max_error), key=_cost) for name, some in options.items()}
    else:
        assert effective_bits is not None
        chosen = _within_bits(options, effective_bits)
    plan = {name: option.config for name, option in chosen.items() if option.config}
    apply(model, plan, {name: chosen[name].buffers for name in plan})
    return model, {name: option.config for name, option in chosen.items()}


@dataclass(frozen=True)
class _Option:
    """What a layer may become: its settings, calibration, relative error and bits."""

    config: LayerConfig | None
    buffers: Mapping[str, Tensor]
    error: float
    bits: float
    elements: int


def _cost(option: _Option) -> tuple[float, float]:
    return option.bits, option.error


def _options(
    model: nn.Module, candidates: Sequence[Settings], forward_loop: ForwardLoop, exclude: Sequence[str]
) -> dict[str, list[_Option]]:
    """For each layer the float one, and each candidate that it can have."""
    options: dict[str, list[_Option]] = {}
    for candidate in candidates:
        if (settings := settings_of(candidate)) is None:
            continue
        plan = planned(model, {"*": settings, **dict.fromkeys(exclude)}, skip_unfit=True)
        buffers = calibrate(model, plan, forward_loop)
        for row in measured(model, plan, buffers, forward_loop):
            weight = weight_of(model.get_submodule(row.name))
            float_option = _Option(None, {}, 0.0, weight.itemsize * 8, row.elements)
            some = options.setdefault(row.name, [float_option])
            bits = row.config.weight.bits
            some.append(_Option(row.config, buffers[row.name], row.relative_error, bits, row.elements))
    if not options:
        raise QuantizationError("auto_quantize needs candidates, such as ['int4_awq', 'int8']")
    return options


def _within_bits(options: Mapping[str, list[_Option]], budget: float) -> dict[str, _Option]:
    """From all layers float, the step that saves most bits for its error, again and again until the budget is met."""
    chosen = {name: some[0] for name, some in options.items()}
    total = sum(option.elements for option in chosen.values())

    def bits() -> float:
        return sum(option.bits * option.elements for option in chosen.values()) / total

    def price(step: tuple[str, _Option]) -> float:
        name, option = step
        saved = (chosen[name].bits - option.bits) * option.elements
        return (option.error**2 - chosen[name].error ** 2) / saved

    while bits() > budget:
        steps = [(name, o) for name, some in options.items() for o in some if o.bits < chosen[name].bits]
        if not steps:
            raise QuantizationError(
                f"no choice has {budget:g} bits: the candidates have {bits():.2f} at least",
                hint="give a candidate of fewer bits, such as int4_awq",
            )
        name, option = min(steps, key=price)
        chosen[name] = option
    return chosen
