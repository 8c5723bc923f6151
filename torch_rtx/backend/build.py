"""Ahead-of-time builds: `compile` exports a model, lowers it and binds the model's weights."""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TokenArgument

from torch_rtx import platforms
from torch_rtx.backend.capture import alone_with, state_of
from torch_rtx.backend.capture_errors import check_mode, checked_model, explained
from torch_rtx.backend.compiler import Program, device_of
from torch_rtx.backend.inputs import DeclaredInputs, declare, forward_names, user_inputs
from torch_rtx.backend.onnx_models import imported, onnx_facts
from torch_rtx.backend.program_cache import get_or_build
from torch_rtx.backend.sharded import group_names, shards_of, with_names
from torch_rtx.engine import Engine, Json, Manifest, calls
from torch_rtx.errors import CaptureError, InputError, RtxError, SettingsError
from torch_rtx.lowering.from_fx import Role, number_of
from torch_rtx.lowering.kernels.toolchain import built_with
from torch_rtx.profiles import Profile
from torch_rtx.runtime.attributes import facts_of
from torch_rtx.runtime.garbage import uncollected
from torch_rtx.runtime.groups import named_groups
from torch_rtx.runtime.module import CompiledModule
from torch_rtx.runtime.signature import PLAIN, Fixed, Plain, Signature
from torch_rtx.runtime.subclasses import is_sharded, is_special, plain_tensors, unwrapped_name
from torch_rtx.settings import CompilationSettings, RuntimeSettings, from_options, settings_of
from torch_rtx.targets import LATER
from torch_rtx.version import __version__

log = logging.getLogger(__name__)


@uncollected()
def compile(
    model: nn.Module | ExportedProgram | str | os.PathLike[str] | Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    settings: CompilationSettings | None = None,
    runtime: RuntimeSettings | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    groups: Mapping[str, Any] | Any = None,
    **options: Any,
) -> CompiledModule:
    """Build an engine ahead of time, for inference.

    The module shares the model's own tensors where it can, and then sees writes to them. A build with
    `CompilationSettings(device="cuda")` needs no GPU, and the model may be on the `meta` device. On a machine without
    the engine's device the module runs on the CPU. A module without weights can be saved, and called after a refit.

    Args:
        model: a module, an ExportedProgram, or an ONNX model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`.
        args, kwargs, dynamic_shapes: as for `torch.export.export`, with an `Input` in place of any tensor; None for an
            ExportedProgram. An ONNX model declares its inputs: without `args`, `dynamic_shapes` has a number, or the
            smallest, typical and largest one, for each size that it leaves open, by name; or a list, one per profile.
        runtime: settings of the returned module.
        inputs: another name of `args`.
        groups: names for the process groups of the model's collectives, as a mapping or a DeviceMesh; `load` binds
            groups to these names. Groups that parameters are divided over have the names of the mesh's dimensions.
        options: fields of both settings by name, in place of `settings` and `runtime`.

    Raises:
        SettingsError: an option is unknown, `settings` or `runtime` are of another type, or contradict the model.
        CaptureError: the model can't be captured as one graph, or computes what it computes in training alone, such as
            dropout.
        PartitionError: `require_full_compilation` is set and a node falls back.
        LoweringError: a bug of torch_rtx.
        InputError: an `Input` contradicts another, `dynamic_shapes` or the settings; or `inputs` repeats `args`.
        OnnxError: the ONNX model is damaged, or has what is not supported.
    """
    settings, runtime = chosen_settings(settings, runtime, options)
    if settings.fallback_on_error:
        log.warning("fallback_on_error has no effect ahead of time: a failed build raises an error")
    given = named_groups(groups)
    with alone_with(model):
        captured = capture_model(model, positional(args, inputs), kwargs, dynamic_shapes, settings)
        return _built(captured, settings, runtime, given)


@dataclass(frozen=True)
class Captured:
    """A model that was captured ahead of time.

    Attributes:
        tensors: by all names that they have in the model.
        roles: of the inputs of the program's graph.
        writes: which of its outputs are written back, see `from_fx`.
        sizes: the ranges and the typical values of its symbols, see `Symbols`.
    """

    model: nn.Module | ExportedProgram
    declared: DeclaredInputs
    program: ExportedProgram
    tensors: Mapping[str, torch.Tensor]
    roles: Sequence[Role]
    writes: Mapping[int, str]
    sizes: tuple[Mapping[Any, Any], Mapping[Any, int]]


def positional(args: Sequence[Any] | None, inputs: Sequence[Any] | None) -> tuple[Any, ...] | Any:
    """The positional arguments, which have two names; what is no list of them is returned as it is."""
    if args is not None and inputs is not None:
        raise InputError("args and inputs are both given, and mean the same", hint="give one of the two")
    given = args if inputs is None else inputs
    return tuple(given) if isinstance(given, list) else given


def chosen_settings(
    settings: CompilationSettings | None, runtime: RuntimeSettings | None, options: Mapping[str, Any]
) -> tuple[CompilationSettings, RuntimeSettings]:
    """The settings that arguments mean: those given, or `options`, fields of both by name.

    Raises:
        SettingsError: see `compile`.
    """
    if options:
        compilation, defaults = from_options(options)
        if settings is not None or runtime is not None:
            names = ", ".join(options)
            hint = f"write {names} in CompilationSettings or RuntimeSettings, or all options as arguments"
            raise SettingsError(f"{names} and settings are both given", hint=hint)
    else:
        compilation = settings_of(CompilationSettings, settings)
        defaults = RuntimeSettings(dump_dir=compilation.dump_dir, override_dir=compilation.override_dir)
    return compilation, defaults if runtime is None else settings_of(RuntimeSettings, runtime, "runtime")


def capture_model(
    model: Any, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any, settings: CompilationSettings
) -> Captured:
    """Capture a model as one graph; the arguments and errors are those of `compile`."""
    model, args, dynamic_shapes = imported(model, args, dynamic_shapes)
    model = checked_model(model, args, kwargs)
    declared = declare(model, args, kwargs, dynamic_shapes, settings.device)
    with explained():
        program = declared.capture()
    check_mode(model, program.graph)
    tensors = _tensors(program, model)
    names = {user_inputs(program)[number].arg.name: name for number, name in declared.names.items()}
    sizes = program.range_constraints, declared.typical(program)
    roles = _roles(program, tensors, names, state_of(model))
    return Captured(model, declared, program, tensors, roles, _writes(program), sizes)


def _built(
    captured: Captured, settings: CompilationSettings, runtime: RuntimeSettings, groups: Mapping[str, Any]
) -> CompiledModule:
    model, declared, program, tensors = captured.model, captured.declared, captured.program, captured.tensors
    built = _with_kernels(settings, device_of(program.graph_module))
    lowered = get_or_build(program.graph_module, captured.roles, built, captured.writes, *captured.sizes)
    state = state_of(model)
    names = group_names(state, groups)
    shards = shards_of(state, names)
    graph, facts = with_names(lowered.graph, names, shards)
    lowered = replace(lowered, graph=graph)
    signature = _signature(program, forward_names(model), _defaults(model))
    profiles = declared.profiles(lowered.graph, signature.leaves)
    signature.sizes = declared.names_of_sizes(lowered.graph, signature.leaves)
    found = {**_facts(model, program), "groups": facts, "shards": shards}
    engine = _engine(program, lowered, signature, tensors, settings, profiles, found)
    runs_here = lowered.device.type == "cpu" or torch.cuda.is_available()
    device = lowered.device if runs_here else torch.device("cpu")
    # Trusted: the fallbacks come from a model of this process, not from a file.
    called = {node.op for node in calls(lowered.graph) if node.kind == "fallback"}
    here = {new: old for old, new in names.items()}
    module = CompiledModule(engine, device, runtime, lowered.callables, called, signature, groups=here)
    lowered.dump("run.py", module.session.source)
    _attach(module, tensors)
    return module


def _with_kernels(settings: CompilationSettings, device: torch.device) -> CompilationSettings:
    """An engine that is bound to a platform brings its kernels along: no compiler is expected there."""
    needs = settings.platform != platforms.ANY and settings.targets == LATER and device.type == "cuda"
    return replace(settings, targets="portable") if needs else settings


def _attach(module: CompiledModule, tensors: Mapping[str, torch.Tensor]) -> None:
    needed = {p.name for p in module.engine.graph.parameters if not p.constant}
    if all(_has_data(tensors.get(name)) for name in needed):
        module.attach({name: tensors[name] for name in needed})
    else:
        log.info("the model has no weights here: the engine can be saved, and called after refit")


def _tensors(program: ExportedProgram, model: nn.Module | ExportedProgram) -> dict[str, torch.Tensor]:
    """The tensors of `program` by all names that they have in `model`. Those that tensor subclasses consist of are the
    model's own: a program has copies of the objects, one for each use of a tensor."""
    state = state_of(model)
    plain = plain_tensors(state)
    parts = {name: tensor for name, tensor in plain.items() if name not in state or is_sharded(state[name])}
    if isinstance(model, nn.Module) and any(map(is_special, state.values())):
        kept = model.state_dict(keep_vars=True)  # modules may give names to tensors in attributes of their parameters
        parts |= {name: tensor for name, tensor in kept.items() if name not in state}
    known = {name: t for name, t in program.state_dict.items() if unwrapped_name(name, state) == name}
    found = {**known, **program.constants, **parts}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _has_data(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _roles(
    program: ExportedProgram, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], state: Mapping[str, Any]
) -> list[Role]:
    """The roles of the inputs of the exported graph; `names`: those of user inputs, where they have others; `state`:
    the tensors of the model."""
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    names = {
        **names,
        **{spec.target: unwrapped_name(spec.target, state) for spec in signature.input_specs if spec.target},
    }
    return _with_aliases([_role(spec, tensors, written, names) for spec in signature.input_specs], tensors)


def _role(spec: Any, tensors: Mapping[str, torch.Tensor], written: Container[str], names: Mapping[str, str]) -> Role:
    """The role of an input of the exported graph. The engine stores tensors that are not in the state dict."""
    if spec.kind is InputKind.USER_INPUT:
        return Role("input", names.get(spec.arg.name, spec.arg.name))
    if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        raise CaptureError(f"the model has an input of kind {spec.kind.name}, which engines do not support")
    in_state = spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent is not False)
    name = names[spec.target]
    tensor = tensors.get(name)
    if in_state or tensor is None or not _has_data(tensor):
        return Role("parameter", name)
    if spec.target not in written:
        return Role("constant", spec.target, number=number_of(tensor))
    return Role("zeros" if tensor.is_contiguous() and not tensor.any() else "constant", spec.target)


def _with_aliases(roles: list[Role], tensors: Mapping[str, torch.Tensor]) -> list[Role]:
    """Give each parameter the other names of its tensor: a state dict may use any of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [
        Role(r.kind, r.name, tuple(n for n in names.get(id(tensors.get(r.name)), ()) if n != r.name))
        if r.kind == "parameter"
        else r
        for r in roles
    ]


def _writes(program: ExportedProgram) -> dict[int, str]:
    """Positions of the outputs that are written back to a buffer or input, with the name of its placeholder."""
    signature = program.graph_signature
    buffers = {target: name for name, target in signature.inputs_to_buffers.items()}
    writes = {}
    for position, spec in enumerate(signature.output_specs):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            writes[position] = buffers[spec.target]
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            writes[position] = spec.target
        elif spec.kind is not OutputKind.USER_OUTPUT or isinstance(spec.arg, TokenArgument):
            raise CaptureError(f"the model has an output of kind {spec.kind.name}, which engines do not support")
    return writes


def _engine(
    program: ExportedProgram,
    lowered: Program,
    signature: Signature,
    tensors: Mapping[str, torch.Tensor],
    settings: CompilationSettings,
    profiles: tuple[Profile, ...],
    found: Mapping[str, Any],
) -> Engine:
    parameters = lowered.graph.parameters
    needed = {name for p in parameters for name in (p.name, *p.aliases)}
    unused = {*tensors} - {*program.constants} - needed
    kernels = lowered.kernels
    tools = built_with(kernels.targets) if kernels else {}
    manifest = Manifest(
        device=lowered.device.type,
        inputs=tuple(value.name for value in lowered.graph.inputs),
        signature=_saved(signature),
        producer={"torch_rtx": __version__, "torch": torch.__version__, **tools},
        platform=settings.platform,
        unused_names=tuple(sorted(unused)),
        profiles=profiles,
        float32=lowered.float32,
        **found,
    )
    data = {**tensors, **lowered.constants}
    constants = {p.name: data[p.name].detach() for p in parameters if p.constant}
    weights = None
    if not settings.strip_weights:
        missing = [p.name for p in parameters if not p.constant and not _has_data(tensors.get(p.name))]
        if missing:
            raise CaptureError(f"strip_weights is False and the model has no data for {', '.join(missing[:5])}")
        weights = {p.name: tensors[p.name].detach() for p in parameters if not p.constant}
    return Engine(lowered.graph, manifest, constants, weights, kernels)


def _facts(model: nn.Module | ExportedProgram, program: ExportedProgram) -> dict[str, Any]:
    """What the manifest says of the model."""
    buffers = program.graph_signature.buffers
    return {**onnx_facts(model, program), "model": facts_of(model, buffers)}


def _saved(signature: Signature) -> Json:
    """The signature for the manifest; None if it can't be serialized: the engine runs here, and `save` says why."""
    try:
        return signature.to_json()
    except RtxError as error:
        log.info("this engine can't be saved: %s", error.message)
        return None


def _defaults(model: nn.Module | ExportedProgram) -> dict[str, Plain]:
    """The defaults of the parameters of the model's forward that a file can hold."""
    if not isinstance(model, nn.Module):
        return {}
    found = {name: parameter.default for name, parameter in inspect.signature(model.forward).parameters.items()}
    return {n: v for n, v in found.items() if type(v) in PLAIN and not (type(v) is float and not math.isfinite(v))}


def _signature(program: ExportedProgram, names: tuple[str, ...], defaults: Mapping[str, Plain]) -> Signature:
    call = program.call_spec
    assert call.in_spec is not None
    assert call.out_spec is not None
    leaves: list[int | Fixed] = []
    count = 0
    for spec in user_inputs(program):
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(Fixed(spec.arg.name, spec.arg.value))
        else:
            leaves.append(count)
            count += 1
    return Signature(names, call.in_spec, call.out_spec, leaves, defaults)
