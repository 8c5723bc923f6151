"""A compiled module: an engine with weights on a device, called like the model that it was built from."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from torch_rtx import aten
from torch_rtx import engine as engine_file
from torch_rtx.engine import Engine
from torch_rtx.errors import CallError, EngineFormatError, InvalidIR, RtxError, SettingsError
from torch_rtx.ir import Parameter, TensorType
from torch_rtx.profiles import Shape, profiles_of, shapes
from torch_rtx.runtime.alias_guard import AliasGuard
from torch_rtx.runtime.file_check import FileCheck
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.signature import Signature
from torch_rtx.runtime.streaming import stream
from torch_rtx.runtime.tuning_context import tactics_and_context
from torch_rtx.runtime.weights import WeightStore, match
from torch_rtx.settings import RuntimeSettings
from torch_rtx.tactics import KernelTable

log = logging.getLogger(__name__)
WeightSource = nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]


class CompiledModule(nn.Module):
    """Runs an engine; made by `torch_rtx.compile` and `torch_rtx.load`.

    It computes without gradients, and has no parameters in the sense of `nn.Module`: `refit` sets its weights.

    Args:
        engine: the program.
        device: where to run it.
        settings: how to run it.
        callables: the functions of Python fallbacks, for an engine that was built in this process.
        trusted_ops: operators outside the allow-list that the engine may call.
        signature: the call signature; None: the engine's own.
        kernels: those of a loaded engine that may run; None: this process built the engine, and all run.
        check: has checked a loaded engine, and checks the sizes of calls; None: everything in it is trusted.

    Raises:
        EngineFormatError: the engine's own signature is damaged.
        InvalidIR: the engine names an operator that is not allowed or does not exist here.
        RtxError: `callables` lacks a Python fallback of the engine.
        SettingsError: `weight_streaming_budget` is too small for the engine.
    """

    def __init__(
        self,
        engine: Engine,
        device: torch.device,
        settings: RuntimeSettings | None = None,
        callables: Sequence[Callable[..., Any]] = (),
        trusted_ops: Collection[str] = (),
        signature: Signature | None = None,
        kernels: KernelTable | None = None,
        check: FileCheck | None = None,
    ) -> None:
        super().__init__()
        self.engine, self.device = engine, device
        self._signature = signature or Signature.from_json(engine.manifest.signature)
        self._signature.check(len(engine.graph.inputs), len(engine.graph.outputs))
        constants = dict(engine.constants)
        settings, trusted = settings or RuntimeSettings(), frozenset(trusted_ops)
        graph = engine.graph
        tactics, context = tactics_and_context(engine.kernels if kernels is None else kernels, graph, device, settings)
        streamer = stream(graph, device, settings.weight_streaming_budget, trusted)
        self._store = WeightStore(graph, device, constants, engine.manifest.unused_names, streamer)
        profiles = engine.manifest.profiles
        self.session = Session(
            *(graph, self._store, settings, callables, trusted, tactics, profiles, context),
            check_sizes=None if check is None else check.at,
        )
        self._with_weights = _caller(
            self._signature, AliasGuard(graph, self._store), self._store, self.session, loaded=kernels is not None
        )
        self._run = _without_weights if self._store.parameters else self._with_weights

    @property
    def profiles(self) -> tuple[Mapping[str, Shape], ...]:
        """The optimization profiles: each maps every input's name to a shape of numbers and of `Range(min, opt, max)`.
        Empty if all sizes are numbers; `opt` is None if unknown."""
        graph = self.engine.graph
        return tuple(shapes(graph, profile) for profile in profiles_of(graph, self.engine.manifest.profiles))

    def attach(self, weights: WeightSource) -> None:
        """Use the tensors of a module or state dict themselves unless a recipe changes them: they are not copied, and
        the next call sees changes in place. A file is read as in `refit`.

        Raises:
            RefitError: a tensor that the engine needs is missing or of another shape or dtype.
        """
        if isinstance(weights, str | os.PathLike):
            self.refit(weights)
            return
        tensors = tensors_of(weights) | self._attributes(weights)
        self._store.attach(tensors)
        if self._store.streamer is not None and any(
            isinstance(t, torch.Tensor) and t.is_cuda for t in tensors.values()
        ):
            log.warning("the model keeps its weights in device memory: streaming them saves nothing while it does")
        self._run = self._with_weights
        self._keep(tensors, copy=False)

    def refit(self, weights: WeightSource) -> None:
        """Copy the values of `weights`: a module, a state dict, or the path of a .safetensors file.

        Raises:
            RefitError: lists the names that are missing, unexpected or of another shape or dtype; nothing was changed.
        """
        tensors = tensors_of(weights) | self._attributes(weights)
        if isinstance(weights, nn.Module):  # also has the buffers that no state dict has
            known = {name for p in self._store.parameters for name in (p.name, *p.aliases)}
            kept = weights.state_dict(keep_vars=True).keys()
            tensors = {name: tensor for name, tensor in tensors.items() if name in known or name in kept}
        self._store.refit(tensors)
        self._run = self._with_weights
        self._keep(tensors, copy=True)

    def _attributes(self, weights: WeightSource) -> dict[str, torch.Tensor]:
        """The plain attributes of a module that the engine needs: tensors that had no data at build time."""
        found = {}
        for parameter in self._store.parameters if isinstance(weights, nn.Module) else ():
            with suppress(AttributeError):
                found[parameter.name] = attrgetter(parameter.name)(weights)
        return {name: tensor.detach() for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}

    def _keep(self, tensors: Mapping[str, torch.Tensor], copy: bool) -> None:
        """Keep the weights in the engine, if it is one that is saved with weights."""
        if self.engine.weights is not None:
            pairs = zip(self._store.parameters, match(self._store.parameters, tensors, None), strict=True)
            kept = {p.name: tensor.detach().clone() if copy else tensor.detach() for p, tensor in pairs}
            self.engine = replace(self.engine, weights=kept)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, in its own structure.

        Raises:
            InputError: an argument does not fit; the message names argument, dimension and range.
            RtxError: the engine has no weights yet.
        """
        return self._run(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`. `nn.Module` spends a tenth of a replayed call on finding that no hooks are set."""
        own = self.__dict__  # faster than attributes of an nn.Module
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "_compiled_call_impl" in own
            or "forward" in own
            or _has_any_global_hook()
        ):
            return super().__call__(*args, **kwargs)
        return own["_run"](args, kwargs)

    def extra_repr(self) -> str:
        """What `print` shows: nodes and device."""
        return f"nodes={len(self.engine.graph.nodes)}, device={self.device}"


Call = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]  # takes args and kwargs


def _caller(signature: Signature, guard: AliasGuard, store: WeightStore, session: Session, loaded: bool) -> Call:
    """The call of a module that has weights, as a closure, since attributes of an `nn.Module` are slow to read.

    Args:
        loaded: errors of operators are CallErrors; else they are as in the model, which this process has.
    """

    def call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            inputs = signature.flatten(args, kwargs)
            if guard.needed:
                inputs = guard(inputs)
            store.refresh()
            return signature.unflatten(session(inputs))
        except Exception as error:
            if not loaded or isinstance(error, RtxError | torch.OutOfMemoryError):
                raise
            raise CallError(f"an operator of the engine failed: {type(error).__name__}: {error}") from error

    return call


def _without_weights(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    raise RtxError("this engine is weight-stripped", hint="give it weights first: module.refit(...)")


def tensors_of(weights: WeightSource) -> dict[str, torch.Tensor]:
    """The named tensors of a module (with the buffers that its state dict leaves out), state dict or safetensors file.

    Raises:
        EngineFormatError: the file is no safetensors file.
    """
    if isinstance(weights, nn.Module):
        named = [*weights.named_parameters(remove_duplicate=False), *weights.named_buffers(remove_duplicate=False)]
        return {name: tensor.detach() for name, tensor in named}
    if isinstance(weights, Mapping):
        return dict(weights)
    try:
        return load_file(weights)
    except SafetensorError as error:
        raise EngineFormatError(f"{os.fspath(weights)} is no safetensors file: {error}") from None


def save(module: CompiledModule | Engine, path: str | os.PathLike[str]) -> None:
    """Write an engine to `path`, as `engine.save`; with weights if it was built with `strip_weights=False`.

    Raises:
        RtxError: a fallback is a Python function, or a container of the signature has no name that a file can hold.
    """
    if isinstance(module, CompiledModule):
        module._signature.to_json()  # raises if it can't be saved; the manifest has no signature then
        module = module.engine
    engine_file.save(module, path)


def load(
    path: str | os.PathLike[str],
    weights: WeightSource | None = None,
    device: torch.device | str | None = None,
    settings: RuntimeSettings | None = None,
    trusted_ops: Sequence[str] = (),
    trust_binaries: bool = False,
    sha256: str | None = None,
    mmap: bool = False,
) -> CompiledModule:
    """Load an engine. Without the arguments that say so, nothing in the file is trusted: see docs/trust.md.

    Args:
        weights: a module or state dict, whose tensors are used themselves where possible, or the path of a
            .safetensors file; None: those in the engine, or none until `refit`.
        device: None: the device the engine was built for, or the CPU (with a warning) if this machine has none.
        trusted_ops: names of operators outside of `optable.FILE_OPS` that the file may call; they must be registered.
            Their calls are not checked.
        trust_binaries: run the GPU kernels in the file. They are machine code, which can read and write all GPU memory
            of this process. Otherwise their operations run one by one, until kernels are compiled here.
        sha256: the SHA-256 of the file, by which you know that it is yours: another file is refused, and everything in
            this one is trusted.
        mmap: map the weights instead of reading them, see `engine.load`.

    Raises:
        EngineFormatError, EngineVersionError: see `engine.load`; or a call in the file is not allowed or is wrong.
        RefitError: the weights do not fit.
        InvalidIR: the engine calls an operator that is neither allowed nor trusted, or does not exist in this process.
        SettingsError: `weight_streaming_budget` is too small for the engine; there is no such device.
    """
    with _typed(EngineFormatError, f"{os.fspath(path)} can't be loaded"):
        engine = engine_file.load(path, mmap, sha256)
        if any(node.op == "python" for node in engine.graph.nodes):
            raise InvalidIR("the engine calls a Python function, which no file can hold")
        placed = resolve_device(device, engine.manifest.device)
        check = FileCheck(engine.graph, placed, trusted_ops) if sha256 is None else None
        kernels = engine.kernels
        if not trust_binaries and sha256 is None:
            kernels = KernelTable()
            if engine.kernels and placed.type == "cuda":
                log.warning("%s: its kernels do not run: pass trust_binaries=True if you trust the file", path)
        module = CompiledModule(engine, placed, settings, (), trusted_ops, kernels=kernels, check=check)
        if weights is not None:
            module.attach(weights)
        elif engine.weights is not None:
            module._store.attach(engine.weights)
            module._run = module._with_weights
    return module


@contextmanager
def _typed(kind: type[RtxError], message: str) -> Iterator[None]:
    """Turns other errors than torch_rtx's own, the system's and those of full GPU memory into errors of `kind`."""
    try:
        yield
    except (RtxError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(f"{message}: {type(error).__name__}: {error}") from error


def resolve_device(device: torch.device | str | None, built_for: str) -> torch.device:
    """The device with its index; for None the kind that the engine was built for, or the CPU if it is missing.

    Raises:
        SettingsError: no CPU or GPU that this process can use.
    """
    if device is None:
        if built_for == "cuda" and not torch.cuda.is_available():
            log.warning("the engine was built for cuda, which is not available: it runs on the CPU")
            return torch.device("cpu")
        device = built_for
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise SettingsError(
            f"there is no device {str(device)!r} for engines", hint="devices are cpu, cuda, cuda:1, ..."
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"there is no device {resolved}: this process sees {torch.cuda.device_count()} GPUs")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def refit_module_weights(module: nn.Module, weights: WeightSource) -> None:
    """Give a compiled module other weights, without compiling: a `CompiledModule`, or what `torch.compile` returned.

    Under torch.compile the values are copied into the model's own parameters, and the next call sees them. To make it
    see parameters that were changed through `.data`, pass the model itself.

    Raises:
        RefitError: lists the names that are missing, unexpected or of another shape or dtype; nothing was changed.
        RtxError: `module` is not compiled.
    """
    if isinstance(module, CompiledModule):
        module.refit(weights)
        return
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None  # by module.compile(...)
    model = module if compiled_in_place else getattr(module, "_orig_mod", None)
    if not isinstance(model, nn.Module):
        hint = "pass a CompiledModule or torch.compile(model)"
        raise RtxError(f"a {type(module).__name__} is not compiled", hint=hint)
    given = tensors_of(weights)
    if isinstance(weights, nn.Module):
        given = {name: given[name] for name in weights.state_dict(keep_vars=True) if name in given}
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    parameters = _parameters(state)
    found = match(parameters, given, ())
    with torch.no_grad():
        for parameter, tensor in zip(parameters, found, strict=True):
            state[parameter.name].copy_(tensor)


def _parameters(state: Mapping[str, torch.Tensor]) -> list[Parameter]:
    """The tensors of a state dict as parameters; tied tensors are one parameter with aliases."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [
        Parameter(first, TensorType(aten.dtype_name(t.dtype), tuple(t.shape), t.stride()), tuple(others))
        for first, *others in names.values()
        for t in (state[first],)
    ]
