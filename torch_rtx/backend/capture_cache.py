"""Cache of captures: maps a Dynamo graph to its cached engines, so that a warm start skips AOTAutograd.

AOTAutograd takes most of the time of a warm start. `CaptureEntry` checks the conditions under which its result depends
on the Dynamo graph, the types of the inputs and PyTorch's settings alone:

- plain tensors of static shapes: tracing adds neither guards nor symbols;
- the graph calls only PyTorch's own public functions and methods, nothing that a user wrote or registered;
- each input is one input of the captured graph, and no effects are ordered by tokens;
- no node falls back to PyTorch.

An entry of kind `capture` has one graph for inference, or the forward and the backward graph of a training step, and
the metadata of AOTAutograd's wrappers around them, if they have work to do. Of a graph it stores the key of the
engine's entry, what the positions of its inputs and results mean, and for each location in the engine the index of its
Dynamo node. Training is stored when the backward is compiled, which is at its first call.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.schemas import ViewAndMutationMeta
from torch._guards import TracingContext
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from torch_rtx.backend import aot_wrappers
from torch_rtx.backend.compiler import Program
from torch_rtx.backend.fx_hash import (
    PURE_MODULES,
    PURE_NAMESPACES,
    GraphHasher,
    SharedTables,
    encode,
    environment_parts,
    lines,
    name_of,
)
from torch_rtx.backend.program_cache import GraphSite, engine_cache, uses_cache
from torch_rtx.backend.retrace import Retrace
from torch_rtx.cache.entries import EngineCache
from torch_rtx.cache.key import Key, Part
from torch_rtx.errors import Uncacheable
from torch_rtx.lowering.from_fx import Role
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.symbols import Symbols, main_device
from torch_rtx.settings import CompilationSettings

log = logging.getLogger("torch_rtx.cache")

# Modules of the PyTorch functions that Dynamo puts into graphs. Others may read global state of the process.
PUBLIC_MODULES = PURE_MODULES | {
    *("torch", "torch.functional", "torch.nn.functional", "torch.amp.autocast_mode"),
    *("torch._C", "torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
}
# Settings of functorch that may be functions, which its hash knows by their address.
FUNCTIONS = ("joint_custom_pass", "activation_memory_budget_runtime_estimator", "activation_memory_budget_solver")


@dataclass(frozen=True)
class CapturedGraph:
    """The program of a captured graph, and what the positions of its placeholders and results mean.

    Attributes:
        roles: one per placeholder.
        pinned, saved: see `GraphPool`.
        gradients: positions of the gradients, in a backward, that may be undefined.
        fixed: positions of the placeholders whose values the program has; undefined gradients are among these.
    """

    program: Program
    roles: Sequence[Role]
    pinned: frozenset[int] = frozenset()
    saved: frozenset[int] = frozenset()
    gradients: Sequence[int] = ()
    fixed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class KnownCapture:
    """A cached capture: its graphs, and the function that puts AOTAutograd's wrappers around their callables.

    Attributes:
        meta: the metadata of the wrappers; None if there are none.
        backward: captures the backward graph, of a training step.
    """

    graphs: list[CapturedGraph]
    wrap: Callable[..., aot_wrappers.Call]
    meta: ViewAndMutationMeta | None = None
    backward: Callable[[], fx.GraphModule] | None = None


@dataclass(frozen=True)
class CaptureEntry:
    """The cache entry of one Dynamo graph: its key, and the graph's nodes in canonical order."""

    gm: fx.GraphModule
    key: Key
    nodes: list[fx.Node]
    inputs: int
    guards: tuple[int, ...]
    device: torch.device
    settings: CompilationSettings
    _forward: list[tuple[CapturedGraph, ViewAndMutationMeta]] = field(default_factory=list)

    @staticmethod
    def of(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompilationSettings) -> CaptureEntry | None:
        """The entry of `gm`; None if the capture depends on more than the graph."""
        if not uses_cache(settings):
            return None
        try:
            _check_inputs(gm, example_inputs)
            if _needs_autograd(example_inputs):
                _check_training(gm)
            key, nodes, device = _key(gm, example_inputs, settings)
        except Uncacheable as error:
            log.debug("the capture is not cacheable: %s", error.message)
            return None
        return CaptureEntry(gm, key, nodes, len(example_inputs), _guards(), device, settings)

    def load(
        self, names: Sequence[str], example_inputs: Sequence[torch.Tensor], capture: Callable[..., object]
    ) -> KnownCapture | None:
        """The cached capture; None on a miss.

        Args:
            capture: see `Retrace`.
            names: those of the placeholders in inference. In training they have the names that the capture gave them.
        """
        if not self.settings.reuse_cached_engines:
            return None
        start = time.perf_counter()
        cache = engine_cache(self.settings)
        body = cache.get(self.key)
        if body is None:
            return None
        try:
            fields = json.loads(body)
            meta = None if fields["meta"] is None else aot_wrappers.from_json(fields["meta"])
            graphs = [self._graph(cache, graph, names) for graph in fields["graphs"]]
            inputs = [int(index) for index in fields["detached"]]
            if not 1 <= len(graphs) <= (1 if meta is None else 2) or meta and len(meta.input_info) != self.inputs:
                raise ValueError("the numbers of graphs and of inputs do not fit")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            cache.discard(self.key.digest, f"{type(error).__name__}: {error}")
            return None
        found = [graph for graph in graphs if graph is not None]
        if len(found) < len(graphs):
            return None  # the engine of one of them is not in the cache any more

        engines = ", ".join(graph["engine"][:12] for graph in fields["graphs"])
        log.info("hit: %s without a capture, %.0f ms", engines, 1e3 * (time.perf_counter() - start))
        if meta is None:
            return KnownCapture(found, lambda call: call)
        if len(found) == 1:
            return KnownCapture(found, partial(aot_wrappers.wrap, meta, inputs), meta)
        backward = partial(Retrace(capture, example_inputs).backward, [role.name for role in found[1].roles])
        wrap = partial(aot_wrappers.wrap, meta, inputs, backward_graph=backward)
        return KnownCapture(found, wrap, meta, backward)

    def _graph(self, cache: EngineCache, stored: Mapping[str, Any], names: Sequence[str]) -> CapturedGraph | None:
        name, static = str(stored["engine"]), set(stored["parameters"])
        labels = list(map(str, names if stored["names"] is None else stored["names"]))
        roles = [Role("parameter" if index in static else "input", label) for index, label in enumerate(labels)]
        body = cache.body(name)
        if body is None:
            return None
        fixed = frozenset(stored["fixed"])
        inputs = [role.name for i, role in enumerate(roles) if role.kind == "input" and i not in fixed]
        site = GraphSite(self.gm, self.nodes, roles, inputs, self.device, list(stored["locations"]))
        program = site.program(cache, name, body)
        if program is None:
            return None
        pinned, saved = frozenset(stored["pinned"]), frozenset(stored["saved"])
        return CapturedGraph(program, roles, pinned, saved, list(stored["gradients"]), fixed)

    def inference(self, gm: fx.GraphModule, graph: CapturedGraph) -> None:
        """Cache a capture without gradients, if it is cacheable; `gm` is the captured graph."""
        meta = self._meta(gm, graph)
        if meta is not None:
            self._store(None if aot_wrappers.needs_no_wrapper(meta) else meta, [graph])

    def forward(self, gm: fx.GraphModule, graph: CapturedGraph) -> None:
        """Note the forward graph of a training step until its backward graph is known."""
        meta = self._meta(gm, graph)
        if meta is not None:
            self._forward[:] = [(graph, meta)]

    def backward(self, gm: fx.GraphModule, graph: CapturedGraph) -> None:
        """Cache a training step with its backward graph `gm`, if it is cacheable."""
        for forward, meta in self._forward:
            self._store(meta, [forward, graph], aot_wrappers.detached(gm, meta))
        self._forward.clear()

    def _meta(self, gm: fx.GraphModule, graph: CapturedGraph) -> ViewAndMutationMeta | None:
        """The metadata of the graph captured last; None if it is not cacheable."""
        context = TracingContext.try_get()
        meta: ViewAndMutationMeta | None = None if context is None else context.fw_metadata
        same = meta is not None and len(graph.roles) == len(meta.input_info) == self.inputs
        values = pytree.tree_leaves([node.meta.get("val") for node in gm.graph.nodes])
        if not same or _guards() != self.guards or any(map(_is_symbolic, values)):
            log.debug("the capture is not cacheable: it has other inputs than the graph, added guards, or symbols")
            return None
        return meta

    def _store(
        self, meta: ViewAndMutationMeta | None, graphs: Sequence[CapturedGraph], detached: Sequence[int] = ()
    ) -> None:
        programs = [graph.program for graph in graphs]
        cacheable = all(p.entry is not None and all(n.kind != "fallback" for n in p.graph.nodes) for p in programs)
        if not self.settings.cache_built_engines or not cacheable:
            return
        try:
            fields = {
                "graphs": [self._fields(graph, training=len(graphs) > 1) for graph in graphs],
                "meta": None if meta is None else aot_wrappers.to_json(meta),
                "detached": list(detached),
            }
        except Uncacheable as error:
            log.debug("the capture is not cacheable: %s", error.message)
            return
        engine_cache(self.settings).put(self.key, json.dumps(fields).encode())

    def _fields(self, graph: CapturedGraph, training: bool) -> dict[str, Any]:
        return {
            "engine": graph.program.entry,
            "names": [role.name for role in graph.roles] if training else None,
            "parameters": [index for index, role in enumerate(graph.roles) if role.kind == "parameter"],
            "pinned": sorted(graph.pinned),
            "saved": sorted(graph.saved),
            "gradients": list(graph.gradients),
            "fixed": sorted(graph.fixed),
            "locations": self._origins(graph.program.origins),
        }

    def _origins(self, origins: Sequence[fx.Node | None]) -> list[int | None]:
        """For each captured node the index of its Dynamo node, or of one with the same location; None: unknown."""
        number = {node.name: index for index, node in enumerate(self.nodes)}
        locations = Locations()
        located = {locations.of(node): index for index, node in reversed(list(enumerate(self.nodes)))}

        def index(origin: fx.Node | None) -> int | None:
            if origin is None:
                return None
            sources = (number[s.name] for s in origin.meta.get("from_node") or () if s.name in number)
            return next(sources, located.get(locations.of(origin)))

        return list(map(index, origins))


def _check_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta.get("example_value") for node in placeholders]
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None or len(fakes) != len(example_inputs):
        raise Uncacheable("the graph does not come from Dynamo")
    values = pytree.tree_leaves([node.meta.get("example_value") for node in _nodes(gm)])
    if any(map(_is_symbolic, values)):
        raise Uncacheable("sizes are symbolic")
    if not all(isinstance(fake, FakeTensor) for fake in fakes) or len({id(fake) for fake in fakes}) != len(fakes):
        raise Uncacheable("an input is not a plain tensor, or is passed twice")
    if not all(
        type(given) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor) and given.layout == torch.strided
        for given in example_inputs
    ):
        raise Uncacheable("an input is sparse or of a tensor subclass")


def _nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of `gm` and of the graphs in it."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            if module.meta.get("_checkpoint_context_fn") is not None:
                raise Uncacheable("a function decides what a checkpoint saves")
            yield from module.graph.nodes


def _is_symbolic(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.layout == torch.strided and value._has_symbolic_sizes_strides
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _guards() -> tuple[int, ...]:
    """How many guards and replacements of symbols there are. An integer in a tensor has a symbol, too."""
    context = TracingContext.get()
    env = None if context.fake_mode is None else context.fake_mode.shape_env
    found = () if env is None else (env.guards, env.replacements)
    return tuple(map(len, (context.guards_context.aotautograd_guards, *found)))


def _check_training(gm: fx.GraphModule) -> None:
    """What AOTAutograd reads of the process when it makes a backward graph, or what reads the backward graph."""
    context = TracingContext.get()
    if context.ddp_optimizer_ctx is not None:
        raise Uncacheable("DDP's buckets count the captures")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise Uncacheable("hooks on saved tensors may be part of the graph")
    if any(node.meta.get("custom") or "memory_budget" in node.meta for node in _nodes(gm)):
        raise Uncacheable("the graph has annotations, which the partitioner may read")
    if any(callable(getattr(functorch_config, name, None)) for name in FUNCTIONS):
        raise Uncacheable("a setting of functorch is a function")


def _needs_autograd(example_inputs: Sequence[Any]) -> bool:
    """Gradients are enabled, and an input (or parameter) requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def _key(
    gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor], settings: CompilationSettings
) -> tuple[Key, list[fx.Node], torch.device]:
    for node in _nodes(gm):
        nested = node.op == "get_attr" and isinstance(
            getattr(node.graph.owning_module, str(node.target), None), fx.GraphModule
        )
        if node.op not in ("placeholder", "call_function", "call_method", "output") and not nested:
            raise Uncacheable(f"the graph has a node of kind {node.op}")
        if node.op == "call_function" and not _is_public(node.target):
            raise Uncacheable(f"the graph calls {name_of(node.target)}")
    device = main_device(node.meta.get("example_value") for node in gm.graph.nodes)
    shared = SharedTables(Symbols(device))
    hasher = GraphHasher(gm, shared, ordered=True)
    memory = [StorageWeakRef(given.untyped_storage()) for given in example_inputs]
    pairs = zip(hasher.placeholders, example_inputs, strict=True)
    inputs = [(_input(hasher, *pair), memory.index(own)) for pair, own in zip(pairs, memory, strict=True)]
    capture = {"grad": torch.is_grad_enabled(), "functorch": functorch_config.get_hash().hex()}
    capture["fusions"] = inductor_config.post_grad_fusion_options  # the partitioner may quantize what is saved
    parts = {
        "kind": Part.of("capture"),
        "graph": Part.of(hasher.summary, encode((hasher.records, list(shared.callees)))),
        "inputs": Part.of(lambda: lines({str(index): item for index, item in enumerate(inputs)}), encode(inputs)),
        "capture": Part.of(lines(capture)),
        **environment_parts(settings, device),
    }
    return Key(parts), hasher.nodes, device


def _input(hasher: GraphHasher, node: fx.Node, given: torch.Tensor) -> tuple[object, ...]:
    """Everything that AOTAutograd can see of an input except its values.

    Dynamo's own tensor of the placeholder may be another one by now: its trace writes to it as the graph does.
    """
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    marks = (given.requires_grad, given.is_leaf, given.is_conj(), given.is_neg(), given.is_inference())
    return hasher.value(given), given.storage_offset(), marks, type(given).__name__, str(static)


def _is_public(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in PURE_NAMESPACES
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target is tag_activation_checkpoint  # AOTAutograd inlines it
    return name_of(target).rpartition(".")[0] in PUBLIC_MODULES
