"""`quantize`: which layers of a model are quantized how, and that they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torch_rtx.errors import QuantizationError
from torch_rtx.quantization.calibration import ForwardLoop, calibrate
from torch_rtx.quantization.config import Config, LayerConfig, rules_of
from torch_rtx.quantization.hadamard import block_of
from torch_rtx.quantization.layers import (
    QuantizedLayer,
    convert,
    in_features,
    is_finite,
    kind_of,
    leave_fast_paths,
    weight_of,
)
from torch_rtx.quantization.rotation import fused_rotations


def quantize(model: nn.Module, config: Config, forward_loop: ForwardLoop | None = None) -> nn.Module:
    """Quantize a model's linear, convolution and embedding layers in place, and return it.

    Layers compute what quantized kernels will, in plain PyTorch: eagerly, in training (gradients pass straight through
    roundings), below `torch.compile`, in `torch.export`. Their weights stay float parameters under their names; what is
    calibrated is in buffers of the layers, and so in the state dict.

    Args:
        model: any module; modes, devices and dtypes of its layers may differ.
        config: a preset (`int8`, `int8_dynamic`, `int8_weight_only`, `int8_rotated`, `fp8`, `fp8_dynamic`, `int4_awq`,
            `int4_weight_only`, `nvfp4`), a `LayerConfig`, or rules: a mapping from glob patterns of layer names to
            presets, `LayerConfig`s, mappings of their fields (with `preset` as a start), or None, which leaves a layer
            as it is. The last pattern that matches counts; layers that none matches stay. `*` alone matches no
            embedding.
        forward_loop: called with the model, runs it on calibration data. Static inputs and smooth channels need it.
            With it, weights of earlier layers take over rotations, where what the loop ran allows that.

    Raises:
        QuantizationError: the config, a layer or the data does not allow it; the model is as it was.
    """
    plan = planned(model, config)
    rotates = any(config.rotate for config in plan.values())
    fused = fused_rotations(model, plan, forward_loop) if rotates and forward_loop else {}
    buffers = calibrate(model, plan, forward_loop, fused)
    apply(model, plan, buffers)
    return model


def restore(model: nn.Module, config: Config, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Quantize a model in place as one whose state dict is given, without data, load that state dict, and return it.

    Args:
        model: a module that is not quantized.
        config: what `quantize` was called with.
        state_dict: all tensors of the quantized model.

    Raises:
        QuantizationError: as `quantize`, or a tensor of calibration is missing; the model is as it was.
        RuntimeError: what `load_state_dict` raises.
    """
    plan = planned(model, config)
    buffers = {}
    for name, config in plan.items():
        fused = [key for key in ("input_rotation", "output_rotation") if _full(name, key) in state_dict]
        buffers[name] = {key: _calibrated(state_dict, name, key) for key in (*calibrated(config), *fused)}
    apply(model, plan, buffers)
    model.load_state_dict(state_dict)
    return model


def calibrated(config: LayerConfig) -> list[str]:
    """The names of the buffers of a layer."""
    static = config.input is not None and not config.input.dynamic
    needed = {"input_scale": config.smooth, "input_amax": static, "weight_clip": config.weight.calibration == "mse"}
    return [name for name, is_needed in needed.items() if is_needed]


def _full(name: str, key: str) -> str:
    return f"{name}.{key}".removeprefix(".")


def _calibrated(state_dict: Mapping[str, Tensor], name: str, key: str) -> Tensor:
    full = _full(name, key)
    if full not in state_dict:
        raise QuantizationError(f"the state dict has no {full!r}", hint="give the config that it was quantized with")
    return state_dict[full].clone()


def planned(model: nn.Module, config: Config, skip_unfit: bool = False) -> dict[str, LayerConfig]:
    """The layers to quantize, in the order of `named_modules`, each with its settings; `skip_unfit` leaves out layers
    that can't have theirs.

    Raises:
        QuantizationError: a pattern matches nothing, or layers can't be quantized as it says.
    """
    layers = {name: layer for name, layer in model.named_modules() if kind_of(layer)}
    chosen: dict[str, LayerConfig | None] = {}
    for pattern, settings in rules_of(config):
        matches = [name for name, layer in layers.items() if _matches(name, layer, pattern)]
        if not matches:
            known = ", ".join(map(repr, list(layers)[:8])) or "none"
            hint = f"linear, convolution and embedding layers here: {known}" + ", ..." * (len(layers) > 8)
            raise QuantizationError(f"the pattern {pattern!r} matches no layer", hint=hint)
        chosen |= dict.fromkeys(matches, settings)
    _check_layers({name: layer for name, layer in layers.items() if chosen.get(name)})
    plan = {name: _fitting(layers[name], settings) for name in layers if (settings := chosen.get(name))}
    unfit = {name: problem for name, config in plan.items() if (problem := _unfit(layers[name], config))}
    if unfit and not skip_unfit:
        first = next(iter(unfit.values()))
        hint = 'leave them as they are, or give them other settings, by rules: {"*": "int4_awq", "conv*": None}'
        raise QuantizationError(first, layers=[name for name in unfit if unfit[name] == first], hint=hint)
    return {name: config for name, config in plan.items() if name not in unfit}


def _matches(name: str, layer: nn.Module, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (pattern != "*" or kind_of(layer) != "embedding")


def _fitting(layer: nn.Module, config: LayerConfig) -> LayerConfig:
    """The settings without what a kind of layer does not have: rotations and scales of channels are of linear
    layers, embeddings have no input that is quantized, and a rotation of one channel is none."""
    linear = kind_of(layer) == "linear"
    rotate = config.rotate and linear and block_of(in_features(layer)) > 1
    return replace(
        config,
        rotate=rotate,
        smooth=config.smooth and linear,
        input=None if kind_of(layer) == "embedding" else config.input,
    )


def _check_layers(layers: Mapping[str, nn.Module]) -> None:
    """Raises QuantizationError for layers that no settings suit."""
    out = "leave them out by rules"
    for problem, hint, is_bad in (
        ("layers are quantized already", f"{out}, or begin with the float model", _is_quantized),
        ("layers have no weights yet", "call the model once", _is_lazy),
        ("weights are not float tensors of 16 bits or more", out, _is_packed),
        ("another tool replaced the forward of layers", "quantize before it does", _is_wrapped),
        ("embeddings with max_norm change their weights in calls", out, _renormalizes),
        ("weights have NaN or infinity", None, lambda layer: not is_finite(weight_of(layer))),
    ):
        if bad := [name for name, layer in layers.items() if is_bad(layer)]:
            raise QuantizationError(problem, layers=bad, hint=hint)


def _is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLayer)


def _is_wrapped(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


def _is_lazy(layer: nn.Module) -> bool:
    return isinstance(layer.weight, UninitializedParameter)


def _is_packed(layer: nn.Module) -> bool:
    weight = weight_of(layer)
    plain = type(weight) in (Tensor, nn.Parameter)
    return not plain or not weight.is_floating_point() or weight.dtype.itemsize < 2


def _renormalizes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) and layer.max_norm is not None


def _unfit(layer: nn.Module, config: LayerConfig) -> str | None:
    """Why a layer can't have these settings."""
    kind, width = kind_of(layer), in_features(layer)
    blocks = [form.block for form in (config.weight, config.input) if form and form.block]
    if kind == "conv" and blocks:
        return "blocks are of linear and embedding layers, not of convolutions"
    uneven = next((block for block in blocks if width % block), None)
    return f"blocks of {uneven} do not divide {width} input features" if uneven else None


def apply(model: nn.Module, plan: Mapping[str, LayerConfig], buffers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Quantize the layers of a plan with what calibration found."""
    for name, config in plan.items():
        convert(model.get_submodule(name), config, dict(buffers[name]))
    leave_fast_paths(model)
