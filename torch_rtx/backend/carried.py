"""Parameters of classes of their own, such as diffusers' GGUFParameter, while `torch.export` traces them.

A trace has a FakeTensor in place of each parameter, which knows nothing of the attributes and methods of its class:
models that ask for them would compute something else, or fail. For the time of a trace, hooks give these to the tensor
that stands for the parameter, and tensors among the attributes are buffers of the module. Wrapper subclasses need none
of this, see `runtime.subclasses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensor

from torch_rtx.runtime.subclasses import attached, is_object, is_special


@dataclass(frozen=True)
class Carried:
    """What the parameter `name` of `module` has beside its data; `tensors` are those of its attributes."""

    module: nn.Module
    name: str
    state: dict[str, Any]
    methods: dict[str, Callable[..., Any]]
    tensors: dict[str, torch.Tensor]

    def give(self, *_: object) -> None:
        """Give it to the tensor that stands for the parameter now; a hook."""
        tensor = self.module._parameters[self.name]
        bound = {name: method.__get__(tensor) for name, method in self.methods.items()}
        vars(tensor).update(self._traced(self.name, self.state), **bound)

    def _traced(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with what stands for its tensors now."""
        traced = {}
        for key, value in state.items():
            label = f"{name}_{key}"
            if isinstance(value, torch.Tensor):
                value = self.module._buffers[label]
            elif is_object(value) and any(found.startswith(f"{label}_") for found in self.tensors):
                content = vars(value)
                value = copy(value)
                vars(value).update(self._traced(label, content))
            traced[key] = value
        return traced


@contextmanager
def carried_by(model: nn.Module) -> Iterator[list[Carried]]:
    """The parameters of `model` that have attributes or methods of their own. Inside of the context, tensors of these
    attributes are buffers: `torch.export` would take them for constants."""
    found = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_special(parameter):
                state, methods = vars(parameter), _methods(type(parameter))
                found.append(Carried(module, name, state, methods, attached(name, parameter)))
    try:
        for one in found:
            one.module._buffers.update(one.tensors)
        yield found
    finally:
        for one in found:
            for name in one.tensors:
                del one.module._buffers[name]


def _methods(kind: type) -> dict[str, Callable[..., Any]]:
    """The functions that `kind` has and tensors have not."""
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(kind.__mro__):
        if not issubclass(nn.Parameter, base):
            found |= {name: f for name, f in vars(base).items() if isinstance(f, FunctionType) and name[:2] != "__"}
    return found


@contextmanager
def carrying(parameters: list[Carried]) -> Iterator[None]:
    """While a model is traced: what stands for `parameters` has what they have. A conversion to a plain tensor gives
    the tensor that is traced itself."""
    if not parameters:
        yield
        return
    make = torch.Tensor._make_subclass

    def made(cls: type, data: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return data if cls is torch.Tensor and isinstance(data, FakeTensor) else make(cls, data, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(compile_lock)  # the change is one for all threads
        for one in parameters:
            stack.enter_context(one.module.register_forward_pre_hook(one.give, prepend=True))
        torch.Tensor._make_subclass = staticmethod(made)  # type: ignore[method-assign, assignment]
        stack.callback(delattr, torch.Tensor, "_make_subclass")
        yield
