"""Tiered execution: a session runs at once with the tactics that exist, and is specialized in the background.

A `Variant` is the graph for some sizes, or for all, with its current code. A `Tuner` takes it up the tiers (see
`runtime.tuner`). Under the strategy "lazy" no call waits for that, and an error leaves the code unchanged.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from torch_rtx.ir import Graph, dim_syms, kernel_nodes, type_dims
from torch_rtx.runtime.admission import AdmissionPolicy
from torch_rtx.runtime.background import Work, attempt
from torch_rtx.runtime.check import bind_sizes
from torch_rtx.runtime.code import Code
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import LoadedTactic, is_for
from torch_rtx.runtime.tuner import MEASURED_OF_A_KIND, TunedGraph, Tuner, TuningContext
from torch_rtx.runtime.variant import PORTABLE, REFERENCE, Variant
from torch_rtx.settings import RuntimeSettings

log = logging.getLogger(__name__)
MAX_KEYS = 1024  # of the table that finds a variant without a lock
Compile = Callable[[Graph, Mapping[str, LoadedTactic]], Code]
Step = Callable[[], object]


class Specializer:
    """The variants of one graph; shared by its sessions, and safe to use from many threads.

    Args:
        graph: level fused.
        compiled: generates the code of a graph with given tactics.
        tactics: the engine's tactics that can be used at once.
        context: None: nothing is tuned.

    Attributes:
        base: the variant for all sizes, or for the only ones.
        variants: those for given sizes, by the sizes of the symbols.
        is_met: a call asked for specialization.
    """

    def __init__(
        self,
        graph: Graph,
        compiled: Compile,
        tactics: Mapping[str, LoadedTactic],
        device: torch.device,
        settings: RuntimeSettings,
        context: TuningContext | None,
    ) -> None:
        self.graph = graph
        nodes = list(kernel_nodes(graph))
        self.context = context if nodes else None
        self.static = not any(sym for value in graph.inputs for dim in type_dims(value.type) for sym in dim_syms(dim))
        native: frozenset[str] = frozenset()
        if self.context is not None and self.static:
            sm = self.context.database.sm
            native = frozenset(op for op, tactic in tactics.items() if is_for(tactic, sm))
        self.tuned = TunedGraph(graph, compiled, device, settings, native)
        self.base = Variant({}, compiled(graph, tactics), PORTABLE if launched(tactics) else REFERENCE)
        self.base.ready = self.context is None or all(node.op in native for node in nodes)
        self.variants: dict[tuple[int, ...], Variant] = {}
        self.is_met = False
        self._policy = AdmissionPolicy(self.variants, settings.specialized_shapes, doubling=True)
        self._by_key: dict[object, Variant] = {}
        self._lock = threading.RLock()
        self._calls = 0

    def recompiled(self, compiled: Compile) -> Specializer:
        """A specializer with the code of this one, generated again from the same tactics. What is being tuned starts
        over with it, from what the cache has."""
        other = copy(self)
        other.tuned = replace(self.tuned, compiled=compiled)
        with self._lock:
            tuned = self.base.done.is_set()
            other.base = _again(self.base, compiled, self.base.done if tuned else threading.Event())
            found = {dims: variant for dims, variant in self.variants.items() if variant.done.is_set()}
            other.is_met = self.is_met and tuned
        other.variants = {dims: _again(variant, compiled, variant.done) for dims, variant in found.items()}
        other._policy = AdmissionPolicy(other.variants, self.tuned.settings.specialized_shapes, doubling=True)
        other._by_key, other._lock = {}, threading.RLock()
        return other

    def current(self, key: object) -> Variant:
        """The variant that runs calls with this key now."""
        return self._by_key.get(key, self.base)

    def variant(self, key: object, inputs: Sequence[Any], strategy: str) -> Variant:
        """The variant that runs a call with these inputs.

        Args:
            key: equal keys imply equal sizes.
            strategy: see `RuntimeSettings.specialization_strategy`.
        """
        found = self._by_key.get(key)
        if found is None:
            if self.context is None or strategy == "none":
                return self.base
            found = self._meet(key, inputs, strategy)
        elif strategy == "eager":
            found.done.wait()
        self._calls = found.used = self._calls + 1
        return found

    def _meet(self, key: object, inputs: Sequence[Any], strategy: str) -> Variant:
        """The variant for inputs whose key is new, or was not admitted yet."""
        sizes = bind_sizes(self.graph, inputs)
        dims = tuple(sizes.values())
        started: list[tuple[Variant, Mapping[str, int]]] = []
        with self._lock:
            if not self.is_met:
                self.is_met = True
                started.append((self.base, sizes))
            found = self.base if self.static else self.variants.get(dims)
            if found is None and (self._policy.record_miss(dims) or (strategy == "eager" and not self._policy.full)):
                found = self._specialized(dims, sizes)
                started.append((found, {}))
            if found is not None:
                if len(self._by_key) >= MAX_KEYS:  # a number among the inputs may differ in each call
                    self._by_key = {}
                self._by_key[key] = found
            elif self._policy.full:  # these sizes will keep the base variant
                self.base.ready = self.base.done.is_set()
        self._start(started, strategy)
        if found is not None and strategy == "eager":
            found.done.wait()
        return found or self.base

    def _specialized(self, dims: tuple[int, ...], sizes: Mapping[str, int]) -> Variant:
        """A new variant for given sizes; may evict another."""
        evicted = self._policy.evict_for(dims)
        if evicted is not None:
            dropped = self.variants.pop(evicted)
            self._by_key = {key: variant for key, variant in self._by_key.items() if variant is not dropped}
        found = self.variants[dims] = Variant(sizes, self.base.code, self.base.tier, used=self._calls)
        return found

    def _start(self, started: Sequence[tuple[Variant, Mapping[str, int]]], strategy: str) -> None:
        """Tune variants: now under the strategy "eager", else in the background.

        Args:
            started: each with its example sizes, see `Tuner`.
        """
        assert self.context is not None
        if strategy != "eager":
            for variant, sizes in started:
                first, *later = self._steps(variant, sizes)
                # Kernels are named by their bodies: equal ones are compiled and measured once.
                count = len({node.op for node in kernel_nodes(self.graph)})
                tactics = MEASURED_OF_A_KIND * count if later else 0
                variant.work = Work(count, tactics, self.tuned.settings.tuning_seconds)
                self.context.background.submit(first, variant.done, *later, work=variant.work)
            return
        try:
            for variant, sizes in started:
                all(map(attempt, self._steps(variant, sizes)))  # none after one that fails
        except BaseException:  # Ctrl-C: the next call starts over
            with self._lock:
                self._by_key, self.is_met = {}, False
                self.variants.clear()
            raise
        finally:
            for variant, _ in started:
                variant.done.set()

    def _steps(self, variant: Variant, sizes: Mapping[str, int]) -> list[Step]:
        """The steps that tune a variant: the first is urgent, the others run when no first step is queued."""
        steps = [Tuner.compile] if sizes else [Tuner.compile, Tuner.measure, Tuner.hear]
        return [partial(_step, weakref.ref(self), variant, sizes, step) for step in steps]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until specialization is done; False after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            started = [self.base, *self.variants.values()] if self.is_met else []
        return all(v.done.wait(None if end is None else max(0.0, end - time.monotonic())) for v in started)


def _again(variant: Variant, compiled: Compile, done: threading.Event) -> Variant:
    """`variant` with code that is generated again."""
    return replace(variant, code=compiled(variant.code.graph, variant.code.tactics), done=done)


def _step(
    owner: weakref.ref[Specializer], variant: Variant, sizes: Mapping[str, int], step: Callable[[Tuner], None]
) -> None:
    """One step of a variant's tuner, unless the model is gone or the variant was evicted."""
    specializer = owner()
    if specializer is None or specializer.context is None:
        return
    if variant is specializer.base or any(variant is other for other in list(specializer.variants.values())):
        step(Tuner(specializer.tuned, variant, sizes, specializer.context))
