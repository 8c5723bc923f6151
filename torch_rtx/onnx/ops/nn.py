"""Convolutions, pooling, normalization and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_rtx.errors import OnnxError
from torch_rtx.onnx.registry import Ints, op

Sizes = list[Any]  # of integers, or symbolic ones, which PyTorch's annotations do not have
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Windows:
    """Where the windows of a convolution or of a pool lie.

    Attributes:
        rank: number of spatial axes.
        kernel, strides, dilations: one number for each of them.
        begin, end: elements added on either side of each.
    """

    def __init__(
        self,
        sizes: Ints,
        kernel: Ints,
        *,
        auto_pad: str = "NOTSET",
        strides: Ints | None = None,
        dilations: Ints | None = None,
        pads: Ints | None = None,
    ) -> None:
        self.rank = len(kernel)
        self.sizes: Sizes = list(sizes)
        self.kernel: Sizes = list(kernel)
        self.strides: Sizes = list(strides or [1] * self.rank)
        self.dilations: Sizes = list(dilations or [1] * self.rank)
        self.spans: Sizes = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        given: Sizes = list(pads or ()) if auto_pad in ("NOTSET", "") else []
        self.begin, self.end = given[: self.rank] or [0] * self.rank, given[self.rank :] or [0] * self.rank
        if auto_pad.startswith("SAME"):
            for i, (size, span, stride) in enumerate(zip(self.sizes, self.spans, self.strides, strict=True)):
                total = span - 1 if stride == 1 else torch.sym_max((-(-size // stride) - 1) * stride + span - size, 0)
                less, more = total // 2, total - total // 2
                self.begin[i], self.end[i] = (less, more) if auto_pad == "SAME_UPPER" else (more, less)

    @property
    def symmetric(self) -> bool:
        """Whether PyTorch's operators can add the elements themselves."""
        return all(
            isinstance(b, int) and isinstance(e, int) and b == e and b >= 0
            for b, e in zip(self.begin, self.end, strict=True)
        )

    def native(self, most: Sizes, ceil_mode: int) -> bool:
        """Whether PyTorch's pooling does it: it adds half of `most`, and rounds known sizes up."""
        known = all(isinstance(size, int) for size in self.sizes)
        return (
            self.symmetric
            and (known or not ceil_mode)
            and all(2 * p <= m for p, m in zip(self.begin, most, strict=True))
        )

    def round_up(self) -> None:
        """`ceil_mode`: adds at the end what the last window lacks, unless it starts after the input."""
        ends = []
        for size, begin, end, span, stride in zip(
            self.sizes, self.begin, self.end, self.spans, self.strides, strict=True
        ):
            before = size + begin
            last = -(-(before + end - span) // stride) * stride
            if span - end < stride:  # else it always starts before
                last = torch.sym_min(last, (before - 1) // stride * stride)
            ends.append(torch.sym_max(last + span - before, end))
        self.end = ends

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """`x` with all of the elements added."""
        amounts = [a for pair in zip(reversed(self.begin), reversed(self.end), strict=True) for a in pair]
        return F.pad(x, amounts, value=value) if any(isinstance(a, torch.SymInt) or a for a in amounts) else x

    def cut(self, x: Tensor) -> Tensor:
        """A view of all windows of a padded tensor: (N, C, windows..., elements...)."""
        for i, (span, stride) in enumerate(zip(self.spans, self.strides, strict=True)):
            x = x.unfold(2 + i, span, stride)[..., :: self.dilations[i]]
        return x

    @property
    def elements(self) -> list[int]:
        """The axes of `cut` that hold a window's elements."""
        return list(range(-self.rank, 0))


def of_rank(table: dict[int, Any], rank: int, name: str) -> Any:
    """PyTorch's operator for a number of spatial axes."""
    if rank not in table:
        raise OnnxError(f"{name} of {rank} spatial dimensions", hint="1, 2 and 3 are supported")
    return table[rank]


@op("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    group: int = 1,
    kernel_shape: Ints | None = None,
    **attributes: Any,
) -> Tensor:
    """x (N, C, D...), w (M, C / group, K...), b (M) -> (N, M, ...)."""
    windows = Windows(x.shape[2:], w.shape[2:], **attributes)
    call = of_rank(CONV, windows.rank, "Conv")
    if windows.symmetric:
        return call(x, w, b, windows.strides, windows.begin, windows.dilations, group)
    return call(windows.pad(x), w, b, windows.strides, 0, windows.dilations, group)


@op("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    **attributes: Any,
) -> Tensor:
    """x (N, C, D...), w (C, M / group, K...), b (M) -> (N, M, ...)."""
    windows = Windows(x.shape[2:], w.shape[2:], **attributes)
    extra = list(output_padding or [0] * windows.rank)
    if auto_pad.startswith("SAME") and not output_shape:
        output_shape = [size * stride for size, stride in zip(windows.sizes, windows.strides, strict=True)]
    if auto_pad == "VALID":
        windows.begin = windows.end = [0] * windows.rank
    for i, wanted in enumerate(output_shape or ()):
        total = (windows.sizes[i] - 1) * windows.strides[i] + extra[i] + windows.spans[i] - wanted
        less, more = total // 2, total - total // 2
        windows.begin[i], windows.end[i] = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
    call = of_rank(CONV_TRANSPOSE, windows.rank, "ConvTranspose")
    # what begins earlier than it ends is a larger output padding
    ends = [e + begin - end for e, begin, end in zip(extra, windows.begin, windows.end, strict=True)]
    fits = all(isinstance(b, int) and b >= 0 for b in windows.begin) and all(
        isinstance(e, int) and 0 <= e < max(s, d)
        for e, s, d in zip(ends, windows.strides, windows.dilations, strict=True)
    )
    if fits:
        return call(x, w, b, windows.strides, windows.begin, ends, group, windows.dilations)
    windows.begin, windows.end = [-n for n in windows.begin], [e - n for e, n in zip(extra, windows.end, strict=True)]
    y = windows.pad(call(x, w, None, windows.strides, 0, 0, group, windows.dilations))
    return y if b is None else y + b.view(-1, *[1] * windows.rank)


@op("DeformConv", since=19)
def deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    group: int = 1,
    offset_group: int = 1,
    kernel_shape: Ints | None = None,
    **attributes: Any,
) -> Tensor:
    """x (N, C, H, W), w (M, C / group, kH, kW), offset (N, offset_group * kH * kW * 2, oH, oW) -> (N, M, oH, oW)."""
    windows = Windows(x.shape[2:], w.shape[2:], **attributes)
    if windows.rank != 2:
        raise OnnxError(f"DeformConv of {windows.rank} spatial dimensions", hint="2 are supported")
    n, channels, *sizes = x.shape
    (kh, kw), (oh, ow) = w.shape[2:], offset.shape[2:]
    shifts = offset.reshape(n, offset_group, kh, kw, 2, oh, ow)
    grid = []
    for i, (size, count, out) in enumerate(zip(sizes, (kh, kw), (oh, ow), strict=True)):
        taps = torch.arange(count, device=x.device) * windows.dilations[i] - windows.begin[i]
        steps = torch.arange(out, device=x.device) * windows.strides[i]
        taps = taps.view(-1, 1, 1, 1) if i == 0 else taps.view(-1, 1, 1)
        at = shifts[:, :, :, :, i] + taps + (steps.view(-1, 1) if i == 0 else steps)
        grid.append(2 * at / max(size - 1, 1) - 1)
    points = torch.stack(grid[::-1], -1).reshape(n * offset_group, kh * kw * oh, ow, 2)
    sized = F.pad(x, (0, int(sizes[1] == 1), 0, int(sizes[0] == 1)))  # a grid has two points at least
    sized = sized.reshape(n * offset_group, channels // offset_group, *sized.shape[2:])
    sampled = F.grid_sample(sized, points.to(x.dtype), align_corners=True)
    sampled = sampled.reshape(n, offset_group, channels // offset_group, kh * kw, oh * ow)
    if mask is not None:
        sampled = sampled * mask.reshape(n, offset_group, 1, kh * kw, oh * ow)
    columns = sampled.reshape(n, group, channels // group * kh * kw, oh * ow)
    y = (w.reshape(group, w.shape[0] // group, -1) @ columns).reshape(n, w.shape[0], oh, ow)
    return y if b is None else y + b.view(-1, 1, 1)


@op("MaxPool")
def max_pool(
    x: Tensor, *, kernel_shape: Ints, ceil_mode: int = 0, storage_order: int = 0, outputs: int = 1, **attributes: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """x (N, C, D...) -> the largest of each window and, if asked for, its position in all of `x`, int64."""
    windows = Windows(x.shape[2:], kernel_shape, **attributes)
    call = of_rank(MAX_POOL, windows.rank, "MaxPool")
    given = x if x.is_floating_point() else x.float()  # integers have 8 bits
    begin, padded = [0] * windows.rank, windows.sizes
    if windows.native(windows.spans, ceil_mode):
        pads, up = windows.begin, bool(ceil_mode)
    else:
        pads, up, begin = [0] * windows.rank, False, windows.begin
        if ceil_mode:
            windows.round_up()
        given = windows.pad(given, -math.inf)
        padded = list(given.shape[2:])
    y = call(given, windows.kernel, windows.strides, pads, windows.dilations, up, outputs > 1)
    if outputs == 1:
        return y.to(x.dtype)
    return y[0].to(x.dtype), _positions(y[1], list(x.shape), padded, begin, storage_order)


def _positions(indices: Tensor, shape: Sizes, padded: Sizes, begin: Sizes, storage_order: int) -> Tensor:
    """Positions in all of a tensor, of positions in the planes of a padded one; `storage_order` 1: column-major."""
    sizes = list(shape[2:])
    coordinates = []
    for size, first in zip(reversed(padded), reversed(begin), strict=True):
        coordinates.append(indices % size - first)
        indices = indices // size
    if storage_order == 1:
        sizes, coordinates = sizes[::-1], coordinates[::-1]
    position = torch.zeros_like(indices)
    for size, coordinate in zip(sizes, reversed(coordinates), strict=True):
        position = position * size + coordinate
    planes = torch.arange(shape[0] * shape[1], device=indices.device).view(shape[0], shape[1], *[1] * len(sizes))
    return planes * math.prod(sizes) + position


@op("AveragePool")
def average_pool(
    x: Tensor, *, kernel_shape: Ints, ceil_mode: int = 0, count_include_pad: int = 0, **attributes: Any
) -> Tensor:
    """x (N, C, D...) -> the mean of each window; elements that `ceil_mode` adds never count."""
    windows = Windows(x.shape[2:], kernel_shape, **attributes)
    if windows.native(windows.kernel, ceil_mode) and windows.spans == windows.kernel and windows.rank in AVG_POOL:
        call = AVG_POOL[windows.rank]
        return call(x, windows.kernel, windows.strides, windows.begin, bool(ceil_mode), bool(count_include_pad))
    counted = windows.pad(x.new_ones([1, 1, *windows.sizes]), float(count_include_pad))
    end = windows.end
    if ceil_mode:
        windows.round_up()
    counted = _append(counted, [more - declared for more, declared in zip(windows.end, end, strict=True)])
    return windows.cut(windows.pad(x)).sum(windows.elements) / windows.cut(counted).sum(windows.elements)


def _append(x: Tensor, amounts: Sizes) -> Tensor:
    """`x` with zeros at the end of its last axes."""
    return F.pad(x, [n for amount in reversed(amounts) for n in (0, amount)])


@op("LpPool")
def lp_pool(x: Tensor, *, kernel_shape: Ints, p: float = 2, ceil_mode: int = 0, **attributes: Any) -> Tensor:
    """x (N, C, D...) -> the p-norm of each window."""
    windows = Windows(x.shape[2:], kernel_shape, **attributes)
    if ceil_mode:
        windows.round_up()
    return torch.linalg.vector_norm(windows.cut(windows.pad(x)), p, windows.elements)


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """The mean of all spatial axes, which stay with size 1."""
    return x.mean(list(range(2, x.dim())), keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """The largest of all spatial axes, which stay with size 1."""
    return x.amax(list(range(2, x.dim())), keepdim=True)


@op("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: float = 2) -> Tensor:
    """The p-norm of all spatial axes, which stay with size 1."""
    return torch.linalg.vector_norm(x, p, list(range(2, x.dim())), keepdim=True)


@op("MaxUnpool", since=9, ints=("output_shape",))
def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """x (N, C, D...) at its positions in a tensor of zeros, which ends where `output_shape` does."""
    windows = Windows(x.shape[2:], kernel_shape, pads=pads, strides=strides)
    sizes = [
        (size - 1) * stride + kernel - begin - end
        for size, stride, kernel, begin, end in zip(
            windows.sizes, windows.strides, windows.kernel, windows.begin, windows.end, strict=True
        )
    ]
    shape = [x.shape[0], x.shape[1], *sizes]
    y = x.new_zeros(math.prod(shape)).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(shape)
    if output_shape:
        y = _append(y, [wanted - size for wanted, size in zip(output_shape, shape, strict=True)])
    return y


@op("BatchNormalization", since=14, state=("mean", "var"))
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """x (N, C, D...), the others (C). In training: also the running mean and (population) variance that follow."""
    scale, bias = scale.to(mean.dtype), bias.to(mean.dtype)
    if not training_mode:
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    now_var, now_mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), axes, correction=0)
    running = [old * momentum + now.to(old.dtype) * (1 - momentum) for old, now in ((mean, now_mean), (var, now_var))]
    return y, *running


@op("BatchNormalization", state=("mean", "var"))
def batch_normalization_1(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    is_test: int = 0,
    spatial: int = 1,
    consumed_inputs: Ints | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Until opset 14 a node trains if it has more than one output: mean, variance, and both once more."""
    if not spatial:
        if outputs > 1:
            raise OnnxError("BatchNormalization that trains with spatial=0")
        return (x - mean) * torch.rsqrt(var + epsilon) * scale + bias
    results = batch_normalization(
        x, scale, bias, mean, var, epsilon=epsilon, momentum=momentum, training_mode=int(outputs > 1 and not is_test)
    )
    return (*results, *results[1:])[:outputs] if isinstance(results, tuple) else results


@op("InstanceNormalization")
def instance_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, consumed_inputs: Ints | None = None
) -> Tensor:
    """x (N, C, D...), scale and bias (C)."""
    return F.group_norm(x, scale.shape[0], scale, bias, epsilon)


@op("GroupNormalization", since=21)
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """x (N, C, D...), scale and bias (C)."""
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@op("GroupNormalization", since=18)
def group_normalization_18(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """x (N, C, D...), scale and bias (num_groups)."""
    y = F.group_norm(x, num_groups, None, None, epsilon).unflatten(1, (num_groups, -1))
    shape = [-1, *[1] * (x.dim() - 1)]
    return (y * scale.view(shape) + bias.view(shape)).flatten(1, 2)


@op("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Normalizes the axes from `axis` on; scale and bias broadcast to them. Also the mean and 1 / deviation."""
    shape = x.shape[axis:] if axis else x.shape
    whole = scale.shape == shape and (bias is None or bias.shape == shape) and scale.dtype == x.dtype
    weights = (scale if whole else None, bias if whole else None)
    results: tuple[Tensor, ...]
    if outputs == 1:
        results = (F.layer_norm(x, shape, weights[0], weights[1], epsilon),)
    else:
        results = torch.native_layer_norm(x, shape, weights[0], weights[1], epsilon)
    y, *statistics = results
    if not whole:
        y = (y * scale if bias is None else y * scale + bias).to(x.dtype)
    return (y, *(s.to(torch.promote_types(x.dtype, torch.float32)) for s in statistics))


@op("SimplifiedLayerNormalization")
@op("RMSNormalization", since=23)
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, outputs: int = 1
) -> Tensor | tuple[Tensor, Tensor]:
    """Divides the axes from `axis` on by their root mean square. The simplified one also returns 1 / that."""
    shape = x.shape[axis:] if axis else x.shape
    whole = scale.shape == shape and scale.dtype == x.dtype
    y = F.rms_norm(x, shape, scale if whole else None, epsilon)
    if not whole:
        y = (y * scale).to(scale.dtype)
    if outputs == 1:
        return y
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = list(range(-len(shape), 0))
    return y, torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)


@op("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divides by the p-norm along an axis; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


@op("MeanVarianceNormalization", since=9)
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Zero mean and unit deviation over `axes`."""
    var, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    return (x - mean) / (var.sqrt() + 1e-9)


@op("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """x (N, C, D...). Of an even number of channels ONNX takes one more after, PyTorch one more before."""
    if size % 2:
        return F.local_response_norm(x, size, alpha, beta, bias)
    return F.local_response_norm(x.flip(1), size, alpha, beta, bias).flip(1)


@op("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """x (N, C, D...), log probabilities; target (N, D...), classes; weight (C)."""
    ignored = -100 if ignore_index is None else ignore_index
    return F.nll_loss(x, target.long(), weight, ignore_index=ignored, reduction=reduction)


@op("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy_loss(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """scores (N, C, D...), labels (N, D...), weights (C) -> the loss and the log probabilities."""
    log_prob = F.log_softmax(scores, 1)
    loss = negative_log_likelihood_loss(log_prob, labels, weights, ignore_index=ignore_index, reduction=reduction)
    return (loss, log_prob)[:outputs]
