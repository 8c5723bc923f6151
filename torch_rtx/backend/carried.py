"""Parameters of classes of their own, such as diffusers' GGUFParameter, while `torch.export` traces them.

A trace has a FakeTensor in place of each parameter, which knows nothing of the attributes and methods of its class:
models that ask for them would compute something else, or fail. For the time of a trace, hooks give these to the tensor
that stands for the parameter. Wrapper subclasses need none of this, see `runtime.subclasses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_rtx.errors import CaptureError


@dataclass(frozen=True)
class Carried:
    """What the parameter `name` of `module` has beside its data."""

    module: nn.Module
    name: str
    state: dict[str, Any]
    methods: dict[str, Callable[..., Any]]

    def give(self, *_: object) -> None:
        """Give it to the tensor that stands for the parameter now; a hook."""
        tensor = self.module._parameters[self.name]
        bound = {name: method.__get__(tensor) for name, method in self.methods.items()}
        vars(tensor).update(self.state, **bound)


def carried_by(model: nn.Module) -> list[Carried]:
    """The parameters of `model` that have attributes or methods of their own.

    Raises:
        CaptureError: attributes are tensors, which `torch.export` would take for constants.
    """
    found = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_special(parameter):
                state = vars(parameter)
                if any(isinstance(leaf, torch.Tensor) or _has_tensors(leaf) for leaf in pytree.tree_leaves(state)):
                    raise CaptureError(
                        f"{path + '.' if path else ''}{name} is a {type(parameter).__name__} with tensors among its "
                        "attributes, which no export keeps",
                        hint='torch.compile(model, backend="rtx") runs it',
                    )
                found.append(Carried(module, name, dict(state), _methods(type(parameter))))
    return found


def _is_special(parameter: torch.Tensor) -> bool:
    own = type(parameter) not in (torch.Tensor, nn.Parameter)
    return own and not isinstance(parameter, FakeTensor) and not is_traceable_wrapper_subclass(parameter)


def _has_tensors(value: object) -> bool:
    return any(isinstance(one, torch.Tensor) for one in getattr(value, "__dict__", {}).values())


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
        for one in parameters:
            stack.enter_context(one.module.register_forward_pre_hook(one.give, prepend=True))
        torch.Tensor._make_subclass = staticmethod(made)  # type: ignore[method-assign, assignment]
        stack.callback(delattr, torch.Tensor, "_make_subclass")
        yield
