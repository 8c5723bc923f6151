"""Quantized layers: the same modules with another forward. Parameters stay float under their names, so that state
dicts, ties, parametrizations, optimizers and refits work as before; what is calibrated is in buffers beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from torch_rtx.quantization.config import LayerConfig
from torch_rtx.quantization.formats import Format, amax_of, fake_quantize
from torch_rtx.quantization.hadamard import block_of, hadamard, rotated

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Spec:
    """What a quantized layer computes. The layer has it as text: Dynamo guards one string in each call, and not each
    field of objects, and the functions below are single calls of its graph.

    Attributes:
        config: how the layer is quantized.
        rotates_input, rotates_output: by Hadamard matrices, which are buffers of the layer.
        transposed: the weight is [in_features, out_features].
        spatial: axes of an input behind the channels, of a convolution.
    """

    config: LayerConfig
    rotates_input: bool
    rotates_output: bool
    transposed: bool
    spatial: int | None

    def __str__(self) -> str:
        return json.dumps(asdict(self))


@cache
def spec_of(text: str) -> Spec:
    """The spec that has this text."""
    fields = json.loads(text)
    config = fields.pop("config")
    forms = {name: Format(**config[name]) if config[name] else None for name in ("weight", "input")}
    return Spec(LayerConfig(**{**config, **forms}), **fields)


Buffers = Mapping[str, Tensor]


def smoothed_input(x: Tensor, spec: str, buffers: Buffers) -> Tensor:
    """An input with its rotation and its scales."""
    if spec_of(spec).rotates_input:
        x = rotated(x, buffers["hadamard"])
    return x / buffers["input_scale"].to(x.dtype) if spec_of(spec).config.smooth else x


def smoothed_weight(weight: Tensor, spec: str, buffers: Buffers) -> Tensor:
    """A weight with its rotation and its scales; of a linear layer [out_features, in_features]."""
    weight = weight.t() if spec_of(spec).transposed else weight
    if spec_of(spec).config.rotate:
        weight = rotated(weight, buffers["hadamard"])
    if spec_of(spec).rotates_output:
        weight = rotated(weight.t(), buffers["output_hadamard"]).t()
    return weight * buffers["input_scale"].to(weight.dtype) if spec_of(spec).config.smooth else weight


def smoothed_bias(bias: Tensor, spec: str, buffers: Buffers) -> Tensor:
    """A bias with the rotation of the output."""
    return rotated(bias, buffers["output_hadamard"]) if spec_of(spec).rotates_output else bias


def quantized_input(x: Tensor, spec: str, buffers: Buffers) -> Tensor:
    """The values that the codes of an input stand for, in its shape and dtype."""
    form = spec_of(spec).config.input
    x = smoothed_input(x, spec, buffers)
    if form is None:
        return x
    axes = token_axes(x, form.granularity, spec_of(spec).spatial)
    return fake_quantize(x, amax_of(x, form, axes) if form.dynamic else buffers["input_amax"], form)


def quantized_weight(weight: Tensor, spec: str, buffers: Buffers) -> Tensor:
    """The values that the codes of a weight stand for."""
    weight, form = smoothed_weight(weight, spec, buffers), spec_of(spec).config.weight
    amax = amax_of(weight, form, weight_axes(weight, form.granularity))
    if form.calibration == "mse":
        amax = amax * buffers["weight_clip"].to(amax.dtype)
    return fake_quantize(weight, amax, form)


@cache
def _keep_whole() -> None:
    """Let Dynamo keep calls of these functions as they are: AOTAutograd traces them, without guards."""
    for function in (smoothed_bias, quantized_input, quantized_weight):
        torch.compiler.allow_in_graph(function)


class QuantizedLayer(nn.Module):
    """What quantized layers have besides their original class.

    Attributes:
        spec: the text of a `Spec`.
        input_amax: a buffer, f32[]: the magnitude that codes of a static input reach.
        weight_clip: a buffer, f32: what part of the largest magnitude the codes of weights reach.
        input_rotation, output_rotation: buffers, i64[]: in blocks of how many channels the input comes rotated by an
            earlier layer, and the weight rotates the output for later ones.
        input_scale: a buffer, f32[in_features]: what the input is divided and the weight multiplied by.
    """

    spec: str
    original_class: type[nn.Module]
    weight: Tensor
    bias: Tensor | None
    input_amax: Tensor

    @property
    def quantization(self) -> LayerConfig:
        """How the layer is quantized."""
        return spec_of(self.spec).config

    @property
    def float_weight(self) -> Tensor:
        """The weight, of a linear layer [out_features, in_features]."""
        return self.weight.t() if spec_of(self.spec).transposed else self.weight

    def smoothed_input(self, x: Tensor) -> Tensor:
        """The input with its rotation and its scales."""
        return smoothed_input(x, self.spec, self._buffers)  # type: ignore[arg-type]

    def smoothed_weight(self) -> Tensor:
        """The weight with its rotation and its scales; of a linear layer [out_features, in_features]."""
        return smoothed_weight(self.weight, self.spec, self._buffers)  # type: ignore[arg-type]

    def quantized_input(self, x: Tensor) -> Tensor:
        """The values that the codes of the input stand for, in its shape and dtype."""
        return quantized_input(x, self.spec, dict(self._buffers))  # type: ignore[arg-type]

    def quantized_weight(self) -> Tensor:
        """The values that the codes of the weight stand for."""
        return quantized_weight(self.weight, self.spec, dict(self._buffers))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The original arguments and the quantization."""
        return f"{self.original_class.extra_repr(self)}, quantization={self.quantization}"

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> QuantizedLayer:
        super()._apply(fn, recurse)
        for name in ("hadamard", "output_hadamard"):
            if (matrix := self._buffers.get(name)) is not None:
                self._buffers[name] = hadamard(len(matrix), matrix.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (self.original_class,), self.__getstate__()


def token_axes(x: Tensor, granularity: str, spatial: int | None) -> tuple[int, ...]:
    """The axes of an input that share a scale: of a token the last one, of a sample all but the batch."""
    if granularity != "token":
        return tuple(range(x.dim()))
    return (-1,) if spatial is None else tuple(range(x.dim() - spatial - 1, x.dim()))


def weight_axes(weight: Tensor, granularity: str) -> tuple[int, ...]:
    """The axes of a weight that share a scale."""
    return tuple(range(granularity == "channel", weight.dim()))


def _linear(self: Any, x: Tensor) -> Tensor:
    bias = None if self.bias is None else smoothed_bias(self.bias, self.spec, dict(self._buffers))
    return F.linear(self.quantized_input(x), self.quantized_weight(), bias)


def _convolution(self: Any, input: Tensor) -> Tensor:
    return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


def _embedding(self: Any, input: Tensor) -> Tensor:
    # The gradients' rules stay; max_norm changes the weight and is refused.
    options = self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse
    return F.embedding(input, self.quantized_weight(), *options)


def kind_of(layer: nn.Module) -> str | None:
    """`linear`, `conv` or `embedding` if a layer can be quantized: one of these classes, or a subclass with the same
    forward. The projection of `nn.MultiheadAttention` is never called: it is none."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return None
    for kind, bases in _kinds().items():
        for base in bases:
            if isinstance(layer, base) and (isinstance(layer, QuantizedLayer) or type(layer).forward is base.forward):
                return kind
    return None


def _kinds() -> dict[str, tuple[Any, ...]]:
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    linear = (nn.Linear, transposed) if transposed else (nn.Linear,)
    return {"linear": linear, "conv": CONVOLUTIONS, "embedding": (nn.Embedding,)}


_FORWARDS: dict[str | None, Callable[..., Tensor]] = {
    "linear": _linear,
    "conv": _convolution,
    "embedding": _embedding,
}


@cache
def _quantized_class(base: Any) -> Any:
    kind = next(kind for kind, bases in _kinds().items() if issubclass(base, bases))
    body = {
        "forward": _FORWARDS[kind],
        "extra_repr": QuantizedLayer.extra_repr,
        "__module__": __name__,
        "__doc__": f"A quantized {base.__name__}.",
        "original_class": base,
    }
    return type(f"Quantized{base.__name__}", (base, QuantizedLayer), body)


def _is_transposed(cls: type) -> bool:
    """Whether weights are [in_features, out_features], as in transformers' Conv1D."""
    return issubclass(cls, _kinds()["linear"]) and not issubclass(cls, nn.Linear)


def _new(base: type) -> nn.Module:
    """An empty quantized layer, for copies and pickles."""
    _keep_whole()
    cls = _quantized_class(base)
    layer: nn.Module = cls.__new__(cls)
    return layer


def convert(layer: nn.Module, config: LayerConfig, buffers: dict[str, Tensor]) -> None:
    """Make a layer a quantized one, in place."""
    _keep_whole()
    for name, value in buffers.items():
        layer.register_buffer(name, value)
    fused, device = buffers.get("input_rotation"), weight_of(layer).device
    axes = len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else None
    rotations = config.rotate and fused is None, "output_rotation" in buffers
    layer.spec = str(Spec(config, *rotations, _is_transposed(type(layer)), axes))  # type: ignore[assignment]
    if config.rotate:
        matrix = hadamard(block_of(in_features(layer)) if fused is None else int(fused), device)
        layer.register_buffer("hadamard", matrix, persistent=False)
    if "output_rotation" in buffers:
        matrix = hadamard(int(buffers["output_rotation"]), device)
        layer.register_buffer("output_hadamard", matrix, persistent=False)
    cls: Any = type(layer)
    if is_parametrized(layer):  # keep the class that computes the parameters: what removes them takes its base
        body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(cls.__name__, (_quantized_class(cls.__bases__[0]),), body)
    else:
        layer.__class__ = _quantized_class(cls)


def clone(layer: nn.Module, config: LayerConfig, buffers: dict[str, Tensor]) -> Any:
    """A quantized layer beside the original one, of the same parameters; its `forward` runs no hooks."""
    other = layer.__class__.__new__(layer.__class__)
    other.__dict__ = {**layer.__dict__, "_buffers": dict(layer._buffers)}
    other.__dict__["_non_persistent_buffers_set"] = set(layer._non_persistent_buffers_set)
    convert(other, config, buffers)
    return other


def weight_of(layer: nn.Module) -> Tensor:
    """The float weight."""
    return layer.weight  # type: ignore[return-value]


def in_features(layer: nn.Module) -> int:
    """The size of the axis that blocks and rotations divide."""
    return weight_of(layer).shape[0 if _is_transposed(type(layer)) else -1]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers of a model, with their names."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer))


def leave_fast_paths(model: nn.Module) -> None:
    """Keep transformer layers of PyTorch from the fused operator that reads weights of their layers by itself."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(quantized_layers(module)):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(quantized_layers(module)):
            module.use_nested_tensor = False


@torch.no_grad()
def is_finite(weight: Tensor) -> bool:
    """Whether a weight has neither NaN nor infinity; True if it has no data."""
    return weight.is_meta or bool(weight.isfinite().all())
