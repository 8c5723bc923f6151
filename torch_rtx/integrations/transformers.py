"""Ahead of time, the generation of text by causal language models of Hugging Face transformers.

    engine = export_generate(model, max_cache_len=2048)
    engine.save("llama")                                             # a folder of engine files, without weights
    engine = GenerationEngine.load("llama", weights="model.safetensors")
    tokens = engine.generate(input_ids, max_new_tokens=100)

A model is exported twice: for a prompt of any length, and for one further token. The tensors of its static cache are
inputs that both programs write to, so that one set of them belongs to each running generation. What the model needs
from call to call it says itself, through the cache that it fills and its `prepare_inputs_for_generation`: no model is
named here. To load and to run an engine needs neither transformers nor a compiler.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_rtx.errors import CaptureError, IntegrationError, SettingsError
from torch_rtx.integrations.generation import GenerationEngine
from torch_rtx.integrations.sampling import Sampler
from torch_rtx.settings import CompilationSettings, RuntimeSettings

__all__ = ["GenerationEngine", "export_generate"]
log = logging.getLogger(__name__)
PROBE = 3, 8  # batch and length of the call that shows which tensors a cache has
TYPICAL = 256  # tokens of a prompt that kernels for any length are chosen for


def export_generate(
    model: Any,
    *,
    max_cache_len: int,
    batch_size: int | tuple[int, int] = 1,
    min_prompt_len: int = 1,
    settings: CompilationSettings | None = None,
    runtime: RuntimeSettings | None = None,
    **options: Any,
) -> GenerationEngine:
    """Build the engines that generate text with a causal language model. Arguments that are not listed are those of
    `torch_rtx.compile`; the model may be on the `meta` device with `device="cuda"`. `watch_weights` is off, see
    `GenerationEngine.load`.

    Args:
        model: a transformers model with a language model head, in evaluation mode.
        max_cache_len: tokens that the cache holds: of the prompt and all generated ones but the last.
        batch_size: sequences per call: a number, or the smallest and the largest one.
        min_prompt_len: tokens of the shortest prompt, where a model does not take fewer, such as one with convolutions.

    Raises:
        IntegrationError: transformers is missing, or a release that has no static cache.
        SettingsError: the model does not generate text from text alone, or has fewer positions than `max_cache_len`; a
            size is no positive number; and as in `compile`.
        CaptureError: the model can't be captured as one graph; and the others of `compile`.
    """
    from torch_rtx.backend.build import chosen_settings, compile  # where engines are only run, nobody compiles

    settings, runtime = chosen_settings(settings, runtime, options)
    runtime = replace(runtime, watch_weights=False)
    sizes = _checked(model, max_cache_len, batch_size, min_prompt_len)
    stripped, device = replace(settings, strip_weights=True), settings.device or model.device.type
    first: CaptureError | None = None
    for narrow in (True, False):
        try:
            empty, filled, vocabulary = _caches(model, max_cache_len, settings.device, narrow)
            tensors = _tensors(empty), _tensors(filled)
            prompt, step, choice = _inputs(sizes, (min_prompt_len, max_cache_len), vocabulary, *tensors)
            places = None if narrow else max_cache_len
            prefill = compile(Prefill(model, empty, places), prompt, settings=stripped, runtime=runtime)
            break
        except CaptureError as error:
            if first is not None:
                error.add_note(f"before that, for prompts that do not look at the whole cache: {first}")
                raise
            first = error
            log.info("prompts will look at the whole cache: %s", error)
    return GenerationEngine(
        prefill=prefill,
        decode=compile(Decode(model, filled), step, settings=settings, runtime=runtime),
        sample=compile(Sampler(), choice, settings=replace(settings, device=device), runtime=runtime),
    )


def _inputs(
    sizes: tuple[int, int], prompt: tuple[int, int], vocabulary: int, empty: list[Tensor], filled: list[Tensor]
) -> tuple[tuple[Any, ...], ...]:
    """The arguments of the programs, for batches and prompts of these smallest and largest sizes."""
    from torch_rtx.backend.inputs import Input

    (few, many), (shortest, places) = sizes, prompt
    if few != many:
        many = max(many, 3)  # in a capture sizes that vary are at least 2, so that up to 2 would be none that varies
    batch = {0: "batch"}

    def tensor(*shape: int, dtype: torch.dtype = torch.int64) -> Any:
        """A tensor with an entry for each sequence."""
        low, high = (few, *shape), (many, *shape)
        return Input(min_shape=low, opt_shape=low, max_shape=high, dtype=dtype, shared_dims=batch)

    def cache(tensors: list[Tensor]) -> list[Any]:
        return [tensor(*found.shape[1:], dtype=found.dtype) for found in tensors]

    span = (few, shortest), (few, max(shortest, min(TYPICAL, places))), (many, places)
    ids = Input(profiles=[span], dtype=torch.int64, shared_dims=batch | {1: "length"})
    length, number = Input((), dtype=torch.int64), tensor(dtype=torch.float32)
    scores, seen = (tensor(vocabulary, dtype=dtype) for dtype in (torch.float32, torch.bool))
    draws = tensor(places + 1, dtype=torch.float32)
    return (
        (ids, ids, ids, cache(empty)),
        (tensor(1), tensor(1), length, tensor(places), cache(filled)),
        (scores, tensor(1), seen, draws, length, tensor(), number, number, number),
    )


def _checked(model: Any, max_cache_len: int, batch_size: int | tuple[int, int], min_prompt_len: int) -> tuple[int, int]:
    """The smallest and the largest batch."""
    if not callable(getattr(model, "prepare_inputs_for_generation", None)):
        hint = "pass a model such as LlamaForCausalLM, not a compiled or wrapped one"
        raise SettingsError(f"a {type(model).__name__} does not generate text as models of transformers do", hint=hint)
    if model.config.is_encoder_decoder:
        hint = "model.generate(cache_implementation='static', compile_config=CompileConfig(backend='rtx')) compiles it"
        raise SettingsError(f"{type(model).__name__} has an encoder, which no generation engine runs", hint=hint)
    sizes = batch_size if isinstance(batch_size, tuple) and len(batch_size) == 2 else (batch_size, batch_size)
    given = {"max_cache_len": max_cache_len, "batch_size": batch_size, "min_prompt_len": min_prompt_len}
    numbers = all(type(size) is int and size > 0 for size in (max_cache_len, min_prompt_len, *sizes))
    if not numbers or sizes[0] > sizes[1] or min_prompt_len > max_cache_len:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        hint = "positive numbers; batch_size may be (smallest, largest)"
        raise SettingsError(f"there is no engine with {said}", hint=hint)
    text = model.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and max_cache_len > positions:
        raise SettingsError(f"max_cache_len={max_cache_len}, and the model has {positions} positions")
    return sizes


# ---- the cache -------------------------------------------------------------------------------------------------------


def _caches(model: Any, max_cache_len: int, device: str | None, narrow: bool = True) -> tuple[Any, Any, int]:
    """A static cache as it is before a prompt and as it is after it, and the size of the vocabulary. The tensors have
    types alone; what the layers hold besides is what Python code branches on.

    Args:
        narrow: see `_own_keys`. A model that asks the cache for its length does not take that, nor does PyTorch 2.11
            where heads share keys.
    """
    from torch_rtx.backend.capture import with_fakes
    from torch_rtx.backend.capture_errors import explained

    try:
        from transformers import StaticCache
    except ImportError as error:
        raise IntegrationError(f"transformers can't be imported: {error}", hint="pip install transformers") from error
    with explained(), with_fakes(model, device) as placed:
        cache = StaticCache(config=model.config, max_cache_len=max_cache_len)
        kinds = [_whole(layer, max_cache_len) for layer in cache.layers]
        for layer in cache.layers if narrow else ():
            _own_keys(layer)
        ids = torch.ones((PROBE[0], min(PROBE[1], max_cache_len)), dtype=torch.int64, device=placed)
        mask = ids if narrow else torch.ones((PROBE[0], max_cache_len), dtype=torch.int64, device=placed)
        vocabulary = _scores(model, cache, ids, mask, ids, first=True).shape[1]
        filled = _with_tensors(cache, _tensors(cache), lambda count: count)
        for layer, kind in zip(filled.layers, kinds, strict=True):
            layer.__class__ = kind
        cache.reset()
    odd = {tuple(tensor.shape) for tensor in _tensors(filled) if tensor.shape[:1] != PROBE[:1]}
    if odd:
        raise CaptureError(f"the model's cache has tensors without an entry for each sequence, of the shapes {odd}")
    return cache, filled, vocabulary


def _whole(layer: Any, max_cache_len: int) -> type:
    """Let `layer` hold all tokens also where the model looks at the last few: a window that moves would have to count
    in Python. The model's masks say which tokens are seen. Returns the class that it has then."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if isinstance(layer, StaticSlidingWindowLayer):
        whole = {name: getattr(StaticLayer, name) for name in ("update", "get_mask_sizes", "get_seq_length", "reset")}
        layer.__class__ = _subclass(type(layer), whole)
        layer.max_cache_len = max_cache_len
    return type(layer)


def _own_keys(layer: Any) -> None:
    """Let tokens of a prompt look at each other, not at all the places that are free in a `layer` that is empty."""
    from transformers.cache_utils import StaticLayer

    if not isinstance(layer, StaticLayer) or hasattr(layer, "update_indexer"):
        return
    base = type(layer)

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        base.update(self, keys, values, *args, **kwargs)
        return keys, values

    def get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
        return query_length, 0

    layer.__class__ = _subclass(base, {"update": update, "get_mask_sizes": get_mask_sizes})


def _subclass(base: type, methods: dict[str, Any]) -> type:
    """A class of layers with other methods; transformers registers those that name a type of layers."""
    return type(base.__name__, (base,), {**methods, "_layer_type": None})


def _is_count(tensor: Tensor) -> bool:
    """The tensor counts the tokens in the cache."""
    return tensor.dim() == 0 and not tensor.is_floating_point()


def _tensors(cache: Any) -> list[Tensor]:
    """The tensors of all layers, in order, but those that count tokens."""
    leaves = pytree.tree_leaves([vars(layer) for layer in cache.layers])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not _is_count(leaf)]


def _with_tensors(cache: Any, tensors: Sequence[Tensor], count: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `cache` with these tensors, and `count` of each one that counts tokens."""
    rest = iter(tensors)
    copied = copy(cache)
    copied.layers = [copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        new = pytree.tree_map_only(Tensor, lambda t: count(t) if _is_count(t) else next(rest), vars(layer))
        vars(layer).update(new)
    return copied


# ---- the programs ----------------------------------------------------------------------------------------------------


def _scores(model: Any, cache: Any, ids: Tensor, mask: Tensor, positions: Tensor, first: bool) -> Tensor:
    """The model's scores for what follows the last token, float32 `[batch, vocabulary]`, by the call that its own
    `generate` makes."""
    names = inspect.signature(model.forward).parameters
    cache_name = "cache_params" if "cache_params" in names else "past_key_values"
    given = {cache_name: cache, "attention_mask": mask, "use_cache": True}
    if "position_ids" in names:
        given["position_ids"] = positions
    if "logits_to_keep" in names:
        given["logits_to_keep"] = 1
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=first, **given)
    scores: Tensor = model.forward(**inputs, return_dict=True).logits[:, -1].float()
    return scores


class _Program(nn.Module):
    """A program around `model`, whose tensors are its own, under the same names.

    Attributes:
        eos_token_id, pad_token_id: what an engine needs to know of the model.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        super().__init__()
        vars(self).update({name: getattr(model, name) for name in ("_parameters", "_buffers", "_modules", "training")})
        vars(self).update(_model=model, _cache=cache)
        self.config, known = model.config, model.generation_config
        self.eos_token_id, self.pad_token_id = known.eos_token_id, known.pad_token_id

    def scores(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Sequence[Tensor], length: Tensor, first: bool
    ) -> Tensor:
        """See `_scores`; the cache holds `length` tokens."""
        bound = _with_tensors(self._cache, cache, lambda _: length.clone())
        return _scores(self._model, bound, ids, mask, positions, first)


class Prefill(_Program):
    """Reads prompts `[batch, length]`, and fills an empty cache.

    Args:
        places: those of the cache, if prompts look at all of them.
    """

    def __init__(self, model: Any, cache: Any, places: int | None = None) -> None:
        super().__init__(model, cache)
        self._places = places

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: list[Tensor]) -> Tensor:
        """The scores."""
        if self._places is not None:
            attention_mask = nn.functional.pad(attention_mask, (0, self._places - attention_mask.shape[1]))
        nothing = torch.zeros((), dtype=torch.int64, device=input_ids.device)
        return self.scores(input_ids, attention_mask, position_ids, cache, nothing, first=True)


class Decode(_Program):
    """Reads one token `[batch, 1]`, which has a position in its sequence and the place `length` in the cache, and
    writes the best next one in its place."""

    def forward(self, token: Tensor, position: Tensor, length: Tensor, mask: Tensor, cache: list[Tensor]) -> Tensor:
        """The scores; `mask [batch, places]` has zeros at the places of padding."""
        scores = self.scores(token, mask, position, cache, length, first=False)
        token.copy_(scores.argmax(-1, keepdim=True))
        position.add_(1)
        length.add_(1)
        return scores
