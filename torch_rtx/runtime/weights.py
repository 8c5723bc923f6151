"""The weights of a session: computed from parameters by recipes, recomputed when a parameter changes, and refitted.

A weight without a recipe is the parameter itself, and a recipe of views alone yields an alias of it: neither takes
memory, and a call sees changes in place. Every other weight owns storage, which recomputing and refit overwrite:
addresses stay valid, and with them captured CUDA graphs. Streamed weights have their storage in host memory; their
values pass through the device only if a recipe computes them.

`unload` frees the device memory of all weights that depend on parameters, and keeps in host memory what `load` makes
them of. Constants, and what calls have written to them, stay.

All methods may be called from any thread; calls that use `values` hold the `gate`.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch

from torch_rtx import aten
from torch_rtx.errors import RefitError, RtxError
from torch_rtx.ir import Graph, TensorType, Type, Weight
from torch_rtx.onnx.framed import aligned
from torch_rtx.runtime.code import undisturbed
from torch_rtx.runtime.gate import Gate
from torch_rtx.runtime.leases import Leases
from torch_rtx.runtime.loan import Loan
from torch_rtx.runtime.recipes import Group, Recipes
from torch_rtx.runtime.streaming import Streamer
from torch_rtx.runtime.strided import compact, overwrite, overwrite_all, placed, restride
from torch_rtx.runtime.watch import Watch, captures, same_bits
from torch_rtx.runtime.weight_match import check, match

log = logging.getLogger(__name__)
Tensors = Mapping[str, torch.Tensor]
_ADDRESS = torch.Tensor.data_ptr
_HOST = torch.device("cpu")
# One computed weight after another is computed again and compared: each after at least so many seconds, and after so
# many times the seconds that the last one took, which is half a percent of the time.
AUDIT_GAP, AUDIT_FACTOR = 0.1, 200
_UNSEEN = (
    "they were written in few elements and without a version counter (`.data`, NumPy, another process); call "
    "refit_module_weights or attach after such writes"
)
Made = dict[int, torch.Tensor]  # weights by index
Check = tuple[Watch, int]  # a comparison that is under way, and the store's `writes` when it began


class Unloaded(NamedTuple):
    """What unloaded weights are made of: tensors to attach to, or values by index; `shared`: see `attach`."""

    sources: Tensors
    values: Mapping[int, torch.Tensor]
    shared: bool


class WeightStore:
    """The tensors of `graph.weights` on `device`.

    Attributes:
        parameters: what `attach` and `refit` need.
        values: one tensor per weight, in order; in host memory if the weight is streamed.
        originals: for `tensors` and `load`: tensors of all parameters that somebody else keeps, by name, or none.
        ready: `values` are there; else those that depend on parameters are empty.
        generation: incremented when a value moves to another address.
        gate: held by a call while it uses `values`.
        watch: follows the tensors that owned weights are computed from, if it is attached to any.

    Args:
        constants: the data of the graph's constants, by name.
        unused_names: parameters of the model that the graph does not need; refit accepts and ignores them.
        streamer: copies weights to the device that are not resident.
        sampled: see `RuntimeSettings.watch_weights`.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        constants: Tensors,
        unused_names: Collection[str] = (),
        streamer: Streamer | None = None,
        sampled: bool = True,
    ) -> None:
        self.device, self.generation, self.streamer, self._sampled = device, 0, streamer, sampled
        self._loan, self.gate, self._lock = Loan(), Gate(device), threading.RLock()
        self._hosts = {} if streamer is None else streamer.hosts
        self.parameters = tuple(p for p in graph.parameters if not p.constant)
        self.weights, self._written = graph.weights, graph.written
        # By name: a parameter's device and strides.
        self._places = {p.name: (_device(p.type, device), p.type.strides) for p in graph.parameters}
        self._data = self._constants = {p.name: constants[p.name] for p in graph.parameters if p.constant}
        if streamer is None:
            self._constants = {name: self._place(name, tensor) for name, tensor in self._data.items()}
        self._unused = unused_names
        self._recipes = Recipes(graph.weights, device)
        self._leasable = {index for index, weight in self.lendable() if weight.recipe is not None}
        # Per weight: it depends on a parameter that is no constant.
        self._variable = [any(name not in self._constants for name in w.names) for w in graph.weights]
        for index in self._hosts:
            if not self._variable[index]:
                overwrite(self._hosts[index], self._make(index, {}))
        self.values = [
            self._hosts[i] if i in self._hosts else torch.empty(0) if variable else self._make(i, {})
            for i, variable in enumerate(self._variable)
        ]
        self.originals: Tensors = {}
        self._detach()

    def sibling(self) -> WeightStore:
        """A store of the same graph for other parameters; shares recipes and the weights computed from constants."""
        assert self.streamer is None  # a streamer holds the values of one store
        other = copy(self)
        other.values = [torch.empty(0) if v else value for v, value in zip(self._variable, self.values, strict=True)]
        other.originals = {}
        other._detach()
        return other

    def share(self, lender: WeightStore) -> None:
        """Use the weights that `lender`, the store of another engine of this model, computes in the same way, so that
        the device holds them once. From then on both are given the same parameters, `lender` first. To be called before
        other threads use this store. Weights that are streamed are not shared.
        """
        if self.streamer is None and lender.streamer is None and self.device == lender.device:
            self._loan = Loan.between(lender, self)
            self.gate, self._lock = lender.gate, lender._lock

    def lendable(self) -> list[tuple[int, Weight]]:
        """The weights, by index, that no call writes to and no constant is in: those of another engine may differ."""
        no_names = self._written, self._constants.keys()
        return [(i, w) for i, w in enumerate(self.weights) if all(map({w.value.name, *w.names}.isdisjoint, no_names))]

    def _borrow(self) -> None:
        """Use the values that the lender has now."""
        with self._lock, self._writing():
            for index in self._loan.places:
                self.values[index], self._owned[index] = self._loan.value(index), False
                self._leases.end(index)
            self.generation += bool(self._loan.places)
            self._follow()

    def _detach(self) -> None:
        self._loan, self._leases = Loan(), Leases()
        self._owned = [index in self._hosts for index in range(len(self.weights))]
        self.gate, self.writes = Gate(self.device), 0
        self._lock = threading.RLock()  # one write at a time
        self.ready = not self.parameters
        self._unloaded: Unloaded | None = None
        self._forget()

    def _forget(self) -> None:
        self._addresses: list[int] | None = None
        self._sources: dict[str, torch.Tensor] = {}
        self._shared = False
        self.watch: Watch | None = None
        self._stale: set[str] = set()  # sources whose recipes have to run again
        self._audited, self._due = 0, math.inf

    def attach(self, sources: Tensors, strict: bool = False, shared: bool = True) -> None:
        """Use the tensors of `sources` themselves, by name; only recipes copy. `refresh` sees changes of them.

        Args:
            shared: others have them, too, and may write to them in any way.

        Raises:
            RefitError: names are missing, a tensor does not fit its parameter, or, if `strict`, names are unexpected.
        """
        self._attach(match(self.parameters, sources, self._unused if strict else None), shared)

    def update(self, tensors: Sequence[torch.Tensor]) -> None:
        """As `attach`, before each call of a live module; does nothing while the tensors lie where they did.

        Args:
            tensors: one per entry of `parameters`, the same objects in each call: the store keeps their memory alive
                but not them. Their contents may change, and their memory through `parameter.data = other`.

        Raises:
            RefitError: a tensor does not fit its parameter, which guards that were left out would have found.
        """
        addresses = list(map(_ADDRESS, tensors))
        if addresses == self._addresses:
            return
        with self._lock:
            if addresses != self._addresses:  # no other thread was faster
                check(self.parameters, tensors)
                self._attach(tensors, True)
                self._addresses = addresses

    def _attach(self, tensors: Sequence[torch.Tensor], shared: bool) -> None:
        sources = {p.name: t.detach() for p, t in zip(self.parameters, tensors, strict=True)}
        storages = set(map(_memory, tensors))
        with self._lock:
            leases, values, own = Leases(), Made(), set[int]()
            for made in self._batches(self._variable_indices(), sources):
                own |= {i for i, value in made.items() if i in self._hosts or _memory(value) not in storages}
                own -= self._loan.places.keys()
                values |= {i: self._leased(i, value, i in own, sources, leases) for i, value in made.items()}
            self._allocate()
            self._forget()  # after all recipes: a failure changes nothing
            self._sources, self._shared = sources, shared
            with self._writing():
                self._store(values, own, leases)
                for index in values:
                    key = self._lease_key(index, sources) if self._owned[index] and index not in leases else None
                    if key is not None:
                        leases.offer(index, key, self.values[index])
                self.ready, self._unloaded, self._leases = True, None, leases
            self._follow()

    def _leased(self, index: int, fresh: torch.Tensor, own: bool, sources: Tensors, leases: Leases) -> torch.Tensor:
        """The weight `fresh` in memory that another store has for it, if there is any, else in that of its own, if it
        is no tensor of the caller."""
        key = self._lease_key(index, sources)
        found = None if key is None else leases.find(index, key, fresh)
        return found if found is not None else compact(fresh) if own else fresh

    def _lease_key(self, index: int, sources: Tensors) -> Hashable | None:
        """See `Leases.find`; None: the weight's memory is for this store alone."""
        if index not in self._leasable or index in self._hosts or index in self._loan.places:
            return None
        given = [sources[name] for name in self.weights[index].names]
        memory = tuple((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in given)
        return self.device, self.weights[index].value.type, self._recipes.key(index), memory

    def _follow(self) -> None:
        """Watch the tensors that owned weights are computed from."""
        names = [w.names for w, owned in zip(self.weights, self._owned, strict=True) if owned and self._sources]
        watched = {n: self._sources[n] for n in dict.fromkeys(sum(names, ())) if n in self._sources}
        self.watch, self._due = None, math.inf
        if watched:
            sampled = self._shared and self._sampled and not captures(self.device)
            self.watch = Watch(watched, sampled, self.device.type == "cuda")
            self._due = perf_counter() + AUDIT_GAP if self.watch.partial else math.inf

    @contextmanager
    def moving(self, streamer: Streamer | None) -> Iterator[None]:
        """Let `streamer` stream the weights from now on, None: nobody. Held while the caller changes what generates
        code for them, after the calls that run, and before any other.

        Raises:
            RtxError: the weights are unloaded.
        """
        if self._unloaded is not None:
            self.check_ready()
        self.refresh(wait=True)
        with self._lock, self._writing():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # calls on other streams use memory that is freed here
            self._loan, other = Loan(), copy(self)  # what is streamed lies in host memory, for this store alone
            other._constants, other.streamer = self._data, streamer
            other._hosts = {} if streamer is None else streamer.hosts
            moved = [other._moved(index, value, index in self._hosts) for index, value in enumerate(self.values)]
            self._constants, self.streamer, self._hosts = other._constants, other.streamer, other._hosts
            for index, place in enumerate(moved):
                if place is not None:
                    self.values[index], self._owned[index] = place
                    self._leases.end(index)
            self.generation += 1
            self._follow()
            yield

    def _moved(self, index: int, value: torch.Tensor, streamed: bool) -> tuple[torch.Tensor, bool] | None:
        """Where a weight is from now on, and whether the store owns it; None: where it is.

        Args:
            streamed: `value` was streamed before.
        """
        if index in self._hosts:
            if value.numel():  # else there are no weights yet
                overwrite(self._hosts[index], value)
            return self._hosts[index], True
        if not streamed:
            return None
        if self._variable[index] and not self._sources:
            return self._copy(index, value), True
        fresh = self._make(index, self._sources)
        storages = {source.untyped_storage().data_ptr() for source in self._sources.values()}
        owned = self._variable[index] and fresh.untyped_storage().data_ptr() not in storages
        if owned:
            overwrite(fresh, value)  # bit for bit, whatever its recipe would compute now
        return fresh, owned

    def refresh(self, wait: bool = False) -> Check | None:
        """Recompute the owned weights whose parameters changed, before a call.

        Version counters and samples of the values show changes, see `runtime.watch`.

        Args:
            wait: for late comparisons.

        Returns:
            The late comparison, which `settle` needs after the call.
        """
        if self.ready and self._loan.moved():
            self._borrow()
        watch = self.watch
        if watch is None:
            return None
        captured = captures(self.device)
        if perf_counter() >= self._due and not captured:
            self._audit(watch)
        if self._stale or watch.changed():
            self._recompute(watch)
        if captured or not watch.late:
            return None
        pending = watch, self.writes
        watch.launch()
        if wait:
            self.settle(pending)
            return None
        return pending

    def settle(self, pending: Check) -> bool:
        """End a late comparison. True: the weights were old, or are written since; the call has to run again."""
        watch, writes = pending
        if watch.wait():
            self._recompute(watch, writes)
        return writes != self.writes

    def _recompute(self, watch: Watch, writes: int | None = None) -> None:
        """Run the recipes of all tensors that changed.

        Args:
            writes: run all recipes, unless there was a write since this one.
        """
        with self._lock:
            if watch is not self.watch or writes not in (None, self.writes):
                return
            self._stale |= watch.take(everything=writes is not None)
            if not self._stale:
                return  # another thread was faster
            with self._writing():
                own = [weight for weight, owned in enumerate(self._owned) if owned]
                stale = [index for index in own if not self._stale.isdisjoint(self.weights[index].names)]
                for made in self._batches(stale, self._sources):
                    overwrite_all([self.values[index] for index in made], list(made.values()))
            self._stale = set()  # after all recipes: if one fails, the next call runs it again

    def _audit(self, watch: Watch) -> None:
        """Compute one weight again: a write that missed the sample shows when the turn of its weight comes."""
        with self._lock:
            start = perf_counter()
            owned = [index for index, (own, v) in enumerate(zip(self._owned, self._variable, strict=True)) if own and v]
            if watch is not self.watch or start < self._due or self._stale or watch.changed():
                return  # another thread was faster, or all is computed again anyway
            index = owned[self._audited % len(owned)]
            self._audited += 1
            try:
                fresh = self._make(index, self._sources)
                same = same_bits(fresh, self.values[index])
                if not same and not same_bits(fresh, self._make(index, self._sources)):
                    same = True  # its recipe is not deterministic
            except torch.OutOfMemoryError:
                same = True  # there is no room for another copy of it
            self._due = perf_counter() + max(AUDIT_GAP, AUDIT_FACTOR * (perf_counter() - start))
            if not same and not watch.differs():
                names = ", ".join(self.weights[index].names)
                log.warning("results of the last calls used old values of %s: %s", names, _UNSEEN)
                self._recompute(watch, self.writes)

    def refit(self, sources: Tensors, strict: bool = True) -> None:
        """Copy the values of `sources`, by name. The store keeps no reference to them and writes to no caller's tensor.

        All recipes run before any value changes, so that a failure changes nothing. A store that streams holds all new
        values in host memory until then.

        Args:
            strict: False: ignore names that are unexpected.

        Raises:
            RefitError: names are missing or unexpected, shapes or dtypes differ, or tied parameters differ.
        """
        found = match(self.parameters, sources, self._unused if strict else None)
        given = dict(zip((p.name for p in self.parameters), found, strict=True))
        fresh = Made()
        for made in self._batches(self._variable_indices(), given, self.streamer is not None):
            fresh |= made
        self._replace(fresh)

    def adopt(self, values: Mapping[int, torch.Tensor]) -> None:
        """Copy the values of a store of the same graph, by index."""
        written = (weight.value.name in self._written for weight in self.weights)
        kept = [variable or written for variable, written in zip(self._variable, written, strict=True)]
        self._replace({index: values[index] for index, keep in enumerate(kept) if keep})

    def _replace(self, fresh: Mapping[int, torch.Tensor]) -> None:
        """Copy values, by index; whoever was attached to is no longer followed."""
        with self._lock:
            own = {i: value for i, value in fresh.items() if i not in self._loan.places}
            copies = {i: value if self._owned[i] else self._copy(i, value) for i, value in own.items()}
            self._allocate()
            with self._writing():
                self._store(copies, copies.keys())
                self.ready, self._unloaded = True, None
            self._forget()
            self._borrow()

    def unload(self, keep: bool) -> None:
        """Free the device memory of the weights; calls are errors until `load`, `attach` or `refit`.

        Args:
            keep: hold in host memory what `load` needs: the tensors that the store is attached to, if they are there
                and calls write to none; else copies of the values, which then follow no other tensors.
        """
        with self._lock:
            if self.ready and self.parameters:
                self.refresh(wait=True)
                with self._writing():
                    kept = self._kept() if keep else None
                    if self.device.type == "cuda":
                        # Memory that is freed may be used at once, on any stream. This one is behind all calls.
                        torch.cuda.current_stream(self.device).synchronize()
                    self._forget()
                    self._unloaded, self.ready, self._leases = kept, False, Leases()
                    for index, variable in enumerate(self._variable):
                        if variable and index not in self._hosts:
                            self.values[index], self._owned[index] = torch.empty(0), False
                    self.generation += 1
                    if self.streamer is not None:
                        self.streamer.free()
            if not keep and not self.ready:
                self._unloaded = None

    def _kept(self) -> Unloaded:
        sources = self._sources or self.originals
        written = any(w.value.name in self._written for w, v in zip(self.weights, self._variable, strict=True) if v)
        if sources and not written and all(tensor.device == _HOST for tensor in sources.values()):
            return Unloaded(dict(sources), {}, self._shared)
        kept = [i for i, variable in enumerate(self._variable) if variable and i not in self._loan.places]
        return Unloaded({}, {i: _in_host_memory(self.values[i]) for i in kept}, False)

    def load(self) -> None:
        """Bring back what `unload` freed.

        Raises:
            RtxError: nothing was kept.
        """
        with self._lock:
            if self.ready:
                return
            kept = self._unloaded or Unloaded(self.originals, {}, False)
            if kept.sources:
                self._attach([kept.sources[p.name] for p in self.parameters], kept.shared)
            elif kept.values or (self._loan.places and self._unloaded is not None):
                self._replace(kept.values)
            else:
                self.check_ready()

    def check_ready(self) -> None:
        """Raises RtxError if the weights are not there."""
        if self._unloaded is not None:
            hint = "module.session.load_weights() brings them back, module.refit(...) brings others"
            raise RtxError("the weights of this engine are unloaded", hint=hint)
        if not self.ready:
            raise RtxError("this engine is weight-stripped", hint="give it weights first: module.refit(...)")

    def _allocate(self) -> None:
        if self.streamer is not None and not self.ready:
            self.streamer.allocate()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of those parameters that are known, by name: if the store is attached to them, if it has
        `originals`, or if the weight is the parameter itself."""
        with self._lock:
            unloaded = self._unloaded or Unloaded({}, {}, False)
            found = {**self.originals, **unloaded.sources, **self._sources}
            values = dict(enumerate(self.values)) if self.ready else unloaded.values
            for index, weight in enumerate(self.weights):
                if weight.recipe is None and index in values:
                    (name,) = weight.names
                    if name not in found or weight.value.name in self._written:
                        found[name] = values[index]
            return {p.name: found[p.name].detach() for p in self.parameters if p.name in found}

    @contextmanager
    def reading(self) -> Iterator[Mapping[int, torch.Tensor] | None]:
        """The present values by index, for `adopt`, also if they are unloaded; None: there are none. Nothing writes to
        them meanwhile."""
        with self._lock:
            if self.ready:
                self.refresh(wait=True)
                with self.gate:
                    yield dict(enumerate(self.values))
            elif self._unloaded is None:
                yield None
            else:
                sources, values, _ = self._unloaded
                found = {**dict(enumerate(self.values)), **values}
                for made in self._batches(self._variable_indices() if sources else (), sources, host=True):
                    found |= made
                yield found

    def _store(self, values: Made, owned: Collection[int], leased: Container[int] = ()) -> None:
        """Set weights by index; in place where the store owns both the old and the new storage, alone."""
        rest = dict(values)
        places = [i for i in values if i in owned and self._owned[i] and i not in leased and self._leases.alone(i)]
        overwrite_all([self.values[i] for i in places], [rest.pop(i) for i in places])
        for index, value in rest.items():
            own = index in owned
            self.values[index], self._owned[index] = compact(value) if own and index not in leased else value, own
            self.generation += 1
        for index in values:
            self._leases.end(index)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Held while values are written: no call uses them, and the streamer copies none from host memory."""
        with self.gate.writing(), nullcontext() if self.streamer is None else self.streamer.idle():
            self.writes += 1
            yield

    def _variable_indices(self) -> list[int]:
        return [index for index, variable in enumerate(self._variable) if variable]

    def _batches(self, indices: Iterable[int], sources: Tensors, host: bool = False) -> Iterator[Made]:
        """The weights computed from `sources`, some at a time: those whose recipes run together. They share memory of
        `sources` where a recipe allows, and those of a batch may share that of the batch.

        Args:
            host: return them in host memory, as streamed weights.
        """
        wanted = set(indices)
        plain = {i for i in wanted if i in self._loan.places or self.weights[i].recipe is None}
        for batch in self._recipes.batches(sorted(wanted - plain)):
            made = self._run(batch, sources, host)
            yield {index: value for index, value in made.items() if index in wanted}
        yield self._given(plain, sources, host)  # at last: meanwhile a GPU runs recipes

    def _make(self, index: int, sources: Tensors) -> torch.Tensor:
        """The weight computed from `sources`, alone; it shares their memory where its recipe allows."""
        if index in self._loan.places or self.weights[index].recipe is None:
            return self._given([index], sources)[index]
        made = self._run([(index,)], sources)[index]
        return made if self._variable[index] else placed(made)  # a part of a constant, which each call would copy

    @torch.inference_mode(False)  # whose tensors nobody may overwrite outside of it
    def _given(self, indices: Iterable[int], sources: Tensors, host: bool = False) -> Made:
        """Weights that are borrowed, or parameters themselves."""
        made = Made()
        for index in indices:
            if index in self._loan.places:
                made[index] = self._loan.value(index)
                continue
            (name,) = self.weights[index].names
            tensor = self._constants[name] if name in self._constants else sources[name]
            made[index] = self._place(name, tensor, _HOST if host or index in self._hosts else None)
        return made

    @torch.inference_mode(False)
    def _run(self, batch: Sequence[Group], sources: Tensors, host: bool = False) -> Made:
        """What a batch of recipes makes."""
        names = [self.weights[index].names for index, *_ in batch]
        with undisturbed(self.device):
            try:
                made = self._recipes.run(batch, [list(map(partial(self._input, sources), given)) for given in names])
            except OverflowError as error:  # of `torch_rtx.to_int8`
                problem = f"{error}; disabled_passes=['raise_quantized'] multiplies floats"
                raise RefitError(mismatched={", ".join(sum(names, ())): problem}) from error
            return {i: _in_host_memory(one) if host or i in self._hosts else one for i, one in made.items()}

    def _input(self, sources: Tensors, name: str) -> torch.Tensor:
        """A parameter, as recipes need it."""
        return aligned(self._place(name, self._constants[name] if name in self._constants else sources[name]))

    @torch.inference_mode(False)
    def _copy(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value` in memory of its own, on the device of the weight."""
        device = _device(self.weights[index].value.type, self.device)
        copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        overwrite(copied, value)
        return copied

    def _place(self, name: str, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """`tensor` with the strides of parameter `name`, on its device or on `device`; no copy unless necessary."""
        own, strides = self._places[name]
        moved = tensor.detach().to(device or own)
        return moved if moved.stride() == strides else restride(aligned(moved), strides)  # type: ignore[arg-type]


def _device(type_: Type, main: torch.device) -> torch.device:
    """The device of a parameter or weight."""
    assert isinstance(type_, TensorType)
    return aten.to_torch("Device", type_.device, main)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _in_host_memory(value: torch.Tensor) -> torch.Tensor:
    """`value` in host memory, with its strides."""
    return restride(value.to(_HOST), value.stride())
