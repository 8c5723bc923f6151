"""Reductions along axes, cumulative ones, and selections of the largest elements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_rtx.onnx.ops.unsigned import narrow, widen, widened
from torch_rtx.onnx.registry import Numbers, op

Reduction = Callable[[Tensor, list[int]], Tensor]  # along axes that stay, with size 1


def _integral(function: Reduction) -> Reduction:
    """A reduction that is computed on floating point values; integers are rounded to zero."""

    def run(x: Tensor, axes: list[int]) -> Tensor:
        return function(x, axes) if x.is_floating_point() else function(x.double(), axes).to(x.dtype)

    return run


def _sum(x: Tensor, axes: list[int]) -> Tensor:
    return torch.sum(x, axes, keepdim=True, dtype=x.dtype)


def _prod(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = torch.prod(x, axis, keepdim=True, dtype=x.dtype)
    return x


def _extreme(name: str) -> Reduction:
    function = torch.amax if name == "ReduceMax" else torch.amin

    def run(x: Tensor, axes: list[int]) -> Tensor:
        if not _empty(x, axes):
            return function(x, axes, keepdim=True)
        shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        return torch.full(shape, _neutral(x.dtype, name == "ReduceMax"), dtype=x.dtype, device=x.device)

    return run


def _neutral(dtype: torch.dtype, lowest: bool) -> float:
    """The extreme of no values."""
    if dtype.is_floating_point:
        return -torch.inf if lowest else torch.inf
    if dtype is torch.bool:
        return not lowest
    return torch.iinfo(dtype).min if lowest else torch.iinfo(dtype).max


def _empty(x: Tensor, axes: list[int]) -> bool:
    return any(isinstance(x.shape[axis], int) and x.shape[axis] == 0 for axis in axes)


def _log_sum_exp(x: Tensor, axes: list[int]) -> Tensor:
    return _sum(x.exp(), axes).log() if _empty(x, axes) else torch.logsumexp(x, axes, keepdim=True)


REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": _sum,
    "ReduceProd": _prod,
    "ReduceMax": _extreme("ReduceMax"),
    "ReduceMin": _extreme("ReduceMin"),
    "ReduceMean": _integral(lambda x, axes: torch.mean(x, axes, keepdim=True)),
    "ReduceL1": lambda x, axes: _sum(x.abs(), axes),
    "ReduceL2": _integral(lambda x, axes: torch.linalg.vector_norm(x, 2, axes, keepdim=True)),
    "ReduceLogSum": _integral(lambda x, axes: _sum(x, axes).log()),
    "ReduceLogSumExp": _integral(_log_sum_exp),
    "ReduceSumSquare": lambda x, axes: _sum(x * x, axes),
}


def _reduce(function: Reduction, x: Tensor, axes: Numbers | None, keepdims: int, order: bool) -> Tensor:
    """None: along all axes. An empty list: each element by itself."""
    wide = widen(x, order=order)
    if x.dim() == 0 or (axes is not None and not axes):
        return narrow(function(wide.unsqueeze(-1), [x.dim()]).squeeze(-1), x.dtype, order=order)
    places = sorted({axis % x.dim() for axis in (range(x.dim()) if axes is None else axes)})
    result = narrow(function(wide, places), x.dtype, order=order)
    return result if keepdims else result.squeeze(places)


def _declare(name: str, function: Reduction) -> None:
    order = name in ("ReduceMax", "ReduceMin")

    @op(name, since=13 if name == "ReduceSum" else 18, ints=("axes",))
    def run(x: Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        return _reduce(function, x, axes or ([] if noop_with_empty_axes else None), keepdims, order)

    @op(name)
    def legacy(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
        return _reduce(function, x, axes or None, keepdims, order)


for _name, _function in REDUCTIONS.items():
    _declare(_name, _function)


def _arg(function: Callable[..., Tensor], x: Tensor, axis: int, keepdims: int, last: int) -> Tensor:
    x = widen(x, order=True)
    if not last:
        return function(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=bool(keepdims))


@op("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the largest element along an axis is: the first of several, or the last."""
    return _arg(torch.argmax, x, axis, keepdims, select_last_index)


@op("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Where the smallest element along an axis is: the first of several, or the last."""
    return _arg(torch.argmin, x, axis, keepdims, select_last_index)


def _cumulate(
    function: Callable[[Tensor, int], Tensor], x: Tensor, axis: int, first: int, exclusive: int, reverse: int
) -> Tensor:
    x = x.flip(axis) if reverse else x
    if exclusive:
        start = torch.full_like(x.narrow(axis, 0, 1), first)
        x = torch.cat([start, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    result = function(x, axis)
    return result.flip(axis) if reverse else result


@op("CumSum", ints=("axis",))
def cum_sum(x: Tensor, axis: Numbers, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sums of all elements up to each, or of those before each."""
    (place,) = axis
    sums = widened(
        lambda wide: _cumulate(lambda v, at: v.cumsum(at, dtype=v.dtype), wide, int(place), 0, exclusive, reverse)
    )
    return sums(x)


@op("CumProd", ints=("axis",))
def cum_prod(x: Tensor, axis: Numbers, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Products of all elements up to each, or of those before each."""
    (place,) = axis
    products = widened(
        lambda wide: _cumulate(lambda v, at: v.cumprod(at, dtype=v.dtype), wide, int(place), 1, exclusive, reverse)
    )
    return products(x)


@op("TopK", since=10, ints=("k",))
def top_k(x: Tensor, k: Numbers, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The `k` largest or smallest elements along an axis and where they are; of equal ones the first.

    `torch.topk` takes any of equal ones.
    """
    values, places = torch.sort(widen(x, order=True), dim=axis, descending=bool(largest), stable=True)
    return narrow(values.narrow(axis, 0, k[0]), x.dtype, order=True), places.narrow(axis, 0, k[0])


@op("TopK")
def top_k_attribute(x: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """TopK with the number as an attribute."""
    return top_k(x, [k], axis=axis)
