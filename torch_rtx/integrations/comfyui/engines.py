"""Engines in the place of a diffusion model of ComfyUI, built at the first call where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_rtx.errors import CaptureError, IntegrationError
from torch_rtx.runtime.module import CompiledModule, load, save

log = logging.getLogger("torch_rtx.comfyui")
LATENT = 8  # pixels of a side for each element of a latent, in most models
# What samplers tell patches and wrappers of a step, which are not part of an engine.
TOLD = {"cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "callbacks", "wrappers", "prefetch_dynamic_vbars"}
TOLERANCE = 0.05  # of an engine's first result from the model's own, relative: half precision differs by less


@dataclass(frozen=True)
class Sizes:
    """What an engine is built for: pixels of a side, images that are computed together, tokens of a prompt."""

    min_size: int
    max_size: int
    max_batch: int
    max_tokens: int


@dataclass(frozen=True)
class RunEngine:
    """The engine of a file, with the weights of the model.

    Args:
        path: of the file; built for `sizes` if there is none.
    """

    path: Path
    sizes: Sizes

    def make(self, model: nn.Module) -> EngineCall:
        """See `Program`."""
        return EngineCall(model, self)

    def release(self, model: nn.Module, run: Any) -> None:
        """See `Program`."""
        run.release()


class EngineCall:
    """Computes what a call of a model does."""

    def __init__(self, model: nn.Module, how: RunEngine) -> None:
        self._model, self._how = model, how
        self._engine: CompiledModule | None = None
        self._places: list[int] = []  # of the parameters that the engine uses
        self._said: str | None = None

    def __call__(
        self,
        x: Any,
        timesteps: Any,
        context: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **more: Any,
    ) -> Any:
        """The model's result.

        Raises:
            CaptureError: the model can't be captured as an engine.
            RefitError: the file is an engine of another model.
            IntegrationError: the engine computes something else than the model.
            InputError: the engine is not built for these sizes.
        """
        given = {name: value for name, value in {"context": context, **more}.items() if value is not None}
        options = {} if transformer_options is None else transformer_options
        reason = _beyond(control, options)
        if reason != self._said:
            log.warning("no engine runs, but the model itself: %s", reason) if reason else log.info("the engine runs")
            self._said = reason

        def itself() -> Any:
            rest = {"control": control, "transformer_options": options}
            return self._model.forward(x, timesteps, **given, **rest)

        if reason is not None:
            return itself()
        if self._engine is None:
            self._engine = self._checked(x, timesteps, given, itself)
        self._attach(self._engine)
        return self._engine(x, timesteps, given)

    def release(self) -> None:
        """Keep no memory of weights until the next call."""
        self._places = []
        if self._engine is not None:
            self._engine.session.unload_weights(keep=False)

    def _attach(self, engine: CompiledModule) -> None:
        """Use the weights that the model has now: patching gives it other parameters, in other memory."""
        places = [place for p in self._model.parameters() for place in (id(p), p.data_ptr())]
        if places != self._places:
            engine.attach(self._model)
            self._places = places

    def _checked(self, x: Tensor, timesteps: Tensor, given: Any, itself: Callable[[], Any]) -> CompiledModule:
        """The engine, after its result has been compared with the model's own."""
        path = self._how.path
        if path.exists():  # maybe from elsewhere: nothing in it is trusted
            engine = load(path, device=x.device)
        else:
            engine = _built(self._model, x, timesteps, given, self._how.sizes)
            path.parent.mkdir(parents=True, exist_ok=True)
            save(engine, path)
            log.info("%s is built", path)
        self._attach(engine)
        found, expected = (pytree.tree_leaves(result) for result in (engine(x, timesteps, given), itself()))
        if len(found) != len(expected) or not all(map(_is_close, found, expected)):
            hint = "remove the file, and it is built for this model"
            raise IntegrationError(f"the engine {path} computes something else than the model", hint=hint)
        return engine


def _is_close(found: Tensor, expected: Tensor) -> bool:
    size = expected.float().norm().clamp(min=1e-12)
    return found.shape == expected.shape and bool((found.float() - expected.float()).norm() / size < TOLERANCE)


def _beyond(control: Any, options: Mapping[str, Any]) -> str | None:
    """What a call asks for beside the model's own computation; None: nothing."""
    if control:
        return "ControlNet adds to what its layers compute"
    patched = [name for name, value in options.items() if name not in TOLD and not _is_nothing(value)]
    patched += ["wrappers of the model"] * bool(options.get("wrappers", {}).get("diffusion_model"))
    return f"it is changed by {', '.join(patched)}" if patched else None


def _is_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, dict | list | tuple | set) and not value)


# ---- building --------------------------------------------------------------------------------------------------------


class _Options(dict[str, Any]):
    """Options of a call without any. What differs from step to step can't be read."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(_readable(name))

    def get(self, name: str, default: Any = None) -> Any:
        """As that of a dict."""
        return super().get(_readable(name), default)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(_readable(name))

    def copy(self) -> _Options:
        """One of these."""
        return _Options(self)


def _readable(name: Any) -> Any:
    if name in TOLD - {"wrappers", "callbacks", "prefetch_dynamic_vbars"}:  # of which there are none in an engine
        hint = "compile the model with the other node, which follows them"
        raise CaptureError(f"the model reads transformer_options[{name!r}], which differs from step to step", hint=hint)
    return name


class _Call(nn.Module):
    """A model as an engine calls it, with the tensors of the model under the same names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        vars(self).update({name: getattr(model, name) for name in ("_parameters", "_buffers", "_modules", "training")})
        self.run: Callable[..., Any] = model.forward

    def forward(self, x: Tensor, timesteps: Tensor, given: dict[str, Any]) -> Any:
        """The result of a call without patches."""
        return self.run(x, timesteps, **given, transformer_options=_Options())


def _built(model: nn.Module, x: Tensor, timesteps: Tensor, given: dict[str, Any], sizes: Sizes) -> CompiledModule:
    """An engine for calls such as this one, with these sizes of images, batches and prompts."""
    from torch_rtx.backend.build import compile  # a loaded engine needs no compiler
    from torch_rtx.backend.inputs import Input

    batch = x.shape[0], 1, max(sizes.max_batch, x.shape[0], 3)  # up to 2, a capture would take it for a fixed size
    sides = [(size, min(sizes.min_size // LATENT, size), max(sizes.max_size // LATENT, size)) for size in x.shape[-2:]]

    def declared(tensor: Any, inner: Mapping[int, tuple[str, tuple[int, int, int]]]) -> Any:
        """An input whose first axis is the batch, and with these other axes that vary, by name."""
        if not isinstance(tensor, Tensor):
            return tensor
        varying = dict(inner)
        if tensor.dim() and tensor.shape[0] == x.shape[0]:
            varying[0] = "batch", batch
        known = {axis: span for axis, (_, span) in varying.items()}
        shapes = [known.get(axis, (size,) * 3) for axis, size in enumerate(tensor.shape)]
        opt, low, high = zip(*shapes, strict=True) if shapes else ((), (), ())
        named = {axis: name for axis, (name, _) in varying.items()}
        span: dict[str, Any] = {"min_shape": low, "opt_shape": opt, "max_shape": high}
        return Input(**span, dtype=tensor.dtype, device=tensor.device, shared_dims=named)

    def prompt(name: str, tensor: Any) -> Any:
        tokens = isinstance(tensor, Tensor) and name == "context" and tensor.dim() == 3
        length = tensor.shape[1] if tokens else 0
        return declared(tensor, {1: ("tokens", (length, 1, max(sizes.max_tokens, length)))} if tokens else {})

    axes = {x.dim() - 2: ("height", sides[0]), x.dim() - 1: ("width", sides[1])}
    texts = {name: prompt(name, value) for name, value in given.items()}
    args = declared(x, axes), declared(timesteps, {}), texts
    return compile(_Call(model), args, device=x.device.type)
