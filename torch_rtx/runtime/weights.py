"""The weights of a session: computed from parameters by recipes, recomputed when a parameter changes, and refitted.

A weight without a recipe is the parameter itself, and a recipe of views alone yields an alias of it: neither takes
memory, and a call sees changes in place. Every other weight owns storage, which recomputing and refit overwrite:
addresses stay valid, and with them captured CUDA graphs. Streamed weights have their storage in host memory; their
values pass through the device only if a recipe computes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from operator import attrgetter

import torch

from torch_rtx import aten
from torch_rtx.errors import RefitError
from torch_rtx.ir import Graph, Parameter, TensorType
from torch_rtx.runtime.code import compile_graph, overwrite, restride, undisturbed
from torch_rtx.runtime.streaming import Streamer

Tensors = Mapping[str, torch.Tensor]
_ADDRESS, _VERSION = torch.Tensor.data_ptr, attrgetter("_version")
_HOST = torch.device("cpu")


class WeightStore:
    """The tensors of `graph.weights` on `device`.

    Attributes:
        parameters: what `attach` and `refit` need.
        values: one tensor per weight, in order; in host memory if the weight is streamed.
        generation: incremented when a value moves to another address.

    Args:
        constants: the data of the graph's constants, by name.
        unused_names: parameters of the model that the graph does not need; refit accepts and ignores them.
        streamer: copies weights to the device that are not resident.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        constants: Tensors,
        unused_names: Collection[str] = (),
        streamer: Streamer | None = None,
    ) -> None:
        self.device, self.generation, self.streamer = device, 0, streamer
        self._hosts = {} if streamer is None else streamer.hosts
        self.parameters = tuple(p for p in graph.parameters if not p.constant)
        self.weights = graph.weights
        self._types = {p.name: p.type for p in graph.parameters}
        self._constants = {p.name: constants[p.name] for p in graph.parameters if p.constant}
        if streamer is None:
            self._constants = {name: self._place(name, tensor) for name, tensor in self._constants.items()}
        self._unused = unused_names
        self._recipes = [
            None if w.recipe is None else compile_graph(w.recipe, device, name="recipe") for w in graph.weights
        ]
        # Per weight: it depends on a parameter that is no constant.
        self._variable = [any(name not in self._constants for name in w.names) for w in graph.weights]
        for index in self._hosts:
            if not self._variable[index]:
                overwrite(self._hosts[index], self._make(index, {}))
        self.values = [
            self._hosts[i] if i in self._hosts else torch.empty(0) if variable else self._make(i, {})
            for i, variable in enumerate(self._variable)
        ]
        self._detach()

    def sibling(self) -> WeightStore:
        """A store of the same graph for other parameters; shares recipes and the weights computed from constants."""
        assert self.streamer is None  # a streamer holds the values of one store
        other = copy(self)
        other.values = [torch.empty(0) if v else value for v, value in zip(self._variable, self.values, strict=True)]
        other._detach()
        return other

    def _detach(self) -> None:
        self._owned = [index in self._hosts for index in range(len(self.weights))]
        self._addresses: list[int] | None = None
        self._forget()

    def _forget(self) -> None:
        self._sources: dict[str, torch.Tensor] = {}
        self._watched: list[torch.Tensor] = []  # the sources of owned weights
        self._stamps: list[object] = []

    def attach(self, sources: Tensors, strict: bool = False) -> None:
        """Use the tensors of `sources` themselves, by name; only recipes copy. `refresh` sees changes of them.

        Raises:
            RefitError: names are missing, a tensor does not fit its parameter, or, if `strict`, names are unexpected.
        """
        self._attach(match(self.parameters, sources, self._unused if strict else None))

    def update(self, tensors: Sequence[torch.Tensor]) -> None:
        """`attach` and `refresh` in one, before each call of a live module.

        Args:
            tensors: one per entry of `parameters`, the same objects in each call: the store keeps their memory alive
                but not them. Their contents may change, and their memory through `parameter.data = other`.

        Raises:
            RefitError: a tensor does not fit its parameter, which guards that were left out would have found.
        """
        addresses = list(map(_ADDRESS, tensors))
        if addresses == self._addresses:
            self.refresh()
            return
        check(self.parameters, tensors)
        self._attach(tensors)
        self._addresses = addresses

    def _attach(self, tensors: Sequence[torch.Tensor]) -> None:
        sources = {p.name: t.detach() for p, t in zip(self.parameters, tensors, strict=True)}
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        made = {index: self._make(index, sources) for index, variable in enumerate(self._variable) if variable}
        self._sources = sources  # after all recipes: a failure changes nothing
        with self._writing():
            for index, fresh in made.items():
                own = index in self._hosts or fresh.untyped_storage().data_ptr() not in storages
                self._store(index, fresh, own)
        names = [w.names for w, owned in zip(self.weights, self._owned, strict=True) if owned]
        self._watched = [self._sources[n] for n in dict.fromkeys(sum(names, ())) if n in self._sources]
        self._stamps = _stamps(self._watched)

    def refresh(self) -> None:
        """Recompute the owned weights whose parameters changed in place.

        The version counters of the parameters show changes. Every in-place operation increments them, except on
        `.data`.
        """
        if not self._watched:
            return
        stamps = _stamps(self._watched)
        if stamps == self._stamps:
            return
        pairs = zip(self._watched, stamps, self._stamps, strict=True)
        changed = {id(tensor) for tensor, now, before in pairs if now != before}
        names = {name for name, tensor in self._sources.items() if id(tensor) in changed}
        with self._writing():
            for index, weight in enumerate(self.weights):
                if self._owned[index] and not names.isdisjoint(weight.names):
                    overwrite(self.values[index], self._make(index, self._sources))
        self._stamps = stamps  # after all recipes: if one fails, the next call runs it again

    def refit(self, sources: Tensors) -> None:
        """Copy the values of `sources`, by name. The store keeps no reference to them and writes to no caller's tensor.

        All recipes run before any value changes, so that a failure changes nothing. A store that streams holds all new
        values in host memory until then.

        Raises:
            RefitError: names are missing or unexpected, shapes or dtypes differ, or tied parameters differ.
        """
        given = dict(zip((p.name for p in self.parameters), match(self.parameters, sources, self._unused), strict=True))
        fresh = {
            index: self._make(index, given, self.streamer is not None)
            for index, variable in enumerate(self._variable)
            if variable
        }
        with self._writing():
            for index, value in fresh.items():
                self._store(index, value if self._owned[index] else self._copy(index, value), True)
        self._addresses = None
        self._forget()

    def _store(self, index: int, value: torch.Tensor, owned: bool) -> None:
        """Set the weight's value; in place if the store owns both the old and the new storage."""
        if owned and self._owned[index]:
            overwrite(self.values[index], value)
        else:
            self.values[index], self._owned[index] = value, owned
            self.generation += 1

    def _writing(self) -> AbstractContextManager[None]:
        """Held while values are written: the streamer copies none from host memory."""
        return nullcontext() if self.streamer is None else self.streamer.idle()

    def _make(self, index: int, sources: Tensors, host: bool = False) -> torch.Tensor:
        """The weight computed from `sources`; shares their memory where its recipe allows.

        Args:
            host: return it in host memory, as for a streamed weight.
        """
        weight, recipe = self.weights[index], self._recipes[index]
        host = host or index in self._hosts
        given = [self._constants[n] if n in self._constants else sources[n] for n in weight.names]
        if recipe is None:
            return self._place(weight.names[0], given[0], _HOST if host else None)
        inputs = [self._place(name, tensor) for name, tensor in zip(weight.names, given, strict=True)]
        with undisturbed(self.device):
            value = recipe(inputs, ())[0]
        return value.to(_HOST) if host else value

    def _copy(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value` in memory of its own, on the device of the weight."""
        device = aten.to_torch("Device", self.weights[index].value.type.device, self.device)  # type: ignore[union-attr]
        copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        overwrite(copied, value)
        return copied

    def _place(self, name: str, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """`tensor` with the strides of parameter `name`, on its device or on `device`; no copy unless necessary."""
        type_ = self._types[name]
        moved = tensor.detach().to(device or aten.to_torch("Device", type_.device, self.device))
        return restride(moved, type_.strides)  # type: ignore[arg-type]


def match(parameters: Sequence[Parameter], sources: Tensors, unused: Collection[str] | None) -> list[torch.Tensor]:
    """The tensor of each parameter, in order.

    Args:
        unused: names to ignore in `sources`; None: ignore all that no parameter has.

    Raises:
        RefitError: lists all names that are missing, are unexpected or do not fit.
    """
    found, missing, mismatched = [], [], {}
    for parameter in parameters:
        given = [name for name in (parameter.name, *parameter.aliases) if name in sources]
        if not given:
            missing.append(parameter.name)
            continue
        tensor = sources[given[0]]
        problem = _problem(tensor, parameter.type)
        for other in given[1:]:
            if problem is None and not _same(tensor, sources[other]):
                problem = f"is tied to {other}, which has other values"
        if problem is not None:
            mismatched[given[0]] = problem
        found.append(tensor)
    names = {name for parameter in parameters for name in (parameter.name, *parameter.aliases)}
    unexpected = tuple(n for n in sources if n not in names and n not in (unused or ()))
    if missing or mismatched or (unexpected and unused is not None):
        raise RefitError(tuple(missing), unexpected, mismatched)
    return found


def check(parameters: Sequence[Parameter], tensors: Sequence[torch.Tensor]) -> None:
    """Check each tensor against its parameter.

    Raises:
        RefitError: lists all that do not fit.
    """
    problems = {p.name: _problem(tensor, p.type) for p, tensor in zip(parameters, tensors, strict=True)}
    mismatched = {name: problem for name, problem in problems.items() if problem is not None}
    if mismatched:
        raise RefitError((), (), mismatched)


def _problem(tensor: object, type_: TensorType) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"expected a tensor, got {type(tensor).__name__}"
    if tuple(tensor.shape) != type_.shape:
        return f"expected shape {list(type_.shape)}, got {list(tensor.shape)}"
    if tensor.dtype != aten.DTYPES[type_.dtype]:
        return f"expected dtype {aten.DTYPES[type_.dtype]}, got {tensor.dtype}"
    return "is on the meta device and has no values" if tensor.is_meta else None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()):
        return True
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _stamps(tensors: Sequence[torch.Tensor]) -> list[object]:
    """A stamp per tensor that changes with its contents: the version counter. An inference tensor has none, and its
    stamp always changes."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return [object() if tensor.is_inference() else tensor._version for tensor in tensors]
