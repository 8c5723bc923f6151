"""Engines for Windows, built on another platform: the names that users of Torch-TensorRT know.

An engine holds no code of the host, so that one for any platform runs on Windows as well. One that is bound to Windows
also brings its kernels along, since Triton is not expected there, and says in an error that other platforms are not
meant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from torch_rtx import platforms
from torch_rtx.backend.build import chosen_settings, compile
from torch_rtx.errors import SettingsError
from torch_rtx.runtime.module import CompiledModule, load, save
from torch_rtx.settings import CompilationSettings, RuntimeSettings


def cross_compile_for_windows(
    model: nn.Module | ExportedProgram | str | os.PathLike[str] | Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    settings: CompilationSettings | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    **options: Any,
) -> CompiledModule:
    """Build an engine for Windows, as `torch_rtx.compile` does from the same arguments with `platform="windows"`. It is
    for `cuda`, which needs no GPU here, and for the GPUs in `targets`, by default those of "portable". Files of the
    module load on Windows alone.

    Raises:
        SettingsError: `settings` name another platform.
        RtxError: see `torch_rtx.compile`.
    """
    settings, runtime = chosen_settings(settings, None, options)
    if settings.platform not in (platforms.ANY, platforms.WINDOWS):
        raise SettingsError(f"the platform of the settings is {settings.platform}, not windows")
    settings = replace(settings, platform=platforms.WINDOWS, device=settings.device or "cuda")
    return compile(model, args, kwargs, dynamic_shapes, settings, runtime, inputs=inputs)


def save_cross_compiled_exported_program(module: CompiledModule, file_path: str | os.PathLike[str]) -> None:
    """Write the engine of `cross_compile_for_windows`, as `torch_rtx.save`.

    Raises:
        SettingsError: it is not bound to a platform.
        RtxError, OSError: see `torch_rtx.save`.
    """
    if module.engine.manifest.platform == platforms.ANY:
        hint = "build it by cross_compile_for_windows, or write it by torch_rtx.save"
        raise SettingsError("the engine was not built for another platform", hint=hint)
    save(module, file_path)


def load_cross_compiled_exported_program(
    file_path: str | os.PathLike[str], weights: Any = None, settings: RuntimeSettings | None = None, **trust: Any
) -> CompiledModule:
    """Load an engine on the platform that it was built for, as `torch_rtx.load`, whose arguments `trust` are.

    Raises:
        EnginePlatformError: this is another platform.
        RtxError, OSError: see `torch_rtx.load`.
    """
    return load(file_path, weights, settings=settings, **trust)
