"""Click on an image, get masks: SAM 2 as two engines, since an image is encoded once and clicked on often.

    python examples/zoo/segment.py                                         # random weights
    python examples/zoo/segment.py --model facebook/sam2.1-hiera-tiny --image photo.jpg --clicks 500,300

Needs transformers. The decoder takes any number of clicks at once, each of which gives three masks; the picture shows
the best one of each. The image is a portrait that matplotlib ships.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVICE, DTYPE, beside, described, exactly, options, package, parsed, picture, right, timed
from PIL import Image
from torch import Tensor, nn
from transformers import Sam2Config, Sam2Model

import torch_rtx

CLICKS = "512,410", "512,820", "100,200"
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that it was trained with
TINY: dict[str, Any] = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "image_size": [64, 64],
            "hidden_size": 8,
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [4, 4, 4, 4],
            "blocks_per_stage": [1, 1, 1, 1],
            "global_attention_blocks": [],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    },
}


class Encoder(nn.Module):
    """An image (1, 3, size, size) to its features at three scales."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.model.get_image_embeddings(image)


class Decoder(Encoder):
    """Features and clicks (1, clicks, 1, 2) to masks (1, clicks, 3, size / 4, size / 4) and how good each is."""

    def forward(self, features: list[Tensor], clicks: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(image_embeddings=features, input_points=clicks, input_labels=labels)
        return found.pred_masks, found.iou_scores


def photograph(file: Path | None, size: int) -> tuple[Tensor, Tensor]:
    """An image (3, size, size) from 0 to 1, and as the model takes it: less its mean, and scaled."""
    file = file or package("matplotlib", "mpl-data/sample_data/grace_hopper.jpg")
    image = Image.open(file).convert("RGB") if file else Image.radial_gradient("L").convert("RGB")
    pixels = torch.from_numpy(np.array(image.resize((size, size)))).to(DEVICE).permute(2, 0, 1) / 255
    mean, spread = (torch.tensor(values, device=DEVICE)[:, None, None] for values in (MEAN, SPREAD))
    return pixels, ((pixels - mean) / spread)[None].to(DTYPE)


def overlay(image: Tensor, masks: Tensor, clicks: Tensor) -> Tensor:
    """An image with masks (clicks, height, width) in colours, and the clicks in white."""
    masks = nn.functional.interpolate(masks[None].float(), image.shape[1:], mode="bilinear")[0] > 0
    for number, mask in enumerate(masks):
        angle = torch.arange(3) * 2.1 + 2.4 * number
        colour = (0.5 + 0.5 * angle.cos()).to(image)[:, None, None]
        image = torch.where(mask, 0.6 * image + 0.4 * colour, image)
    for x, y in clicks.flatten(0, 2).round().long().tolist():
        image[:, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = 1
    return image


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "segment")
    parser.add_argument("--model", help="a folder or a name on the Hub")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--clicks", nargs="+", default=CLICKS, help="x,y, where the image has 1024x1024 pixels")
    given = parsed(parser, arguments)
    torch.manual_seed(0)
    config = Sam2Config(**TINY) if given.size == "tiny" and not given.model else Sam2Config()
    model = Sam2Model.from_pretrained(given.model) if given.model else Sam2Model(config)
    encoder, decoder = (kind(model.to(DEVICE, DTYPE).eval()) for kind in (Encoder, Decoder))
    described(model, given.model or "random weights")
    size = model.config.prompt_encoder_config.image_size
    image, pixels = photograph(given.image, size)
    places = [[size / 1024 * float(number) for number in click.split(",")] for click in given.clicks]
    clicks = torch.tensor(places, device=DEVICE, dtype=DTYPE)[None, :, None]
    labels = torch.ones(clicks.shape[:3], device=DEVICE, dtype=torch.int64)

    start, number = time.perf_counter(), {1: torch.export.Dim("clicks", max=256)}
    encode = torch_rtx.compile(encoder, (pixels,))
    decode = torch_rtx.compile(decoder, (encoder(pixels), clicks, labels), dynamic_shapes=([None] * 3, number, number))
    print(f"built two engines in {time.perf_counter() - start:.1f} s")
    features, compiled = timed(lambda: encode(pixels), given.patience)
    expected, eager = timed(lambda: encoder(pixels))
    beside(f"the image, {size}x{size}", compiled, eager)
    exact = exactly(encoder, pixels)
    for scale, results in enumerate(zip(features, expected, exact, strict=True)):
        right(f"features of scale {scale}", *results)
    (masks, scores), compiled = timed(lambda: decode(features, clicks, labels), given.patience)
    (wanted, _), eager = timed(lambda: decoder(expected, clicks, labels))
    beside(f"{len(places)} clicks", compiled, eager)
    right("masks", masks, wanted, exactly(decoder, exact, clicks, labels)[0])
    best = masks[0, torch.arange(len(places), device=DEVICE), scores[0].argmax(1)]
    picture(given.out / "masks.png", overlay(image, best, clicks))
    print(given.out / "masks.png")


if __name__ == "__main__":
    main()
