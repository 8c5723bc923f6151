"""A film at twice its size: a small convolutional network enlarges frame by frame, in an engine.

    python examples/zoo/upscale.py

No package ships weights for this, so it learns from the beginning of the film, which it has in both sizes, and enlarges
the rest. The film is a camera that moves over a portrait that matplotlib ships. The picture shows a frame as it comes,
by bicubic interpolation, by the network, and as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from common import DEVICE, DTYPE, ON_GPU, beside, described, exactly, options, package, parsed, picture, right, timed
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import torch_rtx

SIZES = {"tiny": (16, 3, 96), "real": (64, 16, 960)}  # channels, layers, pixels of a large frame


class Upscaler(nn.Module):
    """Convolutions of the small frame, of which each place gives four pixels, on top of a bicubic enlargement."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        inner = [layer for _ in range(layers) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width))]
        last = nn.Conv2d(width, 12, 3, padding=1)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.PReLU(width), *inner, last, nn.PixelShuffle(2)
        )
        nn.init.zeros_(last.weight)  # it begins as the interpolation
        nn.init.zeros_(last.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (n, 3, height, width) from 0 to 1, to frames of twice the height and width."""
        with torch.autocast(DEVICE, DTYPE, enabled=ON_GPU):
            added = self.layers(frames)
        return larger(frames) + added.to(frames.dtype)


def larger(frames: Tensor) -> Tensor:
    """Twice as large, by bicubic interpolation."""
    return F.interpolate(frames, scale_factor=2.0, mode="bicubic", align_corners=False)


def film(pixels: int, count: int) -> Tensor:
    """The frames (count, 3, pixels, pixels) of a camera that moves over a portrait."""
    file = package("matplotlib", "mpl-data/sample_data/grace_hopper.jpg")
    image = Image.open(file) if file else Image.effect_mandelbrot((512, 600), (-2, -1.2, 1, 1.2), 100)
    photograph = torch.from_numpy(np.array(image.convert("RGB"))).to(DEVICE).permute(2, 0, 1) / 255
    wall = torch.cat([photograph, photograph.flip(2)], 2)
    wall = torch.cat([wall, wall.flip(1)], 1)
    rows, columns = wall.shape[1] - pixels, wall.shape[2] - pixels
    places = [(min(80 + 2 * at, rows), min(160 + at, columns)) for at in range(count)]
    return torch.stack([wall[:, y : y + pixels, x : x + pixels] for y, x in places])


def halved(frames: Tensor) -> Tensor:
    """Half as large: means of four pixels."""
    return F.avg_pool2d(frames, 2)


def learn(model: Upscaler, frames: Tensor, steps: int) -> None:
    """Train on pieces of large frames, and on what halves them."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        size, (height, width) = 32, frames.shape[2:]
        y, x = (int(torch.randint(most - size + 1, ())) for most in (height, width))
        wanted = frames[torch.randint(len(frames), (8,)), :, y : y + size, x : x + size]
        F.mse_loss(model(halved(wanted)), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()


def quality(frames: Tensor, truth: Tensor) -> float:
    """Peak signal to noise ratio in dB, without the edges."""
    error = (frames.clamp(0, 1) - truth)[..., 4:-4, 4:-4].square().mean()
    return (-10 * error.log10()).item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "upscale")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    given = parsed(parser, arguments)
    torch.manual_seed(0)
    width, layers, pixels = SIZES[given.size]
    beginning, truth = film(pixels, 64 if ON_GPU else 24).split([32 if ON_GPU else 16, 32 if ON_GPU else 8])
    frames, model = halved(truth), Upscaler(width, layers).to(DEVICE)
    learn(model, beginning, given.steps)
    described(model.eval(), f"trained in {given.steps} steps")

    with torch.no_grad():
        engine = torch_rtx.compile(model, (frames[:1],))
        found, compiled = timed(lambda: torch.cat([engine(frame) for frame in frames.split(1)]), given.patience)
        expected, eager = timed(lambda: torch.cat([model(frame) for frame in frames.split(1)]))
        beside(f"a frame to {pixels}x{pixels}", compiled / len(frames), eager / len(frames))
        right("a frame", found[:1], expected[:1], exactly(model, frames[:1]))
    before, after = quality(larger(frames), truth), quality(found, truth)
    print(f"{after:.2f} dB of signal to noise; {before:.2f} dB by bicubic interpolation")
    shown = F.interpolate(frames[:1], scale_factor=2.0)[0], larger(frames[:1])[0], found[0], truth[0]
    picture(given.out / "frames.png", torch.cat(shown, 2))
    print(given.out / "frames.png")


if __name__ == "__main__":
    main()
