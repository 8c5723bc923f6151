"""The torch.compile backend `rtx`, found through the entry point group `torch_dynamo_backends`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo import disable
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import unset_fake_temporarily

from torch_rtx import platforms
from torch_rtx.backend.capture_cache import CapturedGraph, CaptureEntry
from torch_rtx.backend.compiler import check_settings, formed_for
from torch_rtx.backend.dynamo import passes_errors, require_one_graph
from torch_rtx.backend.program_cache import get_or_build
from torch_rtx.backend.sessions import Sessions
from torch_rtx.backend.training import TrainingStep
from torch_rtx.backend.undefined_gradients import positions, specializing, undefined_is_none
from torch_rtx.engine import calls
from torch_rtx.errors import PartitionError, SettingsError
from torch_rtx.lowering.control_flow import attribute
from torch_rtx.lowering.from_fx import Role, is_fixed
from torch_rtx.lowering.location import module_path
from torch_rtx.lowering.symbols import main_device
from torch_rtx.runtime.control import Owned
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.subclasses import any_overrides, names_of, without_overrides
from torch_rtx.runtime.tuning_context import tactics_and_context
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import CompilationSettings, RuntimeSettings, from_options

if TYPE_CHECKING:
    from torch_rtx.backend.capture import GraphCompiler

log = logging.getLogger(__name__)


@passes_errors
def rtx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph.

    Args:
        mode: one of `settings.MODES`.
        options: fields of `CompilationSettings` and `RuntimeSettings` by name.

    Raises:
        SettingsError: an option or mode is unknown, has the wrong type, or does not apply to torch.compile.
        PartitionError: see `compile_fx`; also if `require_full_compilation` is set and Dynamo breaks the graph.
        LoweringError: see `compile_fx`.
    """
    compilation, runtime = _settings(options, mode)
    if compilation.require_full_compilation:
        require_one_graph(gm)
    sharded = is_sharded(gm)
    if sharded:
        runtime = replace(runtime, cuda_graph_strategy="disabled")  # each call would have to capture one
    # `.grad` takes the tensor that the first backward returns, and the next backward would overwrite it.
    trained = replace(runtime, static_outputs=False)
    names = _names(gm, example_inputs)
    plain = without_overrides if any_overrides(example_inputs) else _same
    # A cached graph for inference takes parameters for weights, which stay.
    entry = None if sharded and not torch.is_grad_enabled() else CaptureEntry.of(gm, example_inputs, compilation)
    captured = partial(_capture, gm, compilation)
    if entry is not None:
        call = _from_cache(entry, names, example_inputs, captured, compilation, runtime, trained)
        if call is not None:
            return disable(call, reason="do not trace compiled code")

    def inference(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        done = None if entry is None else entry.inference
        static = frozenset[int]() if sharded else static_inputs(graph)
        return _compile(graph, names, static, compilation, runtime, done)

    step = TrainingStep()

    def forward(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        pinned, saved = step.forward(graph, static_inputs(graph))
        done = None if entry is None else entry.forward
        return _compile(graph, [], frozenset(), compilation, trained, done, pinned, saved)

    def backward(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        done = None if entry is None else lambda _, found: entry.backward(graph, found)
        gradients = positions(graph)
        options: dict[str, Any] = {"done": done, "pinned": step.backward(graph), "gradients": gradients}
        compile = partial(_compile, names=[], static=frozenset(), compilation=compilation, runtime=trained, **options)
        return plain(specializing(gradients, lambda: graph, compile))

    return plain(captured(example_inputs, inference, forward, backward))


def _settings(options: Mapping[str, object] | None, mode: str | None) -> tuple[CompilationSettings, RuntimeSettings]:
    """The settings that torch.compile's arguments mean.

    Raises:
        SettingsError: see `rtx`.
    """
    compilation, runtime = from_options(options, mode)
    check_settings(compilation)
    if (options or {}).get("weight_streaming_budget") is not None:
        hint = "torch_rtx.compile builds an engine, which torch_rtx.load streams from the file of its weights"
        raise SettingsError("weight_streaming_budget: torch.compile runs on the model's own parameters", hint=hint)
    runtime = replace(runtime, weight_streaming_budget=None)  # an environment variable may set it, for engines
    if compilation.platform != platforms.ANY:
        hint = "torch_rtx.compile and cross_compile_for_windows build engines for another platform"
        raise SettingsError(f"platform={compilation.platform!r}: torch.compile runs on this one", hint=hint)
    if compilation.copy_weights is None:
        # The model keeps its weights in memory anyway. A write through `.data`, as peft does to merge adapters, reaches
        # the session only if it reads the parameter itself.
        compilation = replace(compilation, copy_weights=False)
    return compilation, runtime


def _capture(
    gm: fx.GraphModule,
    compilation: CompilationSettings,
    example_inputs: Sequence[Any],
    inference: GraphCompiler,
    forward: GraphCompiler,
    backward: GraphCompiler,
) -> Callable[..., Any]:
    from torch_rtx.backend.capture import capture  # with what decomposes and rewrites graphs: a warm start needs none

    has_kernels = bool(formed_for(compilation, main_device(example_inputs)))
    # Tokens order the calls with effects (a check that may raise, a print). As inputs of the graph they would be None.
    with functorch_config.patch(unlift_effect_tokens=True):
        return capture(gm, example_inputs, inference, forward, backward, compilation.logits_chunk_bytes, has_kernels)


def _from_cache(
    entry: CaptureEntry,
    names: Sequence[str],
    example_inputs: Sequence[torch.Tensor],
    captured: Callable[..., object],
    compilation: CompilationSettings,
    runtime: RuntimeSettings,
    trained: RuntimeSettings,
) -> Callable[..., Any] | None:
    """A callable for a Dynamo graph whose capture is cached; None on a miss."""
    found = entry.load(_unique(names), example_inputs, captured)
    if found is None:
        return None
    settings = runtime if len(found.graphs) == 1 else trained
    try:
        with unset_fake_temporarily():
            calls = [_bind(graph, settings) for graph in found.graphs]
    except Exception:
        if not compilation.fallback_on_error:
            raise
        return None  # it will fail again after a capture, which yields a graph to run in PyTorch
    last = found.graphs[-1]
    if found.backward is not None:
        options: dict[str, Any] = {"compilation": compilation, "runtime": trained, "pinned": last.pinned}
        compile = partial(_compile, names=[], static=frozenset(), **options)
        calls[-1] = specializing(last.gradients, found.backward, compile, [(last.fixed, calls[-1])])
    boxed = found.wrap(*calls)

    def call(*args: Any) -> Any:
        return boxed(list(args))

    return call if not last.gradients or found.meta is None else undefined_is_none(call, found.meta)


def _compile(
    gm: fx.GraphModule,
    names: Sequence[str],
    static: frozenset[int],
    compilation: CompilationSettings,
    runtime: RuntimeSettings,
    done: Callable[[fx.GraphModule, CapturedGraph], None] | None = None,
    pinned: frozenset[int] = frozenset(),
    saved: frozenset[int] = frozenset(),
    gradients: Sequence[int] = (),
) -> Callable[..., Any]:
    """A boxed callable for a functional ATen graph; placeholders at the positions `static` are parameters.

    Args:
        done: is given the graph and its program.
        pinned, saved, gradients: see `CapturedGraph`.
    """
    objects = _take_objects(gm)
    if objects:
        done = None  # no cache has them
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    labels = names if len(names) == len(placeholders) else [node.name for node in placeholders]
    kinds = ("parameter" if index in static else "input" for index in range(len(placeholders)))
    roles = [Role(kind, name) for kind, name in zip(kinds, _unique(labels), strict=True)]
    fixed = frozenset(index for index, node in enumerate(placeholders) if is_fixed(node))
    try:
        with unset_fake_temporarily():  # recipes of constants run now, while the capture's fake mode is still active
            program = get_or_build(gm, roles, compilation)
            graph = CapturedGraph(program, roles, pinned, saved, gradients, fixed)
            if done is not None:
                done(gm, graph)
            call = _bind(graph, runtime)
            return _returning(call, objects) if objects else call
    except (PartitionError, SettingsError):
        raise  # caused by the settings: fallback_on_error covers bugs alone
    except Exception as error:
        if not compilation.fallback_on_error:
            raise
        log.warning("compiling failed, this graph runs in PyTorch: %s", error)
        call = make_boxed_func(gm.forward)
        return _returning(call, objects) if objects else call


def _bind(graph: CapturedGraph, runtime: RuntimeSettings) -> Callable[..., Any]:
    """A boxed callable for a program."""
    program, roles = graph.program, graph.roles
    store = WeightStore(program.graph, program.device, program.constants, sampled=runtime.watch_weights)
    # Trusted: the fallbacks come from a model of this process, not from a file.
    called = frozenset(node.op for node in calls(program.graph) if node.kind == "fallback")
    tactics, context = tactics_and_context(program.kernels, program.graph, program.device, runtime, program.float32)
    given = program.callables, called, tactics
    positions = [i for i, role in enumerate(roles) if role.kind == "input" and i not in graph.fixed]
    at = frozenset(index for index, position in enumerate(positions) if position in graph.pinned)
    template = Session(
        program.graph,
        store,
        runtime,
        *given,
        context=context,
        shares_memory=True,
        guarded=True,
        pinned=at,
        saved=graph.saved,
    )
    program.dump("run.py", template.source)
    sessions = Sessions(template)
    used = {parameter.name for parameter in store.parameters}
    weights = _tuple_getter([i for i, role in enumerate(roles) if role.name in used and role.kind == "parameter"])
    inputs = _tuple_getter(positions)
    again = bool(used)  # a call that finds old weights reads the inputs again

    def call(args: list[Any]) -> list[Any]:
        session = sessions.of(weights(args))
        given = inputs(args)
        args.clear()  # boxed calling convention: the session can free an activation after its last use
        if again:
            return session(given)
        owned = Owned(given)
        del given
        return session(owned)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _take_objects(gm: fx.GraphModule) -> dict[int, Any]:
    """The results of `gm` that are objects which it holds, by position: None is in their place from here on. A DTensor
    is returned as its part and its mesh, which may be another one than an input has."""
    output = gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    found = {}
    for index, node in enumerate(results):
        if isinstance(node, fx.Node) and node.op == "get_attr":
            held = attribute(gm, node)
            if not isinstance(held, torch.Tensor):
                found[index] = getattr(held, "real_obj", held)
                results[index] = None
    if found:
        output.args = (tuple(results),)
        gm.recompile()
    return found


def _returning(call: Callable[..., Any], objects: Mapping[int, Any]) -> Callable[..., Any]:
    """A boxed callable that returns `objects` in their places among the results of `call`."""

    def returning(args: list[Any]) -> list[Any]:
        results = list(call(args))
        for index, held in objects.items():
            results[index] = held
        return results

    returning._boxed_call = True  # type: ignore[attr-defined]
    return returning


def _tuple_getter(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function from a sequence to the tuple of its items at `indices`."""
    return itemgetter(*indices) if len(indices) > 1 else lambda items: tuple([items[index] for index in indices])


def static_inputs(gm: fx.GraphModule) -> frozenset[int]:
    """Positions of the parameters, buffers and tensor attributes that the graph does not write. What varies in size is
    none of them, although it may be marked as static: a cache of cross-attention."""
    context = TracingContext.try_get()
    static = getattr(getattr(context, "fw_metadata", None), "static_input_indices", None) or ()
    if gm.graph.find_nodes(op="call_function", target=torch.ops.prims._make_token.default):
        return frozenset()  # PyTorch's indices still count the tokens, which are no longer inputs
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    written = {node.args[0] for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}
    candidates = [i for i in static if i < len(placeholders) and placeholders[i] not in written]
    return frozenset(i for i in candidates if _has_fixed_type(placeholders[i].meta["val"]))


def _has_fixed_type(value: object) -> bool:
    """A tensor whose sizes and strides are numbers."""
    return isinstance(value, torch.Tensor) and all(type(n) is int for n in (*value.shape, *value.stride()))


def _same(call: Callable[..., Any]) -> Callable[..., Any]:
    return call


def _names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    """The names of the placeholders of what a capture makes of `gm`."""
    sources = (_source_name(node) for node in gm.graph.nodes if node.op == "placeholder")
    return [name for source, given in zip(sources, example_inputs, strict=True) for name in names_of(source, given)]


def is_sharded(gm: fx.GraphModule) -> bool:
    """Whether parameters of a Dynamo graph are those of `fully_shard`, which frees them after each call, and gathers
    them elsewhere before the next one."""
    kinds = (_of_source(node, "guard_source") for node in gm.graph.nodes if node.op == "placeholder")
    return any(kind is not None and kind.is_fsdp_module() for kind in kinds)


def _of_source(placeholder: fx.Node, attribute: str) -> Any:
    """An attribute of where Dynamo has an input from, or the result of a method of older releases; None: unknown."""
    found = getattr(getattr(placeholder.meta.get("grapharg"), "source", None), attribute, None)
    return found() if callable(found) else found


def _source_name(placeholder: fx.Node) -> str:
    """The path of a parameter in the user's module, or the name of an argument."""
    text = _of_source(placeholder, "name")
    return (module_path(text) if isinstance(text, str) else "") or str(placeholder.target).removeprefix("L_").strip("_")


def _unique(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        count = seen[name] = seen.get(name, -1) + 1
        unique.append(f"{name}#{count}" if count else name)
    return unique
