"""Resize and Upsample: along each axis by itself, a weighted sum of an input's neighbours.

What `F.interpolate` computes in the same way runs there, as one call for all axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import Numbers, op

NEAREST: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda place: torch.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: torch.floor(place + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}
SIMPLE = "simple"  # before opset 11: up where the axis shrinks, else down
# F.interpolate's modes by ONNX's mode and the number of axes
INTERPOLATE = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}


@dataclass(frozen=True)
class Options:
    """The attributes of Resize that concern each axis."""

    mode: str
    transformation: str
    nearest_mode: str
    antialias: int
    cubic_coeff_a: float
    exclude_outside: int
    extrapolation_value: float


@dataclass(frozen=True)
class Axis:
    """How one axis is resized.

    Attributes:
        length, size: of the input and of the output.
        scale: the factor; `length * scale` is `size` before it was rounded.
        exact: whether `length * scale` is `size`.
        roi: start and end of the region, in lengths, for tf_crop_and_resize.
    """

    axis: int
    length: Any
    size: Any
    scale: Any
    exact: bool
    roi: tuple[float, float]


def _original(options: Options, axis: Axis, device: torch.device) -> Tensor:
    """The places of the output's elements on the input's axis.

    They are float32, as scales are: what is a half or a whole number there has to stay one.
    """
    places, length, size = torch.arange(axis.size, device=device).to(torch.float32), axis.length, axis.size
    kind, width = options.transformation, length * axis.scale
    single = isinstance(width, int | float) and width == 1
    if kind == "align_corners":
        return places * 0 if single else places * (length - 1) / (width - 1)
    if kind == "asymmetric":
        return places / axis.scale
    if kind == "tf_half_pixel_for_nn":
        return (places + 0.5) / axis.scale
    if kind == "tf_crop_and_resize":
        start, end = axis.roi
        if single:
            return places * 0 + (start + end) * (length - 1) / 2
        return places * (end - start) * (length - 1) / (width - 1) + start * (length - 1)
    half = (places + 0.5) / axis.scale - 0.5
    if kind == "half_pixel":
        return half
    if kind == "pytorch_half_pixel":
        return places * 0 if isinstance(size, int) and size == 1 else half
    if kind == "half_pixel_symmetric":
        return half + length / 2 * (1 - size / width)
    raise OnnxError(f"unknown coordinate_transformation_mode {kind!r}")


def _filter(options: Options, distance: Tensor) -> Tensor:
    """The weight of a neighbour at a distance."""
    x = distance.abs()
    if options.mode == "linear":
        return (1 - x).clamp(min=0)
    a = options.cubic_coeff_a
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))


def _taps(options: Options, axis: Axis, place: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours and weights of each output element, (size, taps)."""
    reach = 1 if options.mode == "linear" else 2
    stretch = torch.sym_max(1 / axis.scale, 1.0) if options.antialias else 1.0
    wide = math.ceil(reach * stretch)
    offsets = torch.arange(1 - wide, wide + 1, device=place.device)
    neighbours = torch.floor(place)[:, None] + offsets
    weights = _filter(options, (neighbours - place[:, None]) / stretch)
    if options.exclude_outside:
        weights = torch.where((neighbours >= 0) & (neighbours < axis.length), weights, 0)
    if options.exclude_outside or options.antialias:
        weights = weights / weights.sum(1, keepdim=True)
    return neighbours.to(torch.int64).clamp(min=0).clamp(max=axis.length - 1), weights


def _resize_axis(x: Tensor, axis: Axis, options: Options) -> Tensor:
    """`x` (floating point, but for the mode nearest) with another size of one axis."""
    place = _original(options, axis, x.device)
    shape = [-1] + [1] * (x.dim() - axis.axis - 1)
    if options.mode == "nearest":
        kind = options.nearest_mode
        if kind == SIMPLE:
            kind = "ceil" if isinstance(axis.scale, int | float) and axis.scale < 1 else "floor"
        if kind not in NEAREST:
            raise OnnxError(f"unknown nearest_mode {kind!r}")
        nearest = NEAREST[kind](place).to(torch.int64)
        result = x.index_select(axis.axis, nearest.clamp(min=0).clamp(max=axis.length - 1))
    else:
        neighbours, weights = _taps(options, axis, place)
        weights = weights.to(x.dtype)
        if options.antialias:  # many taps: a product with a matrix
            gathered = x.movedim(axis.axis, -1)[..., neighbours]
            result = (gathered * weights).sum(-1).movedim(-1, axis.axis)
        else:
            pairs = zip(neighbours.unbind(1), weights.unbind(1), strict=True)
            result = sum(x.index_select(axis.axis, places) * weight.reshape(shape) for places, weight in pairs)  # type: ignore[assignment]
    if options.transformation != "tf_crop_and_resize":
        return result
    outside = (place < 0) | (place > axis.length - 1)
    return torch.where(outside.reshape(shape), options.extrapolation_value, result)


def _interpolated(x: Tensor, axes: Sequence[Axis], options: Options) -> Tensor | None:
    """What F.interpolate makes of it; None: it computes something else."""
    places = [axis.axis for axis in axes]
    if places != list(range(2, x.dim())) or options.antialias or options.exclude_outside or not x.is_floating_point():
        return None
    key, sizes = (options.mode, len(axes)), [axis.size for axis in axes]
    if not all(axis.exact for axis in axes):  # F.interpolate knows sizes alone
        return None
    if options.mode == "nearest":
        floor = options.transformation == "asymmetric" and options.nearest_mode in ("floor", SIMPLE)
        whole = all(isinstance(axis.scale, int) for axis in axes)
        return F.interpolate(x, sizes, mode="nearest") if floor and whole and len(axes) <= 3 else None
    if key not in INTERPOLATE or (options.mode == "cubic" and options.cubic_coeff_a != -0.75):
        return None
    if options.transformation not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return None
    if options.transformation == "pytorch_half_pixel" and any(isinstance(size, int) and size == 1 for size in sizes):
        return None
    # linear: torch takes negative places for 0, as the clamped neighbours do
    return F.interpolate(x, sizes, mode=INTERPOLATE[key], align_corners=options.transformation == "align_corners")


def _resized(x: Tensor, axes: Sequence[Axis], options: Options) -> Tensor:
    if options.mode not in ("nearest", "linear", "cubic"):
        raise OnnxError(f"unknown mode {options.mode!r}")
    crop = options.transformation == "tf_crop_and_resize"
    axes = [axis for axis in axes if crop and axis.roi != (0.0, 1.0) or not _unchanged(axis)]
    if not axes:
        return x
    same = _interpolated(x, axes, options)
    if same is not None:
        return same
    dtype = x.dtype
    if options.mode != "nearest":
        x = x if x.is_floating_point() and dtype.itemsize > 2 else x.float()
    for axis in axes:
        x = _resize_axis(x, axis, options)
    if dtype.is_floating_point or options.mode == "nearest":
        return x.to(dtype)
    return x.trunc().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


def _unchanged(axis: Axis) -> bool:
    """Whether an axis keeps its size, as far as that is known without a guard."""
    if isinstance(axis.scale, int | float):
        return axis.scale == 1
    return axis.size is axis.length


def _scaled_axes(x: Tensor, places: Sequence[int], scales: Numbers, roi: Numbers | None) -> list[Axis]:
    found = []
    for number, (place, scale) in enumerate(zip(places, scales, strict=True)):
        length, exact = x.shape[place], isinstance(scale, int | float) and scale == int(scale)
        scale = int(scale) if exact else scale
        # The size does not depend on the region, whatever the operator's documentation says: no implementation does so.
        size = length * scale if exact else math.floor(length * scale)
        exact = exact or (isinstance(size, int) and size == length * scale)
        found.append(Axis(place, length, size, scale, exact, _region(roi, number, len(places))))
    return found


def _region(roi: Numbers | None, number: int, count: int) -> tuple[float, float]:
    return (float(roi[number]), float(roi[number + count])) if roi else (0.0, 1.0)


def _sized_axes(x: Tensor, places: Sequence[int], sizes: Numbers, roi: Numbers | None, policy: str) -> list[Axis]:
    lengths = [x.shape[place] for place in places]
    factors = [size / length for size, length in zip(sizes, lengths, strict=True)]
    if policy != "stretch":
        if policy not in ("not_larger", "not_smaller"):
            raise OnnxError(f"unknown keep_aspect_ratio_policy {policy!r}")
        factor = factors[0]
        for other in factors[1:]:
            factor = torch.sym_min(factor, other) if policy == "not_larger" else torch.sym_max(factor, other)
        factors, sizes = [factor] * len(places), [math.floor(factor * length + 0.5) for length in lengths]
    return [
        Axis(place, length, size, factor, policy == "stretch", _region(roi, number, len(places)))
        for number, (place, length, size, factor) in enumerate(zip(places, lengths, sizes, factors, strict=True))
    ]


@op("Resize", since=11, ints=("roi", "scales", "sizes"))
def resize(
    x: Tensor,
    roi: Numbers | None = None,
    scales: Numbers | None = None,
    sizes: Numbers | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    antialias: int = 0,
    axes: list[int] | None = None,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """`x` with other sizes of its axes, or of those that are named, given by factors or as they are."""
    options = Options(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        antialias,
        cubic_coeff_a,
        exclude_outside,
        extrapolation_value,
    )
    places = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    roi = roi if coordinate_transformation_mode == "tf_crop_and_resize" else None
    if sizes:
        return _resized(x, _sized_axes(x, places, sizes, roi, keep_aspect_ratio_policy), options)
    if not scales:
        raise OnnxError("neither scales nor sizes are given")
    return _resized(x, _scaled_axes(x, places, scales, roi), options)


@op("Resize", since=10, ints=("scales",))
@op("Upsample", since=9, ints=("scales",))
def upsample(x: Tensor, scales: Numbers, *, mode: str = "nearest") -> Tensor:
    """`x` with its axes scaled, where an element of the output is at its place divided by the factor."""
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode=SIMPLE)


@op("Upsample", since=7)
def upsample_attribute(x: Tensor, *, scales: list[float], mode: str = "nearest") -> Tensor:
    """Upsample with its factors as an attribute."""
    return upsample(x, scales, mode=mode)


@op("Upsample")
def upsample_legacy(x: Tensor, *, height_scale: float, width_scale: float, mode: str = "nearest") -> Tensor:
    """Upsample of (N, C, H, W) before opset 7."""
    return upsample(x, [1.0, 1.0, height_scale, width_scale], mode="linear" if mode == "bilinear" else mode)
