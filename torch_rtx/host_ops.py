"""Python's arithmetic on numbers of the host, as operators of the IR: `1 / n` is `torch_rtx.truediv.default(a=1, b=n)`.

Sums and products of sizes are dims. What dims lack (floats, roundings, conditions) is a call of one of these, and so
means exactly what it means in Python. They take and return plain numbers and can be called from a file.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

_BITS = 64  # of PyTorch's integers: larger ones only take time


def _pow(a: float, b: float) -> float:
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and b > _BITS:
        raise OverflowError(f"{a} ** {b} exceeds 64 bits")
    return a**b


def _lshift(a: int, b: int) -> int:
    if b > _BITS:
        raise OverflowError(f"{a} << {b} exceeds 64 bits")
    return a << b


def _round(number: float, ndigits: int | None = None) -> float:
    if isinstance(number, int) and ndigits is not None:
        ndigits = max(ndigits, -_BITS)  # nothing is left of the number at fewer, either
    return builtins.round(number, ndigits)


# By name: the function as it appears in a captured graph.
_UNARY: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("abs", "neg", "pos")},
    **{name: getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{name: getattr(torch, name) for name in ("sym_float", "sym_int", "sym_not")},
    **{name: getattr(torch, f"_sym_{name}") for name in ("sqrt", "log2", "sin", "cos", "tan", "asin", "acos", "atan")},
    **{name: getattr(torch, f"_sym_{name}") for name in ("sinh", "cosh", "tanh")},
}
_BINARY: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")},
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: getattr(operator, name) for name in ("and_", "or_", "xor", "lshift", "rshift")},
    **{name: getattr(torch, name) for name in ("sym_min", "sym_max")},
}
_FUNCTIONS = {**_UNARY, **_BINARY, "sym_ite": torch.sym_ite, "round": builtins.round}
_SCHEMAS = dict.fromkeys(_UNARY, "Scalar a") | dict.fromkeys(_BINARY, "Scalar a, Scalar b")
_SCHEMAS |= {"sym_ite": "Scalar b, Scalar t, Scalar f", "round": "Scalar number, int? ndigits=None"}
_NAMES: dict[Any, str] = {function: name for name, function in _FUNCTIONS.items()}
_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
for _name, _function in {**_FUNCTIONS, "pow": _pow, "lshift": _lshift, "round": _round}.items():
    _LIBRARY.define(f"{_name}({_SCHEMAS[_name]}) -> Scalar")
    _LIBRARY.impl(_name, _function, "CompositeImplicitAutograd")


def number_op(function: Any) -> torch._ops.OpOverload | None:
    """The operator of a Python function on numbers; None if there is none."""
    name = _NAMES.get(function)
    return None if name is None else getattr(torch.ops.torch_rtx, name).default
