"""Cache of captures: maps a Dynamo graph to its cached engine, so that a warm start skips AOTAutograd.

AOTAutograd takes most of the time of a warm start. `CaptureEntry` checks the conditions under which its result depends
on the Dynamo graph, the types of the inputs and PyTorch's settings alone:

- inference on plain tensors of static shapes: tracing adds neither guards nor symbols;
- the graph calls only PyTorch's own public functions and methods, nothing that a user wrote or registered;
- AOTAutograd needs no wrapper at run time: no input is written to, no result is a view of an input or of another
  result, no effects are ordered by tokens;
- no node falls back to PyTorch.

An entry of kind `capture` stores the key of the engine's entry, the indices of the inputs that are parameters, and for
each location in the engine the index of its Dynamo node.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.schemas import MutationType, OutputType, PlainTensorMeta
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor

from torch_rtx.backend.capture import needs_autograd
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
from torch_rtx.cache.key import Key, Part
from torch_rtx.errors import Uncacheable
from torch_rtx.lowering.from_fx import Role
from torch_rtx.lowering.symbols import Symbols, main_device
from torch_rtx.settings import CompilationSettings

log = logging.getLogger("torch_rtx.cache")

# Modules of the PyTorch functions that Dynamo puts into graphs. Others may read global state of the process.
PUBLIC_MODULES = PURE_MODULES | {
    *("torch", "torch.functional", "torch.nn.functional", "torch.amp.autocast_mode"),
    *("torch._C", "torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
}


@dataclass(frozen=True)
class CaptureEntry:
    """The cache entry of one Dynamo graph: its key, and the graph's nodes in canonical order."""

    gm: fx.GraphModule
    key: Key
    nodes: list[fx.Node]
    device: torch.device
    settings: CompilationSettings

    @staticmethod
    def of(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompilationSettings) -> CaptureEntry | None:
        """The entry of `gm`; None if the capture depends on more than the graph."""
        if not uses_cache(settings):
            return None
        try:
            _check_inputs(gm, example_inputs)
            key, nodes, device = _key(gm, settings)
        except Uncacheable as error:
            log.debug("the capture is not cacheable: %s", error.message)
            return None
        return CaptureEntry(gm, key, nodes, device, settings)

    def load(self, names: Sequence[str]) -> tuple[Program, list[Role]] | None:
        """The cached program and the roles of its placeholders, which get the names `names`; None on a miss."""
        if not self.settings.reuse_cached_engines:
            return None
        start = time.perf_counter()
        cache = engine_cache(self.settings)
        body = cache.get(self.key)
        if body is None:
            return None
        try:
            fields = json.loads(body)
            name, static, locations = str(fields["engine"]), set(fields["parameters"]), list(fields["locations"])
        except (ValueError, KeyError, TypeError) as error:
            cache.discard(self.key.digest, f"{type(error).__name__}: {error}")
            return None
        engine = cache.body(name)
        if engine is None:
            return None
        roles = [Role("parameter" if index in static else "input", label) for index, label in enumerate(names)]
        inputs = [role.name for role in roles if role.kind == "input"]
        site = GraphSite(self.gm, self.nodes, roles, inputs, self.device, locations)
        program = site.program(cache, name, engine)
        if program is None:
            return None
        milliseconds = 1e3 * (time.perf_counter() - start)
        log.info("hit: %s without a capture, %.0f ms", name[:12], milliseconds)
        return program, roles

    def store(self, program: Program, parameters: Sequence[int]) -> None:
        """Cache `program`, whose placeholders at the positions `parameters` are parameters, if it is cacheable."""
        cacheable = program.entry is not None and all(node.kind != "fallback" for node in program.graph.nodes)
        if not self.settings.cache_built_engines or not cacheable or not _needs_no_wrapper():
            return
        number = {node.name: index for index, node in enumerate(self.nodes)}
        locations = [None if origin is None else _index_of(origin, number) for origin in program.origins]
        if -1 in locations:
            return
        fields = {"engine": program.entry, "parameters": sorted(parameters), "locations": locations}
        engine_cache(self.settings).put(self.key, json.dumps(fields).encode())


def _check_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta.get("example_value") for node in placeholders]
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None or len(fakes) != len(example_inputs):
        raise Uncacheable("the graph does not come from Dynamo")
    shape_env = context.fake_mode.shape_env
    if shape_env is None or shape_env.var_to_range:
        raise Uncacheable("sizes are symbolic")
    if needs_autograd(example_inputs):
        raise Uncacheable("gradients are needed")
    if not all(isinstance(fake, FakeTensor) for fake in fakes) or len({id(fake) for fake in fakes}) != len(fakes):
        raise Uncacheable("an input is not a plain tensor, or is passed twice")
    if not all(
        type(given) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor) for given in example_inputs
    ):
        raise Uncacheable("an input is of a tensor subclass")


def _key(gm: fx.GraphModule, settings: CompilationSettings) -> tuple[Key, list[fx.Node], torch.device]:
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "call_function", "call_method", "output"):
            raise Uncacheable(f"the graph has a node of kind {node.op}")
        if node.op == "call_function" and not _is_public(node.target):
            raise Uncacheable(f"the graph calls {name_of(node.target)}")
    device = main_device(node.meta.get("example_value") for node in gm.graph.nodes)
    shared = SharedTables(Symbols(device))
    hasher = GraphHasher(gm, shared, ordered=True)
    inputs = [_input(hasher, node) for node in hasher.placeholders]
    capture = {"grad": torch.is_grad_enabled(), "functorch": functorch_config.get_hash().hex()}
    parts = {
        "kind": Part.of("capture"),
        "graph": Part.of(hasher.summary, encode((hasher.records, list(shared.callees)))),
        "inputs": Part.of(lambda: lines({str(index): item for index, item in enumerate(inputs)}), encode(inputs)),
        "capture": Part.of(lines(capture)),
        **environment_parts(settings, device),
    }
    return Key(parts), hasher.nodes, device


def _input(hasher: GraphHasher, node: fx.Node) -> tuple[object, ...]:
    """Everything that AOTAutograd can see of an input except its values."""
    fake = node.meta["example_value"]
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    marks = (fake.requires_grad, fake.is_leaf, fake.is_conj(), fake.is_neg(), fake.is_inference())
    return hasher.value(fake), fake.storage_offset(), marks, type(fake).__name__, str(static)


def _is_public(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in PURE_NAMESPACES
    module = name_of(target).rpartition(".")[0]
    return module in PUBLIC_MODULES and not isinstance(target, torch._ops.HigherOrderOperator)


def _needs_no_wrapper() -> bool:
    """AOTAutograd's runtime wrappers around the program traced last do nothing."""
    context = TracingContext.try_get()
    meta = context.fw_metadata if context is not None else None
    if meta is None:
        return False
    classes = (*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta)
    # The oldest supported PyTorch lacks some of these.
    work = ("tokens", "num_intermediate_bases", "act_input_indices", "num_graphsafe_rng_states")
    return (
        not any(getattr(meta, name, None) for name in work)
        and meta.grad_enabled_mutation is None
        and all(isinstance(item, PlainTensorMeta) for item in classes)
        and all(item.mutation_type is MutationType.NOT_MUTATED for item in meta.input_info)
        and all(o.output_type is OutputType.non_alias and not o.requires_grad for o in meta.output_info)
    )


def _index_of(origin: fx.Node, number: dict[str, int]) -> int:
    """The index of the Dynamo node that a captured node comes from; -1 if unknown."""
    return next((number[s.name] for s in origin.meta.get("from_node") or () if s.name in number), -1)
