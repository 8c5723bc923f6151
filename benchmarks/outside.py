"""Models that no library of the suite `sweep` has: recommendation, radiance fields, a medical U-Net, a detector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _mlp(*widths: int) -> nn.Sequential:
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(layer for inner, outer in pairs for layer in (nn.Linear(inner, outer), nn.ReLU())))


class Dlrm(nn.Module):
    """A recommendation model: bags of embeddings, products of all pairs, two perceptrons.

    Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019.
    """

    def __init__(self, tables: int = 26, rows: int = 100000, width: int = 64, dense: int = 13) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables))
        self.bottom = _mlp(dense, 512, 256, width)
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(_mlp(width + pairs, 512, 256), nn.Linear(256, 1))
        self.register_buffer("lower", torch.tril_indices(tables + 1, tables + 1, -1), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Takes `dense [batch, features]` and ids `sparse [batch, tables, ids of a bag]`; gives odds `[batch, 1]`."""
        below = self.bottom(dense)
        bags = [bag(sparse[:, index]) for index, bag in enumerate(self.bags)]
        vectors = torch.stack([below, *bags], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        return self.top(torch.cat([below, products[:, self.lower[0], self.lower[1]]], dim=1)).sigmoid()


class Nerf(nn.Module):
    """A radiance field with its volume rendering.

    Mildenhall et al., NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis, 2020.
    """

    def __init__(self, width: int = 256, place: int = 10, direction: int = 4) -> None:
        super().__init__()
        self.place, self.direction = place, direction
        size = 3 + 6 * place
        self.first, self.second = _mlp(size, *[width] * 5), _mlp(width + size, *[width] * 3)
        self.density, self.features = nn.Linear(width, 1), nn.Linear(width, width)
        self.colour = nn.Sequential(_mlp(width + 3 + 6 * direction, width // 2), nn.Linear(width // 2, 3))

    @staticmethod
    def encoded(x: Tensor, count: int) -> Tensor:
        """Sines and cosines of `x [..., 3]` at `count` frequencies behind it."""
        angles = x[..., None] * 2.0 ** torch.arange(count, device=x.device, dtype=x.dtype)
        return torch.cat([x, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)

    def forward(self, samples: Tensor) -> Tensor:
        """Takes places and directions of samples along rays, `[rays, samples, 6]`; gives colours `[rays, 3]`."""
        place = self.encoded(samples[..., :3].tanh(), self.place)
        hidden = self.second(torch.cat([self.first(place), place], dim=-1))
        seen = self.encoded(F.normalize(samples[..., 3:], dim=-1), self.direction)
        colour = self.colour(torch.cat([self.features(hidden), seen], dim=-1)).sigmoid()
        alpha = 1 - torch.exp(-F.relu(self.density(hidden)) / samples.shape[1])
        passed = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], dim=1), dim=1)
        return (passed * alpha * colour).sum(dim=1)


class _Twice(nn.Sequential):
    """Two convolutions with instance norm and leaky relu."""

    def __init__(self, inner: int, outer: int) -> None:
        pairs = ((inner, outer), (outer, outer))
        super().__init__(
            *(
                layer
                for a, b in pairs
                for layer in (nn.Conv2d(a, b, 3, padding=1), nn.InstanceNorm2d(b, affine=True), nn.LeakyReLU(0.01))
            )
        )


class UNet(nn.Module):
    """A U-Net for medical images, with transposed convolutions and a bilinear head.

    Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, 2021.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 512), classes: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(_Twice(a, b) for a, b in zip((1, *widths), widths, strict=False))
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_Twice(2 * b, b) for _, b in pairs)
        self.coarse, self.head = nn.Conv2d(widths[1], classes, 1), nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Takes images `[batch, 1, height, width]`; gives scores `[batch, classes, height, width]`."""
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        coarse = x
        for grow, block, skip in zip(self.grow, self.up, reversed(kept[:-1]), strict=True):
            coarse, x = x, block(torch.cat([grow(x), skip], dim=1))
        rough = F.interpolate(self.coarse(coarse), scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(x) + rough


class _Conv(nn.Sequential):
    """Convolution, batch norm, silu."""

    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outer), nn.SiLU())


class _Split(nn.Module):
    """A stage that keeps the result of each of its blocks."""

    def __init__(self, inner: int, outer: int, blocks: int, shortcut: bool) -> None:
        super().__init__()
        half = outer // 2
        self.enter, self.leave = _Conv(inner, outer), _Conv(half * (2 + blocks), outer)
        self.blocks = nn.ModuleList(nn.Sequential(_Conv(half, half, 3), _Conv(half, half, 3)) for _ in range(blocks))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, dim=1))
        for block in self.blocks:
            parts.append(block(parts[-1]) + parts[-1] if self.shortcut else block(parts[-1]))
        return self.leave(torch.cat(parts, dim=1))


class _Pools(nn.Module):
    """Three pools in a row, side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter, self.leave = _Conv(channels, channels // 2), _Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.leave(torch.cat(parts, dim=1))


class Yolo(nn.Module):
    """A one-stage detector in the manner of YOLOv8-s: split stages, chained pools, two paths of pyramids, and boxes
    from distributions over distances."""

    def __init__(self, width: int = 32, classes: int = 80, bins: int = 16) -> None:
        super().__init__()
        w = [width * 2**i for i in range(5)]
        self.bins = bins
        self.stem = nn.Sequential(_Conv(3, w[0], 3, 2), _Conv(w[0], w[1], 3, 2), _Split(w[1], w[1], 1, True))
        self.third = nn.Sequential(_Conv(w[1], w[2], 3, 2), _Split(w[2], w[2], 2, True))
        self.fourth = nn.Sequential(_Conv(w[2], w[3], 3, 2), _Split(w[3], w[3], 2, True))
        self.fifth = nn.Sequential(_Conv(w[3], w[4], 3, 2), _Split(w[4], w[4], 1, True), _Pools(w[4]))
        self.up4, self.up3 = _Split(w[4] + w[3], w[3], 1, False), _Split(w[3] + w[2], w[2], 1, False)
        self.to4, self.down4 = _Conv(w[2], w[2], 3, 2), _Split(w[2] + w[3], w[3], 1, False)
        self.to5, self.down5 = _Conv(w[3], w[3], 3, 2), _Split(w[3] + w[4], w[4], 1, False)
        heads = (4 * bins, classes)
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Sequential(_Conv(c, w[2], 3), nn.Conv2d(w[2], out, 1)) for out in heads) for c in w[2:]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes images `[batch, 3, height, width]`; gives distances `[batch, 4, places]` and scores
        `[batch, classes, places]`."""
        third = self.third(self.stem(x))
        fourth = self.fourth(third)
        fifth = self.fifth(fourth)
        middle = self.up4(torch.cat([F.interpolate(fifth, scale_factor=2.0), fourth], dim=1))
        fine = self.up3(torch.cat([F.interpolate(middle, scale_factor=2.0), third], dim=1))
        middle = self.down4(torch.cat([self.to4(fine), middle], dim=1))
        coarse = self.down5(torch.cat([self.to5(middle), fifth], dim=1))
        found = [
            [head(level).flatten(2) for head in pair]
            for pair, level in zip(self.heads, (fine, middle, coarse), strict=True)
        ]
        boxes, scores = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
        shares = boxes.unflatten(1, (4, self.bins)).softmax(dim=2)
        distances = torch.arange(self.bins, device=x.device, dtype=x.dtype)
        return (shares * distances[:, None]).sum(dim=2), scores.sigmoid()
