"""The nodes: each takes a model and gives a clone of it that computes in another way."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from torch_rtx.errors import IntegrationError, SettingsError
from torch_rtx.integrations.comfyui.engines import RunEngine, Sizes
from torch_rtx.integrations.comfyui.programs import Compile, with_program
from torch_rtx.settings import MODES

DYNAMIC = {"auto": None, "always": True, "never": False}
FOLDER = "rtx"  # of engines, among those of models


class CompileModel:
    """`torch.compile(backend="rtx")` of what a sampler calls."""

    CATEGORY, FUNCTION, RETURN_TYPES = "torch_rtx", "patch", ("MODEL",)
    DESCRIPTION = "Compiles the model at its first step. LoRAs, sizes and a second start do not compile it again."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets and widgets of the node."""
        return {"required": {"model": ("MODEL",), "mode": (list(MODES),), "dynamic": (list(DYNAMIC),)}}

    def patch(self, model: Any, mode: str, dynamic: str) -> tuple[Any]:
        """The clone."""
        return (with_program(model, Compile(mode, DYNAMIC[dynamic])),)


class UseEngine:
    """An engine in the place of the model, which holds the weights."""

    CATEGORY, FUNCTION, RETURN_TYPES = "torch_rtx", "patch", ("MODEL",)
    DESCRIPTION = "Runs an engine file of this name with the model's weights and LoRAs, or builds it at the first step."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets and widgets of the node."""
        size = {"default": 1024, "min": 64, "max": 1 << 14, "step": 64}
        return {
            "required": {
                "model": ("MODEL",),
                "name": ("STRING", {"default": "model"}),
                "min_size": ("INT", {**size, "default": 512}),
                "max_size": ("INT", {**size, "default": 1536}),
                "max_batch": ("INT", {"default": 2, "min": 1, "max": 64}),
                "max_tokens": ("INT", {"default": 512, "min": 1, "max": 1 << 14}),
            }
        }

    def patch(self, model: Any, name: str, min_size: int, max_size: int, max_batch: int, max_tokens: int) -> tuple[Any]:
        """The clone."""
        if not re.fullmatch(r"[\w][\w .-]*", name):
            raise SettingsError(f"{name!r} is no name of an engine", hint="letters, digits, spaces, and _ . -")
        if min_size > max_size:
            raise SettingsError(f"min_size={min_size} is more than max_size={max_size}")
        sizes = Sizes(min_size, max_size, max_batch, max_tokens)
        return (with_program(model, RunEngine(_folder() / f"{name}.rtx", sizes)),)


def _folder() -> Path:
    """Where engines are: `models/rtx` of ComfyUI."""
    try:
        models = Path(import_module("folder_paths").models_dir)
    except (ImportError, AttributeError) as error:
        raise IntegrationError(f"ComfyUI can't be imported: {error}", hint="use the node in ComfyUI") from error
    return models / FOLDER


NODE_CLASS_MAPPINGS = {"RTXCompileModel": CompileModel, "RTXUseEngine": UseEngine}
NODE_DISPLAY_NAME_MAPPINGS = {"RTXCompileModel": "Compile Model (RTX)", "RTXUseEngine": "Use Engine (RTX)"}
