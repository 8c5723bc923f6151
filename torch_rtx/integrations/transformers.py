"""Ahead of time, the generation of text by models of Hugging Face transformers.

    engine = export_generate(model, max_cache_len=2048)
    engine.save("llama")                                             # a folder of engine files, without weights
    engine = GenerationEngine.load("llama", weights="model.safetensors")
    tokens = engine.generate(input_ids, max_new_tokens=100)

A model is exported twice: for a prompt of any length, and for one further token. The tensors of its static cache are
inputs that both programs write to, so that one set of them belongs to each running generation. What the model needs
from call to call it says itself, through the cache that it fills and its `prepare_inputs_for_generation`: no model is
named here. Where a model has an encoder, that is a third program; the prompt's program also fills the cache of
cross-attention, with the keys and values of what was encoded. To load and to run an engine needs neither transformers
nor a compiler.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_rtx.errors import CaptureError, IntegrationError, SettingsError
from torch_rtx.integrations.generation import KNOWN, GenerationEngine
from torch_rtx.integrations.sampling import Sampler, Timestamps
from torch_rtx.runtime.garbage import uncollected
from torch_rtx.settings import CompilationSettings, RuntimeSettings

__all__ = ["GenerationEngine", "export_generate"]
log = logging.getLogger(__name__)
Types = dict[type[nn.Module], tuple[Any, ...]]  # of the arguments of programs
Result = TypeVar("Result")
PROBE = 3, 8  # batch and length of the call that shows which tensors a cache has
TYPICAL = 256  # tokens of a text that kernels for any length are chosen for
TYPICAL_START = 4  # the same for what a decoder begins with, such as a language and a task
# Options of a generation configuration that change the text, that no engine follows, and the values that mean nothing.
CHECKED = 8  # tokens with which a model is compared with itself
NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "encoder_repetition_penalty"), (None, 1)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "penalty_alpha"), (None, 0)),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "stop_strings"), (None,)),
    **dict.fromkeys(("watermarking_config", "constraints", "force_words_ids", "dola_layers"), (None,)),
    **dict.fromkeys(("logprob_threshold", "compression_ratio_threshold", "no_speech_threshold"), (None,)),
    **dict.fromkeys(("return_token_timestamps", "condition_on_prev_tokens", "token_healing"), (None, False)),
}


@uncollected()
def export_generate(
    model: Any,
    *,
    max_cache_len: int,
    batch_size: int | tuple[int, int] = 1,
    min_prompt_len: int = 1,
    source: int | Tensor | None = None,
    settings: CompilationSettings | None = None,
    runtime: RuntimeSettings | None = None,
    **options: Any,
) -> GenerationEngine:
    """Build the engines that generate text with a causal language model, or with one that has an encoder and a decoder.
    Arguments that are not listed are those of `torch_rtx.compile`; the model may be on the `meta` device with
    `device="cuda"`. `watch_weights` is off, see `GenerationEngine.load`.

    Args:
        model: a transformers model with a language model head, in evaluation mode.
        max_cache_len: tokens that the cache holds: of the prompt and all generated ones but the last. The prompt of a
            decoder is what it begins with, such as a language and a task, and not what the encoder reads.
        batch_size: sequences per call: a number, or the smallest and the largest one.
        min_prompt_len: tokens of the shortest prompt, where a model does not take fewer, such as one with convolutions.
        source: of a model with an encoder, what that reads: the most tokens of a text; or an example of its features,
            such as those of a sound `[any, ...]`, whose sizes but the first are those of every call; in any float
            dtype, since it gets that of the model.

    Raises:
        IntegrationError: transformers is missing, or a release that has no static cache.
        SettingsError: the model does not generate text, has fewer positions than `max_cache_len`, or writes another
            text with a static cache; its generation configuration asks for what no engine does, such as beams;
            `source` is missing, or there is no encoder; a size is no positive number; and as in `compile`.
        CaptureError: the model can't be captured as one graph; and the others of `compile`.
    """
    from torch_rtx.backend.build import chosen_settings, compile  # where engines are only run, nobody compiles

    settings, runtime = chosen_settings(settings, runtime, options)
    runtime = replace(runtime, watch_weights=False)
    sizes = _checked(model, max_cache_len, batch_size, min_prompt_len, source)
    _check_static_cache(model, max_cache_len)
    device = settings.device or model.device.type
    if isinstance(source, Tensor) and source.is_floating_point():
        source = source.to(model.dtype)  # feature extractors know nothing of it

    def build(program: nn.Module, types: Types, **changes: Any) -> Any:
        return compile(program, types[type(program)], settings=replace(settings, **changes), runtime=runtime)

    def prompts(narrow: bool) -> tuple[_Caches, Types, Any]:
        found = _caches(model, max_cache_len, settings.device, narrow, source)
        types = _inputs(sizes, (min_prompt_len, max_cache_len), found, source)
        return found, types, build(Prefill(model, found.empty, None if narrow else max_cache_len), types)

    found, types, prefill = _narrow_or_whole(prompts)
    times = _timestamps(model)
    return GenerationEngine(
        prefill=prefill,
        decode=build(Decode(model, found.filled, found.width), types, strip_weights=True),  # `prefill` has all of them
        sample=build(Sampler(), types, device=device),
        encode=build(Encode(model), types) if found.width else None,
        timestamps=None if times is None else build(times, types, device=device),
    )


def _narrow_or_whole(attempt: Callable[[bool], Result]) -> Result:
    """What `attempt(True)` makes, for prompts that do not look at the whole cache, or else `attempt(False)`."""
    try:
        return attempt(True)
    except CaptureError as first:
        log.info("prompts will look at the whole cache: %s", first)
        try:
            return attempt(False)
        except CaptureError as error:
            error.add_note(f"before that, for prompts that do not look at the whole cache: {first}")
            raise


def _timestamps(model: Any) -> Timestamps | None:
    """The program for texts with timestamps, if the model knows those."""
    known = model.generation_config
    before, end = getattr(known, "no_timestamps_token_id", None), known.eos_token_id or known.bos_token_id
    if type(before) is not int or type(end) is not int:
        return None
    return Timestamps(before, end, getattr(known, "max_initial_timestamp_index", None))


def _inputs(sizes: tuple[int, int], prompt: tuple[int, int], found: _Caches, source: int | Tensor | None) -> Types:
    """The arguments of each program, for batches and prompts of these smallest and largest sizes."""
    from torch_rtx.backend.inputs import Input

    (few, many), (shortest, places) = sizes, prompt
    if few != many:
        many = max(many, 3)  # in a capture sizes that vary are at least 2, so that up to 2 would be none that varies
    batch = {0: "batch"}

    def tensor(*shape: int, dtype: torch.dtype = torch.int64) -> Any:
        """A tensor with an entry for each sequence."""
        low, high = (few, *shape), (many, *shape)
        return Input(min_shape=low, opt_shape=low, max_shape=high, dtype=dtype, shared_dims=batch)

    def text(name: str, low: int, usual: int, high: int, *rest: int, dtype: torch.dtype = torch.int64) -> Any:
        """The same, of any of these lengths."""
        span = (few, low, *rest), (few, max(low, min(usual, high)), *rest), (many, high, *rest)
        return Input(profiles=[span], dtype=dtype, shared_dims=batch | {1: name})

    def cache(layers: Any) -> list[Any]:
        return [tensor(*found.shape[1:], dtype=found.dtype) for found in _tensors(layers)]

    ids = text("length", shortest, TYPICAL_START if found.width else TYPICAL, places)
    length, number = Input((), dtype=torch.int64), tensor(dtype=torch.float32)
    scores, seen = (tensor(found.vocabulary, dtype=dtype) for dtype in (torch.float32, torch.bool))
    draws, banned = tensor(places + 1, dtype=torch.float32), Input((found.vocabulary,), dtype=torch.bool)
    read: tuple[Any, ...] = ()  # by the encoder
    heard: tuple[Any, ...] = ()  # by the decoder, from the encoder
    padded: tuple[Any, ...] = ()  # the mask of the cache of cross-attention
    if isinstance(source, int):
        mask = text("source", 1, TYPICAL, source)
        heard = text("source", 1, TYPICAL, source, found.width, dtype=found.dtype), mask
        read, padded = (mask, mask), (tensor(source),)
    elif source is not None:
        read = (tensor(*source.shape[1:], dtype=source.dtype),)
        heard = (tensor(found.heard, found.width, dtype=found.dtype),)
    return {
        Encode: read,
        Prefill: (ids, ids, ids, cache(found.empty), *heard),
        Decode: (tensor(1), tensor(1), length, tensor(places), banned, cache(found.filled), *padded),
        Sampler: (scores, tensor(1), seen, draws, length, tensor(), number, number, number),
        Timestamps: (scores, tensor(1), tensor(1), tensor(1), tensor(1)),
    }


def _checked(
    model: Any, max_cache_len: int, batch_size: int | tuple[int, int], min_prompt_len: int, source: int | Tensor | None
) -> tuple[int, int]:
    """The smallest and the largest batch."""
    if not callable(getattr(model, "prepare_inputs_for_generation", None)):
        hint = "pass a model such as LlamaForCausalLM, not a compiled or wrapped one"
        raise SettingsError(f"a {type(model).__name__} does not generate text as models of transformers do", hint=hint)
    _check_source(model, source)
    sizes = batch_size if isinstance(batch_size, tuple) and len(batch_size) == 2 else (batch_size, batch_size)
    given = {"max_cache_len": max_cache_len, "batch_size": batch_size, "min_prompt_len": min_prompt_len}
    numbers = all(type(size) is int and size > 0 for size in (max_cache_len, min_prompt_len, *sizes))
    if not numbers or sizes[0] > sizes[1] or min_prompt_len > max_cache_len:
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        hint = "positive numbers; batch_size may be (smallest, largest)"
        raise SettingsError(f"there is no engine with {said}", hint=hint)
    text = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_target_positions"):
        positions = getattr(text, name, None)
        if positions is not None and max_cache_len > positions:
            raise SettingsError(f"max_cache_len={max_cache_len}, and the model has {positions} positions")
    asked = {name: getattr(model.generation_config, name, None) for name in NOT_FOLLOWED}
    odd = [f"{name}={value!r}" for name, value in asked.items() if value not in NOT_FOLLOWED[name]]
    odd += [f"bad_words_ids={w!r}" for w in [model.generation_config.bad_words_ids or ()] if any(len(x) > 1 for x in w)]
    if odd:
        hint = "an engine would write another text; set these to None in model.generation_config if that is meant"
        raise SettingsError(f"no engine does what the generation configuration asks for: {', '.join(odd)}", hint=hint)
    return sizes


def _check_static_cache(model: Any, max_cache_len: int) -> None:
    """Compare the scores of a decoder with a static cache and with one that grows, if transformers does not say that
    the model takes a static one: GPT-Neo looks at other tokens then, without an error."""
    if getattr(model, "_can_compile_fullgraph", True) or model.config.is_encoder_decoder or max_cache_len < 2:
        return
    name, weight = type(model).__name__, next(model.parameters(), None)
    if weight is None or weight.is_meta:
        log.warning("whether a %s takes a static cache is not known without its weights", name)
        return
    from transformers import DynamicCache, StaticCache

    config, count = model.config.get_text_config(decoder=True), min(CHECKED, max_cache_len)
    ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0)).to(weight.device)
    places, mask = torch.arange(count, device=weight.device)[None], torch.ones_like(ids)
    static, last = StaticCache(config, max_cache_len=max_cache_len), count - 1
    try:
        with torch.no_grad():
            expected = _scores(model, DynamicCache(config=config), ids, mask, places, True)
            mask = torch.nn.functional.pad(mask, (0, max_cache_len - count))
            _scores(model, static, ids[:, :last], mask * (mask.cumsum(1) <= last), places[:, :last], True)
            found = _scores(model, static, ids[:, last:], mask, places[:, last:], False)
    except Exception as error:  # the capture says what the model does not take
        log.info("a %s is not compared with itself: %s", name, error)
        return
    apart = float((found - expected).norm() / expected.norm())
    if not apart <= min(max(16 * torch.finfo(model.dtype).eps, 1e-3), 0.1):
        hint = "use the model's own generate, without a static cache"
        raise SettingsError(f"a {name} computes other scores with a static cache: an error of {apart:.1e}", hint=hint)


def _check_source(model: Any, source: int | Tensor | None) -> None:
    """Check what the encoder reads, if there is one."""
    name, what = type(model).__name__, getattr(model, "main_input_name", "input_ids")
    if not model.config.is_encoder_decoder:
        if source is not None:
            raise SettingsError(f"{name} has no encoder, which could read a source")
    elif what == "input_ids":
        if type(source) is not int or source < 1:
            hint = "source=512, say: the most tokens that the encoder reads"
            raise SettingsError(f"{name} has an encoder for text, and source is {_said(source)}", hint=hint)
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and source > positions:
            raise SettingsError(f"source={source}, and the encoder has {positions} positions")
    elif not isinstance(source, Tensor) or source.dim() < 2:
        hint = f"source={what}, an example with a batch and all other sizes as in every call"
        raise SettingsError(f"{name} has an encoder for {what}, and source is {_said(source)}", hint=hint)


def _said(source: Any) -> str:
    """A source in a few words."""
    return f"a tensor of the shape {list(source.shape)}" if isinstance(source, Tensor) else repr(source)


# ---- the cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Caches:
    """A static cache as it is before a prompt and as it is after it, and what else the probing call showed. The tensors
    have types alone; what the layers hold besides is what Python code branches on.

    Attributes:
        vocabulary: the size of the vocabulary.
        heard, width, dtype: of what the encoder returns, `[batch, heard, width]`; `width` is 0 if there is none.
    """

    empty: Any
    filled: Any
    vocabulary: int
    heard: int = 0
    width: int = 0
    dtype: torch.dtype = torch.float32


def _caches(
    model: Any, max_cache_len: int, device: str | None, narrow: bool = True, source: int | Tensor | None = None
) -> _Caches:
    """Let the model fill a cache.

    Args:
        narrow: see `_own_keys`. A model that asks the cache for its length does not take that.
        source: see `export_generate`.
    """
    from torch_rtx.backend.capture import with_fakes
    from torch_rtx.backend.capture_errors import explained

    try:
        from transformers import EncoderDecoderCache, StaticCache
    except ImportError as error:
        raise IntegrationError(f"transformers can't be imported: {error}", hint="pip install transformers") from error
    config, batch = model.config.get_text_config(decoder=True), PROBE[0]
    with explained(), with_fakes(model, device) as placed:

        def ones(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.ones((batch, *shape), dtype=dtype, device=placed)

        cache: Any = StaticCache(config=config, max_cache_len=max_cache_len)
        kinds = [_whole(layer, max_cache_len) for layer in cache.layers]
        for layer in cache.layers if narrow else ():
            _own_keys(layer)
        heard: tuple[Tensor, ...] = ()
        if source is not None:
            text = isinstance(source, int)
            read = (
                ones(min(PROBE[1], source)) if isinstance(source, int) else ones(*source.shape[1:], dtype=source.dtype)
            )
            heard = (Encode(model)(read, read), read) if text else (Encode(model)(read),)
            places = source if isinstance(source, int) else heard[0].shape[1]
            crossed = StaticCache(config=config, max_cache_len=places)
            kinds += [_whole(layer, places) for layer in crossed.layers]
            for layer in crossed.layers:
                _own_keys(layer)
            cache = EncoderDecoderCache(cache, crossed)
        ids = ones(min(PROBE[1], max_cache_len))
        mask = ids if narrow else ones(max_cache_len)
        vocabulary = _scores(model, cache, ids, mask, ids, True, *heard).shape[1]
        filled = _with_tensors(cache, _tensors(cache), lambda count: count)
        for layer, kind in zip(_layers(filled), kinds, strict=True):
            layer.__class__ = kind
        cache.reset()
    odd = {tuple(tensor.shape) for tensor in _tensors(filled) if tensor.shape[:1] != PROBE[:1]}
    if odd:
        raise CaptureError(f"the model's cache has tensors without an entry for each sequence, of the shapes {odd}")
    shown = (heard[0].shape[1], heard[0].shape[2], heard[0].dtype) if heard else ()
    return _Caches(cache, filled, vocabulary, *shown)


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


def _parts(cache: Any) -> list[Any]:
    """The caches in it: that of self-attention, and that of cross-attention."""
    return [cache] if hasattr(cache, "layers") else [cache.self_attention_cache, cache.cross_attention_cache]


def _layers(cache: Any) -> list[Any]:
    return [layer for part in _parts(cache) for layer in part.layers]


def _tensors(cache: Any) -> list[Tensor]:
    """The tensors of all layers, in order, but those that count tokens."""
    leaves = pytree.tree_leaves([vars(layer) for layer in _layers(cache)])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not _is_count(leaf)]


def _with_tensors(cache: Any, tensors: Sequence[Tensor], count: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `cache` with these tensors, and `count` of each one that counts tokens."""
    rest = iter(tensors)

    def copied(part: Any) -> Any:
        other = copy(part)
        other.layers = [copy(layer) for layer in part.layers]
        for layer in other.layers:
            new = pytree.tree_map_only(Tensor, lambda t: count(t) if _is_count(t) else next(rest), vars(layer))
            vars(layer).update(new)
        return other

    parts = [copied(part) for part in _parts(cache)]
    if len(parts) == 1:
        return parts[0]
    both = copy(cache)
    both.self_attention_cache, both.cross_attention_cache = parts
    both.is_updated = dict(cache.is_updated)  # whether the keys of a layer are those of what was encoded
    return both


# ---- the programs ----------------------------------------------------------------------------------------------------


def _scores(
    model: Any,
    cache: Any,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    first: bool,
    encoded: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> Tensor:
    """The model's scores for what follows the last token, float32 `[batch, vocabulary]`, by the call that its own
    `generate` makes."""
    names = inspect.signature(model.forward).parameters
    prefix = "" if encoded is None else "decoder_"
    cache_name = "cache_params" if "cache_params" in names else "past_key_values"
    given = {cache_name: cache, f"{prefix}attention_mask": mask, "use_cache": True}
    if f"{prefix}position_ids" in names:
        given[f"{prefix}position_ids"] = positions
    if "logits_to_keep" in names:
        given["logits_to_keep"] = 1
    if encoded is not None:
        from transformers.modeling_outputs import BaseModelOutput

        given["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)  # type: ignore[arg-type]
        if source_mask is not None:
            given["attention_mask"] = source_mask
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=first, **given)
    scores: Tensor = model.forward(**inputs, return_dict=True).logits[:, -1].float()
    return scores


class _Program(nn.Module):
    """A program around `model`, whose tensors are its own, under the same names.

    Attributes:
        those of `KNOWN`: what an engine needs to know of the model.
    """

    _model: Any
    _cache: Any

    def __init__(self, model: Any, cache: Any = None) -> None:
        super().__init__()
        vars(self).update({name: getattr(model, name) for name in ("_parameters", "_buffers", "_modules", "training")})
        vars(self).update(_model=model, _cache=cache, config=model.config)
        vars(self).update({name: getattr(model.generation_config, name, None) for name in KNOWN})
        from transformers import GenerationMixin

        if type(model).generate is not GenerationMixin.generate:
            self.decoder_start_token_id = None  # the model's own `generate` decides what a text begins with
        elif self.decoder_start_token_id is None and model.config.is_encoder_decoder:
            self.decoder_start_token_id = getattr(model.generation_config, "bos_token_id", None)  # as transformers does

    def scores(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Sequence[Tensor],
        length: Tensor,
        first: bool,
        *heard: Tensor | None,
    ) -> Tensor:
        """See `_scores`; the cache holds `length` tokens."""
        bound = _with_tensors(self._cache, cache, lambda _: length.clone())
        return _scores(self._model, bound, ids, mask, positions, first, *heard)


class Encode(_Program):
    """Reads what a model with an encoder writes about: texts `[batch, length]` or features, such as those of sounds.

    Attributes:
        vocabulary: tokens that there are for the encoder; None: it reads none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.vocabulary = None
        if model.main_input_name == "input_ids":
            self.vocabulary = model.get_encoder().get_input_embeddings().weight.shape[0]

    def forward(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """What the decoder looks at, `[batch, heard, width]`; `source_mask` has zeros at padding of texts."""
        given = {} if source_mask is None else {"attention_mask": source_mask}
        encoder = self._model.get_encoder()
        encoded: Tensor = encoder(**{self._model.main_input_name: source}, **given, return_dict=True).last_hidden_state
        return encoded


class Prefill(_Program):
    """Reads prompts `[batch, length]`, and fills an empty cache.

    Args:
        places: those of the cache, if prompts look at all of them.
    """

    def __init__(self, model: Any, cache: Any, places: int | None = None) -> None:
        super().__init__(model, cache)
        self._places = places

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: list[Tensor],
        encoded: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """The scores. `encoded` and `source_mask` are those of `Encode`."""
        if self._places is not None:
            attention_mask = nn.functional.pad(attention_mask, (0, self._places - attention_mask.shape[1]))
        nothing = torch.zeros((), dtype=torch.int64, device=input_ids.device)
        return self.scores(input_ids, attention_mask, position_ids, cache, nothing, True, encoded, source_mask)


class Decode(_Program):
    """Reads one token `[batch, 1]`, which has a position in its sequence and the place `length` in the cache, and
    writes the best next one in its place.

    Args:
        width: of what the encoder returns; 0: there is none.
    """

    def __init__(self, model: Any, cache: Any, width: int = 0) -> None:
        super().__init__(model, cache)
        self._width = width

    def forward(
        self,
        token: Tensor,
        position: Tensor,
        length: Tensor,
        mask: Tensor,
        banned: Tensor,
        cache: list[Tensor],
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """The scores, -inf for tokens that are `banned [vocabulary]`. `mask [batch, places]` has zeros at the places of
        padding, `source_mask` the same for the cache of cross-attention."""
        encoded = None
        if self._width:  # its keys and values are in the cache: only its size is read
            places = _parts(self._cache)[1].layers[0].keys.shape[2]
            encoded = torch.zeros(token.shape[0], places, self._width, dtype=self._model.dtype, device=token.device)
        scores = self.scores(token, mask, position, cache, length, False, encoded, source_mask)
        scores = scores.masked_fill(banned, -torch.inf)
        token.copy_(scores.argmax(-1, keepdim=True))
        position.add_(1)
        length.add_(1)
        return scores
