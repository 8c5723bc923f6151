"""Pipelines of diffusers without text encoders: SDXL, also with LoRAs that change places, and FLUX."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import timing
from benchmarks.cases import Workload
from benchmarks.numerics import assert_right
from benchmarks.pipelines import OURS, Pipeline
from torch_rtx.backend.entry import rtx
from torch_rtx.integrations.diffusers import accelerate

LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0")
RANK = 16
SWAPS = 4
STEPS = {"sdxl": 30, "sdxl_lora": 4, "flux": 28}
BRIEF = 2  # steps
SDXL: dict[str, dict[str, Any]] = {
    "full": {
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
    "small": {
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
# FLUX.1-dev is what diffusers makes by default.
FLUX: dict[str, dict[str, Any]] = {
    "full": {"guidance_embeds": True},
    "small": {
        "guidance_embeds": True,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    },
}
PIXELS, TOKENS = {"full": 1024, "small": 16}, {"full": 512, "small": 4}


def build(workload: Workload, peer: str, device: str, folder: Path, warm: bool) -> Pipeline:
    """The pipeline of a workload by a peer, see `text_pipelines.build`."""
    if "rtx" not in torch.compiler.list_backends():
        torch._dynamo.register_backend(rtx, name="rtx")
    diffusers.utils.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    dtype = getattr(torch, workload.dtype)
    make = _flux if workload.model == "flux" else _sdxl
    pipe = make(workload.size, device).to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(1)
    given = {n: torch.randn(s, generator=noise).to(device, dtype) for n, s in _inputs(pipe, workload).items()}
    pixels, swaps = PIXELS[workload.size], workload.model == "sdxl_lora"
    asked = {"height": pixels, "width": pixels, "output_type": "latent" if swaps else "pt"}

    def draw(steps: int, dtype: torch.dtype = dtype) -> Tensor:
        inputs = {name: tensor.to(dtype) for name, tensor in given.items()}  # `pipe.dtype` would walk all layers
        images: Tensor = pipe(**inputs, **asked, num_inference_steps=steps).images
        return images

    loras = []
    if swaps:
        loras = [_lora(pipe, folder / f"lora{seed}", seed) for seed in (1, 2)]
        if peer not in OURS and peer != "eager":
            pipe.enable_lora_hotswap(target_rank=RANK)
        pipe.load_lora_weights(loras[0], adapter_name="one")
    undo = _compile(pipe, peer, swaps)
    steps = STEPS[workload.model] if workload.size == "full" else BRIEF
    result, brief = partial(draw, steps), partial(draw, BRIEF)
    found = Pipeline(result, brief, partial(_check, pipe, brief, undo))
    if swaps:
        measured = _Swaps(pipe, peer, loras, result, device)
        found.early, found.more = measured.early, measured.settled
    return found


def _compile(pipe: Any, peer: str, denoiser_alone: bool) -> Callable[[], object]:
    """Compile as a peer does; undoes it."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    if peer in OURS:
        components = ["unet"] if denoiser_alone else None
        return accelerate(pipe, components, repeated_blocks=peer == "rtx-blocks").undo
    parts = [denoiser, *[pipe.vae.decoder] * (not denoiser_alone)]
    if peer == "inductor-blocks":
        denoiser.compile_repeated_blocks(fullgraph=True)
        for part in parts[1:]:
            part.compile(fullgraph=True)
    elif peer != "eager":
        mode = "max-autotune-no-cudagraphs" if peer == "max-autotune" else peer
        for part in parts:
            part.to(memory_format=torch.channels_last)
            part.compile(mode=mode, fullgraph=True)

    def undo() -> None:
        for part in parts:
            for module in part.modules():
                module._compiled_call_impl = None

    return undo


def _check(pipe: Any, brief: Callable[..., Tensor], undo: Callable[[], object]) -> None:
    """The image against those in eager mode and in float32.

    Raises:
        AssertionError: see `assert_right`.
    """
    found = brief().clone()
    undo()
    eager = brief()
    pipe.to(dtype=torch.float32)
    assert_right([found], [eager], [brief(dtype=torch.float32)])


# ---- LoRAs -----------------------------------------------------------------------------------------------------------


class _Swaps:
    """LoRAs that change places, under `lora`, in seconds: `swap_s`, how much later a result is there if a LoRA comes
    from a file before it, in the place of another one; `set_s`, if both are in memory; `graphs`, how many were compiled
    for that; `later`, the time of results after it as a share of what it was before; `same_again`, whether a LoRA
    draws the same image again, bit for bit.

    Args:
        result: draws with what is loaded; at first the first LoRA is, as `one`.
    """

    def __init__(self, pipe: Any, peer: str, loras: list[str], result: Callable[[], Tensor], device: str) -> None:
        self._pipe, self._peer, self._loras, self._result, self._device = pipe, peer, loras, result, device
        self._found: dict[str, Any] = {}

    def early(self) -> Iterator[dict[str, Any]]:
        """While there may still be work in the background, which other processes of a GPU may be, too."""
        before = counters["stats"]["unique_graphs"]
        for swapped, _ in self._swapped():
            yield self._tell(swap_s=swapped, graphs=counters["stats"]["unique_graphs"] - before)
        if self._peer not in (*OURS, "eager"):
            return  # compiled code has the layers of one adapter
        self._pipe.load_lora_weights(self._loras[1], adapter_name="two")
        self._result()
        settings = []
        for name in ("two", "one", "two", "one"):
            settings.append(self._later(partial(self._pipe.set_adapters, name)))
            graphs = counters["stats"]["unique_graphs"] - before
            yield self._tell(set_s=timing.summary(settings), graphs=graphs)
        self._pipe.delete_adapters("two")

    def settled(self) -> Iterator[dict[str, Any]]:
        """When results are as fast as they get; code that becomes another one meanwhile may round in another way."""
        first, before = self._result().clone(), statistics.median(self._seconds() for _ in range(3))
        for swapped, later in self._swapped():
            yield self._tell(swap_s=swapped, later=statistics.median(later) / before)
        yield self._tell(same_again=torch.equal(self._result(), first))

    def _tell(self, **news: Any) -> dict[str, Any]:
        self._found |= news
        return {"lora": dict(self._found)}

    def _swapped(self) -> Iterator[tuple[dict[str, float], list[float]]]:
        """After each swap a summary of all, and the seconds of results after them."""
        swapped, later = [], list[float]()
        for count in range(SWAPS):
            path = self._loras[(count + 1) % 2]
            swap = partial(self._pipe.load_lora_weights, path, adapter_name="one", hotswap=True)
            swapped.append(self._later(swap, later))
            yield timing.summary(swapped), later

    def _later(self, change: Callable[[], object], later: list[float] | None = None) -> float:
        """How much later a result is there after a change than the next one, whose seconds `later` gets."""
        changed, normal = self._seconds(change), self._seconds()
        if later is not None:
            later.append(normal)
        return max(0.0, changed - normal)

    def _seconds(self, change: Callable[[], object] = lambda: None) -> float:
        """Seconds of a change and a result."""
        timing.synchronize(self._device)
        start = time.perf_counter()
        change()
        self._result()
        timing.synchronize(self._device)
        return time.perf_counter() - start


def _lora(pipe: Any, folder: Path, seed: int) -> str:
    """A folder with a LoRA of random weights, which an earlier process may have left."""
    if not folder.exists():
        noise, state, dtype = torch.Generator().manual_seed(seed), dict[str, Tensor](), pipe.dtype
        for name, layer in pipe.unet.named_modules():
            if name.endswith(LAYERS):
                for part, shape in (("A", (RANK, layer.in_features)), ("B", (layer.out_features, RANK))):
                    values = 0.05 * torch.randn(shape, generator=noise)
                    state[f"{name}.lora_{part}.weight"] = values.to(dtype)
        pipe.save_lora_weights(folder, unet_lora_layers=state)
    return str(folder)


# ---- models ----------------------------------------------------------------------------------------------------------


def _autoencoder(size: str, device: str, latent_channels: int, **config: Any) -> nn.Module:
    channels = (128, 256, 512, 512) if size == "full" else (4,)
    with torch.device(device):
        return diffusers.AutoencoderKL(
            block_out_channels=channels,
            layers_per_block=2 if size == "full" else 1,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            latent_channels=latent_channels,
            norm_num_groups=32 if size == "full" else 2,
            **config,
        ).eval()


def _sdxl(size: str, device: str) -> Any:
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(
            **SDXL[size], use_linear_projection=True, addition_embed_type="text_time"
        ).eval()
    models = _autoencoder(size, device, 4), None, None, None, None, unet
    return diffusers.StableDiffusionXLPipeline(*models, diffusers.EulerDiscreteScheduler(), add_watermarker=False)


def _flux(size: str, device: str) -> Any:
    with torch.device(device):
        model = diffusers.FluxTransformer2DModel(**FLUX[size]).eval()
    vae = _autoencoder(size, device, model.config.in_channels // 4, shift_factor=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.FluxPipeline(scheduler, vae, None, None, None, None, model)


def _inputs(pipe: Any, workload: Workload) -> dict[str, tuple[int, ...]]:
    """The shapes of what is drawn and of the noise it is drawn from."""
    batch, side = workload.batch, PIXELS[workload.size] // pipe.vae_scale_factor
    if workload.model == "flux":
        config, tokens = pipe.transformer.config, TOKENS[workload.size]
        return {
            "prompt_embeds": (batch, tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (batch, config.pooled_projection_dim),
            "latents": (batch, (side // 2) ** 2, config.in_channels),
        }
    config = pipe.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    text = {"prompt_embeds": (batch, 77, config.cross_attention_dim), "pooled_prompt_embeds": (batch, pooled)}
    both = {prefix + name: shape for prefix in ("", "negative_") for name, shape in text.items()}
    return both | {"latents": (batch, config.in_channels, side, side)}
