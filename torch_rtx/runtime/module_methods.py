"""What every `nn.Module` can do, done by an engine: its weights are listed, saved and loaded by the names of the model,
and what would change its dtype, device or mode is an error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, Self, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from torch_rtx import aten
from torch_rtx.engine import Engine
from torch_rtx.errors import RtxError
from torch_rtx.runtime.attributes import Config
from torch_rtx.runtime.session import check_not_traced
from torch_rtx.runtime.streaming import numbers
from torch_rtx.runtime.weight_sources import WeightSource
from torch_rtx.runtime.weights import WeightStore

F = TypeVar("F", bound=Callable[..., Any])


class Listing(dict[str, Any]):
    """`_parameters` or `_buffers` of a module: what its user registered, and in `items` the weights of `store` as well.

    A weight is the tensor itself where the store has it. Of one that the store has only in another form, folded into
    others for instance, or not at all, there is a tensor on the meta device.

    Args:
        own: what is registered.
        buffers: names of buffers of the model.
        listed: list these; False: list the others, as parameters without gradients.
    """

    def __init__(self, own: Mapping[str, Any], store: WeightStore, buffers: Collection[str], listed: bool) -> None:
        super().__init__(own)
        self._store, self._buffers, self._listed = store, frozenset(buffers), listed

    def items(self) -> Any:
        """Names and tensors; a weight with several names has all of them."""
        return [*super().items(), *self._weights()]

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        known = self._store.tensors()
        for parameter in self._store.parameters:
            if (parameter.name in self._buffers) is not self._listed:
                continue
            tensor = known.get(parameter.name)
            if tensor is None:
                type_ = parameter.type
                tensor = torch.empty(numbers(type_.shape), dtype=aten.DTYPES[type_.dtype], device="meta")
            tensor = tensor if self._listed else nn.Parameter(tensor, requires_grad=False)
            yield from ((name, tensor) for name in (parameter.name, *parameter.aliases))


def registered(entries: Any) -> Any:
    """`entries`, of a `Listing` those that its user registered."""
    return dict(dict.items(entries)) if isinstance(entries, Listing) else entries


def opaque(function: F) -> F:
    """`function`, which Dynamo does not trace: a call of it breaks the graph, and what it calls runs as it is. Unlike
    `torch.compiler.disable`, this wraps nothing and imports nothing."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "an engine is compiled already; fullgraph=True can't contain it"  # type: ignore[attr-defined]
    with suppress(AttributeError):  # a release without these tries to compile each function that the call runs
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


class ModuleMethods(nn.Module):
    """The methods of `nn.Module`, for an engine with weights in `_store`; `_carried` are attributes of the model."""

    engine: Engine
    device: torch.device
    _store: WeightStore
    _carried: dict[str, Any]

    def attach(self, weights: WeightSource) -> None:
        """Use the tensors of `weights`."""
        raise NotImplementedError

    def refit(self, weights: WeightSource, strict: bool = True) -> None:
        """Copy the values of `weights`."""
        raise NotImplementedError

    def _list_weights(self) -> None:
        buffers = self.engine.manifest.model.get("buffers", ())
        for name, listed in (("_parameters", False), ("_buffers", True)):
            self.__dict__[name] = Listing(registered(self.__dict__[name]), self._store, buffers, listed)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of this name, which the model has in a layer."""
        found: nn.Parameter | None = dict(self._parameters.items()).get(target)
        return super().get_parameter(target) if found is None else found

    def get_buffer(self, target: str) -> torch.Tensor:
        """The buffer of this name, which the model has in a layer."""
        found = dict(self._buffers.items()).get(target)
        return super().get_buffer(target) if found is None else found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Call `refit`, or `attach` to `assign`.

        Args:
            strict: False: ignore names that the model does not have, and leave the weights as they are that
                `state_dict` lacks, if the engine has all of these in the form of the model, see `state_dict`.

        Raises:
            RefitError: see `refit`.
        """
        given = dict(state_dict) if strict else self._completed(state_dict)
        (self.attach if assign else self.refit)(given)
        return torch.nn.modules.module._IncompatibleKeys([], [n for n in state_dict if n not in given])

    def _completed(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What `state_dict` has of the weights, and the engine's own in place of the others that it knows."""
        given = {name: tensor for name, tensor in state_dict.items() if name in self._names()}
        kept = self._store.tensors()
        return given | {
            p.name: kept[p.name]
            for p in self._store.parameters
            if p.name in kept and given.keys().isdisjoint((p.name, *p.aliases))
        }

    def _names(self) -> set[str]:
        """All names that a state dict of the model may have."""
        names = {name for p in self._store.parameters for name in (p.name, *p.aliases)}
        return names.union(self.engine.manifest.unused_names)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The weights by the names of the model; also called by a module that has this one as a part.

        Raises:
            RtxError: the engine has some only in another form, or has no weights.
        """
        kept = self._store.tensors()
        missing = [p.name for p in self._store.parameters if p.name not in kept]
        if missing:
            names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} others" if len(missing) > 5 else "")
            hint = "attach the model or a state dict in place of a file, or build with strip_weights=False"
            raise RtxError(f"the engine does not have {names} in the form of the model", hint=hint)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the weights from the state dict of a module that has this one as a part."""
        state = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        own = {**registered(self._parameters), **registered(self._buffers)}
        for name in own.keys() & state.keys():
            own[name].detach().copy_(state.pop(name))
        parts = {name for name in state if name.partition(".")[0] in self._modules}
        unexpected_keys += [prefix + name for name in state if name not in parts and name not in self._names()]
        lacking = [p.name for p in self._store.parameters if state.keys().isdisjoint((p.name, *p.aliases))]
        missing_keys += [prefix + name for name in lacking]
        if len(lacking) < len(self._store.parameters):
            try:
                given = self._completed(state)
                (self.attach if local_metadata.get("assign_to_params_buffers") else self.refit)(given)
            except RtxError as error:
                error_msgs.append(f"the engine {prefix.rstrip('.')!r}: {error.message}")

    def __getattr__(self, name: str) -> Any:
        """An attribute that the engine has of its model.

        Raises:
            AttributeError: there is none.
            RtxError: an export looks for the layer of a weight.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = self.__dict__
            if name in own.get("_carried", ()):
                found = self._carried[name]
                if isinstance(found, Config) and name != "config":
                    check_not_traced()
                return found
            if "_store" in own and not name.startswith("_") and any(name == w.partition(".")[0] for w in self._names()):
                check_not_traced()
            raise

    def train(self, mode: bool = True) -> Self:
        """Do nothing: an engine stays in the mode in which its model was captured.

        Raises:
            RtxError: this is the other mode.
        """
        if mode != self.training:
            was, wanted = ("training", "evaluation") if self.training else ("evaluation", "training")
            call = "train" if mode else "eval"
            hint = f"build it again from model.{call}()" + (", or train through torch.compile" if mode else "")
            raise RtxError(f"the engine was built in {was} mode and can't change to {wanted} mode", hint=hint)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Do nothing: an engine has no gradients.

        Raises:
            RtxError: they are asked for.
        """
        if requires_grad:
            raise RtxError("an engine has no gradients", hint="train through torch.compile, and build or refit it then")
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Do nothing if `fn` leaves dtype and device of the weights: `.half()`, `.to()`, `.cuda()` and all others of
        `nn.Module` end here.

        Raises:
            RtxError: it does not.
        """
        for dtype in {torch.uint8} | {aten.DTYPES[p.type.dtype] for p in self._store.parameters}:
            before = torch.empty(0, dtype=dtype, device=self.device)
            try:
                after = fn(before)
            except (AssertionError, RuntimeError) as error:  # PyTorch's, of a device that is not here
                hint = "torch_rtx.save it, then torch_rtx.load(path, weights, device=...)"
                raise RtxError(f"the engine runs on {self.device} and can't move: {error}", hint=hint) from None
            if after.device != before.device:
                hint = f"torch_rtx.save it, then torch_rtx.load(path, weights, device={str(after.device)!r})"
                raise RtxError(f"the engine runs on {self.device} and can't move to {after.device}", hint=hint)
            if after.dtype != before.dtype:
                hint = "convert the model, and build the engine again"
                raise RtxError(f"the engine's weights are {before.dtype} and can't become {after.dtype}", hint=hint)
        return self
