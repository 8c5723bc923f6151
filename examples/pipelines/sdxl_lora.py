"""LoRAs that change places in a compiled pipeline of SDXL; needs diffusers and peft.

    python examples/pipelines/sdxl_lora.py                       # tiny on a CPU, SDXL's sizes on a GPU, random weights
    python examples/pipelines/sdxl_lora.py --model stabilityai/stable-diffusion-xl-base-1.0 \
        --lora pixel.safetensors --lora papercut.safetensors

Draws one image in eager mode and with compiled models, for each LoRA in turn and for both together; prints the seconds
of each and saves the pictures. The first LoRA comes twice: its second image has to be the first one, bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch._dynamo.utils import counters

import torch_rtx
from torch_rtx.integrations.diffusers import accelerate

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
# The published sizes of SDXL's UNet, and the same with next to nothing in it.
SIZES: dict[str, dict[str, Any]] = {
    "real": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 20,
    },
}


def random_pipeline(size: str) -> Any:
    """SDXL without text encoders, with random weights."""
    torch.manual_seed(0)
    channels = (128, 256, 512, 512) if size == "real" else (4,)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        norm_num_groups=2 if size == "tiny" else 32,
    )
    unet = diffusers.UNet2DConditionModel(**SIZES[size], use_linear_projection=True, addition_embed_type="text_time")
    models = autoencoder, None, None, None, None, unet
    pipe = diffusers.StableDiffusionXLPipeline(*models, diffusers.EulerDiscreteScheduler(), add_watermarker=False)
    for model in (autoencoder, unet):
        model.eval()
    return pipe.to(DEVICE, DTYPE)


def prompt_of(pipe: Any) -> dict[str, Any]:
    """What is drawn: random embeddings of a text, for a pipeline without text encoders."""
    if pipe.text_encoder_2 is not None:
        return {"prompt": "a lighthouse on a cliff at dawn, oil on canvas"}
    config = pipe.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    sizes = {"prompt_embeds": (1, 77, config.cross_attention_dim), "pooled_prompt_embeds": (1, pooled)}
    noise = torch.Generator().manual_seed(1)
    return {
        prefix + name: torch.randn(shape, generator=noise).to(DEVICE, DTYPE)
        for prefix in ("", "negative_")
        for name, shape in sizes.items()
    }


def random_lora(unet: Any, folder: Path, seed: int) -> str:
    """A folder with a LoRA of random weights, of another rank for each seed."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = type(unet).from_config(unet.config)
        model.add_adapter(LoraConfig(r=4 * seed, target_modules=LAYERS))
    state = {name: 0.1 * torch.randn(t.shape) for name, t in get_peft_model_state_dict(model).items()}
    path = folder / f"lora{seed}"
    diffusers.StableDiffusionXLPipeline.save_lora_weights(path, unet_lora_layers=state)
    return str(path)


def draw(pipe: Any, steps: int, pixels: int) -> tuple[torch.Tensor, float]:
    """The image, always from the same noise, and how many seconds it took."""
    noise = torch.Generator().manual_seed(0)
    size = {"height": pixels, "width": pixels, "num_inference_steps": steps}
    start = time.perf_counter()
    image = pipe(**prompt_of(pipe), **size, generator=noise, output_type="pt").images[0].float().cpu()
    return image, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and print."""
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="real" if ON_GPU else "tiny", help="of random weights")
    parser.add_argument("--model", help="a folder or a name on the Hub, in place of random weights")
    parser.add_argument("--lora", action="append", default=[], help="a file or folder; two of them")
    parser.add_argument("--steps", type=int, default=30 if ON_GPU else 2)
    parser.add_argument("--pixels", type=int, help="1024, or 8 for the tiny size")
    parser.add_argument("--out", type=Path, default=Path("sdxl_lora"), help="a folder for pictures")
    given = parser.parse_args(arguments)
    kind = diffusers.StableDiffusionXLPipeline
    pipe = kind.from_pretrained(given.model, torch_dtype=DTYPE).to(DEVICE) if given.model else None
    pipe = pipe or random_pipeline(given.size)
    pipe.set_progress_bar_config(disable=True)
    pixels = given.pixels or (8 if given.size == "tiny" and not given.model else 1024)
    weights = sum(parameter.numel() for parameter in pipe.unet.parameters())
    print(f"a UNet of {weights / 1e6:.3g} million parameters, {pixels}x{pixels} pixels, {given.steps} steps, {DEVICE}")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        loras = given.lora or [random_lora(pipe.unet, Path(folder), seed) for seed in (1, 2)]
        compare(pipe, loras, given.steps, pixels, given.out)


def compare(pipe: Any, loras: Sequence[str], steps: int, pixels: int, out: Path) -> None:
    """Each choice of LoRAs in eager mode, then compiled."""
    choices = {
        "none": {},
        "first": {"first": 1.0},
        "second": {"second": 1.0},
        "both": {"first": 0.6, "second": 0.4},
        "again": {"first": 1.0},
    }
    expected, eager = {}, {}
    for name, path in zip(("first", "second"), loras, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    for name, scales in choices.items():
        choose(pipe, scales)
        draw(pipe, 1, pixels)  # libraries choose algorithms
        expected[name], eager[name] = draw(pipe, steps, pixels)
    pipe.unload_lora_weights()
    accelerated = accelerate(pipe)
    _, first = draw(pipe, steps, pixels)
    torch_rtx.wait(timeout=600)  # until kernels are compiled and measured; images before that are slower
    _, steady = draw(pipe, steps, pixels)
    print(f"{accelerated} draws the first image in {first:.2f} s, later ones in {steady:.3f} s")
    graphs, images = counters["stats"]["unique_graphs"], {}
    for name, path in zip(("first", "second"), loras, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    print(f"{'LoRAs':10}{'eager':>10}{'swap':>10}{'image':>10}{'speedup':>10}   difference from eager")
    for name, scales in choices.items():
        choose(pipe, scales)
        images[name], swapped = draw(pipe, steps, pixels)
        _, again = draw(pipe, steps, pixels)
        times = f"{eager[name]:8.3f} s{max(swapped - again, 0):8.3f} s{again:8.3f} s{eager[name] / again:9.2f}x"
        print(f"{name:10}{times}   {(images[name] - expected[name]).abs().max().item():.1g}")
        file = out / f"{name}.png"
        diffusers.image_processor.VaeImageProcessor.numpy_to_pil(images[name].permute(1, 2, 0).numpy())[0].save(file)
    compiled = counters["stats"]["unique_graphs"] - graphs
    same = "the same" if torch.equal(images["first"], images["again"]) else "ANOTHER"
    print(f"{compiled} graphs were compiled for LoRAs; the first one drew {same} image again; pictures: {out}")
    accelerated.undo()


def choose(pipe: Any, scales: dict[str, float]) -> None:
    """Activate these LoRAs with these scales."""
    if scales:
        pipe.enable_lora()
        pipe.set_adapters([*scales], [*scales.values()])
    else:
        pipe.disable_lora()


if __name__ == "__main__":
    with torch.no_grad():
        main()
