"""Values that the host knows: sizes of tensors, and what a model computes from them to shape other tensors.

A `Host` holds Python numbers, symbolic ones among them, in a numpy array of objects. An operator in `HOST_OPS` whose
inputs are all known runs here and launches nothing, so that `Reshape(x, Concat(Shape(x)[0], -1))` is `x.reshape(n, -1)`
with a symbolic n in a capture. An operator here may decline, by None; its tensor operator then runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.dtypes import dtype_of
from torch_rtx.onnx.registry import Ints, values_of

LIMIT = 64  # elements: what is larger is data, not a shape
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_BITS = {torch.int32: 32, torch.int64: 64}
_ROUNDED: dict[torch.dtype, Any] = {torch.float16: np.float16, torch.float32: np.float32}
KNOWN_DTYPES = {torch.bool, *_BITS, *_ROUNDED, torch.float64}
# Their first input is what they move, the others say where to.
MOVES = {"Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"}
Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Host:
    """Numbers of the type `dtype`; `array` has dtype object and holds Python numbers or symbolic ones."""

    array: np.ndarray
    dtype: torch.dtype

    def tensor(self, device: torch.device, constant: bool = True) -> Tensor:
        """The numbers as a tensor: a constant, if it may be one, or made by operators."""
        values = self.array.ravel().tolist()
        if not values or (constant and not any(isinstance(value, _SYMBOLIC) for value in values)):
            if len({repr(value) for value in values}) == 1:  # a compiler knows what that makes
                return torch.full(self.array.shape, values[0], dtype=self.dtype, device=device)
            return torch.tensor(self.array.tolist(), dtype=self.dtype, device=device).reshape(self.array.shape)
        parts = [torch.scalar_tensor(_number(value), dtype=self.dtype, device=device) for value in values]
        return torch.stack(parts).reshape(self.array.shape)

    def numbers(self) -> list[Any]:
        """The numbers in a flat list."""
        return self.array.ravel().tolist()


def known(values: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> Host:
    """Numbers in row-major order as a Host."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return Host(array.reshape(shape), dtype)


def of_tensor(tensor: Tensor) -> Host:
    """The values of a tensor that is read now."""
    return known(tensor.reshape(-1).tolist(), tensor.shape, tensor.dtype)


def fits(tensor: Tensor) -> bool:
    """Whether a constant may take part in the arithmetic of sizes."""
    return tensor.dtype in KNOWN_DTYPES and tensor.numel() <= LIMIT and tensor.dim() <= 2


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _number(value: Any) -> Any:
    return torch.sym_ite(value, 1, 0) if isinstance(value, torch.SymBool) else value


def _fit(value: Any, dtype: torch.dtype) -> Any:
    """A result as its type holds it: integers wrap, floats are rounded. Symbolic numbers are sizes, and far from it."""
    if type(value) is int and dtype in _BITS:
        half = 1 << (_BITS[dtype] - 1)
        return (value + half) % (2 * half) - half
    if type(value) is float and dtype in _ROUNDED:
        return float(_ROUNDED[dtype](value))
    return value


def _quotient(a: Any, b: Any) -> Any:
    """Division that truncates, of integers."""
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def _divide(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, float | torch.SymFloat) else _quotient(a, b)


def _sqrt(value: Any) -> Any:
    if isinstance(value, torch.SymFloat):
        return value**0.5
    return math.sqrt(value) if value >= 0 else math.nan


def _cast(value: Any, dtype: torch.dtype) -> Any:
    value = _number(value)
    if dtype is torch.bool:
        return value != 0
    return torch.sym_float(value) if dtype.is_floating_point else torch.sym_int(value)


def _map(function: Callable[..., Any], dtype: torch.dtype, *hosts: Host) -> Host:
    """`function` of the numbers of each position, with broadcasting."""
    arrays = np.broadcast_arrays(*(host.array for host in hosts))
    rows = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    return known([_fit(function(*row), dtype) for row in rows], arrays[0].shape, dtype)


def _fixed(host: Host | None) -> list[int] | None:
    """The numbers, if all are plain integers; those of an input that is missing are none."""
    numbers = [] if host is None else host.numbers()
    return numbers if all(type(number) is int for number in numbers) else None


# ---- operators -------------------------------------------------------------------------------------------------------

HostOp = Callable[..., "Host | tuple[Host, ...] | None"]
HOST_OPS: dict[str, HostOp] = {}


def _host(*names: str) -> Callable[[HostOp], HostOp]:
    def declare(function: HostOp) -> HostOp:
        HOST_OPS.update(dict.fromkeys(names, function))
        return function

    return declare


def _elementwise(name: str, function: Callable[..., Any], dtype: torch.dtype | None = None) -> None:
    def run(attributes: Attributes, *hosts: Host) -> Host | None:
        try:
            return _map(function, dtype or hosts[0].dtype, *hosts)
        except ZeroDivisionError:
            return None  # what a tensor of the type gives

    HOST_OPS[name] = run


_SAME: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _divide,
    "Neg": operator.neg,
    "Abs": abs,
    "Floor": lambda x: torch.sym_float(math.floor(x)),
    "Ceil": lambda x: torch.sym_float(math.ceil(x)),
    "Sqrt": _sqrt,
    "Identity": lambda x: x,
}
for _name, _function in _SAME.items():
    _elementwise(_name, _function)
_LOGICAL: dict[str, Callable[..., Any]] = {
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Not": lambda a: not a,
}
for _name, _function in _LOGICAL.items():
    _elementwise(_name, _function, torch.bool)


@_host("Min")
def _min(attributes: Attributes, *hosts: Host) -> Host:
    return _map(lambda *row: _fold(torch.sym_min, row), hosts[0].dtype, *hosts)


@_host("Max")
def _max(attributes: Attributes, *hosts: Host) -> Host:
    return _map(lambda *row: _fold(torch.sym_max, row), hosts[0].dtype, *hosts)


def _fold(function: Callable[[Any, Any], Any], row: Sequence[Any]) -> Any:
    result = row[0]
    for value in row[1:]:
        result = function(result, value)
    return result


@_host("Mod")
def _mod(attributes: Attributes, a: Host, b: Host) -> Host | None:
    if a.dtype.is_floating_point or 0 in b.numbers():
        return None
    if attributes.get("fmod", 0):
        return _map(lambda x, y: x - _quotient(x, y) * y, a.dtype, a, b)
    return _map(operator.mod, a.dtype, a, b)


@_host("Where")
def _where(attributes: Attributes, condition: Host, a: Host, b: Host) -> Host:
    return _map(lambda c, x, y: x if c else y, a.dtype, condition, a, b)


@_host("Cast")
def _cast_to(attributes: Attributes, x: Host) -> Host | None:
    dtype = dtype_of(attributes["to"])
    numbers = [number for number in x.numbers() if isinstance(number, float)]
    if dtype not in KNOWN_DTYPES or not all(map(math.isfinite, numbers)):
        return None
    return _map(lambda value: _cast(value, dtype), dtype, x)


@_host("Gather")
def _gather(attributes: Attributes, x: Host, indices: Host) -> Host | None:
    positions, axis = _fixed(indices), attributes.get("axis", 0)
    if positions is None:
        return None
    size = x.array.shape[axis]
    wrong = [position for position in positions if not -size <= position < size]
    if wrong:
        raise OnnxError(f"index {wrong[0]} is out of range: axis {axis} of the data has {size} elements")
    return Host(_objects(np.take(x.array, indices.array.astype(np.int64), axis)), x.dtype)


def _objects(array: Any) -> np.ndarray:
    """An array of objects also where numpy hands out a lone element."""
    if isinstance(array, np.ndarray):
        return array
    whole = np.empty((), dtype=object)
    whole[()] = array
    return whole


@_host("Slice")
def _slice(attributes: Attributes, x: Host, *inputs: Host | None) -> Host | None:
    given = [*map(_fixed, inputs)] if inputs else [attributes.get(name, []) for name in ("starts", "ends", "axes")]
    starts, ends, axes, steps = [*given, [], []][:4]
    if starts is None or ends is None or axes is None or steps is None:
        return None
    index = [slice(None)] * x.array.ndim
    steps = steps or [1] * len(starts)
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return Host(x.array[tuple(index)], x.dtype)


@_host("Concat")
def _concat(attributes: Attributes, *hosts: Host) -> Host:
    return Host(np.concatenate([host.array for host in hosts], attributes["axis"]), hosts[0].dtype)


@_host("Split")
def _split(attributes: Attributes, x: Host, sizes: Host | None = None, *, outputs: int) -> tuple[Host, ...] | None:
    axis, given = attributes.get("axis", 0), attributes.get("split") or _fixed(sizes)
    if given is None:
        return None
    if not given:
        each = -(-x.array.shape[axis] // attributes.get("num_outputs", outputs))
        given = [each] * (outputs - 1)
    cuts = np.cumsum(given[: outputs - 1]).astype(int)
    return tuple(Host(part, x.dtype) for part in np.split(x.array, cuts, axis))


def _axes(attributes: Attributes, axes: Host | None) -> list[int] | None:
    """The axes from the attribute or the input; an empty list: none are given; None: they are unknown."""
    return list(attributes["axes"]) if "axes" in attributes else _fixed(axes)


@_host("Unsqueeze")
def _unsqueeze(attributes: Attributes, x: Host, axes: Host | None = None) -> Host | None:
    where = _axes(attributes, axes)
    return None if where is None else Host(np.expand_dims(x.array, tuple(where)), x.dtype)


@_host("Squeeze")
def _squeeze(attributes: Attributes, x: Host, axes: Host | None = None) -> Host | None:
    where = _axes(attributes, axes)
    return None if where is None else Host(_objects(np.squeeze(x.array, tuple(where) or None)), x.dtype)


@_host("Transpose")
def _transpose(attributes: Attributes, x: Host) -> Host:
    return Host(x.array.transpose(attributes.get("perm")), x.dtype)


@_host("Reshape")
def _reshape(attributes: Attributes, x: Host, shape: Host | None = None) -> Host | None:
    sizes = attributes.get("shape") if shape is None else _fixed(shape)
    if sizes is None:
        return None
    keep = not attributes.get("allowzero", 0)
    return Host(x.array.reshape([x.array.shape[i] if n == 0 and keep else n for i, n in enumerate(sizes)]), x.dtype)


@_host("Expand")
def _expand(attributes: Attributes, x: Host, shape: Host) -> Host | None:
    sizes = _fixed(shape)
    if sizes is None or math.prod(sizes) > LIMIT:
        return None
    return Host(np.broadcast_to(x.array, np.broadcast_shapes(x.array.shape, tuple(sizes))), x.dtype)


@_host("ConstantOfShape")
def _constant_of_shape(attributes: Attributes, shape: Host) -> Host | None:
    sizes, value = _fixed(shape), attributes.get("value")
    dtype = torch.float32 if value is None else value.dtype
    if sizes is None or len(sizes) > 1 or math.prod(sizes) > LIMIT or dtype not in _BITS:
        return None
    number = 0 if value is None else values_of(value).item()
    return known([number] * math.prod(sizes), sizes, dtype)


@_host("Range")
def _range(attributes: Attributes, *bounds: Host) -> Host | None:
    numbers = [number for bound in bounds for number in _fixed(bound) or ()]
    if len(numbers) != 3 or numbers[2] == 0 or len(range(*numbers)) > LIMIT:
        return None
    values = list(range(*numbers))
    return known(values, [len(values)], bounds[0].dtype)


def _reduction(name: str, function: Callable[[Any, Any], Any]) -> None:
    def reduce(attributes: Attributes, x: Host, axes: Host | None = None) -> Host | None:
        where = _axes(attributes, axes)
        if where is None or x.array.size == 0 or x.dtype is torch.bool:
            return None
        if not where and attributes.get("noop_with_empty_axes", 0):
            return x
        array = x.array
        for axis in sorted({axis % array.ndim for axis in where or range(array.ndim)}, reverse=True):
            array = _objects(np.frompyfunc(function, 2, 1).reduce(array, axis))
            array = np.expand_dims(array, axis) if attributes.get("keepdims", 1) else array
        return known([_fit(value, x.dtype) for value in array.ravel().tolist()], array.shape, x.dtype)

    HOST_OPS[name] = reduce


for _name, _function in {
    "ReduceProd": operator.mul,
    "ReduceSum": operator.add,
    "ReduceMin": torch.sym_min,
    "ReduceMax": torch.sym_max,
}.items():
    _reduction(_name, _function)


# ---- from tensors to what the host knows -----------------------------------------------------------------------------


def sizes(attributes: Attributes, x: Tensor | Host) -> Host:
    """ONNX's Shape: the sizes of the axes from `start` to `end`."""
    shape = list((x.array if isinstance(x, Host) else x).shape)[attributes.get("start", 0) : attributes.get("end")]
    return known(shape, [len(shape)], torch.int64)


def size(attributes: Attributes, x: Tensor | Host) -> Host:
    """ONNX's Size: the number of elements."""
    return known([x.array.size if isinstance(x, Host) else _fold(operator.mul, (1, *x.shape))], [], torch.int64)


OF_TENSORS: dict[str, Callable[[Attributes, Tensor | Host], Host]] = {"Shape": sizes, "Size": size}


def integers(value: Tensor | Host | None) -> Ints | None:
    """A value as a list of numbers; a tensor is read, which in a capture makes symbols that depend on data."""
    if value is None:
        return None
    return value.numbers() if isinstance(value, Host) else value.reshape(-1).tolist()
