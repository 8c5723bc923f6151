"""The model zoo: architectures of `transformers`, and a few that it does not have, with random weights.

    model, args, kwargs = models.build("bert_base", "small")
    model(*args, **kwargs)

Each model exists in two sizes. `full` is the published configuration. `small` is the same architecture with fewer
layers, narrower widths or smaller images: its forward takes well under a second on one CPU core.

Weights and inputs depend on the name, the size and the seed alone, so they are the same on every device; other dtypes
hold the rounded float32 values. (A GPU draws those of the sweep's models itself, in no time.) `gpt2`, `gpt2_prefill`
and `gpt2_decode` share their weights; so do the llama models.
Every parameter, and every batch norm statistic, that a fresh model holds as a constant (biases, norm weights, layer
scales) is given random values: otherwise folding them wrongly would go unnoticed.

Every model is captured as one graph by `torch.compile(fullgraph=True)` and by `torch.export.export(strict=False)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from transformers import (
    BertConfig,
    BertModel,
    Cache,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
)
from transformers.cache_utils import StaticLayer
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder

from benchmarks import sweep_models
from benchmarks.diffusion import FluxTransformer, StableDiffusionUNet
from benchmarks.sweep_table import ENTRIES
from benchmarks.vision import BLOCKS, KINDS, MobileNetV3Large

log = logging.getLogger(__name__)

Size = Literal["small", "full"]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class ModelSpec:
    """One model of the zoo.

    Args:
        name: the name that `build` takes.
        model: returns the module of a size (and, with a static cache, of a batch size), in float32 on the CPU.
        inputs: returns `(args, kwargs)` of one call for `(size, batch, length)`, in float32 on the CPU.
        dynamic_batch: the same module accepts any batch size (a static cache fixes it).
    """

    name: str
    model: Callable[..., nn.Module]
    inputs: Callable[[Size, int, int | None], Inputs]
    dynamic_batch: bool = True


def names() -> list[str]:
    """The names of all models, in a fixed order."""
    return list(SPECS)


def spec(name: str) -> ModelSpec:
    """The specification called `name`, of the zoo or of the sweep; `ValueError` names the known ones.

    Of the sweep's models `small` has few layers and is as wide as `full`.
    """
    if name in ENTRIES:
        entry = ENTRIES[name]
        return ModelSpec(
            name,
            lambda size: sweep_models.module(entry, few=size == "small"),
            lambda size, batch, length: sweep_models.inputs(entry, batch),
        )
    if name not in SPECS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(SPECS)}")
    return SPECS[name]


def build(
    name: str,
    size: Size = "small",
    *,
    batch: int = 2,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Returns `(model, args, kwargs)`: a module in eval mode and the inputs of one call of it.

    Args:
        batch: the batch size. A model with a static cache accepts only the one that it was built for.
        length: tokens of text (for a decode step: tokens in the cache), or the side of images and latents; None: as
            the size has it. Absolute positions bound the first, and vision transformers have a fixed side.
        dtype: floating-point dtype of weights and inputs. Rotary frequencies stay in float32, as in a
            loaded checkpoint.
        seed: another seed gives the same architecture with other weights.
    """
    args, kwargs = inputs(name, size, batch=batch, length=length, dtype=dtype, device=device, seed=seed)

    def made(where: str | torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device(where):
            torch.manual_seed(seed)
            model = _module(name, size, batch)
            _randomize(model)
            if name in ENTRIES:
                _normalize(model, *pytree.tree_map_only(Tensor, partial(_float32, device=where), (args, kwargs)))
        return _to(model, dtype, device)

    try:
        return made(device if name in ENTRIES else "cpu"), args, kwargs
    except (RuntimeError, TypeError, ValueError):  # its code reads numbers of its tensors, which are on the CPU then
        return made("cpu"), args, kwargs


def without_weights(
    name: str, size: Size = "small", *, batch: int = 2, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model on the `meta` device, for what needs no data. Arguments as in `build`."""
    with torch.device("meta"):
        return _to(_module(name, size, batch), dtype, "meta")


def _module(name: str, size: Size, batch: int) -> nn.Module:
    model_spec = spec(name)
    return (model_spec.model(size) if model_spec.dynamic_batch else model_spec.model(size, batch)).eval()


def inputs(
    name: str,
    size: Size = "small",
    *,
    batch: int = 2,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """Returns `(args, kwargs)` of one call of the model, without building it. Arguments as in `build`."""
    model_spec = spec(name)
    if size not in ("small", "full"):
        raise ValueError(f"unknown size {size!r}; known sizes: small, full")

    def cast(value: Any) -> Any:
        return value.to(device, dtype if value.is_floating_point() else None)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        args, kwargs = model_spec.inputs(size, batch, length)
    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


# Weights ------------------------------------------------------------------------------------------------------------


_SPREAD = {"initializer_range": 0.1}
"""For narrow models: with the usual 0.02, attention scores would all be near zero and their errors invisible."""


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Replaces what a fresh model holds as constants; keeps batch norm networks from losing their signal."""
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.Conv2d) and normalized:  # the statistics above expect outputs near unit variance
            mode = "fan_out" if module.groups == 1 else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
    if isinstance(model, CachedDecoder):
        for keys, values, _ in model.layers():  # what a prompt would have left there, for a decode step to read
            keys.normal_()
            values.normal_()


@torch.no_grad()
def _normalize(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives batch norms the statistics of these inputs: with others, deep networks overflow in half precision."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    try:
        if norms:
            model(*args, **kwargs)
    except ValueError as error:  # statistics of a single value: the others stay as well
        log.info("batch norms keep random statistics: %s", error)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(min=1e-3)


def _float32(tensor: Tensor, device: str | torch.device) -> Tensor:
    return tensor.to(device, torch.float32 if tensor.is_floating_point() else None)


def _to(model: nn.Module, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(device, dtype)
    for name, buffer in frequencies.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(device))
    return model


# Static caches ------------------------------------------------------------------------------------------------------


class _BoundLayer(StaticLayer):
    """One layer of a static cache over tensors that its caller owns: keys, values, and the number of tokens held."""

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        self.keys, self.values, self.cumulative_length = keys, values, length
        self.max_cache_len, self.dtype, self.device = keys.shape[2], keys.dtype, keys.device
        self.is_initialized = True


class CachedDecoder(nn.Module):
    """A causal language model over a `transformers` static cache whose tensors are buffers of the module.

    A call writes the keys and values of `input_ids` at `cache_position` and attends to what the cache holds up to
    there. The position is an input, not state, so that repeating a call repeats its result. As buffers, the cache
    tensors move with the module, and both `torch.compile` and `torch.export` see their mutation. The cache object is
    made anew in each call, because an export would record the tensors of a kept one as constants.
    """

    def __init__(self, model: PreTrainedModel, batch: int, max_cache_len: int) -> None:
        super().__init__()
        config = model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        self.model = model
        for layer in range(config.num_hidden_layers):
            shape = (batch, heads, max_cache_len, head_dim)
            self.register_buffer(f"keys_{layer}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"values_{layer}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"length_{layer}", torch.zeros((), dtype=torch.long), persistent=False)

    def layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys and values, `[batch, heads, max_cache_len, head_dim]`, and length of each layer."""
        count = self.model.config.num_hidden_layers
        return [tuple(getattr(self, f"{part}_{i}") for part in ("keys", "values", "length")) for i in range(count)]

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Takes `input_ids [batch, tokens]`, `cache_position [tokens]`; gives logits `[batch, tokens, vocabulary]`."""
        layers = self.layers()
        for _, _, length in layers:
            length.copy_(cache_position[0])
        output = self.model(
            input_ids,
            position_ids=cache_position.unsqueeze(0),
            past_key_values=Cache(layers=[_BoundLayer(*layer) for layer in layers]),
            use_cache=True,
        )
        return output.logits


def _cached(causal: ModelSpec, phase: Literal["prefill", "decode"]) -> ModelSpec:
    def model(size: Size, batch: int) -> nn.Module:
        return CachedDecoder(causal.model(size), batch, max_cache_len=512 if size == "full" else 32)

    def call(size: Size, batch: int, length: int | None) -> Inputs:
        prompt = length or (128 if size == "full" else 16)
        tokens, start = (prompt, 0) if phase == "prefill" else (1, prompt)
        _, kwargs = causal.inputs(size, batch, tokens)
        return (kwargs["input_ids"], torch.arange(start, start + tokens)), {}

    return ModelSpec(f"{causal.name}_{phase}", model, call, dynamic_batch=False)


# Vision -------------------------------------------------------------------------------------------------------------


def _images(pixels: int = 64) -> Callable[[Size, int, int | None], Inputs]:
    def call(size: Size, batch: int, length: int | None) -> Inputs:
        side = length or (224 if size == "full" else pixels)
        # Noise around a colour: noise alone averages out, and every image would get the same answer.
        return (torch.randn(batch, 3, side, side) + 2 * torch.randn(batch, 3, 1, 1),), {}

    return call


def _vision(
    name: str,
    kind: type[PreTrainedModel],
    config: type[PreTrainedConfig],
    small: dict[str, Any],
    full: dict[str, Any] | None = None,
    pixels: int = 64,
) -> ModelSpec:
    """An image classifier with 1000 classes; `pixels` is the side of the images of size small, full has 224."""

    def model(size: Size) -> nn.Module:
        return kind(config(num_labels=1000, **((full or {}) if size == "full" else small)))

    return ModelSpec(name, model, _images(pixels))


def _mobilenet_v2(size: Size) -> nn.Module:
    model = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))
    if size == "small":
        blocks, kept = model.mobilenet_v2.layer, []
        for block in blocks:  # of several blocks in a row with a sum, which are alike, the first
            if not (kept and block.use_residual and kept[-1].use_residual):
                kept.append(block)
        model.mobilenet_v2.layer = nn.ModuleList(kept)
    return model


# Text ---------------------------------------------------------------------------------------------------------------


def _ids(vocabulary: int, *shape: int) -> Tensor:
    """Token ids that avoid the first few, which models reserve (padding, end of text)."""
    return torch.randint(4, vocabulary, shape)


def _causal(
    name: str,
    kind: type[PreTrainedModel],
    config: type[PreTrainedConfig],
    small: dict[str, Any],
    full: dict[str, Any],
) -> ModelSpec:
    """A causal language model over whole sequences, without a cache."""

    def configure(size: Size) -> PreTrainedConfig:
        return config(use_cache=False, **(full if size == "full" else small))

    def call(size: Size, batch: int, length: int | None) -> Inputs:
        tokens = length or (256 if size == "full" else 24)
        return (), {"input_ids": _ids(configure(size).vocab_size, batch, tokens)}

    return ModelSpec(name, lambda size: kind(configure(size)), call)


def _bert_config(size: Size) -> BertConfig:
    small = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(**({} if size == "full" else {**small, "intermediate_size": 256, **_SPREAD}))


def _bert_inputs(size: Size, batch: int, length: int | None) -> Inputs:
    tokens = length or (128 if size == "full" else 24)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, -tokens // 4 :] = 0  # one padded sequence
    return (), {"input_ids": _ids(_bert_config(size).vocab_size, batch, tokens), "attention_mask": mask}


def _t5_config(size: Size) -> T5Config:
    small = {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return T5Config(use_cache=False, **({} if size == "full" else small))


def _t5_inputs(size: Size, batch: int, length: int | None) -> Inputs:
    vocabulary, tokens, decoded = _t5_config(size).vocab_size, *((128, 32) if size == "full" else (24, 8))
    tokens = length or tokens
    ids, decoder_ids = _ids(vocabulary, batch, tokens), _ids(vocabulary, batch, decoded)
    return (), {"input_ids": ids, "decoder_input_ids": decoder_ids}


# Speech and multimodal ----------------------------------------------------------------------------------------------


def _whisper_config(size: Size) -> WhisperConfig:
    width, layers, heads = (768, 12, 12) if size == "full" else (64, 2, 4)
    shape = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))
    }
    small = {
        "vocab_size": 1000,
        "max_source_positions": 50,
        "max_target_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "init_std": 0.1,
    }
    return WhisperConfig(d_model=width, use_cache=False, **shape, **({} if size == "full" else small))


def _whisper_encoder_inputs(size: Size, batch: int, _: int | None) -> Inputs:  # always 30 s of sound
    config = _whisper_config(size)
    return (torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions),), {}


def _whisper_decoder_inputs(size: Size, batch: int, length: int | None) -> Inputs:
    config = _whisper_config(size)
    ids = _ids(config.vocab_size, batch, length or (32 if size == "full" else 8))
    return (), {
        "input_ids": ids,
        "encoder_hidden_states": torch.randn(batch, config.max_source_positions, config.d_model),
    }


def _clip_config(size: Size) -> CLIPConfig:
    if size == "full":
        return CLIPConfig()
    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    small["initializer_factor"] = 2.0
    text = {**small, "vocab_size": 1000, "eos_token_id": 999, "bos_token_id": 998}
    return CLIPConfig(text_config=text, vision_config={**small, "image_size": 64, "patch_size": 16}, projection_dim=32)


def _clip_inputs(size: Size, batch: int, length: int | None) -> Inputs:
    config = _clip_config(size)
    text, vision = config.text_config, config.vision_config
    ids = _ids(text.vocab_size - 2, batch, length or (text.max_position_embeddings if size == "full" else 24))
    ids[:, -1] = text.eos_token_id
    return (), {"input_ids": ids, "pixel_values": torch.randn(batch, 3, vision.image_size, vision.image_size)}


# Denoisers ----------------------------------------------------------------------------------------------------------


def _unet(size: Size) -> nn.Module:
    return StableDiffusionUNet() if size == "full" else StableDiffusionUNet((32, 64), context=48, heads=4, layers=1)


def _unet_inputs(size: Size, batch: int, length: int | None) -> Inputs:
    side, text = (64, (77, 768)) if size == "full" else (16, (7, 48))
    latents = torch.randn(batch, 4, length or side, length or side)
    return (latents, torch.randint(1000, (batch,)), torch.randn(batch, *text)), {}


def _flux(size: Size) -> nn.Module:
    """A few blocks at full width: the other 51 would be more of the same."""
    if size == "full":
        return FluxTransformer(double=2, single=4)
    return FluxTransformer(double=1, single=2, width=64, heads=4, axes=(4, 6, 6), text=48, pooled=32)


def _flux_inputs(size: Size, batch: int, length: int | None) -> Inputs:
    side, tokens, text, pooled = (64, 512, 4096, 768) if size == "full" else (4, 8, 48, 32)
    side = length or side
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    ids = torch.cat([torch.zeros(tokens, 3, dtype=torch.long), places])
    image, states = torch.randn(batch, side * side, 64), torch.randn(batch, tokens, text)
    return (image, states, torch.randn(batch, pooled), torch.rand(batch), 1 + 3 * torch.rand(batch), ids), {}


# The zoo ------------------------------------------------------------------------------------------------------------

_GPT2 = _causal(
    "gpt2",
    GPT2LMHeadModel,
    GPT2Config,
    {
        "vocab_size": 1000,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **_SPREAD,
    },
    {},
)
_LLAMA = _causal(
    "llama",
    LlamaForCausalLM,
    LlamaConfig,
    {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **_SPREAD,
    },
    {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
)
_QWEN3 = _causal(
    "qwen3",
    Qwen3ForCausalLM,
    Qwen3Config,
    {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
        **_SPREAD,
    },
    {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
)

SPECS: dict[str, ModelSpec] = {
    entry.name: entry
    for entry in (
        _vision("resnet50", ResNetForImageClassification, ResNetConfig, {"depths": [2, 1, 1, 2]}),
        ModelSpec("mobilenet_v2", _mobilenet_v2, _images()),
        ModelSpec("mobilenet_v3", lambda size: MobileNetV3Large(blocks=BLOCKS if size == "full" else KINDS), _images()),
        _vision(
            "vit_b_16",
            ViTForImageClassification,
            ViTConfig,
            {
                "image_size": 64,
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                **_SPREAD,
            },
        ),
        _vision(
            "convnext_t",
            ConvNextForImageClassification,
            ConvNextConfig,
            {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]},
        ),
        _vision(
            "swin_t",
            SwinForImageClassification,
            SwinConfig,
            {"image_size": 56, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], **_SPREAD},
            pixels=56,
        ),
        ModelSpec("bert_base", lambda size: BertModel(_bert_config(size)), _bert_inputs),
        _GPT2,
        _LLAMA,
        _QWEN3,
        ModelSpec("t5", lambda size: T5ForConditionalGeneration(_t5_config(size)), _t5_inputs),
        ModelSpec("whisper_encoder", lambda size: WhisperEncoder(_whisper_config(size)), _whisper_encoder_inputs),
        ModelSpec("whisper_decoder", lambda size: WhisperDecoder(_whisper_config(size)), _whisper_decoder_inputs),
        ModelSpec("clip", lambda size: CLIPModel(_clip_config(size)), _clip_inputs),
        ModelSpec("sd15_unet", _unet, _unet_inputs),
        ModelSpec("flux_dit", _flux, _flux_inputs),
        _cached(_GPT2, "prefill"),
        _cached(_GPT2, "decode"),
        _cached(_LLAMA, "prefill"),
        _cached(_LLAMA, "decode"),
    )
}
