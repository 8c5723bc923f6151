"""Tensors of other classes as plain ones: torchao's quantized weights, and whatever overrides functions of PyTorch.

A wrapper subclass consists of inner tensors. `torch.export` makes each a parameter of its own, `X.weight` becomes
`X.parametrizations.weight.original0` and so on; these are the names that an engine has. A DTensor stands for its part
on this rank, which keeps the name: checkpoints of the whole model have it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, TypeGuard

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` with the inner tensors of wrapper subclasses in their place. They share the memory. A tensor that
    several names have gives each of these the same objects."""
    made: dict[int, list[torch.Tensor]] = {}
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not (overrides(tensor) or is_traceable_wrapper_subclass(tensor)):
            found[name] = tensor
            continue
        if id(tensor) not in made:
            made[id(tensor)] = list(inner(tensor))
        parts = zip(names_of(name, tensor), made[id(tensor)], strict=True)
        found |= {label: part for label, part in parts if isinstance(part, torch.Tensor)}  # a DTensor also has its mesh
    return found


def names_of(name: str, tensor: Any) -> list[str]:
    """The names of the plain tensors that `tensor`, called `name`, consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [name]
    if is_sharded(tensor) and not is_traceable_wrapper_subclass(tensor.to_local()):
        return [name, *(f"{name}.{other}" for other in tensor.__tensor_flatten__()[0][1:])]
    owner, dot, attribute = name.rpartition(".")
    return [f"{owner}{dot}parametrizations.{attribute}.original{index}" for index, _ in enumerate(inner(tensor))]


def outer_name(name: str) -> str:
    """The name of the subclass that the tensor called `name` is part of; `name` itself for others."""
    owner, found, rest = name.rpartition("parametrizations.")
    attribute, dot, number = rest.rpartition(".original")
    return owner + attribute if found and dot and number.isdigit() and "." not in attribute else name


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """A DTensor. Imports nothing: where its module is not loaded, nobody has one."""
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def unwrapped_name(name: str, tensors: Mapping[str, Any]) -> str:
    """The name in an engine of what `torch.export` calls `name`: that of a DTensor in `tensors`, of which it is the
    part on this rank, or `name` itself."""
    whole = outer_name(name)
    tensor = tensors.get(whole)
    return whole if whole != name and is_sharded(tensor) and names_of(whole, tensor)[0] == whole else name


def overrides(tensor: torch.Tensor) -> bool:
    """Whether calls of PyTorch's functions with `tensor` call Python code of its class."""
    kind, disabled = type(tensor), torch._C._disabled_torch_function_impl
    return kind is not torch.Tensor and getattr(kind, "__torch_function__", disabled) is not disabled


def any_overrides(values: Iterable[object]) -> bool:
    """Whether any of `values` is a tensor that `overrides`."""
    return any(isinstance(value, torch.Tensor) and overrides(value) for value in values)


def without_overrides(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, in which no class takes part: a capture has recorded what classes do, and works on plain tensors."""

    @wraps(call)
    def plain(*args: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return call(*args)

    return plain


def is_special(parameter: object) -> bool:
    """Whether a parameter is of a class of its own that is no wrapper of inner tensors."""
    own = isinstance(parameter, torch.Tensor) and type(parameter) not in (torch.Tensor, torch.nn.Parameter)
    return own and not isinstance(parameter, FakeTensor) and not is_traceable_wrapper_subclass(parameter)


def attached(name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in the attributes of a parameter called `name`, also in those of objects there, by the names that
    they have in an engine, such as `weight_quant_state_absmax`."""
    return dict(_attached(name, parameter, set()))


def _attached(name: str, owner: object, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    seen.add(id(owner))  # an object may refer to one that refers to it
    for key, value in vars(owner).items():
        if isinstance(value, torch.Tensor):
            yield f"{name}_{key}", value
        elif is_object(value) and id(value) not in seen:
            yield from _attached(f"{name}_{key}", value, seen)


def is_object(value: object) -> bool:
    """Whether `value` holds data in attributes, and is no module, class or function."""
    return hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type) and not callable(value)


def inner(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that `tensor` consists of."""
    if is_traceable_wrapper_subclass(tensor):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from inner(getattr(tensor, attribute))
    elif overrides(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            yield tensor.detach()
    else:
        yield tensor


def rebuilt(like: torch.Tensor, parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """A tensor as `like` that consists of `parts`, in the order of `inner`."""
    if not is_traceable_wrapper_subclass(like):
        return next(parts)
    attributes, context = like.__tensor_flatten__()
    made = {attribute: rebuilt(getattr(like, attribute), parts) for attribute in attributes}
    return type(like).__tensor_unflatten__(made, context, like.size(), like.stride())
