"""Denoisers, which `transformers` does not have: the UNet of Stable Diffusion 1.5 and a transformer like FLUX.1's.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022; Esser et al., Scaling Rectified Flow
Transformers, 2024, with the single-stream blocks that Black Forest Labs published as FLUX.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, `[batch, width]` in float32, of `timesteps [batch]`."""
    exponent = torch.arange(width // 2, dtype=torch.float32, device=timesteps.device) / (width // 2)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# The UNet -----------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """Two convolutions with the timestep between them."""

    def __init__(self, inner: int, outer: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(time, outer)
        self.norm2, self.conv2 = nn.GroupNorm(32, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class _Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(inner, width, bias=False) for inner in (width, context, context))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _SpatialTransformer(nn.Module):
    """Self-attention, attention to the text and a gated feed-forward layer, over the pixels of a feature map."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, width, 1)
        self.norm1, self.self_attention = nn.LayerNorm(width), _Attention(width, width, heads)
        self.norm2, self.cross_attention = nn.LayerNorm(width), _Attention(width, context, heads)
        self.norm3, self.gate, self.down = nn.LayerNorm(width), nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        hidden = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        normed = self.norm1(hidden)
        hidden = hidden + self.self_attention(normed, normed)
        hidden = hidden + self.cross_attention(self.norm2(hidden), context)
        value, gate = self.gate(self.norm3(hidden)).chunk(2, dim=-1)
        hidden = hidden + self.down(value * F.gelu(gate))
        return x + self.proj_out(hidden.transpose(1, 2).unflatten(2, (height, -1)))


class _Stage(nn.Module):
    """Residual blocks of one resolution, each with a transformer behind it where `attends`."""

    def __init__(self, inner: Sequence[int], outer: int, time: int, context: int, heads: int, attends: bool) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(_Residual(channels, outer, time) for channels in inner)
        self.transformers = nn.ModuleList(_SpatialTransformer(outer, context, heads) for _ in inner if attends)
        self.resample: nn.Module | None = None

    def step(self, index: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """One residual block and its transformer."""
        x = self.residuals[index](x, time)
        return self.transformers[index](x, context) if self.transformers else x


class StableDiffusionUNet(nn.Module):
    """The UNet of Stable Diffusion 1.5 at its published widths.

    Takes latents `[batch, 4, height, width]`, timesteps `[batch]` and text states `[batch, tokens, context]`; gives the
    noise, as large as the latents, whose sides are multiples of 8.
    """

    def __init__(
        self, widths: Sequence[int] = (320, 640, 1280, 1280), context: int = 768, heads: int = 8, layers: int = 2
    ) -> None:
        super().__init__()
        first, last, time = widths[0], widths[-1], 4 * widths[0]
        shape = {"time": time, "context": context, "heads": heads}
        self.time_in, self.time_out = nn.Linear(first, time), nn.Linear(time, time)
        self.conv_in = nn.Conv2d(4, first, 3, padding=1)
        skips, self.down = [first], nn.ModuleList()
        for level, width in enumerate(widths):
            inner = [skips[-1], *[width] * (layers - 1)]
            stage = _Stage(inner, width, attends=level < len(widths) - 1, **shape)
            skips += [width] * layers
            if level < len(widths) - 1:
                stage.resample = nn.Conv2d(width, width, 3, stride=2, padding=1)
                skips.append(width)
            self.down.append(stage)
        self.middle = _Stage([last], last, attends=True, **shape)
        self.middle_out = _Residual(last, last, time)
        below, self.up = last, nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            inner = [channels + skips.pop() for channels in (below, *[width] * layers)]
            stage = _Stage(inner, width, attends=level < len(widths) - 1, **shape)
            stage.resample = nn.Conv2d(width, width, 3, padding=1) if level else None
            self.up.append(stage)
            below = width
        self.norm_out, self.conv_out = nn.GroupNorm(32, first), nn.Conv2d(first, 4, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        sinusoids = timestep_embedding(timesteps, self.time_in.in_features).to(latents.dtype)
        time = self.time_out(F.silu(self.time_in(sinusoids)))
        x = self.conv_in(latents)
        skips = [x]
        for stage in self.down:
            for index in range(len(stage.residuals)):
                x = stage.step(index, x, time, text)
                skips.append(x)
            if stage.resample is not None:
                x = stage.resample(x)
                skips.append(x)
        x = self.middle_out(self.middle.step(0, x, time, text), time)
        for stage in self.up:
            for index in range(len(stage.residuals)):
                x = stage.step(index, torch.cat([x, skips.pop()], dim=1), time, text)
            if stage.resample is not None:
                x = stage.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


# The diffusion transformer ------------------------------------------------------------------------------------------


def rotations(ids: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each `[tokens, sum(axes) / 2]` in float32, of positions `ids [tokens, len(axes)]`."""
    angles = []
    for axis, size in enumerate(axes):
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=ids.device) / size
        angles.append(ids[:, axis, None].float() * torch.exp(-math.log(10000.0) * exponent))
    joined = torch.cat(angles, dim=-1)
    return joined.cos(), joined.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring pairs of the last dimension, in float32."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    out = F.scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v)
    return out.transpose(1, 2).flatten(2)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: the norm itself has no weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class _Embedder(nn.Module):
    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inner, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class _HeadNorm(nn.Module):
    """Splits queries, keys and values by head and normalizes the first two."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.q, self.k = heads, nn.RMSNorm(size, eps=1e-6), nn.RMSNorm(size, eps=1e-6)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q(q), self.k(k), v


class _Stream(nn.Module):
    """One side, image or text, of a double-stream block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.norm = nn.Linear(width, 3 * width), _HeadNorm(heads, width // heads)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attended: Tensor, parts: Sequence[Tensor]) -> Tensor:
        gate, shift, scale, out_gate = parts
        x = x + gate * self.proj(attended)
        return x + out_gate * self.down(F.gelu(self.up(_modulate(x, shift, scale)), approximate="tanh"))


class _DoubleBlock(nn.Module):
    """Joint attention over text and image, each with weights of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.text, self.image = _Stream(width, heads), _Stream(width, heads)

    def forward(
        self, text: Tensor, image: Tensor, condition: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        split = text.shape[1]
        parts = [s.modulation(F.silu(condition))[:, None].chunk(6, dim=-1) for s in (self.text, self.image)]
        heads = [
            stream.norm(stream.qkv(_modulate(x, *part[:2])))
            for stream, x, part in zip((self.text, self.image), (text, image), parts, strict=True)
        ]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        attended = _attend(q, k, v, rotation)
        return self.text(text, attended[:, :split], parts[0][2:]), self.image(image, attended[:, split:], parts[1][2:])


class _SingleBlock(nn.Module):
    """Attention and feed-forward layer side by side, over text and image as one sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.modulation = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 7 * width), nn.Linear(5 * width, width)
        self.norm = _HeadNorm(heads, width // heads)

    def forward(self, x: Tensor, condition: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, dim=-1)
        qkv, hidden = self.up(_modulate(x, shift, scale)).split([3 * self.width, 4 * self.width], dim=-1)
        attended = _attend(*self.norm(qkv), rotation)
        return x + gate * self.down(torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1))


class FluxTransformer(nn.Module):
    """A transformer with the blocks of FLUX.1-dev, which has 19 double and 38 single ones.

    Takes image tokens `[batch, n, 64]`, text tokens `[batch, m, text]`, pooled text `[batch, pooled]`, timesteps and
    guidance `[batch]`, and positions `[m + n, 3]`, text first; gives image tokens `[batch, n, 64]`.
    """

    def __init__(
        self,
        double: int = 19,
        single: int = 38,
        width: int = 3072,
        heads: int = 24,
        axes: tuple[int, ...] = (16, 56, 56),
        text: int = 4096,
        pooled: int = 768,
        channels: int = 64,
    ) -> None:
        super().__init__()
        self.axes = axes
        self.image_in, self.text_in = nn.Linear(channels, width), nn.Linear(text, width)
        self.time_in, self.guidance_in = _Embedder(256, width), _Embedder(256, width)
        self.pooled_in = _Embedder(pooled, width)
        self.double_blocks = nn.ModuleList(_DoubleBlock(width, heads) for _ in range(double))
        self.single_blocks = nn.ModuleList(_SingleBlock(width, heads) for _ in range(single))
        self.modulation_out, self.image_out = nn.Linear(width, 2 * width), nn.Linear(width, channels)

    def forward(
        self, image: Tensor, text: Tensor, pooled: Tensor, timesteps: Tensor, guidance: Tensor, ids: Tensor
    ) -> Tensor:
        rotation, split = rotations(ids, self.axes), text.shape[1]
        times, scales = (timestep_embedding(1000 * t, 256).to(image.dtype) for t in (timesteps, guidance))
        condition = self.time_in(times) + self.guidance_in(scales) + self.pooled_in(pooled)
        image, text = self.image_in(image), self.text_in(text)
        for block in self.double_blocks:
            text, image = block(text, image, condition, rotation)
        joint = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            joint = block(joint, condition, rotation)
        shift, scale = self.modulation_out(F.silu(condition))[:, None].chunk(2, dim=-1)
        return self.image_out(_modulate(joint[:, split:], shift, scale))
