"""Pipelines of diffusers with tiny models of random weights, and LoRAs for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
TEXT = 8  # width of text embeddings, and tokens of a prompt


def tokenizer(folder: Path) -> CLIPTokenizer:
    """One that knows letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=TEXT, pad_token="<|endoftext|>")


def text_encoder(kind: Any) -> Any:
    sizes = {"hidden_size": TEXT, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    return kind(
        CLIPTextConfig(
            **sizes,
            vocab_size=64,
            bos_token_id=52,
            eos_token_id=53,
            max_position_embeddings=TEXT,
            projection_dim=TEXT,
        )
    )


def autoencoder(**config: Any) -> Any:
    sizes = {"block_out_channels": (4,), "latent_channels": 4, "norm_num_groups": 2, "layers_per_block": 1}
    return diffusers.AutoencoderKL(**sizes, sample_size=8, **config)


def unet(mid_block_type: str | None = None, **config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=mid_block_type,
        attention_head_dim=2,
        **config,
    )


def sd15(folder: Path, mid_block_type: str | None = None) -> Any:
    torch.manual_seed(0)
    model = unet(mid_block_type, cross_attention_dim=TEXT)
    models = autoencoder(), text_encoder(CLIPTextModel), tokenizer(folder), model
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    return ready(
        diffusers.StableDiffusionPipeline(*models, scheduler, None, None, requires_safety_checker=False),
        prompt="a cat",
    )


def sdxl(folder: Path) -> Any:
    torch.manual_seed(0)
    encoders = text_encoder(CLIPTextModel), text_encoder(CLIPTextModelWithProjection)
    model = unet(
        cross_attention_dim=2 * TEXT,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=6 * 2 + TEXT,
    )
    tokens, scheduler = tokenizer(folder), diffusers.EulerDiscreteScheduler()
    return ready(
        diffusers.StableDiffusionXLPipeline(
            autoencoder(), *encoders, tokens, tokens, model, scheduler, add_watermarker=False
        ),
        prompt="a cat",
    )


def flux(folder: Path) -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, autoencoder(shift_factor=0.1), None, None, None, None, model)
    return ready(pipe, prompt_embeds=torch.randn(1, 4, TEXT), pooled_prompt_embeds=torch.randn(1, TEXT))


def sd3(folder: Path) -> Any:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    rest: tuple[None, ...] = (None,) * 6
    pipe = diffusers.StableDiffusion3Pipeline(model, scheduler, autoencoder(shift_factor=0.1), *rest)
    texts = {
        f"{prefix}{name}": torch.randn(size)
        for prefix in ("", "negative_")
        for name, size in (("prompt_embeds", (1, 4, TEXT)), ("pooled_prompt_embeds", (1, TEXT)))
    }
    return ready(pipe, **texts)


def controlnet(folder: Path) -> Any:
    base = sd15(folder, "UNetMidBlock2DCrossAttn")
    control = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4,))
    parts = base.vae, base.text_encoder, base.tokenizer, base.unet, control, base.scheduler
    return ready(
        diffusers.StableDiffusionControlNetPipeline(*parts, None, None, requires_safety_checker=False),
        prompt="a cat",
        image=torch.rand(1, 3, 16, 16),
        controlnet_conditioning_scale=0.5,
    )


def ltx(folder: Path) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT,
    )
    blocks: dict[str, tuple[Any, ...]] = {
        name: value
        for prefix in ("", "decoder_")
        for name, value in {
            f"{prefix}block_out_channels": (4,) * 4,
            f"{prefix}layers_per_block": (1,) * 5,
            f"{prefix}spatio_temporal_scaling": (True, True, False, False),
        }.items()
    }
    inside: dict[str, Any] = {"decoder_inject_noise": (False,) * 5, "upsample_residual": (False,) * 4}
    sizes: dict[str, Any] = {"upsample_factor": (1,) * 4, "latent_channels": 4, "patch_size": 1, "patch_size_t": 1}
    video = diffusers.AutoencoderKLLTXVideo(**blocks, **inside, **sizes, decoder_causal=False)
    video.use_framewise_encoding = video.use_framewise_decoding = False
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    texts = {f"{prefix}prompt_embeds": torch.randn(1, 4, TEXT) for prefix in ("", "negative_")}
    masks = {f"{prefix}prompt_attention_mask": torch.ones(1, 4, dtype=torch.long) for prefix in ("", "negative_")}
    return ready(diffusers.LTXPipeline(scheduler, video, None, None, transformer), num_frames=9, **texts, **masks)


PIPELINES = {make.__name__: make for make in (sd15, sdxl, sd3, flux, controlnet, ltx)}


def ready(pipe: Any, **call: Any) -> Any:
    """`pipe` in evaluation mode, with large weights, since those of new models give nearly the same for all inputs."""
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    pipe.set_progress_bar_config(disable=True)
    pipe.tiny_call = call
    return pipe


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def images(pipe: Any, size: int = 8, steps: int = 1, **kwargs: Any) -> torch.Tensor:
    """What the pipeline draws, always from the same noise."""
    given = {**pipe.tiny_call, **kwargs}
    if "prompt_embeds" in given:
        given = {name: one.to(pipe.device) if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    noise = torch.Generator().manual_seed(0)
    result = pipe(height=size, width=size, num_inference_steps=steps, output_type="pt", generator=noise, **given)
    return result.frames if hasattr(result, "frames") else result.images


def lora(pipe: Any, folder: Path, seed: int = 1, rank: int = 2, layers: Sequence[str] = ATTENTION) -> str:
    """The folder of a LoRA of random weights for the denoiser of a pipeline."""
    model = denoiser(pipe)
    torch.manual_seed(seed)
    model = type(model).from_config(model.config)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=list(layers)))
    state = {name: 4 * tensor for name, tensor in get_peft_model_state_dict(model).items()}
    name = f"{'unet' if hasattr(pipe, 'unet') else 'transformer'}_lora_layers"
    path = folder / f"lora{seed}"
    pipe.save_lora_weights(path, **{name: state})
    return str(path)
