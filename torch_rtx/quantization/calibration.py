"""What calibration data says about layers: amax of their inputs, scales of their channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_rtx.errors import QuantizationError
from torch_rtx.progress import progress
from torch_rtx.quantization.config import LayerConfig
from torch_rtx.quantization.formats import Format
from torch_rtx.quantization.histogram import Histogram, calibrated_amax
from torch_rtx.quantization.layers import clone
from torch_rtx.quantization.scales import channel_scale, output_clip, weight_clip

ROWS, ROWS_OF_CALL = 2048, 256  # of inputs that are kept to try scales on
TRIED = 512  # of them for each scale of channels
ForwardLoop = Callable[[nn.Module], Any]


@dataclass
class Observer:
    """What was seen of a layer's inputs.

    Attributes:
        layer: a quantized clone of the layer, without what is calibrated.
        most: the largest magnitude, f32[], or if channels are scaled of each channel, f32[in_features]; NaN once a NaN
            was seen; None before the layer ran.
        histogram: of magnitudes, where the method of calibration needs it.
        rows: inputs to try scales on, in their dtype, [n, in_features].
        sums, count: sums of magnitudes by channel, and the number of rows of which they are.
    """

    layer: Any
    most: Tensor | None = None
    histogram: Histogram = field(default_factory=Histogram)
    rows: list[Tensor] = field(default_factory=list)
    sums: Tensor | None = None
    count: int = 0

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take a call's input into account."""
        config: LayerConfig = self.layer.quantization
        if not x.numel():
            return
        where = self.layer.weight.device
        if config.smooth:
            rows = x.detach().flatten(0, -2)
            self._add(rows.abs().amax(0).float().to(where))
            sums = rows.abs().sum(0, dtype=torch.float32).to(where)
            self.sums = sums if self.sums is None else self.sums + sums
            self.count += len(rows)
            if sum(map(len, self.rows)) < ROWS:
                self.rows.append(rows[:: -(-len(rows) // ROWS_OF_CALL)].to(where))
        else:
            x = self.layer.smoothed_input(x.detach()).float()
            self._add(x.abs().amax().to(where))
            if config.input and config.input.calibration != "max" and self.is_finite():
                self.histogram.add(x)

    def _add(self, most: Tensor) -> None:
        self.most = most if self.most is None else torch.maximum(self.most, most)

    def is_finite(self) -> bool:
        """Whether all that was seen is."""
        return self.most is not None and bool(self.most.isfinite().all())

    def found(self) -> dict[str, Tensor]:
        """The buffers of the layer."""
        config, buffers = self.layer.quantization, dict[str, Tensor]()
        if config.smooth:
            buffers["input_scale"] = self._channel_scale()
            self.layer.register_buffer("input_scale", buffers["input_scale"])
        if config.input and not config.input.dynamic:
            buffers["input_amax"] = self._amax(config.input)
        if config.weight.calibration == "mse":
            buffers["weight_clip"] = self._weight_clip(self.layer.smoothed_weight().detach(), config)
        return buffers

    def _rows(self) -> Tensor:
        return torch.cat(self.rows)[:ROWS].float()

    def _weight_clip(self, weight: Tensor, config: LayerConfig) -> Tensor:
        if not config.smooth:
            return weight_clip(weight, config.weight)
        rows = self._rows() / self.layer.input_scale
        if config.weight.two_levels or config.weight.granularity == "tensor":
            return weight_clip(weight, config.weight, rows.square().mean(0))
        return output_clip(weight.float(), config.weight, rows.t() @ rows / len(rows))

    def _channel_scale(self) -> Tensor:
        assert self.most is not None
        assert self.sums is not None
        weight = self.layer.float_weight.detach().float()
        return channel_scale(weight, self._rows()[:TRIED], self.sums / self.count, self.most, self.layer.quantization)

    def _amax(self, form: Format) -> Tensor:
        assert self.most is not None
        most = self.most
        if self.layer.quantization.smooth:
            most = (most / self.layer.input_scale).amax()
            if form.calibration != "max":
                self.histogram.add(self._rows() / self.layer.input_scale)
        # The histogram ends beyond the largest magnitude.
        return most.clone() if form.calibration == "max" else most.clamp(max=calibrated_amax(self.histogram, form))


def calibrate(
    model: nn.Module,
    plan: Mapping[str, LayerConfig],
    forward_loop: ForwardLoop | None,
    fused: Mapping[str, dict[str, Tensor]] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """The buffers of each layer of the plan, those of `fused` rotations among them. The model runs in evaluation mode,
    without gradients.

    Raises:
        QuantizationError: layers need data and there is none, or none reached them, or it is not finite, or all zeros.
    """
    known = {name: (fused or {}).get(name, {}) for name in plan}
    seen = {name: Observer(clone(model.get_submodule(name), plan[name], known[name])) for name in plan}
    needing = [name for name, config in plan.items() if config.needs_data]
    if needing:
        if forward_loop is None:
            hint = "give quantize() a forward_loop, which calls the model with some of its data, or a dynamic preset"
            raise QuantizationError("calibration needs data", layers=needing, hint=hint)
        watched = {name: model.get_submodule(name) for name in needing}
        with watching(watched, lambda name, layer, x, y: seen[name].see(x)):
            run(model, forward_loop)
        _check_data({name: seen[name] for name in needing})
    buffers = {}
    with progress("calibrating layers") as update:
        for name in plan:
            buffers[name] = known[name] | seen[name].found()
            update(len(buffers), len(plan))
    return buffers


def _check_data(seen: Mapping[str, Observer]) -> None:
    if missed := [name for name, observer in seen.items() if observer.most is None]:
        if len(missed) == len(seen):
            raise QuantizationError("the forward_loop ran none of the layers", hint="it has to call the model it gets")
        hint = 'give data that reaches them, or leave them as they are by rules such as {"*expert*": None}'
        raise QuantizationError("no calibration data reached layers", layers=missed, hint=hint)
    if bad := [name for name, observer in seen.items() if not observer.is_finite()]:
        raise QuantizationError("calibration data has NaN or infinity at the inputs of layers", layers=bad)
    if zero := [name for name, observer in seen.items() if not observer.most.any()]:  # type: ignore[union-attr]
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
