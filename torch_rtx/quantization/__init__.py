"""Quantization of PyTorch models, for those without a tool: `torch_rtx.quantize(model, "int8", forward_loop)`.

A layer on its own, which needs torch alone: what it makes is a PyTorch module, which compiles as any other.
"""

from __future__ import annotations

from torch_rtx.quantization.config import PRESETS, LayerConfig
from torch_rtx.quantization.formats import Format
from torch_rtx.quantization.model import quantize, restore
from torch_rtx.quantization.report import (
    LayerError,
    Sensitivity,
    auto_quantize,
    print_summary,
    sensitivity,
    summary,
)

__all__ = [
    "PRESETS",
    "Format",
    "LayerConfig",
    "LayerError",
    "Sensitivity",
    "auto_quantize",
    "print_summary",
    "quantize",
    "restore",
    "sensitivity",
    "summary",
]
