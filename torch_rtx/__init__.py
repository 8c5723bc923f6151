"""torch_rtx: a compiler for PyTorch models on NVIDIA RTX GPUs.

    model = torch.compile(model, backend="rtx")                  no import needed

    module = torch_rtx.compile(model, (x,))                      ahead of time
    torch_rtx.save(module, "model.rtx")                          without weights
    module = torch_rtx.load("model.rtx", weights=model)          anywhere

Importing the package loads no other part of it: each name below is imported on its first use.
"""

from __future__ import annotations

from importlib import import_module

from torch_rtx.version import __version__ as __version__

TYPE_CHECKING = False  # that of `typing`, whose import would take most of the time of this one
if TYPE_CHECKING:
    from typing import Any

    from torch_rtx import quantization as quantization
    from torch_rtx import runtime as runtime
    from torch_rtx.backend.build import compile
    from torch_rtx.backend.cross import (
        cross_compile_for_windows,
        load_cross_compiled_exported_program,
        save_cross_compiled_exported_program,
    )
    from torch_rtx.backend.debugger import Debugger
    from torch_rtx.backend.dryrun import dryrun
    from torch_rtx.backend.explain import Explanation, explain
    from torch_rtx.backend.guards import skip_layer_guards
    from torch_rtx.backend.inputs import Input
    from torch_rtx.backend.mutable import MutableModule
    from torch_rtx.backend.rank_engines import compile_ranks
    from torch_rtx.backend.registered_kernels import register_kernel
    from torch_rtx.backend.registered_operators import register_decomposition, register_pointwise
    from torch_rtx.engine import Engine
    from torch_rtx.errors import (
        CacheError,
        CallError,
        CaptureError,
        EngineFormatError,
        EnginePlatformError,
        EngineVersionError,
        InputError,
        IntegrationError,
        InvalidIR,
        KernelError,
        LoweringError,
        OnnxError,
        PartitionError,
        QuantizationError,
        RanksError,
        RefitError,
        RtxError,
        SettingsError,
        Unsupported,
    )
    from torch_rtx.inspection import inspect
    from torch_rtx.machine import Machine
    from torch_rtx.onnx.module import from_onnx
    from torch_rtx.quantization.model import quantize
    from torch_rtx.runtime.background import wait
    from torch_rtx.runtime.module import CompiledModule, load, refit_module_weights, save
    from torch_rtx.runtime.profiling import Profile, profile
    from torch_rtx.runtime.session import runtime_settings
    from torch_rtx.settings import CompilationSettings, RuntimeSettings
    from torch_rtx.validity import EngineCheck, Validity, check_engine

_HOMES = {
    "torch_rtx.backend.build": ("compile",),
    "torch_rtx.backend.cross": (
        "cross_compile_for_windows",
        "load_cross_compiled_exported_program",
        "save_cross_compiled_exported_program",
    ),
    "torch_rtx.backend.debugger": ("Debugger",),
    "torch_rtx.backend.dryrun": ("dryrun",),
    "torch_rtx.backend.explain": ("Explanation", "explain"),
    "torch_rtx.backend.guards": ("skip_layer_guards",),
    "torch_rtx.backend.inputs": ("Input",),
    "torch_rtx.backend.mutable": ("MutableModule",),
    "torch_rtx.backend.rank_engines": ("compile_ranks",),
    "torch_rtx.backend.registered_kernels": ("register_kernel",),
    "torch_rtx.backend.registered_operators": ("register_decomposition", "register_pointwise"),
    "torch_rtx.engine": ("Engine",),
    "torch_rtx.inspection": ("inspect",),
    "torch_rtx.machine": ("Machine",),
    "torch_rtx.onnx.module": ("from_onnx",),
    "torch_rtx.errors": (
        "CacheError",
        "CallError",
        "CaptureError",
        "EngineFormatError",
        "EnginePlatformError",
        "EngineVersionError",
        "InputError",
        "IntegrationError",
        "InvalidIR",
        "KernelError",
        "LoweringError",
        "OnnxError",
        "PartitionError",
        "QuantizationError",
        "RanksError",
        "RefitError",
        "RtxError",
        "SettingsError",
        "Unsupported",
    ),
    "torch_rtx.quantization.model": ("quantize",),
    "torch_rtx.runtime.background": ("wait",),
    "torch_rtx.runtime.module": ("CompiledModule", "load", "refit_module_weights", "save"),
    "torch_rtx.runtime.session": ("runtime_settings",),
    "torch_rtx.runtime.profiling": ("Profile", "profile"),
    "torch_rtx.settings": ("CompilationSettings", "RuntimeSettings"),
    "torch_rtx.validity": ("EngineCheck", "Validity", "check_engine"),
}
_NAMESPACES = ("quantization", "runtime")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CacheError",
    "CallError",
    "CaptureError",
    "CompilationSettings",
    "CompiledModule",
    "Debugger",
    "Engine",
    "EngineCheck",
    "EngineFormatError",
    "EnginePlatformError",
    "EngineVersionError",
    "Explanation",
    "Input",
    "InputError",
    "IntegrationError",
    "InvalidIR",
    "KernelError",
    "LoweringError",
    "Machine",
    "MutableModule",
    "OnnxError",
    "PartitionError",
    "Profile",
    "QuantizationError",
    "RanksError",
    "RefitError",
    "RtxError",
    "RuntimeSettings",
    "SettingsError",
    "Unsupported",
    "Validity",
    "check_engine",
    "compile",
    "compile_ranks",
    "cross_compile_for_windows",
    "dryrun",
    "explain",
    "from_onnx",
    "inspect",
    "load",
    "load_cross_compiled_exported_program",
    "profile",
    "quantize",
    "refit_module_weights",
    "register_decomposition",
    "register_kernel",
    "register_pointwise",
    "runtime_settings",
    "save",
    "save_cross_compiled_exported_program",
    "skip_layer_guards",
    "wait",
]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
