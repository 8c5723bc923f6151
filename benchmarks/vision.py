"""MobileNetV3-Large, which `transformers` does not have, laid out as in torchvision.

Howard et al., Searching for MobileNetV3, 2019, table 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# Kernel, expanded channels, output channels, squeeze-excitation, activation, stride.
_Block = tuple[int, int, int, bool, type[nn.Module], int]
BLOCKS: tuple[_Block, ...] = (
    (3, 16, 16, False, nn.ReLU, 1),
    (3, 64, 24, False, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 1),
    (5, 72, 40, True, nn.ReLU, 2),
    (5, 120, 40, True, nn.ReLU, 1),
    (5, 120, 40, True, nn.ReLU, 1),
    (3, 240, 80, False, nn.Hardswish, 2),
    (3, 200, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 480, 112, True, nn.Hardswish, 1),
    (3, 672, 112, True, nn.Hardswish, 1),
    (5, 672, 160, True, nn.Hardswish, 2),
    (5, 960, 160, True, nn.Hardswish, 1),
    (5, 960, 160, True, nn.Hardswish, 1),
)

# One of each kind: with and without expansion, squeeze-excitation, a stride and a sum, of either activation.
KINDS = tuple(BLOCKS[index] for index in (0, 1, 3, 4, 6, 7, 10, 12))


def _eighth(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, at most a tenth below it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class _ConvNorm(nn.Sequential):
    """Convolution, batch norm and, if given, an activation."""

    def __init__(
        self, inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = None
    ) -> None:
        conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(outer, eps=1e-3, momentum=0.01)
        super().__init__(conv, norm, *([act(inplace=True)] if act else []))


class _SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = _eighth(channels / 4)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return F.hardsigmoid(scale) * x


class _InvertedResidual(nn.Module):
    def __init__(
        self, inner: int, kernel: int, expanded: int, outer: int, squeeze: bool, act: type[nn.Module], stride: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expanded != inner:
            layers.append(_ConvNorm(inner, expanded, 1, act=act))
        layers.append(_ConvNorm(expanded, expanded, kernel, stride, groups=expanded, act=act))
        if squeeze:
            layers.append(_SqueezeExcitation(expanded))
        layers.append(_ConvNorm(expanded, outer, 1))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3Large(nn.Module):
    """Takes images `[batch, 3, height, width]`; gives scores `[batch, classes]`.

    Args:
        width: factor of all channels but the classifier's.
        blocks: fewer of them make a smaller model.
    """

    def __init__(self, width: float = 1.0, classes: int = 1000, blocks: Sequence[_Block] = BLOCKS) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return _eighth(channels * width)

        inner = scaled(16)
        layers: list[nn.Module] = [_ConvNorm(3, inner, 3, 2, act=nn.Hardswish)]
        for kernel, expanded, outer, squeeze, act, stride in blocks:
            layers.append(_InvertedResidual(inner, kernel, scaled(expanded), scaled(outer), squeeze, act, stride))
            inner = scaled(outer)
        layers.append(_ConvNorm(inner, 6 * inner, 1, act=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        hidden = nn.Linear(6 * inner, 1280)
        self.classifier = nn.Sequential(hidden, nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(x.flatten(1))
