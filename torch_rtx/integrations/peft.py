"""Adapters of PEFT, merged into weights beside the model's own, so that a compiled program meets a model without any.

PEFT puts a layer of its own around each layer that an adapter changes. Compiled as they are, such layers mean another
program for each set of adapters. Here a call meets the layers that they are around, with weights that PEFT has merged
the active adapters into: another adapter, rank, scale or choice of layers is other values in the same memory.

The model's own weights are not written to. What is merged is computed from them each time, so that it depends on the
present adapters alone, bit for bit, and not on those before.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import copy
from operator import attrgetter
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from torch_rtx.runtime.watch import Watch, captures

log = logging.getLogger(__name__)
T = TypeVar("T")
_ADDRESS = torch.Tensor.data_ptr


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """In the block, `model` is without layers of PEFT, and its parameters have the active adapters in them:

        with torch_rtx.integrations.peft.merged(pipe.unet) as plain:
            engine.refit(plain)

    `plain` is the model; of a `PeftModel` the one that it was made of, whose weights have the names that they had.
    Nobody else may use the model meanwhile. Layers whose weights are quantized stay as they are.
    """
    adapters = MergedAdapters(model)
    adapters.update()
    wrapper = getattr(sys.modules.get("peft"), "PeftModel", ())
    with adapters.hidden():
        yield model.get_base_model() if isinstance(model, wrapper) else model


class MergedAdapters:
    """The adapters of a model, found anew wherever PEFT adds or removes layers. For one thread at a time.

    Memory: a second copy of the weights that adapters change, as long as there are adapters.

    Attributes:
        suspected: a value may have changed that no version counter tells of, as far as the caller knows. The next
            `update` compares values, for which the host waits for the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # The parts of each module, which PEFT replaces, and what they were.
        self._parts: list[dict[str, nn.Module | None]] = []
        self._children: list[list[nn.Module | None]] = []
        self._layers: list[_Layer] = []
        self._others: list[Any] = []  # layers of PEFT that run themselves
        self._refused: WeakSet[Any] = WeakSet()  # those of them that PEFT can't merge, as a merge has shown
        self._holders: list[dict[str, Any]] = []  # `parameters()` takes too long for each call
        self._tensors: list[torch.Tensor] = []
        self._places: list[int] = []  # the ids of these, and their addresses
        self._watch: Watch | None = None
        self.suspected = False

    def update(self, scale: float = 1.0) -> bool:
        """Merge again what changed since the last time: adapters, their scales, or weights.

        Args:
            scale: multiplies the scales of all adapters.

        Returns:
            Whether there are adapters.
        """
        if not self._parts or [[*parts.values()] for parts in self._parts] != self._children:
            self._find()
        tensors = [tensor for holder in self._holders for tensor in holder.values() if tensor is not None]
        tensors += [each for layer in self._layers for each in layer.scaling().values() if _is_tensor(each)]
        places = [*map(id, tensors), *map(_ADDRESS, tensors)]
        changed: Collection[int] = ()
        if places != self._places:
            before = self._by_place()
            changed = self._taken(everything=True) if self._watch is not None and self._watch.differs() else set()
            self._tensors, self._places = tensors, places
            changed |= {id(tensor) for tensor, _ in before ^ self._by_place()}
            # Detached, they are plain tensors, whose values are compared as well: hotswapping moves no version counter.
            named = {str(index): tensor.detach() for index, tensor in enumerate(tensors)}
            self._watch = Watch(named, sampled=True) if named else None
        elif self._watch is not None:
            unseen = self.suspected and not self._is_captured() and self._watch.late_differs()
            if unseen or self._watch.changed():
                changed = self._taken(unseen)
        self.suspected = False
        self._merge(changed, scale)
        return bool(self._layers or self._others)

    def run(self, call: Callable[[], T], scale: float = 1.0) -> T:
        """What `call` returns for the model without layers of PEFT and with the merged weights; to be used after
        `update`. Values of adapters on a device are compared beside the call. If one had changed unseen, it is merged
        then, and the call runs again.

        Args:
            scale: that of `update`.
        """
        watch = None if self._is_captured() else self._watch
        with self.hidden(scale):
            if watch is not None:
                watch.launch()
            result = call()
        # Not within the block: merging needs the model's own layers and weights.
        if watch is None or not watch.wait():
            return result
        self._merge(self._taken(everything=True), scale)
        with self.hidden(scale):
            return call()

    @contextmanager
    def hidden(self, scale: float = 1.0) -> Iterator[None]:
        """The model is without layers of PEFT, and has the merged weights. Layers that are not merged are there.

        Args:
            scale: that of `update`, for those.
        """
        given = [(tuner, tuner.scaling) for tuner in self._others if scale != 1 and _scaling(tuner)]
        try:
            for layer in self._layers:
                layer.hide()
            for tuner, scaling in given:
                tuner.scaling = {name: each * scale for name, each in scaling.items()}
            yield
        finally:
            for tuner, scaling in given:
                tuner.scaling = scaling
            for layer in reversed(self._layers):
                layer.show()

    def weights(self) -> list[nn.Parameter]:
        """The parameters that calls meet in place of the model's own."""
        return [own for layer in self._layers for own in layer.own.values()]

    def _is_captured(self) -> bool:
        """Whether the caller captures what is queued on the adapters' device."""
        return self._watch is not None and any(captures(sample.device) for sample in self._watch.late)

    def _find(self) -> None:
        kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
        known = {id(layer.tuner): layer for layer in self._layers}
        self._parts, self._layers, self._others = [], [], []
        pending, seen = [self._model], {id(self._model)}
        while pending:
            module = pending.pop()
            parts = module._modules
            if parts or isinstance(module, nn.ModuleDict):  # where PEFT adds and replaces layers
                self._parts.append(parts)
            for name, child in parts.items():
                if isinstance(child, kind):
                    if _is_mergeable(child) and child not in self._refused:
                        self._layers.append(_Layer(parts, name, child, known.get(id(child))))
                    else:
                        self._others.append(child)
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    pending.append(child)
        self._children = [[*parts.values()] for parts in self._parts]
        self._holders = [holder for layer in self._layers for holder in layer.holders]

    def _by_place(self) -> set[tuple[torch.Tensor, int]]:
        """The tensors with their addresses."""
        return {*zip(self._tensors, self._places[len(self._tensors) :], strict=True)}

    def _taken(self, everything: bool = False) -> set[int]:
        """The ids of the tensors whose values changed."""
        assert self._watch is not None
        return {id(self._tensors[int(name)]) for name in self._watch.take(everything)}

    def _merge(self, changed: Collection[int], scale: float) -> None:
        for layer in self._layers:
            if changed and layer.has(changed):
                layer.merged = None
        for layer in self._layers:  # if one fails, the next call merges it and those after it
            if layer.merged != (scale, layer.state()):
                try:
                    layer.merge(scale)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    log.warning("a %s is not merged, and each set of its adapters is compiled: %s", layer, error)
                    self._refused.add(layer.tuner)
        if any(layer.tuner in self._refused for layer in self._layers):
            self._find()


class _Layer:
    """A layer of PEFT, `parts[name]`, around another one.

    Attributes:
        tuner: the layer of PEFT.
        own: the parameters that calls meet, by name; always in the same memory, if possible.
        merged: what they were made of, beside tensors.
        holders: the dicts with all tensors that they depend on.

    Args:
        known: this layer, before PEFT added or removed something.
    """

    def __init__(self, parts: dict[str, nn.Module | None], name: str, tuner: Any, known: _Layer | None) -> None:
        self.tuner, self._parts, self._name = tuner, parts, name
        self._base: nn.Module = tuner.base_layer
        self._given: dict[str, nn.Parameter | None] = {}  # the base's own parameters, while they are hidden
        self.own: dict[str, nn.Parameter] = {} if known is None else known.own
        self.merged: object = None if known is None else known.merged
        holders = [holder for module in tuner.modules() for holder in (module._parameters, module._buffers)]
        self.holders = [holder for holder in holders if holder]
        names = "disable_adapters", "active_adapter", "merged_adapters", "scaling"
        self._state = attrgetter(*(name for name in names if hasattr(tuner, name)))

    def has(self, tensors: Collection[int]) -> bool:
        """Whether the merged weights depend on one of the tensors with these ids."""
        found = [*(tensor for holder in self.holders for tensor in holder.values()), *self.scaling().values()]
        return any(id(tensor) in tensors for tensor in found)

    def state(self) -> tuple[Any, ...]:
        """What else they depend on, in lists and dicts of PEFT's own."""
        return self._state(self.tuner)

    def scaling(self) -> dict[str, Any]:
        """See `_scaling`."""
        return _scaling(self.tuner)

    def merge(self, scale: float) -> None:
        """Compute the parameters that calls meet."""
        tuner, self.merged = self.tuner, None
        with torch.inference_mode(False), torch.no_grad():
            if tuner.disable_adapters and tuner.merged:
                tuner.unmerge()  # as its own call does
            for name, given in self._base._parameters.items():
                if given is not None:
                    own = self.own.get(name)
                    if own is None or (own.device, own.dtype, own.shape) != (given.device, given.dtype, given.shape):
                        self.own[name] = own = nn.Parameter(torch.empty_like(given), requires_grad=False)
                    own.copy_(given)
            if not tuner.disable_adapters and not tuner.merged:
                self._add(scale)
        self.merged = scale, tuple(map(copy, self.state()))

    def _add(self, scale: float) -> None:
        """Let PEFT merge the active adapters into the copy of the base's parameters."""
        tuner, scaling = self.tuner, self.scaling()
        memory = {name: own.data for name, own in self.own.items()}
        self.hide()
        try:
            if scale != 1 and scaling:
                tuner.scaling = {name: each * scale for name, each in scaling.items()}
            tuner.merge()
            if tuner.base_layer is not self._base:  # some kinds put a layer of their own there
                for name, value in tuner.base_layer._parameters.items():
                    if name in self.own:
                        self.own[name].copy_(value)
        finally:
            if tuner.base_layer is not self._base:
                tuner.unmerge()
            tuner.merged_adapters.clear()
            if scaling:
                tuner.scaling = scaling
            self.show()
        for name, own in self.own.items():
            if own.data_ptr() != memory[name].data_ptr():  # some kinds of adapters put a new tensor there
                memory[name].copy_(own.data)
                own.data = memory[name]

    def __str__(self) -> str:
        return f"{type(self.tuner).__name__} around {self._name!r}"

    def hide(self) -> None:
        """Put the base in the place of this layer, with the merged weights."""
        self._given = dict(self._base._parameters)
        self._base._parameters.update(self.own)
        self._parts[self._name] = self._base

    def show(self) -> None:
        """Undo `hide`."""
        self._base._parameters.update(self._given)
        self._parts[self._name] = self.tuner


def _scaling(tuner: Any) -> dict[str, Any]:
    """The scales of adapters by name; some are tensors."""
    scaling = getattr(tuner, "scaling", None)
    return scaling if isinstance(scaling, dict) else {}


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _is_mergeable(tuner: Any) -> bool:
    """PEFT adds to floats of a layer without parts. Merging would round the weights of quantized layers, to whose
    results an adapter adds its own product."""
    base = getattr(tuner, "base_layer", None)
    if not isinstance(base, nn.Module) or base._modules:
        return False
    given = [p for p in base._parameters.values() if p is not None]
    return bool(given) and all(
        type(p) is nn.Parameter and p.is_floating_point() and p.element_size() > 1 for p in given
    )
