"""What computes in the place of a diffusion model of ComfyUI, and when.

Patchers that are cloned from each other share one model. A patcher brings weights (LoRAs are merged while a model is
loaded, each patched weight as a new parameter) and wrappers around each call. So a program belongs to the model, and is
made once; whether it is used belongs to the patcher, as a wrapper, which lets the model's `__call__` run the program
for the time of one call.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

from torch import nn
from torch._dynamo import config

from torch_rtx.backend.sessions import release
from torch_rtx.errors import IntegrationError
from torch_rtx.integrations.sizes import compiled

log = logging.getLogger("torch_rtx.comfyui")
Run = Callable[..., Any]
KEY = "torch.compile"  # ComfyUI's own: of several nodes that compile, the last one counts
# A model has a graph for each kind of call: the conditions that are computed together, with ControlNet or without,
# patches of attention. PyTorch's limit of 8 is for functions that should have one.
GRAPHS = 64


class Program(Protocol):
    """A way to compute what a model computes; equal ones are made once for a model."""

    def __hash__(self) -> int:
        """Of its settings."""

    def make(self, model: nn.Module) -> Run:
        """What the model's `__call__` runs."""

    def release(self, model: nn.Module, run: Run) -> None:
        """Keep no memory of the model's weights until the next call."""


@dataclass(frozen=True)
class Compile:
    """`torch.compile` with these arguments."""

    mode: str = "default"
    dynamic: bool | None = None

    def make(self, model: nn.Module) -> Run:
        """See `Program`."""
        return compiled(model._call_impl, mode=self.mode, dynamic=self.dynamic)

    def release(self, model: nn.Module, run: Run) -> None:
        """See `Program`."""
        release(model.parameters())


def with_program(patcher: Any, program: Program) -> Any:
    """A clone of a patcher whose sampling runs `program`.

    Raises:
        IntegrationError: this is no patcher of ComfyUI.
    """
    try:
        names = import_module("comfy.patcher_extension")
        wrappers, callbacks = names.WrappersMP, names.CallbacksMP
    except (ImportError, AttributeError) as error:
        raise IntegrationError(f"ComfyUI can't be imported: {error}", hint="use the node in ComfyUI") from error
    clone = _clone(patcher)
    clone.remove_wrappers_with_key(wrappers.APPLY_MODEL, KEY)
    clone.add_wrapper_with_key(wrappers.APPLY_MODEL, KEY, partial(_call, program))
    for kind, callback in ((callbacks.ON_CLONE, _cloned), (callbacks.ON_DETACH, _detached)):
        clone.remove_callbacks_with_key(kind, KEY)
        clone.add_callback_with_key(kind, KEY, callback)
    _cloned(patcher, clone)
    return clone


def _clone(patcher: Any) -> Any:
    """A clone that ComfyUI loads as a whole, if it fits; by default it may bring each weight while it is used."""
    if "disable_dynamic" in inspect.signature(patcher.clone).parameters:
        try:
            return patcher.clone(disable_dynamic=True)
        except RuntimeError as error:  # what loaded the model does not know how to load it again
            log.info("a clone that holds its weights can't be made: %s", error)
    return patcher.clone()


# ---- a call ----------------------------------------------------------------------------------------------------------


class _Made(dict[Program, Run]):
    """The programs of a model; a copy of the model has none.

    Attributes:
        said: the last reason why none is used.
    """

    said: str | None = None

    def __reduce__(self) -> Any:
        return _Made, ()


def _made(model: nn.Module) -> _Made:
    """Those that are made for a model. An attribute of it, so that they go when it goes."""
    found: _Made = vars(model).setdefault("_torch_rtx_programs", _Made())
    return found


def _call(program: Program, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """The wrapper: a call of the model around the diffusion model."""
    model, made = executor.class_obj.diffusion_model, _made(executor.class_obj.diffusion_model)
    reason = _why_not(executor.class_obj)
    if reason != made.said:
        log.warning("the model runs as without the node: %s", reason) if reason else log.info("the model is compiled")
        made.said = reason
    if reason is not None:
        return executor(*args, **kwargs)
    if program not in made:
        made[program] = program.make(model)
    before, model._compiled_call_impl = model._compiled_call_impl, made[program]
    try:
        with config.patch(recompile_limit=max(config.recompile_limit, GRAPHS), ignore_logger_methods=_quiet()):
            return executor(*args, **kwargs)
    finally:
        model._compiled_call_impl = before


def _quiet() -> set[Any]:
    """What Dynamo leaves out; a message about the choice of a kernel would break the graph at each quantized layer."""
    return {*config.ignore_logger_methods, logging.Logger.debug}


def _why_not(base: Any) -> str | None:
    """Why a model has to be run by ComfyUI itself; None: it is on the device as a whole."""
    patcher = getattr(base, "current_patcher", None)
    if patcher is not None and getattr(patcher, "is_dynamic", bool)():
        return "ComfyUI brings its weights to the device while they are used; start it with --disable-dynamic-vram"
    if getattr(base, "model_lowvram", False):
        return "it does not fit into the memory of the device, and ComfyUI brings its weights there for each call"
    return None


# ---- memory ----------------------------------------------------------------------------------------------------------


def _cloned(_: Any, clone: Any) -> None:
    """When ComfyUI takes memory from a clone, programs let go of it as well."""
    unload = clone.partially_unload

    def partially_unload(*args: Any, **kwargs: Any) -> Any:
        _release(clone)
        return unload(*args, **kwargs)

    clone.partially_unload = partially_unload


def _detached(patcher: Any, *_: Any) -> None:
    _release(patcher)


def _release(patcher: Any) -> None:
    model = patcher.model.diffusion_model
    for program, run in _made(model).items():
        program.release(model, run)
