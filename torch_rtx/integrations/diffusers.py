"""Compiles the models of a diffusers pipeline, in place, so that LoRAs can be loaded, mixed and swapped meanwhile.

import torch_rtx.integrations.diffusers

accelerated = torch_rtx.integrations.diffusers.accelerate(pipe)
pipe.load_lora_weights(...)      # before or after: nothing is compiled again
pipe(prompt)
accelerated.undo()
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, update_wrapper
from importlib import import_module
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from torch_rtx.errors import IntegrationError, SettingsError
from torch_rtx.integrations.peft import MergedAdapters
from torch_rtx.integrations.sizes import compiled
from torch_rtx.runtime.module import CompiledModule

log = logging.getLogger(__name__)
Run = Callable[..., Any]


def accelerate(
    pipe: Any,
    components: Iterable[str] | None = None,
    *,
    engines: Mapping[str, CompiledModule] | None = None,
    repeated_blocks: bool = False,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Accelerated:
    """Compile the models of a pipeline with `rtx`, in place. Each is captured at its first call.

    The parameters of these models no longer require gradients, as PEFT would have it with the first adapter.

    Args:
        pipe: a diffusers pipeline.
        components: the names of those to compile, such as `unet` or `vae.decoder`; None: the models of diffusers (UNet
            or transformer, ControlNet, autoencoder) and the text encoders.
        engines: by such a name, an engine that computes what the model does, in place of compiling it. It uses the
            model's weights, with adapters.
        repeated_blocks: compile the blocks that a model repeats, once for all of them, instead of the whole model: the
            first call waits for less, and every call takes a little longer. Models that repeat none are compiled whole.
        mode, options, dynamic, fullgraph: as those of `torch.compile`.

    Raises:
        IntegrationError: diffusers is not installed, or `pipe` is no pipeline of it.
        SettingsError: the pipeline has no model of a name that is given.
        RefitError: an engine has other weights than its model.
    """
    known, engines = _parts(pipe), engines or {}
    chosen = _find(_default(pipe) if components is None else components, known)
    if not engines.keys() <= known.keys():
        hint = f"engines may be for {', '.join(known)}"
        raise SettingsError(f"no engine can be for {', '.join(engines.keys() - known.keys())}", hint=hint)
    given: dict[str, Any] = {"mode": mode, "dynamic": dynamic, "fullgraph": fullgraph}
    given["options"] = None if options is None else dict(options)
    accelerated = Accelerated()
    try:
        for path in dict.fromkeys([*chosen, *engines]):
            if any(isinstance(value, _Forward) for value in vars(known[path]).values()):
                log.info("%s is accelerated already", path)  # by another pipeline that shares it
            elif path in engines:
                accelerated._add(path, known[path], partial(_first, engines[path]))
            elif repeated_blocks and _repeated(known[path]):
                accelerated._add_blocks(path, known[path], given)
            else:
                accelerated._add(path, known[path], partial(compiled, **given))
    except BaseException:
        accelerated.undo()
        raise
    return accelerated


class Accelerated:
    """What `accelerate` changed; as a context manager, undone at the end of the block.

    Attributes:
        components: the names of what is compiled, such as `unet` and `vae.decoder`.
    """

    def __init__(self) -> None:
        self.components: list[str] = []
        self._undo: list[Callable[[], object]] = []

    def _add(self, path: str, model: nn.Module, make: Callable[[Run], Run]) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._undo += [partial(parameter.requires_grad_, True) for parameter in trained]
        model.requires_grad_(False)
        self._set(model, None)
        forward = _Forward(model)
        self._undo.append(forward.undo)
        forward.use(make)
        self.components.append(path)
        if model.training:
            log.warning("%s is in training mode: adapters are not merged, and each set of them is compiled", path)

    def _add_blocks(self, path: str, model: nn.Module, options: Mapping[str, Any]) -> None:
        for block in _repeated(model):
            self._set(block, compiled(block._call_impl, **options))
        self._add(path, model, lambda original: original)

    def _set(self, model: nn.Module, compiled: Run | None) -> None:
        """As `model.compile()` does, in the place of what a call of it left."""
        self._undo.append(partial(setattr, model, "_compiled_call_impl", model._compiled_call_impl))
        model._compiled_call_impl = compiled

    def undo(self) -> None:
        """Leave the pipeline as it was. Does nothing a second time."""
        while self._undo:
            self._undo.pop()()
        self.components = []

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Accelerated({', '.join(self.components)})"


class _Replaced:
    """A method of one module in place of that of its class. A copy of the module has the class's again."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner, self._name, self._original = owner, name, getattr(owner, name)
        self._inherited = name not in vars(owner)
        update_wrapper(self, self._original)  # type: ignore[arg-type]  # as `self` is called
        setattr(owner, name, self)

    def undo(self) -> None:
        """Put the original back, also where a hook has been put around this one meanwhile."""
        for name in [name for name, value in vars(self._owner).items() if value is self]:
            if name == self._name and self._inherited:
                delattr(self._owner, name)
            else:
                setattr(self._owner, name, self._original)

    def __reduce__(self) -> Any:
        return self._original.__reduce__()


class _Forward(_Replaced):
    """What a call of a model computes: by `run`, for the model without adapters, which are merged into its weights."""

    def __init__(self, model: nn.Module) -> None:
        # What a hook calls that moves the model to its device, as offloading does; else what the model's own call does.
        super().__init__(model, "_old_forward" if "_old_forward" in vars(model) else "forward")
        self._run: Run = self._original
        self._adapters, self._lock = MergedAdapters(model), threading.RLock()
        names = "named_modules", "named_children"
        self._walks: WeakSet[_Walk] = WeakSet()
        self._listings = [_Listing(model, name, self._lock, self._walks, self._adapters) for name in names]
        self._attached: list[nn.Parameter] | None = None  # the merged weights that an engine uses

    def use(self, make: Callable[[Run], Run]) -> None:
        """Compute with what `make` makes of the original."""
        self._run = make(self._original)
        if isinstance(self._run, CompiledModule):
            self._adapters.update()
            self._attach()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = isinstance(self._run, CompiledModule)
        if not engine and (self._owner.training or torch.is_grad_enabled()):
            return self._run(*args, **kwargs)  # adapters are trained, or drop out: PEFT's layers run themselves
        scale, rest = _without_scale(kwargs)
        with self._lock:
            for walk in [*self._walks]:
                walk.finish()
            found = self._adapters.update(scale)
            if engine:
                self._attach()
            if found:
                return self._adapters.run(partial(self._run, *args, **rest), scale)
        return self._run(*args, **rest)

    def _attach(self) -> None:
        """Let the engine use the weights of the model with adapters, where these lie elsewhere than before."""
        weights = self._adapters.weights()
        if self._attached is None or [*map(id, weights)] != [*map(id, self._attached)]:
            with self._adapters.hidden():
                self._run.attach(self._owner)  # type: ignore[attr-defined]
            self._attached = weights

    def undo(self) -> None:
        """Undo the lists of layers as well."""
        for listing in self._listings:
            listing.undo()
        super().undo()


class _Listing(_Replaced):
    """A method that lists layers, between calls: during one, another thread would miss the adapters, and so would what
    it does to them. Who changes adapters unseen has listed the layers before, as hotswapping does; so do pipelines, but
    not for each step."""

    def __init__(
        self, model: nn.Module, name: str, lock: threading.RLock, walks: WeakSet[_Walk], adapters: MergedAdapters
    ) -> None:
        super().__init__(model, name)
        self._lock, self._walks, self._adapters = lock, walks, adapters

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._lock:
            self._adapters.suspected = True
            walk = _Walk(self._original(*args, **kwargs), self._lock)
            self._walks.add(walk)
            return walk


class _Walk:
    """A walk through layers, as far as somebody takes it: a pipeline asks for the device of the first parameter again
    and again, and models with adapters have thousands of layers."""

    def __init__(self, layers: Iterator[Any], lock: threading.RLock) -> None:
        self._layers, self._lock = layers, lock

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._lock:
            return next(self._layers)

    def finish(self) -> None:
        """Do the rest of the walk now, before a call hides the adapters."""
        self._layers = iter([*self._layers])


def _without_scale(kwargs: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The scale of adapters that a pipeline passes to its model among the arguments of attention, and the arguments
    without it."""
    scale, rest = 1.0, dict(kwargs)
    for name, value in kwargs.items():
        if name.endswith("attention_kwargs") and isinstance(value, Mapping) and "scale" in value:
            scale = value["scale"]
            rest[name] = {key: item for key, item in value.items() if key != "scale"} or None
    return scale, rest


def _first(value: Any, *_: object) -> Any:
    return value


def _diffusers() -> Any:
    """The library. Type checkers would read all of it."""
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise IntegrationError(f"diffusers can't be imported: {error}", hint="pip install diffusers") from error


def _models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by name."""
    if not isinstance(pipe, _diffusers().DiffusionPipeline):
        hint = "compile a model by itself with model.compile(backend='rtx')"
        raise IntegrationError(f"a {type(pipe).__name__} is no pipeline of diffusers", hint=hint)
    return {name: value for name, value in pipe.components.items() if isinstance(value, nn.Module)}


def _default(pipe: Any) -> list[str]:
    models, kind = _models(pipe).items(), _diffusers().ModelMixin
    return [name for name, model in models if isinstance(model, kind) or name.startswith("text_encoder")]


def _parts(pipe: Any) -> dict[str, nn.Module]:
    """What a pipeline calls, by path: of an autoencoder its halves, which it calls tile by tile or frame by frame."""
    found = {}
    for name, model in _models(pipe).items():
        halves = {f"{name}.{half}": getattr(model, half, None) for half in ("decoder", "encoder")}
        parts = {
            path: half for path, half in halves.items() if isinstance(half, nn.Module) and hasattr(model, "decode")
        }
        found.update(parts or {name: model})
    return found


def _find(names: Iterable[str], known: Mapping[str, nn.Module]) -> list[str]:
    """The paths of `known` that these names stand for: `vae` for both halves."""
    found = []
    for name in names:
        paths = [path for path in known if path == name or path.startswith(f"{name}.")]
        if not paths:
            raise SettingsError(f"the pipeline has no model {name!r}", hint=f"it has {', '.join(known)}")
        found += paths
    return found


def _repeated(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, as its class says."""
    kinds = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in kinds]
