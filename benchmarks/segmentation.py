"""A U-Net as medical images are segmented by: of the kind that nnU-Net configures.

Ronneberger et al., U-Net, 2015; Isensee et al., nnU-Net, 2021. Levels are halved by strides, and doubled by transposed
convolutions or, every second one, by bilinear interpolation; each level but the lowest has a head of its own, whose
scores are interpolated to the size of the image and added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (32, 64, 128, 256, 320, 320)


def _block(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
    def layers(inner: int, stride: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(inner, outer, 3, stride, 1)
        return conv, nn.InstanceNorm2d(outer, affine=True), nn.LeakyReLU(0.01, inplace=True)

    return nn.Sequential(*layers(inner, stride), *layers(outer, 1))


class _Enlarge(nn.Module):
    """Twice the height and the width."""

    def __init__(self, inner: int, outer: int, transposed: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inner, outer, 2, 2) if transposed else nn.Conv2d(inner, outer, 1)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return x if self.transposed else F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class MedicalUNet(nn.Module):
    """Takes images `[batch, 1, height, width]`, whose sides the strides divide; gives scores
    `[batch, classes, height, width]`.

    Args:
        channels: of each level, from the image's own size down.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS, classes: int = 4) -> None:
        super().__init__()
        pairs = list(zip(channels, channels[1:], strict=False))
        self.first = _block(1, channels[0])
        self.down = nn.ModuleList(_block(above, below, 2) for above, below in pairs)
        self.enlarge = nn.ModuleList(
            _Enlarge(below, above, level % 2 == 0) for level, (above, below) in enumerate(pairs)
        )
        self.up = nn.ModuleList(_block(2 * above, above) for above, _ in pairs)
        self.heads = nn.ModuleList(nn.Conv2d(above, classes, 1) for above, _ in pairs)

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.first(image)]
        for block in self.down:
            levels.append(block(levels[-1]))
        x, scores = levels.pop(), []
        for enlarge, block, head in reversed(list(zip(self.enlarge, self.up, self.heads, strict=True))):
            x = block(torch.cat((enlarge(x), levels.pop()), 1))
            scores.append(head(x))
        total = scores.pop()
        for score in scores:
            total = total + F.interpolate(score, total.shape[2:], mode="bilinear", align_corners=False)
        return total
