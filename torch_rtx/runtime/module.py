"""A compiled module: an engine with weights on a device, called like the model that it was built from."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from io import BytesIO
from typing import Any, Self, TypeVar

import torch
from torch import is_grad_enabled, nn
from torch.nn.modules.module import _has_any_global_hook

from torch_rtx import aten, platforms
from torch_rtx import engine as engine_file
from torch_rtx.collectives import bound
from torch_rtx.engine import Engine
from torch_rtx.engine_header import name_of
from torch_rtx.errors import (
    CallError,
    EngineFormatError,
    EnginePlatformError,
    InputError,
    InvalidIR,
    RtxError,
    SettingsError,
)
from torch_rtx.ir import Graph, Parameter, TensorType
from torch_rtx.manifest import Manifest
from torch_rtx.optable import LAUNCH
from torch_rtx.profiles import Shape, profiles_of, shapes
from torch_rtx.runtime.alias_guard import AliasGuard
from torch_rtx.runtime.attributes import read_attributes
from torch_rtx.runtime.file_check import FileCheck
from torch_rtx.runtime.groups import checked_groups, places_of
from torch_rtx.runtime.module_methods import ModuleMethods, opaque, registered
from torch_rtx.runtime.no_gradients import refuse_gradients, require_gradients
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.shards import local, parts_of
from torch_rtx.runtime.signature import Signature
from torch_rtx.runtime.streaming import stream
from torch_rtx.runtime.strided import copy_strided, overwrite_all
from torch_rtx.runtime.subclasses import plain_tensors
from torch_rtx.runtime.tuning_context import tactics_and_context
from torch_rtx.runtime.weight_match import match
from torch_rtx.runtime.weight_sources import WeightSource, is_onnx, tensors_of
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings, settings_of
from torch_rtx.tactics import KernelTable

log = logging.getLogger(__name__)


class CompiledModule(ModuleMethods):
    """Runs an engine; made by `torch_rtx.compile` and `torch_rtx.load`.

    It computes without gradients. Its weights are listed as frozen parameters and buffers, by the names of the model;
    `refit` sets them. It has the model's `config`, `dtype` and plain public numbers as attributes, see
    `runtime.attributes`.

    Args:
        engine: the program.
        device: where to run it.
        settings: how to run it.
        callables: the functions of Python fallbacks, for an engine that was built in this process.
        trusted_ops: operators outside the allow-list that the engine may call.
        signature: the call signature; None: the engine's own.
        kernels: those of a loaded engine that may run; None: this process built the engine, and all run.
        check: has checked a loaded engine, and checks the sizes of calls; None: everything in it is trusted.
        groups: by their names in the engine, the names of process groups in this process.

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
        groups: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._groups = dict(groups or {})
        self.engine, self.device, self.training = engine, device, _is_training(engine.graph)
        self._signature = signature or Signature.from_json(engine.manifest.signature)
        self._signature.check(len(engine.graph.inputs), len(engine.graph.outputs))
        self._kernels, self._check = kernels, check
        self._carried = read_attributes(engine.manifest.model.get("attributes", {}))
        self._bind(self._session(settings or RuntimeSettings(), callables, frozenset(trusted_ops)))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass with a `forward` of its own is called through it."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and "__call__" not in vars(cls):
            cls.__call__ = nn.Module.__call__  # type: ignore[method-assign]

    def _session(
        self, settings: RuntimeSettings, callables: Sequence[Callable[..., Any]], trusted_ops: frozenset[str]
    ) -> Session:
        graph, manifest = bound(self.engine.graph, self._groups), self.engine.manifest
        kernels = self.engine.kernels if self._kernels is None else self._kernels
        tactics, context = tactics_and_context(kernels, graph, self.device, settings, manifest.float32)
        streamer = stream(graph, self.device, settings.weight_streaming_budget, trusted_ops)
        constants, sampled = dict(self.engine.constants), settings.watch_weights
        store = WeightStore(graph, self.device, constants, manifest.unused_names, streamer, sampled)
        return Session(
            *(graph, store, settings, callables, trusted_ops, tactics, manifest.profiles, context),
            check_sizes=None if self._check is None else self._check.at,
            names=self._signature.sizes,
        )

    def _bind(self, session: Session) -> None:
        self.session, self._store = session, session.store
        self._store.originals = self.engine.weights or {}
        guard, loaded = AliasGuard(session.graph, self._store), self._kernels is not None
        self._run = _caller(self._signature, guard, session, loaded)
        self._list_weights()

    @property
    def profiles(self) -> tuple[Mapping[str, Shape], ...]:
        """The optimization profiles: each maps every input's name to a shape of numbers and of `Range(min, opt, max)`.
        Empty if all sizes are numbers; `opt` is None if unknown."""
        graph = self.engine.graph
        return tuple(shapes(graph, profile) for profile in profiles_of(graph, self.engine.manifest.profiles))

    def attach(self, weights: WeightSource) -> None:
        """Use the tensors of a module or state dict themselves unless a recipe changes them: they are not copied, and
        the next call sees changes in place. Files are read as in `refit`.

        Raises:
            RefitError: a tensor that the engine needs is missing or of another shape or dtype, or a state dict has
                names that the model did not have.
            CallError: an operator of a loaded engine, which computes a weight from these, failed.
        """
        if not isinstance(weights, nn.Module | Mapping):
            self.refit(weights)
            return
        tensors = self._tensors(weights)
        with self._computing():
            self._store.attach(tensors, strict=not isinstance(weights, nn.Module))
        if self._store.streamer is not None and any(
            isinstance(t, torch.Tensor) and t.is_cuda for t in tensors.values()
        ):
            log.warning("the model keeps its weights in device memory: streaming them saves nothing while it does")
        self._keep(tensors, copy=False)

    def refit(self, weights: WeightSource, strict: bool = True) -> None:
        """Copy the values of `weights`: a module, a state dict, safetensors files, or an ONNX model, see `load`.

        Args:
            strict: False: ignore names that the model does not have.

        Raises:
            RefitError: lists the names that are missing, unexpected or of another shape or dtype; nothing was changed.
            CallError: see `attach`.
        """
        tensors = self._tensors(weights)
        if isinstance(weights, nn.Module) and not is_onnx(weights):  # also has the buffers that no state dict has
            known = {name for p in self._store.parameters for name in (p.name, *p.aliases)}
            kept = plain_tensors(weights.state_dict(keep_vars=True)).keys()
            tensors = {name: tensor for name, tensor in tensors.items() if name in known or name in kept}
        with self._computing():
            self._store.refit(tensors, strict)
        self._keep(tensors, copy=True)

    def _tensors(self, weights: WeightSource) -> dict[str, torch.Tensor]:
        """The tensors of a source, of those that are divided among ranks the part of this one."""
        parameters, manifest = self._store.parameters, self.engine.manifest
        parts = parts_of(parameters, manifest.shards, places_of(self._groups)) if manifest.shards else {}
        return local(tensors_of(weights, parameters, manifest, parts), parts)

    def _computing(self) -> AbstractContextManager[None]:
        """Where weights are computed: as for calls, only errors of loaded engines are CallErrors."""
        return nullcontext() if self._kernels is None else _typed(CallError, "a weight can't be computed")

    def _keep(self, tensors: Mapping[str, torch.Tensor], copy: bool) -> None:
        """Keep the weights in the engine, if it is one that is saved with weights."""
        if self.engine.weights is not None:
            pairs = zip(self._store.parameters, match(self._store.parameters, tensors, None), strict=True)
            kept = {p.name: tensor.detach().clone() if copy else tensor.detach() for p, tensor in pairs}
            self.engine = replace(self.engine, weights=kept)
            self._store.originals = kept

    @opaque
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, in its own structure.

        Raises:
            InputError: an argument does not fit; the message names argument, dimension and range.
            RtxError: the engine has no weights yet, or they are unloaded; or the call is traced.
        """
        return self._run(args, kwargs)

    @opaque
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

    # Copies

    def __copy__(self) -> Self:
        """A module with the same weights."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A module with copies of the weights. Both share the engine, its kernels and the code."""
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        other.__dict__.update({name: deepcopy(value, memo) for name, value in self._others().items()})
        other.engine, other.device, other._signature = _with_copies(self.engine), self.device, self._signature
        other._kernels, other._check, other._groups = self._kernels, self._check, self._groups
        other._carried, session = deepcopy(self._carried, memo), self.session
        if session.streamer is None:
            copied = session.sibling()
        else:
            copied = self._session(session.settings, session._callables, session._trusted_ops)
        with self._store.reading() as values:
            if values is not None:
                copied.store.adopt(values)
        other._bind(copied)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """The engine as the bytes of its file, and the weights as bytes: workers that are spawned would look for
        tensors in the memory of this process, where these are copies that are gone by then. There are no weights if
        there are none at this time, such as after `session.unload_weights(keep=False)`.

        Raises:
            RtxError: the engine can't be saved, see `save`.
        """
        session, weights = self.session, self.engine.weights
        with self._store.reading() as current:
            values = None if current is None else {index: _on_host(value) for index, value in current.items()}
        if weights is not None:
            weights = {name: _on_host(tensor) for name, tensor in weights.items()}
        tensors = BytesIO()
        torch.save((weights, values), tensors)
        given = str(self.device), asdict(session.settings), sorted(session._trusted_ops), self._check is not None
        return {**self._others(), _ENGINE: (_to_bytes(self), tensors.getvalue(), *given, self._groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Run on the same device, or on the CPU if this machine has none."""
        content, tensors, placed, settings, trusted_ops, checked, groups = state.pop(_ENGINE)
        weights, values = torch.load(BytesIO(tensors))
        engine = replace(engine_file.load(BytesIO(content)), weights=weights)
        kind = torch.device(placed).type
        device = resolve_device(placed if kind != "cuda" or torch.cuda.is_available() else None, kind)
        check = FileCheck(engine.graph, device, trusted_ops) if checked else None
        given = RuntimeSettings(**settings), (), trusted_ops
        self.__init__(engine, device, *given, check=check, groups=groups)  # type: ignore[misc]
        self.__dict__.update(state)
        self._list_weights()
        if values is not None:
            self._store.adopt(values)

    def _others(self) -> dict[str, Any]:
        """The attributes that are not the engine's."""
        return {name: registered(value) for name, value in self.__dict__.items() if name not in _OWN}

    def extra_repr(self) -> str:
        """What `print` shows: nodes and device."""
        return f"nodes={len(self.engine.graph.nodes)}, device={self.device}"


Call = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]  # takes args and kwargs
_Module = TypeVar("_Module", bound=nn.Module)
# Attributes of a module that a copy gets in another way.
_OWN = frozenset(
    ("engine", "device", "session", "_signature", "_store", "_run", "_kernels", "_check", "_carried", "_groups")
)
_ENGINE = "_engine"  # the engine in what is pickled


def _is_training(graph: Graph) -> bool:
    """A call in `graph` does what it does in training alone, such as dropout."""
    return any(
        node.arg("train") is True or node.arg("training") is True or (node.body is not None and _is_training(node.body))
        for node in graph.nodes
    )


def _with_copies(engine: Engine) -> Engine:
    """`engine`, with copies of the weights in it."""
    weights = engine.weights
    return engine if weights is None else replace(engine, weights={n: w.detach().clone() for n, w in weights.items()})


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory."""
    return copy_strided(tensor.detach().cpu(), tensor.stride())


def _to_bytes(module: CompiledModule) -> bytes:
    """The file of the engine, without weights, and without kernels that may not run."""
    module._signature.to_json()  # raises if it can't be saved
    kernels = module.engine.kernels if module._kernels is None else module._kernels
    file = BytesIO()
    engine_file.save(replace(module.engine, weights=None, kernels=kernels), file)
    return file.getvalue()


def _caller(signature: Signature, guard: AliasGuard, session: Session, loaded: bool) -> Call:
    """The call of a module that has weights, as a closure, since attributes of an `nn.Module` are slow to read.

    Args:
        loaded: errors of operators are CallErrors; else they are as in the model, which this process has.
    """

    def call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inputs = signature.flatten(args, kwargs)
        if guard.needed:
            inputs = guard(inputs)
        try:
            results = session(inputs)
        except InputError as error:
            raise signature.named(error) from None
        except Exception as error:
            if not loaded or isinstance(error, RtxError | torch.OutOfMemoryError):
                raise
            raise CallError(f"an operator of the engine failed: {type(error).__name__}: {error}") from error
        if is_grad_enabled() and require_gradients(inputs):
            results = refuse_gradients(inputs, results)
        return signature.unflatten(results)

    return call


def save(module: CompiledModule | Engine, path: engine_file.File) -> None:
    """Write an engine to `path`, as `engine.save`; with weights if it was built with `strip_weights=False`.

    Args:
        path: or a file object that is opened to write bytes, such as `io.BytesIO()`.

    Raises:
        RtxError: a fallback is a Python function, a container of the signature has no name that a file can hold, or
            `module` is not compiled ahead of time.
        OSError: the file can't be written.
    """
    if not isinstance(module, CompiledModule | Engine):
        hint = "build an engine: torch_rtx.compile(model, args)"
        if isinstance(module, str | os.PathLike):
            hint = "the module comes first: torch_rtx.save(module, path)"
        elif hasattr(module, "_orig_mod"):
            hint = "torch.compile leaves nothing to save; " + hint
        raise RtxError(f"save takes a compiled module, not a {type(module).__name__}", hint=hint)
    if isinstance(module, CompiledModule):
        module._signature.to_json()  # raises if it can't be saved; the manifest has no signature then
        module = module.engine
    engine_file.save(module, path)


def load(
    path: engine_file.File,
    weights: WeightSource | None = None,
    device: torch.device | str | None = None,
    settings: RuntimeSettings | None = None,
    trusted_ops: Sequence[str] = (),
    trust_binaries: bool = False,
    sha256: str | None = None,
    mmap: bool = False,
    groups: Mapping[str, Any] | Any = None,
) -> CompiledModule:
    """Load an engine. Without the arguments that say so, nothing in the file is trusted: see docs/trust.md.

    Args:
        path: or a file object that is opened to read bytes; it is read to its end.
        weights: a module or state dict, whose tensors are used themselves where possible; the path of a .safetensors
            file, a list of such paths, or a folder with an index of them; an ONNX model: the path of an .onnx file, an
            `onnx.ModelProto` or an `onnx_ir.Model`; None: those in the engine, or none until `refit`.
        device: None: the device the engine was built for, or the CPU (with a warning) if this machine has none.
        trusted_ops: names of operators outside of `optable.FILE_OPS` that the file may call, registered and unchecked.
        trust_binaries: run the GPU kernels in the file. They are machine code, which can read and write all GPU memory
            of this process. Else operations run one by one until kernels are compiled here; foreign ones are refused.
        sha256: the SHA-256 of the file, by which you know that it is yours: another file is refused, and everything in
            this one is trusted.
        mmap: map the weights instead of reading them, see `engine.load`.
        groups: the engine's process groups by name, or a DeviceMesh. Of a whole checkpoint each rank reads its part.

    Raises:
        EngineFormatError, EngineVersionError: see `engine.load`; or a call in the file is not allowed or is wrong.
        EnginePlatformError: it was built for another operating system.
        FileNotFoundError: there is no such engine, or file of weights.
        OnnxError: the ONNX model with the weights is damaged, or has what is not supported.
        RefitError: the weights do not fit, or a state dict or file has names that the model did not have.
        InvalidIR: the engine calls an operator that is neither allowed nor trusted, or does not exist in this process.
        SettingsError: `weight_streaming_budget` is too small for the engine, there is no such device, `trusted_ops` is
            no collection, or a process group is missing or is another one.
    """
    settings = settings_of(RuntimeSettings, settings)
    name = name_of(path)
    if isinstance(trusted_ops, str):
        hint = f"write trusted_ops=[{trusted_ops!r}]"
        raise SettingsError(f"trusted_ops must be a list of names, not {trusted_ops!r}", hint=hint)
    with _typed(EngineFormatError, f"{name} can't be loaded"):
        engine = engine_file.load(path, mmap, sha256)
        _check_platform(engine.manifest.platform, name)
        if any(node.op == "python" for node in engine_file.calls(engine.graph)):
            raise InvalidIR("the engine calls a Python function, which no file can hold")
        placed = resolve_device(device, engine.manifest.device)
        trusted_ops = [*trusted_ops, *[LAUNCH] * trust_binaries]
        check = FileCheck(engine.graph, placed, trusted_ops) if sha256 is None else None
        kernels = engine.kernels if trust_binaries or sha256 is not None else KernelTable()
        if engine.kernels and not kernels and placed.type == "cuda":
            log.warning("%s: its kernels do not run without trust_binaries=True (--trust-binaries)", name)
        bound_to = checked_groups(engine.graph, engine.manifest, groups)
        module = CompiledModule(engine, placed, settings, (), trusted_ops, None, kernels, check, bound_to)
        if weights is not None:
            module.attach(weights)
        elif engine.weights is not None:
            module._store.attach(engine.weights, shared=False)
    return module


def _check_platform(built_for: str, name: str) -> None:
    if not platforms.runs_here(built_for):
        hint = 'build it for this platform, or with CompilationSettings(platform="any")'
        raise EnginePlatformError(f"{name} was built for {built_for}, and this is {platforms.here()}", hint=hint)


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
        SettingsError: there is no such device here.
    """
    if device is None:
        if built_for == "cuda" and not torch.cuda.is_available():
            log.warning("the engine was built for cuda, which is not available: it runs on the CPU")
            return torch.device("cpu")
        device = built_for
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise SettingsError(f"an engine can't run on {device!r}", hint='devices are "cpu", "cuda" and such as "cuda:1"')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        hint = 'device="cpu" runs the engine on the CPU, and so does None where there is no GPU'
        raise SettingsError(f"there is no device {device}: this process has {count} CUDA devices", hint=hint)
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def refit_module_weights(module: _Module, weights: WeightSource) -> _Module:
    """Give a compiled module other weights, without compiling: a `CompiledModule`, or what `torch.compile` returned.
    Returns `module` itself.

    Under torch.compile the values are copied into the model's own parameters, and the next call sees them. To make it
    see parameters that were changed through `.data`, pass the model itself.

    Raises:
        RefitError: lists the names that are missing, unexpected or of another shape or dtype; nothing was changed.
        RtxError: `module` is not compiled.
    """
    if isinstance(module, CompiledModule):
        module.refit(weights)
        return module
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None  # by module.compile(...)
    model = module if compiled_in_place else getattr(module, "_orig_mod", None)
    if not isinstance(model, nn.Module):
        hint = "pass a CompiledModule or torch.compile(model)"
        raise RtxError(f"a {type(module).__name__} is not compiled", hint=hint)
    kept = plain_tensors(model.state_dict(keep_vars=True))
    state = {name: tensor for name, tensor in kept.items() if isinstance(tensor, torch.Tensor)}
    parameters = _parameters(state)
    given = tensors_of(weights, parameters, _manifest(model))
    if isinstance(weights, nn.Module) and not is_onnx(weights):
        given = {name: given[name] for name in plain_tensors(weights.state_dict(keep_vars=True)) if name in given}
    found = match(parameters, given, ())
    overwrite_all([state[parameter.name] for parameter in parameters], found)
    return module


def _manifest(model: nn.Module) -> Manifest | None:
    """What an engine would say of finding weights of `model` in ONNX models."""
    if not is_onnx(model):
        return None
    from torch_rtx.onnx.weights import program_of

    return Manifest("cpu", onnx=program_of(model))  # type: ignore[arg-type]


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
