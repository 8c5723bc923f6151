"""Reductions, positions of extremes, and running sums. What is made of these, such as softmax and norms, is written out
by `reduction_rules`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch_rtx.dtypes import register
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.expressions import A, B, C, absolute, eq, exp, fmax, log, ne, sqrt, where
from torch_rtx.lowering.kernels.index import Index, product, ravel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    Iota,
    Scalar,
    Tensor,
    cast,
    number,
    pointwise,
    reduce,
    scan,
    squeeze,
)
from torch_rtx.lowering.kernels.ops.pointwise import floating, tensor
from torch_rtx.lowering.kernels.ops.registry import Types, op

Axes = int | Sequence[int] | None


def _axes(dim: Axes) -> list[int]:
    return [] if dim is None else [dim] if isinstance(dim, int) else list(dim)


def _wide(self: Tensor, out: Types) -> Tensor:
    """`self` in the dtype to sum in."""
    return cast(self, register(out[0].dtype))


def count_of(self: Tensor, axes: Sequence[int]) -> Index:
    """The number of elements along axes; of all, if there are none."""
    return product(self.shape[axis] for axis in (axes or range(len(self.shape)))) if self.shape else ONE


def size_as(value: Index, dtype: str) -> Tensor:
    """A size as a float tensor."""
    return tensor(value, dtype) if value.number is None else number(float(value.number), dtype)


def mean_of(self: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean over axes, which stay with size 1; `self` is a float in its register's dtype."""
    total = reduce("sum", self, axes)
    return pointwise(A / B, self.dtype, total, size_as(count_of(self, axes), self.dtype))


def variance_of(self: Tensor, axes: Sequence[int], correction: float = 0) -> tuple[Tensor, Tensor]:
    """Variance and mean over axes, which stay with size 1. Two passes: the mean first, as nothing is lost that way."""
    mean = mean_of(self, axes)
    squares = pointwise((A - B) * (A - B), self.dtype, self, mean)
    count = size_as(count_of(self, axes), self.dtype)
    if correction:
        count = pointwise(fmax(A - B, 0.0), self.dtype, count, number(correction, self.dtype))
    return pointwise(A / B, self.dtype, reduce("sum", squares, axes), count), mean


def _finish(found: Tensor, axes: Sequence[int], keepdim: bool, out: Types, which: int = 0) -> Tensor:
    rank = len(found.shape)
    if not rank:
        return cast(found, out[which].dtype)
    wanted = {axis % rank for axis in axes} if axes else set(range(rank))
    return cast(found if keepdim else squeeze(found, wanted), out[which].dtype)


@op("sum.default", "sum.dim_IntList")
def sum_(self: Tensor, dim: Axes = None, keepdim: bool = False, dtype: str | None = None, *, out: Types) -> Tensor:
    """The sum over dimensions."""
    return _finish(reduce("sum", _wide(self, out), _axes(dim)), _axes(dim), keepdim, out)


@op("mean.default", "mean.dim")
def mean(self: Tensor, dim: Axes = None, keepdim: bool = False, dtype: str | None = None, *, out: Types) -> Tensor:
    """The mean over dimensions."""
    return _finish(mean_of(_wide(self, out), _axes(dim)), _axes(dim), keepdim, out)


@op("prod.default", "prod.dim_int")
def prod(self: Tensor, dim: Axes = None, keepdim: bool = False, dtype: str | None = None, *, out: Types) -> Tensor:
    """The product over dimensions."""
    return _finish(reduce("prod", _wide(self, out), _axes(dim)), _axes(dim), keepdim, out)


def _extreme(kind: str, self: Tensor, dim: Axes = (), keepdim: bool = False, *, out: Types) -> Tensor:
    if self.dtype == "bool":
        kind = {"max": "any", "min": "all"}[kind]
    return _finish(reduce(kind, self, _axes(dim)), _axes(dim), keepdim, out)


op("amax.default", "max.default")(partial(_extreme, "max"))
op("amin.default", "min.default")(partial(_extreme, "min"))


def _test(kind: str, self: Tensor, dim: Axes = None, keepdim: bool = False, *, out: Types) -> Tensor:
    return _finish(reduce(kind, tensor(self, "bool"), _axes(dim)), _axes(dim), keepdim, out)


op("any.default", "any.dim", "any.dims")(partial(_test, "any"))
op("all.default", "all.dim", "all.dims")(partial(_test, "all"))


# ---- positions of extremes, running sums -----------------------------------------------------------------------------


def _position(self: Tensor, extreme: Tensor, axes: Sequence[int]) -> Tensor:
    """Where `extreme` is in its row: the first place that has it, or the first NaN, if it is one. A second reduction
    instead of one over pairs: the row is in registers, or in the cache, and any loop over rows can do it."""
    rank = len(self.shape)
    if not rank:
        return number(0, "i32")
    wanted = sorted({axis % rank for axis in axes} if axes else range(rank))
    sizes = tuple(self.shape[axis] for axis in wanted)
    count = product(sizes)
    dtype = "i32" if (count.number or 1 << 31) < 1 << 31 else "i64"
    place = Iota(self.shape, dtype, lambda position: ravel(tuple(position[axis] for axis in wanted), sizes))
    here = pointwise(eq(A, B) | ne(A, A), "bool", self, extreme)
    found = pointwise(where(A, B, C), dtype, here, place, number(count, dtype))
    return reduce("min", found, wanted)


def _found(kind: str, self: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The extreme of each row, and where it is."""
    value = cast(self, register(self.dtype))
    logical = {"max": "any", "min": "all"}[kind]
    extreme = reduce(logical if value.dtype == "bool" else kind, value, axes)
    return extreme, _position(value, extreme, axes)


def _argument(kind: str, self: Tensor, dim: Axes = None, keepdim: bool = False, *, out: Types) -> Tensor:
    _, position = _found(kind, self, _axes(dim))
    return _finish(position, _axes(dim), keepdim, out)


op("argmax.default")(partial(_argument, "max"))
op("argmin.default")(partial(_argument, "min"))


def _with_position(kind: str, self: Tensor, dim: int, keepdim: bool = False, *, out: Types) -> tuple[Tensor, Tensor]:
    extreme, position = (_finish(part, [dim], keepdim, out, i) for i, part in enumerate(_found(kind, self, [dim])))
    return extreme, position


op("max.dim")(partial(_with_position, "max"))
op("min.dim")(partial(_with_position, "min"))


def _running(kind: str, self: Tensor, dim: int, dtype: str | None = None, *, out: Types) -> Tensor:
    return cast(scan(kind, _wide(self, out), dim), out[0].dtype)


op("cumsum.default")(partial(_running, "sum"))
op("cumprod.default")(partial(_running, "prod"))
op("logcumsumexp.default")(partial(_running, "logaddexp"))


def _extreme_so_far(kind: str, self: Tensor, dim: int, *, out: Types) -> tuple[Tensor, Tensor]:
    """The largest or smallest element up to each, and where it is: the last of equal ones. NaN is both."""
    value = cast(self, register(self.dtype))
    if value.dtype == "bool" or not self.shape:
        raise Unsupported("running extremes of truth values, or of a single number")
    running, axis = scan(kind, value, dim), dim % len(self.shape)
    place = Iota(self.shape, "i32", lambda position: position[axis])
    here = pointwise(eq(A, B) | ne(A, A), "bool", value, running)
    found = pointwise(where(A, B, C), "i32", here, place, number(0, "i32"))
    return cast(running, out[0].dtype), cast(scan("max", found, dim), "i64")


op("cummax.default")(partial(_extreme_so_far, "max"))
op("cummin.default")(partial(_extreme_so_far, "min"))


@op("var.correction")
def var(
    self: Tensor, dim: Axes = None, correction: Scalar | None = None, keepdim: bool = False, *, out: Types
) -> Tensor:
    """The variance over dimensions; by default unbiased."""
    floating(out)
    found, _ = variance_of(_wide(self, out), _axes(dim), _correction(correction))
    return _finish(found, _axes(dim), keepdim, out)


@op("std.correction")
def std(
    self: Tensor, dim: Axes = None, correction: Scalar | None = None, keepdim: bool = False, *, out: Types
) -> Tensor:
    """The standard deviation over dimensions."""
    floating(out)
    found, _ = variance_of(_wide(self, out), _axes(dim), _correction(correction))
    return _finish(pointwise(sqrt(A), found.dtype, found), _axes(dim), keepdim, out)


@op("var_mean.correction")
def var_mean(
    self: Tensor, dim: Axes = None, correction: Scalar | None = None, keepdim: bool = False, *, out: Types
) -> tuple[Tensor, Tensor]:
    """The variance and the mean over dimensions."""
    floating(out)
    both = variance_of(_wide(self, out), _axes(dim), _correction(correction))
    first, second = (_finish(part, _axes(dim), keepdim, out, which) for which, part in enumerate(both))
    return first, second


def _correction(correction: Scalar | None) -> float:
    if isinstance(correction, Index):
        raise Unsupported("a correction that is a dim")
    return 1.0 if correction is None else float(correction)


@op("linalg_vector_norm.default")
def vector_norm(
    self: Tensor, ord: Scalar = 2, dim: Axes = None, keepdim: bool = False, dtype: str | None = None, *, out: Types
) -> Tensor:
    """A norm of the elements as a vector: 1, 2 or infinite."""
    floating(out)
    value = pointwise(absolute(A), register(out[0].dtype), _wide(self, out))
    if ord == 2:
        total = reduce("sum", pointwise(A * A, value.dtype, value), _axes(dim))
        found = pointwise(sqrt(A), value.dtype, total)
    elif ord in (1, math.inf):
        found = reduce("sum" if ord == 1 else "max", value, _axes(dim))
    else:
        raise Unsupported(f"the norm {ord}")
    return _finish(found, _axes(dim), keepdim, out)


@op("logsumexp.default")
def logsumexp(self: Tensor, dim: Axes, keepdim: bool = False, *, out: Types) -> Tensor:
    """The logarithm of the sum of exponentials; infinite maxima are taken out of the difference."""
    floating(out)
    value = _wide(self, out)
    largest = reduce("max", value, _axes(dim))
    base = pointwise(where(eq(absolute(A), math.inf), 0.0, A), value.dtype, largest)
    total = reduce("sum", pointwise(exp(A - B), value.dtype, value, base), _axes(dim))
    return _finish(pointwise(log(A) + B, value.dtype, total, base), _axes(dim), keepdim, out)
