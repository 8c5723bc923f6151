"""Cache of compiled programs: graphs with the same key share one program, each under its own names.

The body of an entry holds the fused graph as text without locations, its kernels, and the data of its constants. To
bind it to another FX graph with the same key, the entry also stores the placeholder index of each input and parameter,
and the node index, in the key's canonical order, of each location, Python fallback and fallback. Entries contain no
weights: a hit computes them from the model's by its recipes, like any engine.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import fx

from torch_rtx import aten
from torch_rtx.backend.compiler import Built, Program, check_settings, compile_fx, device_of, log_fallbacks
from torch_rtx.backend.fx_hash import graph_key
from torch_rtx.backend.kernels import kernels_of
from torch_rtx.binaries import Binaries, Pack, packs_of
from torch_rtx.cache.entries import EngineCache
from torch_rtx.cache.store import FileStore, Store
from torch_rtx.engine import calls, from_stored, to_stored
from torch_rtx.errors import CacheError, RtxError, Uncacheable
from torch_rtx.ir import CONTROL, Attr, Graph, Loc, Node, Parameter, Value, Weight, attr_map, verify
from torch_rtx.irparse import parse
from torch_rtx.lowering.addressing import count_from_tensors
from torch_rtx.lowering.associative_scans import write_out_scans
from torch_rtx.lowering.effects import drop_tokens
from torch_rtx.lowering.flex_calls import name_flex_attention
from torch_rtx.lowering.from_fx import Role, is_fixed, python_call, unique_name
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.progress import stage
from torch_rtx.runtime.ranks import one_rank_first
from torch_rtx.serialization import memory_of, serialize
from torch_rtx.settings import CompilationSettings, cache_dir, opens_stages
from torch_rtx.tactics import groups_of, read_table, write_table
from torch_rtx.targets import Float32

log = logging.getLogger("torch_rtx.cache")


def engine_cache(settings: CompilationSettings) -> EngineCache:
    """The engine cache that `settings` ask for."""
    store: Store | None = settings.engine_cache
    return EngineCache(store or FileStore(os.path.join(cache_dir(settings), "engines"), settings.engine_cache_size))


def get_or_build(
    gm: fx.GraphModule,
    roles: Sequence[Role],
    settings: CompilationSettings,
    writes: Mapping[int, str] | None = None,
    ranges: Mapping[Any, Any] | None = None,
    typical: Mapping[Any, int] | None = None,
) -> Program:
    """The program of `gm`, from the engine cache; built and stored there on a miss.

    While stages are dumped or overridden, it is always built.

    Args and raises: see `compile_fx`.
    """
    check_settings(settings)
    drop_tokens(gm)
    write_out_scans(gm)
    count_from_tensors(gm)
    name_flex_attention(gm)
    if not uses_cache(settings):
        return _build(gm, roles, settings, writes, ranges, typical).program
    start = time.perf_counter()
    device = device_of(gm)
    try:
        graph_id = graph_key(gm, roles, settings, Symbols(device, ranges, typical), writes)
    except Uncacheable as error:
        log.info("not cached, since other processes cannot identify %s", error.message)
        return _build(gm, roles, settings, writes, ranges, typical).program
    cache = engine_cache(settings)
    inputs = [r.name for n, r in zip(graph_id.nodes, roles, strict=False) if r.kind == "input" and not is_fixed(n)]
    site = GraphSite(gm, graph_id.nodes, roles, inputs, device)
    with cache.building(graph_id.key):
        body = cache.get(graph_id.key) if settings.reuse_cached_engines else None
        program = None if body is None else site.program(cache, graph_id.key.digest, body)
        if program is not None:
            log.info("hit: %s, %.0f ms", graph_id.key.digest[:12], 1e3 * (time.perf_counter() - start))
            return program
        if settings.reuse_cached_engines and log.isEnabledFor(logging.INFO):
            log.info("miss: %s; %s", graph_id.key.digest[:12], cache.explain(graph_id.key))
        shares = settings.reuse_cached_engines and settings.cache_built_engines
        with one_rank_first(f"engine {graph_id.key.digest}") if shares else nullcontext():
            body = cache.get(graph_id.key) if shares else None  # of another rank
            program = None if body is None else site.program(cache, graph_id.key.digest, body)
            if program is not None:
                return program
            built = _build(gm, roles, settings, writes, ranges, typical)
            if settings.cache_built_engines:
                cache.put(graph_id.key, to_bytes(built, site))
                built.program.entry = graph_id.key.digest
    return built.program


def _build(
    gm: fx.GraphModule,
    roles: Sequence[Role],
    settings: CompilationSettings,
    writes: Mapping[int, str] | None,
    ranges: Mapping[Any, Any] | None,
    typical: Mapping[Any, int] | None,
) -> Built:
    stage("compiling the graph")
    built = compile_fx(gm, roles, settings, writes, ranges, typical)
    built.program.kernels = kernels_of(built.program, settings)
    return built


def uses_cache(settings: CompilationSettings) -> bool:
    """The settings read or write the engine cache. Dumping or overriding stages disables it: a hit runs no stage."""
    return (settings.cache_built_engines or settings.reuse_cached_engines) and not opens_stages(settings)


@dataclass(frozen=True)
class GraphSite:
    """The FX graph to which a cached program is bound.

    Attributes:
        nodes: in canonical order, the same for all graphs with one key; placeholders first.
        roles: one per placeholder.
        inputs: the names of the placeholders that are inputs of the program.
        locations: the index of the source node of each location in the program; None: those stored in the entry.
    """

    gm: fx.GraphModule
    nodes: list[fx.Node]
    roles: Sequence[Role]
    inputs: list[str]
    device: torch.device
    locations: Sequence[int | None] | None = None

    def program(self, cache: EngineCache, name: str, body: bytes) -> Program | None:
        """The program in the body of the entry `name`; None, and a warning, if the body is damaged."""
        try:
            program = from_bytes(body, self)
        except CacheError as error:
            cache.discard(name, error.message)
            return None
        program.entry = name
        return program


# ---- the body of an entry --------------------------------------------------------------------------------------------


def to_bytes(built: Built, site: GraphSite) -> bytes:
    """Serialize `built` as the body of an entry. Also sets `built.program.origins`, and keeps the packs of binaries,
    which a file of the engine has as well."""
    graph, constants = built.program.graph, built.program.constants
    number = {node: index for index, node in enumerate(site.nodes)}
    position = {role.name: index for index, role in reversed(list(enumerate(site.roles))) if role.kind != "input"}
    origins = built.program.origins = [built.locations.origin(node.loc) for node in _nodes(graph)]
    table = built.program.kernels
    packs = packs_of(groups_of(table), table.binaries)
    built.program.kernels = replace(table, binaries=Binaries(packs, table.binaries))
    fields = {
        "graph": str(_with_locations(graph, iter([None] * len(origins)))),
        "inputs": site.inputs,
        "parameters": {p.name: position[p.name] for p in graph.parameters if p.name not in constants},
        "locations": [None if origin is None else number[origin] for origin in origins],
        "tactics": write_table(built.program.kernels),
        "packs": [(pack.sizes, pack.ptx) for pack in packs],
        "float32": [built.program.float32.products, built.program.float32.convolutions],
        "called": [number[node] for node in built.called],
        "fallbacks": [(number[node], why) for node, why in built.fallbacks.items()],
    }
    data = {f"kernels/{index}": _bytes(pack.stored) for index, pack in enumerate(packs)}
    for parameter in graph.parameters:
        if parameter.name in constants:
            tensor = constants[parameter.name].detach().resolve_conj().resolve_neg().cpu()
            data[f"constant/{parameter.name}"] = to_stored(tensor.contiguous(), parameter.type.dtype)
    head = json.dumps(fields).encode()
    header, pieces = serialize(data)
    return b"".join((len(head).to_bytes(8, "little"), head, header, *pieces))


def _bytes(stored: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(stored), dtype=torch.uint8)


def from_bytes(body: bytes, site: GraphSite) -> Program:
    """Deserialize the body of an entry and bind the program to `site`.

    Raises:
        CacheError: the body is damaged or does not fit the graph.
    """
    start = 8 + int.from_bytes(body[:8], "little")
    try:
        fields = json.loads(body[8:start])
        data = load(body[start:])
        constants = {name.removeprefix("constant/"): t for name, t in data.items() if name.startswith("constant/")}
        stored = [bytes(memory_of(data[f"kernels/{index}"])) for index in range(len(fields["packs"]))]
        packs = [
            Pack(data, tuple((str(name), int(size)) for name, size in rows), bool(ptx))
            for data, (rows, ptx) in zip(stored, fields["packs"], strict=True)
        ]
        indices = fields["locations"] if site.locations is None else site.locations
        origins = [None if index is None else site.nodes[index] for index in indices]
        graph = _bind(parse(fields["graph"]), fields, constants.keys(), site)
        graph = _with_locations(graph, _locations(origins))
        types = {parameter.name: parameter.type for parameter in graph.parameters}
        constants = {name: from_stored(tensor, types[name]) for name, tensor in constants.items()}
        verify(graph, aten.ALLOWED)
        kernels = replace(read_table(fields["tactics"], graph), binaries=Binaries(packs))
        called = {str(one) for node in site.nodes for one in (node.target, *node.args[:1])} | {"python"} | CONTROL
        unexpected = {node.op for node in calls(graph) if node.kind == "fallback"} - called
        if unexpected:
            raise CacheError(f"it calls {', '.join(sorted(unexpected))}, which the graph does not call")
        callables = [python_call(site.gm, site.nodes[index]) for index in fields["called"]]
        log_fallbacks({site.nodes[index]: why for index, why in fields["fallbacks"]})
        float32 = Float32(*fields["float32"])
    except CacheError:
        raise
    except (RtxError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise CacheError(f"{type(error).__name__}: {error}") from None
    return Program(graph, constants, callables, site.device, kernels=kernels, origins=origins, float32=float32)


def _bind(graph: Graph, fields: Mapping[str, Any], constants: Collection[str], site: GraphSite) -> Graph:
    """`graph` with the input and parameter names of `site`."""
    roles = [site.roles[fields["parameters"][p.name]] if p.name not in constants else None for p in graph.parameters]
    name = {p.name: role.name if role else p.name for p, role in zip(graph.parameters, roles, strict=True)}
    parameters = tuple(
        p if role is None else Parameter(role.name, p.type, role.aliases, p.constant)
        for p, role in zip(graph.parameters, roles, strict=True)
    )
    weights = tuple(Weight(w.value, tuple(map(name.__getitem__, w.names)), w.recipe) for w in graph.weights)
    bound = replace(graph, parameters=parameters, weights=weights)
    return bound if site.inputs == fields["inputs"] else _rename_inputs(bound, site.inputs)


def _rename_inputs(graph: Graph, names: Sequence[str]) -> Graph:
    """`graph` with its inputs renamed to `names`, each made unique among the graph's other names."""
    inputs = {value.name for value in graph.inputs}
    taken = {value.name for value in graph.values() if value.name not in inputs} | graph.syms.keys()
    renamed: dict[str, Value] = {}
    for value, name in zip(graph.inputs, names, strict=True):
        renamed[value.name] = Value(unique_name(name, taken), value.type)
        taken.add(renamed[value.name].name)

    def rename(value: Value) -> Attr:
        return renamed.get(value.name, value)

    nodes = tuple(
        replace(node, args=node.map_inputs(rename)) if any(v.name in renamed for v in node.inputs) else node
        for node in graph.nodes
    )
    outputs = tuple(attr_map(attr, rename) for attr in graph.outputs)
    return replace(graph, inputs=tuple(renamed.values()), nodes=nodes, outputs=outputs)


def _locations(origins: Iterable[fx.Node | None]) -> Iterator[Loc | None]:
    locations = Locations()
    return (None if origin is None else locations.of(origin) for origin in origins)


def _nodes(graph: Graph) -> Iterator[Node]:
    """Every node, including those in kernel bodies and recipes, in the order of `_with_locations`."""
    for node in graph.nodes:
        yield node
        if node.body is not None:
            yield from _nodes(node.body)
    for weight in graph.weights:
        if weight.recipe is not None:
            yield from _nodes(weight.recipe)


def _with_locations(graph: Graph, locations: Iterator[Loc | None]) -> Graph:
    """`graph` with the next of `locations` in each node."""

    def locate(node: Node) -> Node:
        loc = next(locations)
        body = None if node.body is None else _with_locations(node.body, locations)
        return Node(node.kind, node.op, node.args, node.outputs, body, loc)

    nodes = tuple([locate(node) for node in graph.nodes])
    weights = tuple(
        w if w.recipe is None else Weight(w.value, w.names, _with_locations(w.recipe, locations)) for w in graph.weights
    )
    return replace(graph, nodes=nodes, weights=weights)
