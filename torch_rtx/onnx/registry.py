"""Declarations of ONNX operators as functions of tensors.

    @op("Softmax", since=13)
    def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
        return torch.softmax(x, axis)

    @op("Reshape", since=5, ints=("shape",))
    def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor: ...

Inputs are positional, in ONNX's order; one that is missing is None. Attributes are keywords with ONNX's names; tensors
among them are tensors, and graphs are not passed. Several outputs are a tuple; trailing ones that the node lacks may be
left out. A function is told what it has a keyword-only parameter for: `outputs`, how many the node has; `dtypes`, those
of the inputs, also of the ones that arrive as numbers; `device`, where a tensor that is made of numbers has to be;
`known`, the numbers of the inputs that the host knows, in nested lists, and None for others; `constants`, the same, but
for a lone number among the weights, which stays one where `known` makes it part of the program; `stored`, the node's
attributes as the model has them, whose tensors `values_of` reads in a capture, too.
Inputs named in `ints` arrive as lists of Python numbers, some of them symbolic: integers, or floats where ONNX has
floats, such as the scales of Resize; all others as tensors, on the device of the model's inputs. ONNX's element types
below a byte are torch.uint4, int4, uint2, int2 and float4_e2m1fn_x2 with one element in each byte, whatever PyTorch
packs (`dtypes`). An ONNX sequence is a list. What an operator can't do is an OnnxError; the module adds node and file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])
Ints = Sequence["int | torch.SymInt"]
Numbers = Sequence[Any]  # where stubs of PyTorch want an int, or floats come, too
TOLD = ("outputs", "dtypes", "device", "known", "constants", "stored")


@dataclass(frozen=True)
class Operator:
    """What an operator does from one version of its opset on.

    Attributes:
        since: the first version that it is right for; a later declaration of the same name replaces it.
        ints: parameters that arrive as lists of integers.
        state: parameters that nothing learns, such as running statistics: they arrive detached, and weights that are
            nothing else are buffers.
    """

    name: str
    domain: str
    since: int
    ints: tuple[str, ...]
    function: Callable[..., Any]
    state: tuple[str, ...] = ()


OPERATORS: dict[tuple[str, str], list[Operator]] = {}
REFUSED: dict[tuple[str, str], str] = {}  # why operators that are known here have no declaration


def refuse(reason: str, *names: str, domain: str = "") -> None:
    """Say why there are no declarations of operators."""
    REFUSED.update({(domain, name): reason for name in names})


def op(
    *names: str, domain: str = "", since: int = 1, ints: tuple[str, ...] = (), state: tuple[str, ...] = ()
) -> Callable[[F], F]:
    """Declare a function as the implementation of operators. `domain`: "" is that of ONNX itself."""

    def declare(function: F) -> F:
        for name in names:
            versions = OPERATORS.setdefault((domain, name), [])
            versions.append(Operator(name, domain, since, ints, function, state))
            versions.sort(key=lambda operator: operator.since)
        return function

    return declare


def values_of(tensor: torch.Tensor) -> np.ndarray:
    """What a tensor of the model holds, also in a capture, whose operators know no values."""
    with _disable_current_modes():
        return tensor.numpy()


def find(domain: str, name: str, version: int) -> Operator | None:
    """The implementation of an operator in a version of its opset; None: there is none."""
    known = [operator for operator in OPERATORS.get((domain, name), ()) if operator.since <= version]
    return known[-1] if known else None
