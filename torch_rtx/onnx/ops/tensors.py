"""Operators that arrange the elements of tensors, and those that make tensors of sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.dtypes import dtype_of
from torch_rtx.onnx.ops.unsigned import by_bits, narrow, widen
from torch_rtx.onnx.registry import Numbers, op


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1; a symbolic one is not, without a guard on it."""
    return isinstance(size, int) and size == 1


@op("Reshape", since=5, ints=("sizes",))
@by_bits
def reshape(x: Tensor, sizes: Numbers, *, allowzero: int = 0) -> Tensor:
    """`x` in another shape: 0 keeps a size unless `allowzero`, -1 takes what is left."""
    copied = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size == 0 and not allowzero]
    whole = [x.shape[axis] if axis in copied else size for axis, size in enumerate(sizes)]
    if -1 in whole and any(
        isinstance(size, int) and size == 0 for size in x.shape
    ):  # torch can't divide by no elements
        given = math.prod(size for axis, size in enumerate(whole) if axis not in copied and size != -1)
        left = math.prod(size for axis, size in enumerate(x.shape) if axis not in copied) // max(given, 1)
        whole = [left if size == -1 else size for size in whole]
    return x.reshape(whole)


@op("Reshape")
def reshape_attribute(x: Tensor, *, shape: list[int], consumed_inputs: Any = None) -> Tensor:
    """Reshape with the sizes as an attribute."""
    return reshape(x, shape)


@op("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix whose rows are the axes before `axis`."""
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Transpose")
def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    """Axes in another order; without one reversed."""
    return x.permute(list(reversed(range(x.dim()))) if perm is None else perm)


@op("Squeeze", since=13, ints=("axes",))
def squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    """`x` without axes of size 1: those that are named, or all."""
    if axes is None:
        return x.squeeze([axis for axis, size in enumerate(x.shape) if is_one(size)])
    for axis in axes:
        if isinstance(x.shape[axis], int) and x.shape[axis] != 1:
            raise OnnxError(f"axis {axis} of shape {tuple(x.shape)} has not the size 1")
    return x.squeeze([int(axis) for axis in axes])


@op("Squeeze")
def squeeze_attribute(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Squeeze with its axes as an attribute."""
    return squeeze(x, axes)


@op("Unsqueeze", since=13, ints=("axes",))
def unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    """`x` with axes of size 1, which the axes of the result are named for."""
    rank = x.dim() + len(axes)
    for axis in sorted(int(axis) % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("Unsqueeze")
def unsqueeze_attribute(x: Tensor, *, axes: list[int]) -> Tensor:
    """Unsqueeze with its axes as an attribute."""
    return unsqueeze(x, axes)


@op("Concat")
@by_bits
def concat(*xs: Tensor, axis: int = 1) -> Tensor:
    """Tensors one after another along an axis."""
    return torch.cat(xs, axis)


@op("Split", since=13, ints=("sizes",))
@by_bits
def split_sizes(
    x: Tensor, sizes: Numbers | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> tuple[Tensor, ...]:
    """Parts of `x` along an axis, of the sizes that are given, or equal but for a smaller last one."""
    count, length = num_outputs or outputs, x.shape[axis]
    if not sizes:
        part = (length + count - 1) // count
        sizes = [part] * (count - 1) + [length - part * (count - 1)]
    return torch.split_with_sizes(x, list(sizes), axis)


@op("Split")
def split_attribute(x: Tensor, *, split: list[int] | None = None, axis: int = 0, outputs: int) -> tuple[Tensor, ...]:
    """Split with its sizes as an attribute."""
    return split_sizes(x, split, axis=axis, outputs=outputs)


def _slice(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    if step == 1 and isinstance(start, torch.SymInt) and free_unbacked_symbols(start):
        size = (end - start).node.maybe_as_int()
        if size is not None and size > 0:  # as of `x[i : i + 1]`, where only a run knows i
            torch._check(start >= 0)
            return x.narrow(axis, start, size)
    if step > 0:
        return torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    # From the other end, where what counts from the end counts from the start.
    length = x.shape[axis]
    first, last = (
        -1 - place if isinstance(place, int) and place < 0 else torch.sym_max(length - 1 - place, 0)
        for place in (start, end)
    )
    first = torch.sym_min(first, length - 1) if isinstance(first, int) and first > 0 else first
    return torch.ops.aten.slice.Tensor(x.flip(axis), axis, first, last, -step)


@op("Slice", since=10, ints=("starts", "ends", "axes", "steps"))
@by_bits
def slice_(
    x: Tensor,
    starts: Numbers,
    ends: Numbers,
    axes: Numbers | None = None,
    steps: Numbers | None = None,
) -> Tensor:
    """Elements from `starts` to before `ends`, of `steps`; negative places count from the end."""
    places = range(len(starts)) if axes is None else axes
    for axis, start, end, step in zip(places, starts, ends, steps or [1] * len(starts), strict=True):
        x = _slice(x, int(axis), start, end, int(step))
    return x


@op("Slice")
def slice_attributes(x: Tensor, *, starts: list[int], ends: list[int], axes: list[int] | None = None) -> Tensor:
    """Slice with its places as attributes."""
    return slice_(x, starts, ends, axes)


@op("Expand", ints=("sizes",))
@by_bits
def expand(x: Tensor, sizes: Numbers) -> Tensor:
    """`x` broadcast with a shape, in both directions."""
    x = x[(None,) * max(len(sizes) - x.dim(), 0)]
    whole: list[Any] = list(x.shape)
    for axis, size in enumerate(sizes, x.dim() - len(sizes)):
        if is_one(whole[axis]):
            whole[axis] = size
        elif isinstance(size, int) and size != 1 and isinstance(whole[axis], int) and size != whole[axis]:
            raise OnnxError(f"shape {tuple(x.shape)} can't be broadcast with {list(sizes)}")
    return x.expand(whole)


@op("Tile", since=6, ints=("repeats",))
@by_bits
def tile(x: Tensor, repeats: Numbers) -> Tensor:
    """`x`, repeated along each axis."""
    return x.repeat(list(repeats))


@op("Tile", ints=("tiles", "axis"))
def tile_axis(x: Tensor, tiles: Numbers, axis: Numbers) -> Tensor:
    """`x`, repeated along one axis."""
    return x.repeat([int(tiles[0]) if place == int(axis[0]) % x.dim() else 1 for place in range(x.dim())])


def _padded_places(mode: str, before: Any, after: Any, length: Any, device: torch.device) -> Tensor:
    """For each place of a padded axis, the one of the axis that it shows."""
    places = torch.arange(-before, length + after, device=device)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return torch.remainder(places, length)
    if mode != "reflect":
        raise OnnxError(f"unknown mode {mode!r}")
    period: Any = torch.sym_max(2 * (length - 1), 1)
    places = torch.remainder(places, period)
    return torch.where(places >= length, period - places, places)


def _pad(x: Tensor, pads: Numbers, mode: str, value: float, axes: Numbers | None) -> Tensor:
    axes = range(x.dim()) if axes is None else [int(axis) % x.dim() for axis in axes]
    both = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    both = {axis: pair for axis, pair in both.items() if any(not isinstance(size, int) or size for size in pair)}
    if mode == "constant":
        flat = [size for axis in reversed(range(x.dim())) for size in both.get(axis, (0, 0))]
        return F.pad(x, flat, value=value) if both else x
    for axis, pair in both.items():
        crop = [min(size, 0) if isinstance(size, int) else 0 for size in pair]
        x = x.narrow(axis, -crop[0], x.shape[axis] + crop[0] + crop[1])
        before, after = pair[0] - crop[0], pair[1] - crop[1]
        x = x.index_select(axis, _padded_places(mode, before, after, x.shape[axis], x.device))
    return x


@op("Pad", since=11, ints=("pads", "constant_value", "axes"))
def pad(
    x: Tensor,
    pads: Numbers,
    constant_value: Numbers | None = None,
    axes: Numbers | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """`x` with more elements before and after each axis, or with fewer."""
    value = constant_value[0] if constant_value else 0
    return narrow(_pad(widen(x), pads, mode, value, axes), x.dtype)


@op("Pad", since=2)
def pad_attributes(x: Tensor, *, pads: list[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Pad with its sizes as an attribute."""
    return _pad(x, pads, mode, value, None)


@op("Pad")
def pad_legacy(x: Tensor, *, paddings: list[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Pad before opset 2."""
    return _pad(x, paddings, mode, value, None)


@op("CenterCropPad", ints=("sizes",))
def center_crop_pad(x: Tensor, sizes: Numbers, *, axes: list[int] | None = None) -> Tensor:
    """`x` cropped or padded with zeros to other sizes; its center stays, rounded to the left."""
    pads: list[list[Any]] = [[], []]
    places = range(x.dim()) if axes is None else axes
    for axis, size in zip(places, sizes, strict=True):
        more = size - x.shape[axis]
        before = more // 2 if more >= 0 else -(-more // 2)
        pads[0].append(before)
        pads[1].append(more - before)
    return narrow(_pad(widen(x), pads[0] + pads[1], "constant", 0, places), x.dtype)


@op("ConstantOfShape", ints=("sizes",))
def constant_of_shape(sizes: Numbers, *, value: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """A tensor of one value, by default the float32 number 0."""
    return torch.zeros(list(sizes), device=device) if value is None else value.reshape(()).expand(list(sizes))


@op("Range", ints=("start", "limit", "delta"))
def range_(
    start: Numbers,
    limit: Numbers,
    delta: Numbers,
    *,
    stash_type: int = 1,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> Tensor:
    """start, start + delta, ... before `limit`, in the inputs' dtype."""
    first, end, step = start[0], limit[0], delta[0]
    if isinstance(step, int | float) and step == 0:
        raise OnnxError("delta is 0")
    dtype = dtypes[0]
    if not dtype.is_floating_point:
        count = torch.sym_max(-((first - end) // step), 0)
        return (torch.arange(count, device=device) * step + first).to(dtype)
    count = torch.sym_max(torch.sym_int(math.ceil((end - first) / step)), 0)
    exact = torch.float32 if dtype.itemsize == 2 else dtype
    return (torch.arange(count, device=device).to(exact) * step + first).to(dtype)


@op("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on a diagonal, zeros elsewhere, in the shape of a matrix."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return (columns - rows[:, None] == k).to(x.dtype if dtype is None else dtype_of(dtype))


@op("Trilu", ints=("k",))
@by_bits
def trilu(x: Tensor, k: Numbers | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of matrices, zeros elsewhere."""
    diagonal = k[0] if k else 0
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """(N, C * blocksize ** 2, H, W) as (N, C, H * blocksize, W * blocksize)."""
    n, c, h, w = x.shape
    block = (blocksize, blocksize)
    if mode == "DCR":
        parts = x.reshape(n, *block, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    elif mode == "CRD":
        parts = x.reshape(n, c // blocksize**2, *block, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        raise OnnxError(f"mode is {mode!r}, not DCR or CRD")
    return parts.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """(N, C, H * blocksize, W * blocksize) as (N, C * blocksize ** 2, H, W)."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.permute(order).reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@op("Col2Im", ints=("image", "block"))
def col2im(
    x: Tensor,
    image: Numbers,
    block: Numbers,
    *,
    strides: list[int] | None = None,
    pads: list[int] | None = None,
    dilations: list[int] | None = None,
) -> Tensor:
    """The sum of blocks (N, C * prod(block), L) at their places of an image (N, C, *image)."""
    rank = len(image)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    whole = [size + pads[axis] + pads[axis + rank] for axis, size in enumerate(image)]
    crop = [-size for axis in reversed(range(rank)) for size in (pads[axis], pads[axis + rank])]
    if rank == 2:
        result = F.fold(x, tuple(whole), tuple(block), tuple(dilations), 0, tuple(strides))
        return F.pad(result, crop) if any(crop) else result
    flat: Any = torch.zeros([1] * 2 * rank, dtype=torch.int64, device=x.device)
    for axis in range(rank):
        steps = (whole[axis] - dilations[axis] * (block[axis] - 1) - 1) // strides[axis] + 1
        offsets = torch.arange(block[axis], device=x.device)[:, None] * dilations[axis]
        places = offsets + torch.arange(steps, device=x.device) * strides[axis]
        view = [1] * 2 * rank
        view[axis], view[axis + rank] = block[axis], steps
        flat = flat * whole[axis] + places.reshape(view)
    columns = x.reshape(x.shape[0], x.shape[1] // math.prod(block), -1)
    empty = columns.new_zeros((*columns.shape[:2], math.prod(whole)))
    result = empty.index_add(2, flat.reshape(-1), columns).reshape(*columns.shape[:2], *whole)
    return F.pad(result, crop) if any(crop) else result
