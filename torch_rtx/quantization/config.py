"""What is quantized how: settings of a layer, presets, and rules that give them to layers by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch_rtx.errors import QuantizationError
from torch_rtx.quantization.formats import Format


@dataclass(frozen=True)
class LayerConfig:
    """How a layer is quantized.

    Attributes:
        weight: the format of its weight.
        input: the format of its input, or None: weight-only.
        rotate: multiply inputs and weights of linear layers by Hadamard matrices, which spreads outliers.
        smooth: divide input channels of linear layers by factors, and multiply the weight by them, that are searched on
            calibration data: the error of the layer's output is least (AWQ, SmoothQuant).
    """

    weight: Format = Format("int8", "channel")
    input: Format | None = None
    rotate: bool = False
    smooth: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Format) or not isinstance(self.input, Format | None):
            raise QuantizationError("weight must be a Format, and input a Format or None")
        if self.weight.granularity == "token" or self.weight.calibration in ("percentile", "entropy"):
            raise QuantizationError("scales of weights are of a tensor, channel or block, by max or mse")
        if self.input and self.input.granularity == "channel":
            raise QuantizationError("scales of inputs are of a tensor, token or block: a channel is summed over")
        if self.input and not self.input.dynamic and not self.input.two_levels and self.input.granularity != "tensor":
            raise QuantizationError(f"scales of a {self.input.granularity} of inputs are dynamic")
        if self.input and self.input.dynamic and self.input.calibration != "max":
            raise QuantizationError("dynamic scales are the largest magnitude: calibration='max'")
        if self.smooth and self.rotate:
            raise QuantizationError("a layer has either smooth or rotate")

    @property
    def needs_data(self) -> bool:
        """Whether layers need calibration data."""
        return self.smooth or (self.input is not None and not self.input.dynamic)

    def __str__(self) -> str:
        extras = "".join(f" {name}" for name in ("rotate", "smooth") if getattr(self, name))
        return f"{self.weight} x {self.input or 'float'}{extras}"


_INT8, _TOKENS = Format("int8", "channel"), Format("int8", "token", dynamic=True)
_INT4, _FP4 = Format("int4", "block", 128, calibration="mse"), Format("float4_e2m1", "block", 16)
_FP8 = Format("float8_e4m3fn")

PRESETS = {
    "int8": LayerConfig(_INT8, Format("int8"), smooth=True),
    "int8_dynamic": LayerConfig(_INT8, _TOKENS),
    "int8_weight_only": LayerConfig(_INT8),
    "int8_rotated": LayerConfig(_INT8, _TOKENS, rotate=True),
    "fp8": LayerConfig(_FP8, _FP8),
    "fp8_dynamic": LayerConfig(
        replace(_FP8, granularity="channel"), replace(_FP8, granularity="token", dynamic=True)
    ),
    "int4_awq": LayerConfig(_INT4, smooth=True),
    "int4_weight_only": LayerConfig(_INT4),
    "nvfp4": LayerConfig(_FP4, _FP4),
}  # fmt: skip

Settings = str | LayerConfig | Mapping[str, Any] | None
Config = str | LayerConfig | Mapping[str, Settings]


def rules_of(config: Config) -> list[tuple[str, LayerConfig | None]]:
    """Pairs of a glob pattern and the settings of layers whose names match; the last one that matches counts."""
    if isinstance(config, Mapping):
        if not config:
            raise QuantizationError("the config has no rules", hint='such as {"*": "int8", "*lm_head*": None}')
        return [(pattern, settings_of(settings)) for pattern, settings in config.items()]
    if config is None:
        raise QuantizationError(f"config must be a preset ({', '.join(PRESETS)}), a LayerConfig or rules, not None")
    return [("*", settings_of(config))]


def settings_of(value: Settings) -> LayerConfig | None:
    """The settings that a rule gives: of a preset, with changes to one, or none (the layer stays as it is)."""
    if value is None or isinstance(value, LayerConfig):
        return value
    if isinstance(value, str):
        if value not in PRESETS:
            raise QuantizationError(f"there is no preset {value!r}", hint=f"presets: {', '.join(PRESETS)}")
        return PRESETS[value]
    if not isinstance(value, Mapping):
        raise QuantizationError(f"settings must be a preset, a LayerConfig, a mapping or None, not {value!r}")
    changes = dict(value)
    base = settings_of(changes.pop("preset", None)) or LayerConfig()
    _known(changes, LayerConfig)
    for name in ("weight", "input"):
        if isinstance(changes.get(name), Mapping):
            _known(changes[name], Format)
            changes[name] = replace(getattr(base, name) or Format(), **changes[name])
    return replace(base, **changes)


def _known(changes: Mapping[str, Any], kind: type) -> None:
    """Raises QuantizationError for a name that is no field."""
    names = [field.name for field in fields(kind)]
    for name in changes:
        if name not in names:
            raise QuantizationError(f"{kind.__name__} has no field {name!r}", hint=f"fields: {', '.join(names)}")
