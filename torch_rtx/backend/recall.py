"""Captures that need not be made again: from a Dynamo graph straight to the engine that it once became.

AOTAutograd takes most of the time that a warm start still spends. Its work is a function of the Dynamo graph, the types
of the inputs and PyTorch's settings, and of nothing else where all of this holds, which `Recall` checks:

- inference, of plain tensors of static shapes: no guards are made, and no symbols, while it traces;
- the graph calls PyTorch's own public functions and methods alone, nothing that a user wrote or registered;
- AOTAutograd left nothing to do at run time: no input is written to, no result is a view of an input or of another
  result, no effects need an order;
- the whole graph is in the engine.

An entry of kind `capture` holds the name of the engine's entry, which inputs are parameters, and the places in the
Dynamo graph that the engine's locations come from.
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
from torch_rtx.backend.fx_key import PURE_MODULES, PURE_NAMESPACES, Shared, Walk, encode, lines, name_of, surroundings
from torch_rtx.backend.reuse import Site, caching, engine_cache
from torch_rtx.cache.key import Key, Part
from torch_rtx.errors import Uncacheable
from torch_rtx.lowering.from_fx import Role
from torch_rtx.lowering.symbols import Symbols, main_device
from torch_rtx.settings import CompilationSettings

log = logging.getLogger("torch_rtx.cache")

# Where PyTorch's own functions are that Dynamo puts into graphs. Others may look things up in tables of the process.
PUBLIC_MODULES = PURE_MODULES | {
    *("torch", "torch.functional", "torch.nn.functional", "torch.amp.autocast_mode"),
    *("torch._C", "torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
}


@dataclass(frozen=True)
class Recall:
    """A Dynamo graph whose capture may be known: its key, and its nodes in their order."""

    gm: fx.GraphModule
    key: Key
    nodes: list[fx.Node]
    device: torch.device
    settings: CompilationSettings

    @staticmethod
    def of(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompilationSettings) -> Recall | None:
        """None where the capture can't be told from the graph."""
        if not caching(settings):
            return None
        try:
            _check_inputs(gm, example_inputs)
            key, nodes, device = _key(gm, settings)
        except Uncacheable as error:
            log.debug("the capture has to be made: %s", error.message)
            return None
        return Recall(gm, key, nodes, device, settings)

    def find(self, names: Sequence[str]) -> tuple[Program, list[Role]] | None:
        """The program of the graph and the roles of its placeholders, which are called `names`."""
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
        roles = [Role("parameter" if index in static else "input", known) for index, known in enumerate(names)]
        inputs = [role.name for role in roles if role.kind == "input"]
        site = Site(self.gm, self.nodes, roles, inputs, self.device, locations)
        program = site.program(cache, name, engine)
        if program is None:
            return None
        milliseconds = 1e3 * (time.perf_counter() - start)
        log.info("hit: %s without a capture, %.0f ms", name[:12], milliseconds)
        return program, roles

    def remember(self, program: Program, parameters: Sequence[int]) -> None:
        """Keep that the graph becomes `program`, whose placeholders at these positions are parameters."""
        whole = program.entry is not None and all(node.kind != "fallback" for node in program.graph.nodes)
        if not self.settings.cache_built_engines or not whole or not _leaves_nothing_to_do():
            return
        number = {node.name: index for index, node in enumerate(self.nodes)}
        locations = [None if origin is None else _place(origin, number) for origin in program.origins]
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
        raise Uncacheable("an input is no plain tensor, or is given twice")
    if not all(
        type(given) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor) for given in example_inputs
    ):
        raise Uncacheable("an input is of a class of its own")


def _key(gm: fx.GraphModule, settings: CompilationSettings) -> tuple[Key, list[fx.Node], torch.device]:
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "call_function", "call_method", "output"):
            raise Uncacheable(f"the graph has a node of kind {node.op}")
        if node.op == "call_function" and not _is_public(node.target):
            raise Uncacheable(f"the graph calls {name_of(node.target)}")
    device = main_device(node.meta.get("example_value") for node in gm.graph.nodes)
    shared = Shared(Symbols(device))
    walk = Walk(gm, shared, ordered=True)
    inputs = [_input(walk, node) for node in walk.placeholders]
    capture = {"grad": torch.is_grad_enabled(), "functorch": functorch_config.get_hash().hex()}
    parts = {
        "kind": Part.of("capture"),
        "graph": Part.of(walk.summary, encode((walk.records, list(shared.callees)))),
        "inputs": Part.of(lambda: lines({str(index): item for index, item in enumerate(inputs)}), encode(inputs)),
        "capture": Part.of(lines(capture)),
        **surroundings(settings, device),
    }
    return Key(parts), walk.nodes, device


def _input(walk: Walk, node: fx.Node) -> tuple[object, ...]:
    """All that AOTAutograd can see of an input, the values apart."""
    fake = node.meta["example_value"]
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    marks = (fake.requires_grad, fake.is_leaf, fake.is_conj(), fake.is_neg(), fake.is_inference())
    return walk.value(fake), fake.storage_offset(), marks, type(fake).__name__, str(static)


def _is_public(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in PURE_NAMESPACES
    module = name_of(target).rpartition(".")[0]
    return module in PUBLIC_MODULES and not isinstance(target, torch._ops.HigherOrderOperator)


def _leaves_nothing_to_do() -> bool:
    """Whether AOTAutograd's wrappers around the program that was just traced do nothing."""
    context = TracingContext.try_get()
    meta = context.fw_metadata if context is not None else None
    if meta is None:
        return False
    classes = (*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta)
    # Some of these are newer than the oldest PyTorch that is supported.
    work = ("tokens", "num_intermediate_bases", "act_input_indices", "num_graphsafe_rng_states")
    return (
        not any(getattr(meta, name, None) for name in work)
        and meta.grad_enabled_mutation is None
        and all(isinstance(item, PlainTensorMeta) for item in classes)
        and all(item.mutation_type is MutationType.NOT_MUTATED for item in meta.input_info)
        and all(o.output_type is OutputType.non_alias and not o.requires_grad for o in meta.output_info)
    )


def _place(origin: fx.Node, number: dict[str, int]) -> int:
    """The index of the Dynamo node that a node of the capture comes from; -1 if that is not known."""
    return next((number[s.name] for s in origin.meta.get("from_node") or () if s.name in number), -1)
