"""Builds the models of the suite `sweep` from their libraries, with random weights and without a network."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks import outside
from benchmarks.sweep_table import Entry


class PlainDetector(nn.Module):
    """The network of a detector of torchvision, without the resizing and selecting around it, which are not tensor
    code: scores and boxes of all anchors."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Takes images `[batch, 3, height, width]`."""
        return self.head(list(self.backbone(images).values()))


def module(entry: Entry, few: bool) -> nn.Module:
    """The model in evaluation mode, in float32 on the current device.

    Args:
        few: of few layers, where the configuration allows that.

    Raises:
        ImportError: its library is not installed.
    """
    config = {**entry.config, **(entry.few if few else {})}
    built = {
        "timm": _timm,
        "torchvision": _torchvision,
        "transformers": _transformers,
        "diffusers": _diffusers,
        "own": _own,
    }
    return _without_zeros(built[entry.library](entry.kind, config)).eval()


def _without_zeros(model: nn.Module) -> nn.Module:
    """Parameters that begin as zeros are small numbers: some models return zeros until they are trained, and a bias of
    zeros would be missed by nobody."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def inputs(entry: Entry, batch: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Random inputs of one call, `(args, kwargs)`: normal floats, and integers from 4 on, below which many models
    reserve some."""
    made: dict[str, torch.Tensor] = {}
    for name, one in entry.inputs.items():
        shape = (batch, *one.shape)
        made[name] = torch.randint(min(4, one.below - 1), one.below, shape) if one.below else torch.randn(shape)
    args = tuple(value for name, value in made.items() if name.isdigit())
    return args, {name: value for name, value in made.items() if not name.isdigit()}


def _timm(kind: str, config: dict[str, Any]) -> nn.Module:
    return import_module("timm").create_model(kind, pretrained=False, **config)


def _torchvision(kind: str, config: dict[str, Any]) -> nn.Module:
    get = import_module("torchvision.models").get_model
    builder = import_module("torchvision.models").get_model_builder(kind)
    known = inspect.signature(builder).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in known else {}
    if kind in ("googlenet", "inception_v3"):
        config = {"init_weights": True, **config}
    model = get(kind, weights=None, **backbone, **config)
    return PlainDetector(model) if hasattr(model, "anchor_generator") else model


def _transformers(kind: str, config: dict[str, Any]) -> nn.Module:
    model = getattr(import_module("transformers"), kind)
    return model(model.config_class(**config))


def _diffusers(kind: str, config: dict[str, Any]) -> nn.Module:
    return getattr(import_module("diffusers"), kind)(**config)


def _own(kind: str, config: dict[str, Any]) -> nn.Module:
    return getattr(outside, kind)(**config)
