"""Scales that are searched: of a weight's largest magnitudes, and of input channels (AWQ, SmoothQuant)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_rtx.quantization.config import LayerConfig
from torch_rtx.quantization.formats import Format, amax_of, fake_quantize
from torch_rtx.quantization.layers import weight_axes

STEPS = 10  # of exponents
CLIPS = 41
PASSES = 2  # over all blocks of a row


@torch.no_grad()
def weight_clip(weight: Tensor, form: Format, importance: Tensor | None = None) -> Tensor:
    """The part of each amax of a weight, 0.5 to 1, that gives the least square error, in the shape of the amax;
    `importance` has a factor for the error of each input channel."""
    amax = amax_of(weight, form, weight_axes(weight, form.granularity))
    best = torch.full_like(amax, torch.inf)
    clip = torch.ones_like(amax)
    for part in torch.linspace(1, 0.5, CLIPS).tolist():
        error = (fake_quantize(weight, amax * part, form).to(amax.dtype) - weight).square()
        error = error if importance is None else error * importance
        if form.two_levels:
            error = error.sum()
        elif form.block:
            error = error.unflatten(-1, (-1, form.block)).sum(-1, keepdim=True)
        else:
            error = error.sum(weight_axes(weight, form.granularity), keepdim=True)
        better = error < best
        clip, best = torch.where(better, part, clip), torch.where(better, error, best)
    return clip.float()


@torch.no_grad()
def output_clip(weight: Tensor, form: Format, gram: Tensor) -> Tensor:
    """The parts of the amax of channels or blocks, 0.5 to 1, that give a linear layer's output the least square error.
    Each is chosen given the errors of the other blocks of its row: errors of inputs that vary together may cancel.

    Args:
        weight: f32[out_features, in_features].
        form: of channels or blocks with scales of one level.
        gram: products of input channels, on average, f32[in_features, in_features].
    """
    amax = amax_of(weight, form, weight_axes(weight, form.granularity))
    clip = weight_clip(weight, form, gram.diagonal())
    error = fake_quantize(weight, amax * clip, form) - weight
    size = form.block or weight.shape[1]
    for part in [slice(start, start + size) for start in range(0, weight.shape[1], size)] * PASSES:
        at = slice(part.start // size, part.start // size + 1)
        own, given = gram[part, part], error @ gram[:, part] - error[:, part] @ gram[part, part]
        best = torch.full_like(weight[:, :1], torch.inf)
        for ratio in torch.linspace(1, 0.5, CLIPS).tolist():
            found = fake_quantize(weight[:, part], amax[:, at] * ratio, form) - weight[:, part]
            cost = ((found @ own + 2 * given) * found).sum(1, keepdim=True)
            better = cost < best
            best = torch.where(better, cost, best)
            error[:, part] = torch.where(better, found, error[:, part])
            clip[:, at] = torch.where(better.view_as(clip[:, at]), ratio, clip[:, at])
    return clip


def candidates(mean: Tensor, most: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Factors of input channels, f32[in_features]: none; powers of their mean magnitudes, as in AWQ; powers of their
    largest by the complementary powers of the weight's largest, as in SmoothQuant."""
    yield torch.ones_like(mean)
    largest = weight.abs().amax(0)
    for step in range(1, STEPS + 1):
        power = step / STEPS
        for scale in (mean**power, most**power / largest ** (1 - power)):
            yield scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def channel_scale(weight: Tensor, rows: Tensor, mean: Tensor, most: Tensor, config: LayerConfig) -> Tensor:
    """The factors of input channels that give a linear layer's output the least error.

    Args:
        weight: f32[out_features, in_features].
        rows: some inputs, f32[n, in_features].
        mean, most: the mean and largest magnitude of each channel over all inputs, f32[in_features].
        config: how weight and input are quantized.
    """
    # Channels of zeros get factors as if they had next to nothing.
    floor = most.max() * 1e-6
    least, best = float("inf"), torch.ones_like(mean)
    wanted = rows @ weight.t()
    for scale in candidates(mean.clamp(min=floor), most.clamp(min=floor), weight.abs().clamp(min=1e-8)):
        scaled, x = weight * scale, rows / scale
        scaled = fake_quantize(
            scaled, amax_of(scaled, config.weight, weight_axes(scaled, config.weight.granularity)), config.weight
        )
        if config.input:
            dynamic = amax_of(x, config.input, (-1,) if config.input.granularity == "token" else (0, 1))
            x = fake_quantize(x, dynamic if config.input.dynamic else (most / scale).amax(), config.input)
        error = float((x @ scaled.t() - wanted).square().mean())
        if error < least:
            least, best = error, scale
    return best
