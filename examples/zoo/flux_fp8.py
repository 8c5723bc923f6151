"""FLUX in 8 bits: a pipeline of diffusers, quantized to fp8 and compiled; needs diffusers and accelerate.

    python examples/zoo/flux_fp8.py                                              # random weights
    python examples/zoo/flux_fp8.py --model black-forest-labs/FLUX.1-schnell --steps 4

The linear layers of the transformer's blocks multiply in e4m3, with a scale for each channel of a weight, and for each
token in each call. Draws a picture in eager mode, compiled, and compiled in fp8. What fp8 costs is how far one step is
from that of the model as it was. A CPU multiplies no 8-bit floats, so that it takes longer there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from common import DEVICE, DTYPE, ON_GPU, beside, described, options, parsed, picture, right, timed
from torch import Tensor

import torch_rtx
from torch_rtx.integrations.diffusers import accelerate

# FLUX.1-schnell has the defaults of diffusers.
TINY = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "in_channels": 16,
    "axes_dims_rope": (4, 6, 6),
}
FP8 = {"*transformer_blocks*": "fp8_dynamic", "*norm*": None}  # modulation has one token: nothing to gain


def random_pipeline(size: str) -> Any:
    """FLUX without text encoders, with random weights that are made on the device."""
    torch.manual_seed(0)
    channels, latents = ((128, 256, 512, 512), 16) if size == "real" else ((4,), 4)
    with torch.device(DEVICE):
        torch.set_default_dtype(DTYPE)
        transformer = diffusers.FluxTransformer2DModel(**(TINY if size == "tiny" else {}))
        autoencoder = diffusers.AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=2 if size == "real" else 1,
            latent_channels=latents,
            norm_num_groups=32 if size == "real" else 2,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        )
        torch.set_default_dtype(torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, autoencoder.eval(), None, None, None, None, transformer.eval())


def draw(pipe: Any, steps: int, pixels: int, kind: str = "pt") -> Tensor:
    """The image (3, pixels, pixels), or the latents, always from the same noise."""
    noise = torch.Generator().manual_seed(0)
    config = pipe.transformer.config
    texts: dict[str, Any] = {"prompt": "a lighthouse on a cliff at dawn, oil on canvas"}
    if pipe.text_encoder is None:
        sizes = {
            "prompt_embeds": (1, 256, config.joint_attention_dim),
            "pooled_prompt_embeds": (1, config.pooled_projection_dim),
        }
        texts = {name: torch.randn(shape, generator=noise).to(DEVICE, DTYPE) for name, shape in sizes.items()}
    size = {"height": pixels, "width": pixels, "num_inference_steps": steps}
    return pipe(**texts, **size, generator=noise, output_type=kind).images[0].float()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "flux_fp8")
    parser.add_argument("--model", help="a folder or a name on the Hub")
    parser.add_argument("--steps", type=int, default=4 if ON_GPU else 1)
    parser.add_argument("--skip", action="store_true", help="fp8 alone, not compiled without it")
    parser.add_argument("--pixels", type=int, help="1024, or 32 for the tiny size")
    given = parsed(parser, arguments)
    diffusers.utils.logging.set_verbosity_error()
    pretrained = diffusers.FluxPipeline.from_pretrained
    pipe = pretrained(given.model, torch_dtype=DTYPE).to(DEVICE) if given.model else random_pipeline(given.size)
    pipe.set_progress_bar_config(disable=True)
    pixels = given.pixels or (32 if given.size == "tiny" and not given.model else 1024)
    described(pipe.transformer, given.model or "random weights")

    exact = draw(pipe, 1, pixels, "latent")
    image, eager = timed(lambda: draw(pipe, given.steps, pixels), times=1)
    picture(given.out / "eager.png", image)
    if not given.skip:
        with accelerate(pipe, repeated_blocks=True):  # the blocks are captured once for all of them
            image, compiled = timed(lambda: draw(pipe, given.steps, pixels), given.patience)
        beside(f"{given.steps} steps at {pixels}x{pixels}", compiled, eager)

    torch_rtx.quantize(pipe.transformer, FP8)
    own = draw(pipe, 1, pixels, "latent")
    with accelerate(pipe, repeated_blocks=True):
        image, compiled = timed(lambda: draw(pipe, given.steps, pixels), given.patience)
        step = draw(pipe, 1, pixels, "latent")
    picture(given.out / "fp8.png", image)
    beside(f"{given.steps} steps at {pixels}x{pixels} in fp8", compiled, eager)
    right("a step in fp8", step, own, exact, "the model as it was")
    print(f"{given.out}: eager.png, fp8.png")


if __name__ == "__main__":
    main()
