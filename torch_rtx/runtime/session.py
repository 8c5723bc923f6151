"""A session: one engine with its weights on one device, called with a flat list of inputs.

A call checks the inputs against the graph's types and ranges (once per combination of types) and runs the code for
their sizes, at its current tier; on CUDA as one CUDA graph per combination of shapes once that code is final.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from torch_rtx.collectives import is_collective
from torch_rtx.errors import InputError, RtxError, SettingsError
from torch_rtx.ir import Graph, ScalarType, TensorType, dim_syms, type_dims
from torch_rtx.profiles import Profile
from torch_rtx.runtime.captured import may_draw
from torch_rtx.runtime.check import bind_sizes, check_inputs, check_layouts
from torch_rtx.runtime.code import Code, compile_graph, undisturbed
from torch_rtx.runtime.cudagraph import GraphPool, why_not
from torch_rtx.runtime.groups import why_not_captured
from torch_rtx.runtime.launch import LoadedTactic
from torch_rtx.runtime.overwriting import writes_early
from torch_rtx.runtime.plan import Memory, Room
from torch_rtx.runtime.specialize import Compile, Specializer
from torch_rtx.runtime.stats import Stats, stats_of
from torch_rtx.runtime.streaming import Streamer, stream
from torch_rtx.runtime.together import Together
from torch_rtx.runtime.tuner import TuningContext
from torch_rtx.runtime.variant import Variant
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings

log = logging.getLogger(__name__)
MAX_KNOWN = 1024  # combinations of input types that are known to be valid, each with its key
_FAKE = torch._C._TorchDispatchModeKey.FAKE
# Called at each call of a session; empty except inside `watched_calls`.
_WATCHERS: list[Callable[[Session, Sequence[Any]], None]] = []


# What `runtime_settings` changes in this context.
_CHANGES: ContextVar[Callable[[RuntimeSettings], RuntimeSettings] | None] = ContextVar("torch_rtx", default=None)
_ALONE = nullcontext()
PER_CALL = ("specialization_strategy", "cuda_graph_strategy")


@contextmanager
def runtime_settings(**changes: Any) -> Iterator[None]:
    """Change settings for the calls in this context, in this thread:

        with torch_rtx.runtime_settings(specialization_strategy="none", cuda_graph_strategy="disabled"):
            y = model(x)

    Args:
        changes: `specialization_strategy` or `cuda_graph_strategy`; a module fixes all other settings.

    Raises:
        SettingsError: another option, or an invalid value.
    """
    unknown = [name for name in changes if name not in PER_CALL]
    if unknown:
        hint = f"{' and '.join(PER_CALL)} can"
        if "weight_streaming_budget" in unknown:
            hint += "; torch_rtx.runtime.weight_streaming(module) changes the budget"
        raise SettingsError(f"{', '.join(unknown)} can't be changed per call", hint=hint)
    RuntimeSettings(**changes)  # checks the values
    before = _CHANGES.get()
    change = cache(lambda settings: replace(settings if before is None else before(settings), **changes))
    token = _CHANGES.set(change)
    try:
        yield
    finally:
        _CHANGES.reset(token)


class Session:
    """Runs `graph` (level fused).

    Args:
        store: the weights.
        callables: Python fallbacks by index.
        trusted_ops: operators outside the allow-list that the graph may call.
        tactics: run the kernel nodes, see `runtime.launch`; the bodies of others run call by call.
        context: what tuners work with while the session is used; None: nothing is tuned.
        shares_memory: CUDA graphs share memory with those of other such sessions, see `GraphPool`.
        profiles: one of these must hold all sizes of a call, see `check_inputs`.
        guarded: guards of the caller have checked the inputs, also that those which the graph writes to overlap no
            other ones, so that the session does not.
        pinned, saved: what CUDA graphs leave where it is, see `GraphPool`.
        check_sizes: called with the sizes of the symbols that the inputs determine when they are first met; an error
            refuses the call.
        names: by symbol of the graph, the caller's name of that size.

    Raises:
        InvalidIR: an op does not exist here or a dim can't be determined.
    """

    def __init__(
        self,
        graph: Graph,
        store: WeightStore,
        settings: RuntimeSettings,
        callables: Sequence[Callable[..., Any]] = (),
        trusted_ops: frozenset[str] = frozenset(),
        tactics: Mapping[str, LoadedTactic] | None = None,
        profiles: Sequence[Profile] = (),
        context: TuningContext | None = None,
        shares_memory: bool = False,
        guarded: bool = False,
        pinned: frozenset[int] = frozenset(),
        saved: frozenset[int] = frozenset(),
        check_sizes: Callable[[Mapping[str, int]], None] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.graph, self.store, self.device = graph, store, store.device
        self.profiles, self._names = profiles, names or {}
        self._callables, self._trusted_ops = callables, trusted_ops
        self.settings, self._shares_memory = settings, shares_memory
        self._pinned, self._saved = pinned, saved
        self.streamer = store.streamer
        self._guarded, self._count = guarded, len(graph.inputs)
        self._distinct = guarded or writes_early(graph)  # a module has seen to the latter
        compiled = self._compiler(self.streamer)
        self.specializer = Specializer(graph, compiled, tactics or {}, store.device, settings, context)
        # A second run changes nothing but the results, and other ranks need not take part.
        self._together = Together(graph, store.device) if any(map(is_collective, graph.nodes)) else None
        self._repeatable = not graph.written and not may_draw(graph) and self._together is None
        self._check_sizes = check_sizes if graph.syms else None
        self._open = [i for i, value in enumerate(graph.inputs) if _is_open(value.type)]
        self._known: dict[object, object] = {}  # keys by the types of inputs that are valid
        # Of the last call: compares other inputs with its own, and its key.
        self._last: tuple[Callable[..., bool], object] = _never, None
        self.pool: GraphPool | None = None
        self._allow_graphs()

    def _compiler(self, streamer: Streamer | None) -> Compile:
        """Generates code whose weights `streamer` brings; it keeps no reference to the session."""
        device, callables, trusted_ops = self.device, self._callables, self._trusted_ops
        distinct, guarded = self._distinct, self._guarded

        def compiled(graph: Graph, tactics: Mapping[str, LoadedTactic]) -> Code:
            given = callables, trusted_ops, "graph", tactics, None, streamer
            return compile_graph(graph, device, *given, distinct=distinct, guarded=guarded)

        return compiled

    def _allow_graphs(self) -> None:
        """Start with no CUDA graph, and decide whether there may be any; `no_graphs` is the reason why not."""
        self.pool, self.no_graphs = None, "it runs on the CPU" if self.device.type != "cuda" else why_not(self.graph)
        if self.no_graphs is None and self.streamer is not None:
            self.no_graphs = self.streamer.pageable
        if self.no_graphs is None:
            self.no_graphs = why_not_captured(self.graph)
        if self.settings.cuda_graph_strategy == "disabled":
            return  # until `runtime_settings` wants them
        if self.no_graphs is None:
            self.pool = self._new_pool()
        elif self.device.type == "cuda":
            log.info("no CUDA graphs for this module: %s", self.no_graphs)

    def stream_weights(self, budget: int | str | None) -> None:
        """Change `weight_streaming_budget`. Calls compute the same with the same kernels, bit for bit; those that run
        end first. The weights of before are freed afterwards, so that those that move need room twice.

        Raises:
            SettingsError: the budget is invalid or too small; nothing was changed.
            RtxError: the weights are unloaded.
        """
        settings = replace(self.settings, weight_streaming_budget=budget)
        streamer = stream(self.graph, self.device, budget, self._trusted_ops)
        if streamer is None and self.streamer is None:
            self.settings = settings
            return
        specializer = self.specializer.recompiled(self._compiler(streamer))
        with self.store.moving(streamer):
            self.settings, self.streamer, self.specializer = settings, streamer, specializer
            self._allow_graphs()

    @property
    def source(self) -> str:
        """The code for any sizes, as Python text."""
        return self.specializer.base.code.source

    @property
    def tactics(self) -> Mapping[str, LoadedTactic]:
        """The tactics of the code for any sizes, by the `op` of nodes."""
        return self.specializer.base.code.tactics

    def memory(self, **sizes: int) -> Memory:
        """The device memory that a call takes, known before the first call.

        Args:
            sizes: the sizes that vary, by the names of their `Dim`s or of the graph's symbols; none for a static graph.

        Raises:
            InputError: a size is missing, or there is none of this name.
        """
        plan = self.specializer.base.code.plan
        names = {symbol: self._names.get(symbol, symbol) for symbol in self.graph.syms}
        given = {symbol: sizes[name] for symbol, name in names.items() if name in sizes} | sizes
        missing = [names[symbol] for symbol in plan.symbols if symbol not in given]
        unknown = sizes.keys() - names.keys() - set(names.values())
        if missing or unknown:
            problem = f"{', '.join(missing)} is missing" if missing else f"{', '.join(sorted(unknown))} does not exist"
            raise InputError(f"the size of {problem}", hint=f"the sizes are {', '.join(names.values()) or 'all fixed'}")
        return plan.memory(given)

    def sibling(self) -> Session:
        """A session of the same graph with other parameters; it shares the variants. See `WeightStore.sibling`."""
        other = copy(self)
        other.store = self.store.sibling()
        if self.pool is not None:
            other.pool = self._new_pool()
        return other

    def _new_pool(self) -> GraphPool:
        size, static = self.settings.cuda_graph_pool_size, self.settings.static_outputs
        given = self._shares_memory, self._pinned, self._saved, self._guarded, self.placed
        return GraphPool(self.graph, self.run, self.device, size, static, *given)

    def current(self, inputs: Sequence[Any]) -> Variant:
        """The variant that runs these inputs now."""
        types = self._types(inputs)
        return self.specializer.current(self._known.get(types, types))

    def placed(self, code: Code, stay: frozenset[str], room: Room | None) -> Code:
        """`code` with other places for its values, see `Plan`."""
        given = self._callables, self._trusted_ops
        options: dict[str, Any] = {"tactics": code.tactics, "streamer": self.streamer, "stay": stay, "room": room}
        return compile_graph(
            code.graph, self.device, *given, name="placed", distinct=self._distinct, guarded=self._guarded, **options
        )

    def probed(self, code: Code, probe: Callable[[], None]) -> Code:
        """`code` with a call of `probe` before the first node and after each, for measuring."""
        given = self._callables, self._trusted_ops
        options: dict[str, Any] = {"tactics": code.tactics, "probe": probe, "streamer": self.streamer}
        return compile_graph(
            code.graph, self.device, *given, name="probed", distinct=self._distinct, guarded=self._guarded, **options
        )

    def run(self, code: Code, inputs: Sequence[Any], weights: Sequence[torch.Tensor], *empty: Any) -> list[Any]:
        """Run code of the graph; `empty`: as in `Code.run`."""
        with undisturbed(self.device), self._turn():
            return code.run(inputs, weights, *empty)

    def _turn(self) -> AbstractContextManager[None]:
        """Held during a call: calls with streamed weights run one at a time."""
        return nullcontext() if self.streamer is None else self.streamer.turn()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """The graph's outputs for `inputs`, both flat and in the graph's order.

        Raises:
            InputError: names the input, the dimension and the range.
        """
        same, key = self._last
        if len(inputs) != self._count or not same(*inputs):
            inputs = inputs if self._guarded else _plain(self.graph, inputs)
            key = self._key(inputs)
        if _WATCHERS:
            for watcher in list(_WATCHERS):
                watcher(self, inputs)
        settings = self.settings
        changes = _CHANGES.get()
        if changes is not None:
            settings = changes(settings)
        specializer = self.specializer
        variant = specializer.variant(key, inputs, settings.specialization_strategy)
        # The host waits for a comparison of weights on the device while the call runs, unless it may run only once.
        pending = self.store.refresh(wait=not self._repeatable)
        results = self._launch(key, specializer, variant, inputs, settings)
        if pending is not None and self.store.settle(pending):
            results = self._launch(key, specializer, variant, inputs, settings)
        return results

    def _launch(
        self, key: object, of: Specializer, variant: Variant, inputs: Sequence[Any], settings: RuntimeSettings
    ) -> list[Any]:
        """Run the call with the weights as they are."""
        with self.store.gate, _ALONE if self._together is None else self._together:
            if not self.store.ready:
                self.store.check_ready()
            if of is not self.specializer:  # the weights have moved since: `variant` expects them where they were
                variant = self.specializer.current(key)
            final = variant.ready or settings.specialization_strategy == "none"  # no better code is being compiled
            if not final or settings.cuda_graph_strategy == "disabled" or self.no_graphs is not None:
                return self.run(variant.code, inputs, self.store.values)
            if self.pool is None:
                self.pool = self._new_pool()
            with self._turn():
                return self.pool(key, variant.code, inputs, self.store)

    def _types(self, inputs: Sequence[Any]) -> tuple[object, ...]:
        """Everything about the inputs that a call depends on, except contents, addresses and strides."""
        given = [inputs[index] for index in self._open] if self._guarded else inputs
        return tuple([(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else _number(x) for x in given])

    def _key(self, inputs: Sequence[Any]) -> object:
        """The key of a call: one object for equal types, so that no table has to hash sizes.

        Raises:
            InputError: see `check_inputs`.
        """
        types = self._types(inputs)
        key = self._known.get(types)
        if key is None:
            if not self._guarded:
                check_inputs(self.graph, inputs, self.device, self.profiles)
            if self._check_sizes is not None:
                self._check_sizes(bind_sizes(self.graph, inputs))
            if len(self._known) >= MAX_KNOWN:
                return types
            key = self._known.setdefault(types, object())
        if not self._guarded:
            self._last = _same_types(inputs), key
        elif not self._open:
            self._last = _always, key
        return key

    def unload_weights(self, keep: bool = True) -> None:
        """Free the device memory of weights and CUDA graphs, and keep the program. Until the weights are back, calls
        are errors. Waits for calls in progress, of any thread. Constants of the program and what calls have written to
        them stay. PyTorch keeps what is freed for other tensors of this process (`torch.cuda.empty_cache`).

        Args:
            keep: hold in host memory what `load_weights` needs: tensors that were attached, if they are there, else
                copies of the values, which no longer follow tensors that were attached. False: hold nothing; `refit`
                or `attach` of the module brings weights.
        """
        self.store.unload(keep)
        if self.pool is not None and not self.store.ready:
            self.pool.clear()

    def load_weights(self) -> None:
        """Bring back the weights that `unload_weights` kept; nothing is to be done if they are there.

        Raises:
            RtxError: there are none: none were given yet, or they were unloaded without being kept.
        """
        self.store.load()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until compiling and measuring have ended; False after `timeout` seconds."""
        return self.specializer.wait(timeout)

    def stats(self) -> Stats:
        """The current tiers, tactics and CUDA graphs."""
        return stats_of(self.specializer, self.pool)


@contextmanager
def watched_calls() -> Iterator[list[tuple[Session, list[Any]]]]:
    """Record the calls of this thread to any session, each with its inputs, in the list that is yielded."""
    calls: list[tuple[Session, list[Any]]] = []
    thread = threading.get_ident()

    def watcher(session: Session, inputs: Sequence[Any]) -> None:
        if threading.get_ident() == thread:
            calls.append((session, list(inputs)))

    _WATCHERS.append(watcher)
    try:
        yield calls
    finally:
        _WATCHERS.remove(watcher)


def check_not_traced() -> None:
    """Raises RtxError in an export, and wherever tensors are fake."""
    if torch.compiler.is_exporting() or torch._C._get_dispatch_mode(_FAKE) is not None:
        hint = "export or compile the model that the engine was built from"
        raise RtxError("an engine can't be traced, neither by torch.export nor as a part of another engine", hint=hint)


def _plain(graph: Graph, inputs: Sequence[Any]) -> Sequence[Any]:
    """`inputs` with pending conjugations and negations resolved, since types of the IR do not express them.

    Raises:
        RtxError: the call is traced: kernels read memory, which a tracer's tensors do not have.
        InputError: a tensor is of a class that has no memory of its own, such as a wrapper, or is sparse or nested.
    """
    check_not_traced()
    check_layouts(graph, inputs)
    pending = False
    for value, given in zip(graph.inputs, inputs, strict=False):
        if isinstance(given, torch.Tensor):
            kind = type(given)
            if kind is not torch.Tensor and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
                raise InputError(f"input {value.name!r} is a {kind.__name__}, expected a plain tensor")
            pending = pending or given.is_conj() or given.is_neg()
    if pending:
        return [x.resolve_conj().resolve_neg() if isinstance(x, torch.Tensor) else x for x in inputs]
    return inputs


def _is_open(type_: TensorType | ScalarType) -> bool:
    """Inputs of this type may differ in more than contents and addresses."""
    return not isinstance(type_, TensorType) or any(True for dim in type_dims(type_) for _ in dim_syms(dim))


def _never(*inputs: Any) -> bool:
    """Before the first call no input matches."""
    return False


def _always(*inputs: Any) -> bool:
    """A guarded static graph has inputs of one combination of types."""
    return True


def _same_types(inputs: Sequence[Any]) -> Callable[..., bool]:
    """Compares as many other inputs with these, in one call of PyTorch's guards. True: types, strides, conjugations and
    negations agree; False decides nothing."""
    if not inputs or not all(isinstance(given, torch.Tensor) for given in inputs):
        return _never
    guards = torch._C._dynamo.guards.TensorGuards(*inputs, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guards.check


def _number(given: object) -> object:
    """The key of an input that is no tensor: 2 and 2.0 differ, as do 0.0 and -0.0. Only numbers are valid."""
    if isinstance(given, float):
        return float, given.hex()
    return (type(given), given) if isinstance(given, int) else type(given)
