"""Values that depend on no input of a model, while `torch.export` traces it.

A trace computes with FakeTensors, which have no elements, so that a model can't ask for one. Many ask for what they
made themselves, such as the last of the positions `torch.arange(length)`, or whether a mask of ones hides anything.
PyTorch knows this of single numbers that Python wrote down (`torch.tensor(2.0)`). Inside of `known_values` each small
tensor that begins with sizes and numbers alone remembers how it was computed; if the model asks, the CPU computes it.
So do buffers of single integers that are in no state dict: an engine stores these, and no refit changes them. In the
bodies of loops and branches nothing is known: a trace runs them once, on the values of the first pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.symbolic_convert import tls
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake, no_dispatch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

LARGEST = 1 << 22  # elements of a tensor that remembers
SYMBOLIC = torch.SymInt | torch.SymFloat | torch.SymBool
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ITEM = torch.ops.aten._local_scalar_dense.default
_NAMES = """
    arange eye full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices
    triu_indices zeros zeros_like
""".split()  # noqa: SIM905
# Their results depend on the sizes of tensors alone.
FACTORIES = frozenset(
    getattr(packet, overload)
    for packet in (getattr(torch.ops.aten, name) for name in _NAMES)
    for overload in packet.overloads()
)


def fixed_numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of single integers that are in no state dict, by name, such as the strides of a layer."""
    found = {}
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.numel() == 1 and buffer.dtype in INTEGERS and not is_fake(buffer):
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return {name: buffer for name, buffer in found.items() if not buffer.is_meta}


@dataclass(frozen=True)
class Known:
    """The call that made a tensor, with a `Known` in place of each tensor whose elements it read."""

    func: Any
    args: Any
    kwargs: dict[str, Any]

    @cached_property
    def value(self) -> torch.Tensor:
        """What the call returns on the CPU."""
        args, kwargs = pytree.tree_map_only(Known, lambda known: known.value, (self.args, self.kwargs))
        return self.func(*args, **(kwargs | ({"device": "cpu"} if "device" in kwargs else {})))


@contextmanager
def known_values(given: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Remember values inside of this context. It is a change for all threads: hold Dynamo's lock around it.

    Args:
        given: tensors that stand for others in the trace, with those whose values they have.
    """
    before: Any = FakeTensorMode.dispatch
    operate: Any = HigherOrderOperator.dispatch
    bodies = 0
    made: Any = FakeTensorMode.from_tensor
    known = WeakIdKeyDictionary({one: _constant(value) for one, value in given.items()})

    def with_bodies(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal bodies
        bodies += 1
        try:
            return operate(self, *args, **kwargs)
        finally:
            bodies -= 1

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if bodies or getattr(tls, "current_tx", None) is not None:  # Dynamo traces some bodies, and nothing else
            return before(self, func, types, args, kwargs or {})
        call = _call(known, func, args, kwargs or {})
        if func is ITEM and call is not None:
            with suppress(Exception), no_dispatch():  # whatever: then it is not known
                return call.value
        result = before(self, func, types, args, kwargs or {})
        written = _written(func, args, kwargs or {})
        if written:
            _forget(known, written)
            if call is not None and args and result is args[0]:
                known[result] = replace(call, func=partial(_on_copy, func))
        elif call is not None and isinstance(result, FakeTensor) and _is_small(result):
            known[result] = call
        return result

    def from_tensor(self: Any, tensor: torch.Tensor, **options: Any) -> Any:
        result = made(self, tensor, **options)
        if tensor in known:
            known[result] = known[tensor]
        return result

    FakeTensorMode.from_tensor = from_tensor  # type: ignore[method-assign]
    FakeTensorMode.dispatch = dispatch  # type: ignore[method-assign]
    HigherOrderOperator.dispatch = with_bodies  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeTensorMode.from_tensor = made  # type: ignore[method-assign]
        FakeTensorMode.dispatch = before  # type: ignore[method-assign]
        HigherOrderOperator.dispatch = operate  # type: ignore[method-assign]


def _on_copy(func: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a call that writes to `self` makes of it; others may still need the old elements."""
    return func(self.clone(), *args, **kwargs)


def _call(known: WeakIdKeyDictionary, func: Any, args: Any, kwargs: dict[str, Any]) -> Known | None:
    """The call, if its result follows from known values."""
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    if any(isinstance(leaf, SYMBOLIC) for leaf in leaves) or not all(map(_is_small, tensors)):
        return None
    values = {id(one): known[one] if one in known else _written_down(one) for one in tensors}
    if func not in FACTORIES and (not values or None in values.values()):
        return None

    def stand_in(tensor: torch.Tensor) -> Any:
        value = values[id(tensor)]
        return torch.empty(tensor.shape, dtype=tensor.dtype) if value is None else value

    with no_dispatch():
        return Known(func, *pytree.tree_map_only(torch.Tensor, stand_in, (args, kwargs)))


def _written_down(tensor: torch.Tensor) -> Known | None:
    """The value that PyTorch itself knows, as it is now."""
    return _constant(tensor.constant) if isinstance(tensor, FakeTensor) and tensor.constant is not None else None


def _constant(tensor: torch.Tensor) -> Known:
    with no_dispatch():
        return Known(tensor.to("cpu", copy=True).clone, (), {})


def _is_small(tensor: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in tensor.shape) and tensor.numel() <= LARGEST


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call may write to."""
    given: Any = (args, kwargs)
    if isinstance(func, torch._ops.OpOverload):
        if not func._schema.is_mutable:
            return []
        pairs = [*zip(func._schema.arguments, args, strict=False)]
        pairs += [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]
        given = [value for one, value in pairs if one.alias_info is not None and one.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]


def _forget(known: WeakIdKeyDictionary, written: list[torch.Tensor]) -> None:
    """Forget `written`, and whatever lies in the same memory."""
    storages = {tensor.untyped_storage()._cdata for tensor in written}
    for tensor in [one for one in known if one.untyped_storage()._cdata in storages]:
        del known[tensor]
