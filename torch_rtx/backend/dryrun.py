"""`dryrun`: what an engine would hold, without building it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from torch_rtx.backend.build import capture_model, chosen_settings, positional
from torch_rtx.backend.capture import alone_with
from torch_rtx.backend.compiler import check_settings, device_of
from torch_rtx.backend.explain import Explanation, report
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.settings import CompilationSettings


def dryrun(
    model: nn.Module | ExportedProgram | str | os.PathLike[str] | Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    settings: CompilationSettings | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    **options: Any,
) -> Explanation:
    """Capture `model` as `torch_rtx.compile` does, and report how it would be partitioned: what the engine would hold,
    what falls back to PyTorch, and why. Nothing is built, and no weight is read; `explain` is the same for
    torch.compile.

    Args:
        model, args, kwargs, dynamic_shapes, inputs, options: see `torch_rtx.compile`.
        settings: those of the build; `require_full_compilation` is ignored.

    Raises:
        CaptureError, InputError, OnnxError, SettingsError: see `torch_rtx.compile`, which would fail alike.
    """
    settings, _ = chosen_settings(settings, None, options)
    settings = replace(settings, require_full_compilation=False)
    check_settings(settings)
    with alone_with(model):
        captured = capture_model(model, positional(args, inputs), kwargs, dynamic_shapes, settings)
        gm = captured.program.graph_module
        symbols = Symbols(device_of(gm), *captured.sizes)
        return Explanation((report(gm, settings, roles=captured.roles, symbols=symbols, writes=captured.writes),))
