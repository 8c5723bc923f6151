"""A detector before a camera: a small YOLO, with its choice of boxes in the engine, in one call per frame.

    python examples/zoo/detect.py

It first learns, in seconds, to find red, green and blue balls, since no package ships weights. Then the engine takes
frames as a camera gives them, bytes (height, width, 3), and returns boxes: scaling, the network, the best candidates,
and which of them overlap a better one, are one program. The picture shows four frames with what was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import DEVICE, DTYPE, ON_GPU, beside, described, exactly, options, parsed, picture, right, timed, verdict
from torch import Tensor, nn
from torch.nn import functional as F

import torch_rtx

COLOURS = torch.tensor([[220.0, 40, 40], [40, 200, 60], [60, 80, 230]], device=DEVICE)  # the classes
SIZES = {"tiny": (8, 64), "real": (16, 640)}  # channels, pixels
STRIDES, CANDIDATES, LEAST, OVERLAP = (8, 16, 32), 200, 0.5, 0.5


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, SiLU."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Split(nn.Module):
    """YOLO's block: half of the channels go through two convolutions, and all that there was is mixed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = conv(width, width, 1), conv(width * 3 // 2, width, 1)
        self.inner = nn.Sequential(conv(width // 2, width // 2), conv(width // 2, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        kept, half = self.enter(x).chunk(2, 1)
        return self.leave(torch.cat([kept, half, half + self.inner(half)], 1))


class Detector(nn.Module):
    """Three scales, the coarse ones added to the fine; at each place a box around it, and a score for each class."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(1, 5)]
        self.stem = nn.Sequential(conv(3, width, stride=2), conv(width, 2 * width, stride=2), Split(2 * width))
        self.down = nn.ModuleList(nn.Sequential(conv(w, 2 * w, stride=2), Split(2 * w)) for w in widths[:3])
        self.across = nn.ModuleList(conv(w, 4 * width, 1) for w in widths[1:])
        self.heads = nn.ModuleList(nn.Sequential(conv(w, w), nn.Conv2d(w, 7, 1)) for w in [4 * width] * len(STRIDES))
        lines = [torch.arange(stride / 2, pixels, stride) for stride in STRIDES]
        self.register_buffer("places", torch.cat([torch.cartesian_prod(line, line).flip(1) for line in lines]))
        self.register_buffer("strides", torch.cat([line.new_full((len(line) ** 2, 1), 2 * line[0]) for line in lines]))

    def dense(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes (n, height, width, 3) to corners (n, places, 4) in pixels, and scores (n, places, classes)."""
        x, wide = frames.permute(0, 3, 1, 2).to(self.places.dtype) / 255, self.places.dtype
        with torch.autocast(DEVICE, DTYPE, enabled=ON_GPU):
            x = self.stem(x)
            fine, middle, coarse = (across(x := down(x)) for across, down in zip(self.across, self.down, strict=True))
            middle = middle + F.interpolate(coarse, scale_factor=2.0)
            levels = fine + F.interpolate(middle, scale_factor=2.0), middle, coarse
            found = [head(level).flatten(2).to(wide) for head, level in zip(self.heads, levels, strict=True)]
        reach, scores = torch.cat(found, 2).mT.split([4, len(COLOURS)], -1)
        low, high = (F.softplus(reach) * self.strides).chunk(2, -1)
        return torch.cat([self.places - low, self.places + high], -1), scores

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bytes (height, width, 3) to candidates, best first: corners (n, 4), classes, scores, whether to keep them."""
        boxes, scores = (part[0] for part in self.dense(frame[None]))
        best, classes = scores.sigmoid().max(1)
        best, chosen = best.topk(min(CANDIDATES, len(best)))
        boxes, classes = boxes[chosen], classes[chosen]
        low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
        area, shared = (boxes[:, 2:] - boxes[:, :2]).prod(1), (high - low).clamp(min=0).prod(2)
        overlap = shared / (area + area[:, None] - shared)
        return boxes, classes, best, (best > LEAST) & (overlap.tril(-1).amax(1) < OVERLAP)

    def loss(self, frames: Tensor, truth: Tensor) -> Tensor:
        """How far it is from boxes (n, classes, 4), one of each class: places near the middle should say so."""
        boxes, scores = self.dense(frames)
        middle, size = (truth[..., :2] + truth[..., 2:]) / 2, truth[..., 2] - truth[..., 0]
        near = (self.places - middle[:, :, None]).abs().amax(-1) < size[..., None] / 4  # (n, classes, places)
        errors = (boxes[:, None] - truth[:, :, None]).abs().mean(-1) / size[..., None]
        doubt = F.binary_cross_entropy_with_logits(scores.mT, near.float(), reduction="sum") / near.sum()
        return doubt + errors[near].mean()


def camera(moments: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Frames (n, pixels, pixels, 3) of a wall with three balls that swing, and the balls' boxes (n, 3, 4)."""
    phase = moments[:, None] * torch.tensor([1.0, 1.31, 1.73], device=DEVICE) + torch.tensor([0.0, 2, 4], device=DEVICE)
    centre = pixels * torch.stack([0.5 + 0.35 * phase.sin(), 0.5 + 0.35 * (1.9 * phase).cos()], -1)
    radius = pixels * (0.14 + 0.03 * (0.7 * phase).sin())
    line = torch.arange(pixels, device=DEVICE) + 0.5
    image = (90 + 60 * line / pixels)[:, None, None] + 8 * torch.randn(len(moments), pixels, pixels, 3, device=DEVICE)
    for ball in (2, 1, 0):  # the red one is in front
        aside = (line - centre[:, ball, :1])[:, None] ** 2 + (line - centre[:, ball, 1:])[:, :, None] ** 2
        share = (aside.sqrt() / radius[:, ball, None, None])[..., None]
        image = torch.where(share < 1, COLOURS[ball] * (1 - 0.4 * share), image)
    return image.clamp(0, 255).byte(), torch.cat([centre - radius[..., None], centre + radius[..., None]], -1)


def learn(model: Detector, pixels: int, steps: int) -> float:
    """Train on frames of other moments than those that follow; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=ON_GPU)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        loss = model.loss(*camera(-1000 * torch.rand(8, device=DEVICE), pixels))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def watch(model: Detector, pixels: int, given: argparse.Namespace) -> None:
    """Look at a film, with and without the engine."""
    film, truth = camera(0.2 * torch.arange(60 if given.size == "real" else 12, device=DEVICE), pixels)
    film, truth = film.cpu(), truth.cpu()  # a camera's frames come from host memory
    engine = torch_rtx.compile(model.eval(), (film[0].to(DEVICE),))

    def every(call: Any) -> list[list[Tensor]]:
        return [[part.cpu() for part in call(frame.to(DEVICE))] for frame in film]

    seen, compiled = timed(lambda: every(engine), given.patience)
    expected, eager = timed(lambda: every(model))
    beside("a frame, from and to host memory", compiled / len(film), eager / len(film))
    scores = exactly(model, film[0].to(DEVICE))[2].cpu()
    right("the scores of the first one", seen[0][2], expected[0][2], scores)
    ours, own = (hits(results, truth, pixels) for results in (seen, expected))
    verdict(f"{ours} of {len(film) * len(COLOURS)} balls found, {own} in eager mode", abs(ours - own) <= 0.02 * own)
    drawn = [framed(frame, *found[:2], found[3]) for frame, found in zip(film, seen, strict=True)]
    picture(given.out / "balls.png", torch.cat(drawn[:: len(drawn) // 4], 1).permute(2, 0, 1) / 255)
    print(given.out / "balls.png")


def hits(results: list[list[Tensor]], truth: Tensor, pixels: int) -> int:
    """How many balls were found."""
    count = 0
    for (boxes, classes, _, keep), balls in zip(results, truth, strict=True):
        near = (boxes - balls[classes]).abs().amax(1) < pixels / 12
        count += len(set(classes[near & keep].tolist()))
    return count


def framed(frame: Tensor, boxes: Tensor, classes: Tensor, keep: Tensor) -> Tensor:
    """A frame with its boxes, in the light colours of their classes."""
    frame, boxes, classes = frame.clone(), boxes[keep], classes[keep]
    for (x0, y0, x1, y1), kind in zip(boxes.round().long().clamp(0, len(frame) - 1).tolist(), classes, strict=True):
        colour = (COLOURS[kind].cpu() / 2 + 127).byte()
        frame[y0 : y1 + 1, [x0, x1]] = colour
        frame[[y0, y1], x0 : x1 + 1] = colour
    return frame


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "detect")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    given = parsed(parser, arguments)
    torch.manual_seed(0)
    width, pixels = SIZES[given.size]
    model = Detector(width, pixels).to(DEVICE)
    described(model)
    print(f"learned to find balls in {given.steps} steps: loss {learn(model, pixels, given.steps):.2f}")
    watch(model, pixels, given)


if __name__ == "__main__":
    main()
