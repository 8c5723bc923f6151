"""Operators of images and boxes: sampling at places, pooling of regions, suppression of overlaps."""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.detection import suppressed
from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import Numbers, op

MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


@op("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, mode: str = "linear", padding_mode: str = "zeros", align_corners: int = 0
) -> Tensor:
    """Values of (N, C, d1, ...) at the places that (N, o1, ..., rank) names from -1 to 1, the last axis first."""
    if mode not in MODES or padding_mode not in ("zeros", "border", "reflection"):
        raise OnnxError(f"unknown mode {mode!r} or padding_mode {padding_mode!r}")
    dtype, rank = x.dtype, x.dim() - 2
    x = x if x.is_floating_point() else x.double()
    if rank == 1:  # a row of an image
        grid = torch.stack([grid[..., 0], torch.zeros_like(grid[..., 0])], -1)[:, None]
        result = grid_sample(x[:, :, None], grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)
        return result[:, :, 0].to(dtype)
    if rank > 3 or (rank == 3 and MODES[mode] == "bicubic"):
        result = _grid_sample_nd(x, grid.to(x.dtype), MODES[mode], padding_mode, align_corners)
    else:
        result = F.grid_sample(x, grid.to(x.dtype), MODES[mode], padding_mode, bool(align_corners))
    return result.to(dtype)


def _grid_sample_nd(x: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: int) -> Tensor:
    """For ranks that `F.grid_sample` lacks: the weighted sum of all neighbours along each axis."""
    per_axis = []
    for axis, unit in enumerate(reversed(grid.unbind(-1))):
        length = x.shape[axis + 2]
        place = (unit + 1) / 2 * (length - 1) if align_corners else ((unit + 1) * length - 1) / 2
        if mode == "nearest":
            neighbours, weights = torch.round(place)[..., None], torch.ones_like(place)[..., None]
        else:
            reach = 1 if mode == "bilinear" else 2
            neighbours = torch.floor(place)[..., None] + torch.arange(1 - reach, reach + 1, device=x.device)
            weights = _kernel(mode, neighbours - place[..., None])
        neighbours, inside = _padded(neighbours, length, padding_mode, align_corners)
        per_axis.append((neighbours, weights * inside))
    batch = torch.arange(x.shape[0], device=x.device).reshape(-1, *[1] * (grid.dim() - 2))
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for taps in product(*(range(weights.shape[-1]) for _, weights in per_axis)):
        places = [neighbours[..., tap] for tap, (neighbours, _) in zip(taps, per_axis, strict=True)]
        weight = reduce(torch.mul, (weights[..., tap] for tap, (_, weights) in zip(taps, per_axis, strict=True)))
        total = total + x.movedim(1, -1)[(batch, *places)] * weight.unsqueeze(-1)
    return total.movedim(-1, 1)


def _kernel(mode: str, distance: Tensor) -> Tensor:
    x, a = distance.abs(), -0.75
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))


def _padded(places: Tensor, length: Any, padding_mode: str, align_corners: int) -> tuple[Tensor, Tensor]:
    """The places of an axis that others stand for, and whether these have a value."""
    inside = torch.ones_like(places)
    if padding_mode == "zeros":
        inside = ((places >= 0) & (places < length)).to(places.dtype)
    elif padding_mode == "reflection":
        low, span = (0.0, length - 1) if align_corners else (-0.5, length)
        distance = torch.remainder(places - low, torch.sym_max(2 * span, 1))
        places = torch.where(distance > span, 2 * span - distance, distance) + low
    return places.round().clamp(min=0).clamp(max=length - 1).to(torch.int64), inside


@op("AffineGrid", ints=("size",))
def affine_grid(theta: Tensor, size: Numbers, *, align_corners: int = 0) -> Tensor:
    """Places of affine maps (N, rank, rank + 1) for an image of `size`, as GridSample takes them."""
    return F.affine_grid(theta, list(size), bool(align_corners))


@op("RoiAlign", since=16)
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Regions (count, 4) of images (N, C, H, W), sampled and pooled: (count, C, output_height, output_width)."""
    if mode not in ("avg", "max") or coordinate_transformation_mode not in ("half_pixel", "output_half_pixel"):
        raise OnnxError(f"unknown mode {mode!r} or coordinate_transformation_mode {coordinate_transformation_mode!r}")
    half = coordinate_transformation_mode == "half_pixel"
    edges = rois * spatial_scale - (0.5 if half else 0.0)
    rows = _samples(edges[:, 1], edges[:, 3], output_height, x.shape[2], sampling_ratio, half)
    columns = _samples(edges[:, 0], edges[:, 2], output_width, x.shape[3], sampling_ratio, half)
    where = batch.to(torch.int64)[:, None, None, None, None]
    pixels = x.movedim(1, -1)
    parts = []
    for (row, row_weight), (column, column_weight) in product(rows[:2], columns[:2]):
        values = pixels[where, row[:, :, :, None, None], column[:, None, None]]
        weight = row_weight[:, :, :, None, None] * column_weight[:, None, None]
        parts.append(values * weight.unsqueeze(-1))  # (count, height, samples, width, samples, C)
    counted = rows[2][0][:, None, :, None, None, None] & columns[2][0][:, None, None, None, :, None]
    if mode == "avg":
        counts = (rows[2][1] * columns[2][1]).clamp(min=1).reshape(-1, 1, 1, 1)
        return (torch.where(counted, sum(parts), 0).sum((2, 4)) / counts).movedim(-1, 1)
    largest = torch.where(counted, torch.stack(parts).amax(0), -torch.inf).amax((2, 4)).movedim(-1, 1)
    return torch.where(largest == -torch.inf, 0, largest)


@op("RoiAlign")
def roi_align_legacy(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """RoiAlign before opset 16, whose regions are not shifted by half a pixel."""
    return roi_align(
        x,
        rois,
        batch,
        coordinate_transformation_mode="output_half_pixel",
        mode=mode,
        output_height=output_height,
        output_width=output_width,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


Neighbour = tuple[Tensor, Tensor]


def _samples(
    start: Tensor, end: Tensor, bins: int, length: Any, ratio: int, half: bool
) -> tuple[Neighbour, Neighbour, Neighbour]:
    """The two neighbours of each sample along an axis, with weights, all (count, bins, samples).

    The third pair says which samples count, (count, samples), and how many do. Regions have numbers of samples of their
    own if `ratio` is 0; there are as many here as the largest has.
    """
    extent = end - start if half else (end - start).clamp(min=1)
    if ratio:
        counts, most = torch.full_like(extent, ratio), ratio
    else:
        counts = torch.ceil(extent / bins)
        most = _largest(counts)
    steps = torch.arange(most, device=start.device)
    size = (extent / bins)[:, None, None]
    offset = (steps + 0.5) * size / counts.clamp(min=1)[:, None, None]
    place = start[:, None, None] + torch.arange(bins, device=start.device)[:, None] * size + offset
    inside = ((place >= -1) & (place <= length)).to(place.dtype)
    place = place.clamp(min=0).clamp(max=length - 1)
    low = torch.floor(place)
    far = place - low
    first = low.to(torch.int64)
    second = (first + 1).clamp(max=length - 1)
    return (first, (1 - far) * inside), (second, far * inside), (steps < counts[:, None], counts)


def _largest(counts: Tensor) -> int:
    """The largest of counts, which depend on data."""
    return int(torch.cat([counts, counts.new_ones(1)]).amax().to(torch.int64).item())


@op("MaxRoiPool")
def max_roi_pool(x: Tensor, rois: Tensor, *, pooled_shape: list[int], spatial_scale: float = 1.0) -> Tensor:
    """The largest elements of the parts of regions (count, 5), whole pixels of images (N, C, H, W)."""
    images, edges = x[rois[:, 0].to(torch.int64)], rois[:, 1:] * spatial_scale
    edges = torch.trunc(edges + torch.copysign(torch.full_like(edges, 0.5), edges))  # halves away from zero
    rows = _parts(edges[:, 1], edges[:, 3], pooled_shape[0], x.shape[2])
    columns = _parts(edges[:, 0], edges[:, 2], pooled_shape[1], x.shape[3])
    lowest = torch.full((), -torch.inf, dtype=x.dtype, device=x.device)
    across = torch.stack([torch.where(mask[:, None, None], images, lowest).amax(-1) for mask in columns], -1)
    pooled = torch.stack([torch.where(mask[:, None, :, None], across, lowest).amax(-2) for mask in rows], -2)
    return torch.where(pooled == -torch.inf, 0, pooled)


def _parts(start: Tensor, end: Tensor, count: int, length: Any) -> list[Tensor]:
    """For each part of a region along an axis, which pixels it has, (regions, length)."""
    size, start = ((end - start + 1).clamp(min=1) / count)[:, None], start[:, None]
    pixels = torch.arange(length, device=start.device)
    return [
        (pixels >= start + torch.floor(part * size)) & (pixels < start + torch.ceil((part + 1) * size))
        for part in range(count)
    ]


@op("NonMaxSuppression", ints=("most",))
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    most: Numbers | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Boxes (N, count, 4) of classes (N, classes, count), best first, without those that overlap a better one.

    Returns:
        (selected, 3): the number of the batch, of the class and of the box; at most `most` for each class.
    """
    low, high = _corners(boxes, center_point_box)
    candidates = torch.ones_like(scores, dtype=torch.bool)
    if score_threshold is not None:
        candidates = scores > score_threshold.reshape(())
    scores = torch.where(candidates, scores, -torch.inf)
    limit = torch.zeros((), device=boxes.device) if iou_threshold is None else iou_threshold.reshape(())
    count = torch.sym_min(most[0] if most else 0, boxes.shape[1])
    chosen = suppressed(low, high, scores, limit, count)
    places = torch.nonzero(chosen >= 0)
    return torch.cat([places[:, :2], chosen[places[:, 0], places[:, 1], places[:, 2], None]], 1)


def _corners(boxes: Tensor, center_point_box: int) -> tuple[Tensor, Tensor]:
    """The smaller and the larger corner of each box."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if center_point_box:
        return first - second / 2, first + second / 2
    return torch.minimum(first, second), torch.maximum(first, second)
