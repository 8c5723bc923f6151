"""Elements by their places: gathered, scattered, selected by their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.ops.unsigned import by_bits, narrow, widen
from torch_rtx.onnx.registry import Numbers, op

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(places: Tensor, length: Any) -> Tensor:
    """Places that count from the start."""
    places = places.to(torch.int64)
    return torch.where(places < 0, places + length, places)


@op("Gather")
@by_bits
def gather(x: Tensor, indices: Tensor, *, axis: int = 0, known: Sequence[Any]) -> Tensor:
    """Slices of `x` at `indices` of an axis, whose place their axes take. One that is known is a view."""
    match known[1]:
        case int() | torch.SymInt() as place:
            return x.select(axis, place)
        case [int() | torch.SymInt() as place]:
            return x.select(axis, place).unsqueeze(axis % x.dim())
    before: tuple[Any, ...] = (slice(None),) * (axis % x.dim())
    # A tensor without axes would be read, to be a number.
    return x[(*before, indices)] if indices.dim() else x[(*before, indices.reshape(1))].squeeze(axis)


@op("GatherElements")
@by_bits
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """For each element of `indices` the one of `x` that it names on an axis, at its own places of the others."""
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _leading(x: Tensor, batch: int, rank: int) -> list[Tensor]:
    """Places of the batch's axes that broadcast with `rank` axes."""
    shape = [-1] + [1] * (rank - 1)
    return [torch.arange(x.shape[axis], device=x.device).reshape(shape[: rank - axis]) for axis in range(batch)]


@op("GatherND")
@by_bits
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices of `x` at vectors of places (..., k), which name the axes behind those of the batch."""
    places = indices.unbind(-1)
    batch = _leading(x, batch_dims, indices.dim() - 1)
    return x[(*batch, *places)] if batch or places else x.expand(*indices.shape[:-1], *x.shape)


@op("Scatter", "ScatterElements")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """`x` with elements of `updates` at the places that `indices` name on an axis, or reduced with them."""
    places = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return by_bits(lambda own, new: own.scatter(axis, places, new))(x, updates)
    return _scatter_reduced(x, axis, places, updates, reduction)


def _scatter_reduced(x: Tensor, axis: int, places: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction not in REDUCTIONS:
        raise OnnxError(f"reduction {reduction!r} is none of none, {', '.join(REDUCTIONS)}")
    order = reduction in ("max", "min")
    wide, new = widen(x, order=order), widen(updates, order=order)
    return narrow(wide.scatter_reduce(axis, places, new, REDUCTIONS[reduction]), x.dtype, order=order)


@op("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """`x` with slices of `updates` at vectors of places (..., k), or reduced with them."""
    if reduction == "none":
        return by_bits(lambda own, new: own.index_put(indices.unbind(-1), new))(x, updates)
    depth, rest = indices.shape[-1], x.shape[indices.shape[-1] :]
    flat = torch.zeros_like(indices[..., 0])
    for axis in range(depth):
        flat = flat * x.shape[axis] + _wrapped(indices[..., axis], x.shape[axis])
    rows, new = x.reshape(-1, rest.numel()), updates.reshape(-1, rest.numel())
    places = flat.reshape(-1, 1).expand(new.shape)
    return _scatter_reduced(rows, 0, places, new, reduction).reshape(x.shape)


@op("TensorScatter")
def tensor_scatter(
    x: Tensor, update: Tensor, write: Tensor | None = None, *, mode: str = "linear", axis: int = -2
) -> Tensor:
    """A cache with `update` at the places of an axis from `write` on, one for each sample; "circular" wraps around."""
    axis = axis % x.dim()
    places = torch.arange(update.shape[axis], device=x.device).expand(x.shape[0], -1)
    places = places if write is None else places + write[:, None]
    if mode == "circular":
        places = torch.remainder(places, x.shape[axis])
    shape = [1] * x.dim()
    shape[0], shape[axis] = places.shape
    return scatter_elements(x, places.reshape(shape).expand(update.shape), update, axis=axis)


@op("OneHot", ints=("depth",))
def one_hot(indices: Tensor, depth: Numbers, values: Tensor, *, axis: int = -1) -> Tensor:
    """values[1] where the place on a new axis is the index, values[0] elsewhere."""
    count = int(depth[0]) if isinstance(depth[0], float) else depth[0]
    axis = axis % (indices.dim() + 1)
    places = torch.arange(count, device=indices.device).reshape([-1] + [1] * (indices.dim() - axis))
    off, on = values.unbind()
    return torch.where(places == _wrapped(indices, count).unsqueeze(axis), on, off)


@op("NonZero")
def non_zero(x: Tensor) -> Tensor:
    """Places of the elements that are not 0, (rank, count)."""
    return torch.nonzero(widen(x)).t()


@op("Compress")
@by_bits
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Slices of an axis, or elements, where `condition` is true."""
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, torch.nonzero(condition)[:, 0])


@op("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, ...]:
    """Different elements or slices of an axis; where each is first, which each element is, and how many there are."""
    wide, at = widen(x, order=True), 0 if axis is None else axis
    if axis is None:
        wide = wide.reshape(-1)
        values, inverse, counts = torch.unique(wide, return_inverse=True, return_counts=True)
    else:
        values, inverse, counts = torch.unique(wide, dim=axis, return_inverse=True, return_counts=True)
    places = torch.arange(wide.shape[at], device=x.device)
    first = torch.zeros_like(counts).scatter_reduce(0, inverse, places, "amin", include_self=False)
    if not sorted:
        order = torch.argsort(first)
        rank = torch.argsort(order)
        values, first, counts, inverse = values.index_select(at, order), first[order], counts[order], rank[inverse]
    return narrow(values, x.dtype, order=True), first, inverse, counts


@op("ReverseSequence")
@by_bits
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first elements of each sequence in reverse, as many as its length."""
    shape = [1] * x.dim()
    shape[time_axis] = -1
    time = torch.arange(x.shape[time_axis], device=x.device).reshape(shape)
    shape = [1] * x.dim()
    shape[batch_axis] = -1
    lengths = lengths.reshape(shape)
    places = torch.where(time < lengths, lengths - 1 - time, time)
    return torch.gather(x, time_axis, places.expand(x.shape))
