"""Types of calls on meta tensors, without what PyTorch imports for them and does not need: Dynamo and SymPy.

PyTorch computes most types in Python. The first such call imports Dynamo, a second and 100 MB, to hide the code from
it, and then `symbolic_shapes` and SymPy, a third of a second, to ask of sizes whether they are symbolic. Here none is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_INSIDE: ContextVar[bool] = ContextVar("torch_rtx_light_meta", default=False)


@contextmanager
def light_meta() -> Iterator[None]:
    """Calls on meta tensors in this context import neither Dynamo nor SymPy if all sizes are numbers."""
    token = _INSIDE.set(True)
    for name, known in KNOWN.items():
        sys.modules.setdefault(name, _StandIn(name, known))
    try:
        with _without_dynamo():
            yield
    finally:
        _leave()
        _INSIDE.reset(token)


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """The calls' Python code is hidden from Dynamo by `torch._compile._disable_dynamo`, which imports it for that
    alone. While nobody has imported it, nothing has to be hidden, and a function may stand for its hidden self."""

    def found(thing: Any, name: str, *default: Any) -> Any:
        hidden = name == "__dynamo_disable" and "torch._dynamo" not in sys.modules
        return thing if hidden else getattr(thing, name, *default)

    names = vars(torch._compile)
    names["getattr"] = found
    try:
        yield
    finally:
        names.pop("getattr", None)


class _StandIn(ModuleType):
    """Stands in `sys.modules` for a module that nobody has imported yet.

    Code in the context finds the names in `known` here. Any other name, and every import and name from elsewhere, such
    as another thread, makes way for the module itself, and gets what is there.
    """

    def __init__(self, name: str, known: Mapping[str, Any]) -> None:
        super().__init__(name)
        del self.__spec__  # `import` asks for it, which `__getattr__` has to hear of
        self.__known = known

    def __getattr__(self, name: str) -> Any:
        if _INSIDE.get():
            if name in self.__known:
                return self.__known[name]
            if name == "__spec__":
                return None
            if name == "__path__":  # `from ... import` asks whether this is a package
                raise AttributeError(name)
        return getattr(_itself(self.__name__), name)


def _leave() -> None:
    """Remove the stand-ins."""
    for name in KNOWN:
        if isinstance(sys.modules.get(name), _StandIn):
            sys.modules.pop(name, None)


def _itself(name: str) -> ModuleType:
    """The module, imported without stand-ins for what it imports."""
    _leave()
    return import_module(name)


def _of_numbers(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """The function `name` of `symbolic_shapes`, by `answer` where all arguments are numbers."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if all(map(_is_number, (*args, *kwargs.values()))):
            return answer(*args, **kwargs)
        return getattr(_itself(SHAPES), name)(*args, **kwargs)

    return call


def _is_number(value: object) -> bool:
    """A number, or a list of numbers."""
    return all(map(_is_number, value)) if isinstance(value, tuple | list) else type(value) in (int, bool, float)


def _same(one: Any, other: Any) -> bool:
    return list(one) == list(other) if isinstance(one, tuple | list) else bool(one == other)


class _Symbolic:
    """Nothing is an instance."""


SHAPES = "torch.fx.experimental.symbolic_shapes"
_ANSWERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("guard_or_false", "guard_or_true", "guard_size_oblivious"), lambda condition: condition),
    **dict.fromkeys(("statically_known_true", "guarding_hint_or_throw"), lambda value: value),
    "expect_true": lambda condition, skip=0: condition,
    "has_guarding_hint": lambda value: True,
    "is_nested_int": lambda value: False,
    "sym_and": lambda *conditions: all(conditions),
    "sym_or": lambda *conditions: any(conditions),
    "sym_eq": _same,
}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    SHAPES: {name: _of_numbers(name, answer) for name, answer in _ANSWERS.items()},
    "sympy": {"Basic": _Symbolic},
}
