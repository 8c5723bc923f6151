"""Runs engines that generate text: a prompt goes in, and a sound, say; tokens come out while further ones are computed.

The next token is chosen on the device, and is there as the input of the next step: the host queues steps and reads
tokens that are a few steps old. It needs them to see the end of a sequence, and to hand them on.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from torch_rtx import aten
from torch_rtx.errors import EngineFormatError, InputError
from torch_rtx.integrations.choices import End, Rules, Sampling, tokens_of
from torch_rtx.ir import Dim, Sym, TensorType, evaluate
from torch_rtx.runtime.module import CompiledModule, load, save
from torch_rtx.runtime.weight_sources import WeightSource, tensors_of
from torch_rtx.settings import RuntimeSettings, settings_of

PROGRAMS = ("prefill", "decode", "sample")
FURTHER = ("encode", "timestamps")  # those of models with an encoder, and of models whose texts may have timestamps
CACHE = "cache_"  # what the names of its tensors begin with
WIDE = {"token", "position", "mask", "seen", "uniforms"}  # inputs with a row for each sequence
# What an engine knows of its model's generation configuration: the defaults of these options.
KNOWN = (
    *("eos_token_id", "pad_token_id", "decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens", "return_timestamps"),
    "bad_words_ids",
)
AHEAD = 2  # steps that are queued on a GPU while the host waits for a token
MASKS = 8  # of tokens that may not be chosen, kept for further texts


@dataclass(frozen=True)
class Prompt:
    """What a text begins with, on the device.

    Attributes:
        ids, mask: int64 `[batch, length]`; the mask has zeros at padding.
        read: what an encoder reads: none, features, or a text and its mask.
    """

    ids: Tensor
    mask: Tensor
    read: tuple[Tensor, ...] = ()

    @property
    def positions(self) -> Tensor:
        """Of the tokens in their sequences, int64 `[batch, length]`."""
        return (self.mask.cumsum(1) - 1).masked_fill(self.mask == 0, 0)


class State:
    """The tensors of one running generation, which its programs write to, and what the host reads of them.

    Attributes:
        tensors: by the names that they have as inputs of the programs.
        cache: those that hold what the model knows of earlier tokens.
        step, choice, times: the inputs of `decode`, `sample` and `timestamps`, with None in place of the scores.
    """

    @torch.inference_mode(False)  # whose tensors could not be written to in other calls
    def __init__(self, engine: GenerationEngine, batch: int) -> None:
        self.batch, self.tensors = batch, dict[str, Tensor]()
        for program in filter(None, (engine.decode, engine.sample, engine.timestamps)):
            sizes = dict.fromkeys(program.engine.graph.syms, batch)  # no other size varies
            for name, type_ in _inputs(program).items():
                shape: list[Any] = [evaluate(dim, sizes) for dim in type_.shape]
                if name != "logits":
                    self.tensors[name] = torch.zeros(shape, dtype=aten.DTYPES[type_.dtype], device=engine.device)
        self.cache = [tensor for name, tensor in self.tensors.items() if name.startswith(CACHE)]
        self.step = [self.tensors[name] for name in _inputs(engine.decode)]
        self.choice = [self.tensors.get(name) for name in _inputs(engine.sample)]
        self.times = [] if engine.timestamps is None else [self.tensors.get(n) for n in _inputs(engine.timestamps)]
        self.token, self.banned = self.tensors["token"], self.tensors["banned"]
        self._begin = getattr(engine.timestamps, "no_timestamps", -2) + 1  # the first timestamp
        self._bans: dict[tuple[int, ...], Tensor] = {}  # on the device: a copy from the host would wait for it
        self._cuda = engine.device.type == "cuda"
        self.ahead = AHEAD if self._cuda else 0
        self._places = [torch.empty(batch, dtype=torch.int64, pin_memory=self._cuda) for _ in range(self.ahead + 1)]
        self._released: Any = None

    def ban(self, tokens: tuple[int, ...]) -> None:
        """Let steps that are queued from now on choose none of these."""
        if tokens not in self._bans:
            mask = torch.zeros(self.banned.shape, dtype=torch.bool)
            mask[list(tokens)] = True
            self._bans = {**(self._bans if len(self._bans) < MASKS else {}), tokens: mask.to(self.banned.device)}
        self.banned.copy_(self._bans[tokens])

    def start(self, prompt: Prompt, sampling: Sampling, uniforms: Tensor | None) -> None:
        """Set everything but the cache, which a prompt has filled, and what is banned."""
        tensors, ids = self.tensors, prompt.ids
        length, positions = ids.shape[1], prompt.positions
        tensors["mask"].fill_(1)[:, :length] = prompt.mask
        if "source_mask" in tensors:
            read = prompt.read[-1]
            tensors["source_mask"].zero_()[:, : read.shape[1]] = read
        tensors["length"].fill_(length)
        tensors["position"].copy_(positions[:, -1:] + 1)
        if self.times:
            for name, value in {"previous": -1, "before": self._begin, "latest": -1}.items():
                tensors[name].fill_(value)
        if sampling.plain:
            return
        tensors["seen"].zero_().scatter_(1, ids, True)
        tensors["temperature"].fill_(sampling.temperature if sampling.do_sample else 1)
        tensors["top_p"].fill_(sampling.top_p if sampling.do_sample else 1)
        tensors["repetition_penalty"].fill_(sampling.repetition_penalty)
        vocabulary = tensors["seen"].shape[1]
        tensors["least"].fill_(min(sampling.top_k or vocabulary, vocabulary) - 1 if sampling.do_sample else 0)
        tensors["uniforms"].zero_()
        if uniforms is not None:
            tensors["uniforms"][:, length : length + uniforms.shape[0]] = uniforms.T

    def read(self, step: int) -> Callable[[], Tensor]:
        """Copy the tokens `[batch]` of this step to the host; the result waits for them."""
        place = self._places[step % len(self._places)]
        place.copy_(self.token[:, 0], non_blocking=True)
        copied = torch.cuda.current_stream(self.token.device).record_event() if self._cuda else None

        def tokens() -> Tensor:
            if copied is not None:
                copied.synchronize()
            return place.clone()

        return tokens

    def release(self) -> None:
        """Work that is queued is all that still uses the tensors."""
        if self._cuda:
            self._released = torch.cuda.current_stream(self.token.device).record_event()

    def acquire(self) -> None:
        """Let this stream wait for what was queued by the last user."""
        if self._released is not None:
            torch.cuda.current_stream(self.token.device).wait_event(self._released)


def _inputs(program: CompiledModule) -> dict[str, TensorType]:
    """Names and types of the inputs, in order."""
    return {value.name: value.type for value in program.engine.graph.inputs if isinstance(value.type, TensorType)}


def _range(dim: Dim) -> tuple[int, float]:
    """The smallest and the largest size."""
    if isinstance(dim, Sym):
        return dim.min, math.inf if dim.max is None else dim.max
    size = evaluate(dim, {})
    return (0, math.inf) if size is None else (size, size)


class GenerationEngine:
    """Generates text with the engines of a causal language model, or of one with an encoder and a decoder; made by
    `export_generate` and `load`.

    Several threads may use one engine: each running generation has a cache of its own. Weights may be changed at any
    time; those that change during a generation are used from its next token on.

    Args:
        prefill: computes the scores after a prompt `[batch, length]`, and fills the cache.
        decode: the same for one further token, which it replaces by the one with the best score.
        sample: replaces it by another choice, see `sampling`.
        encode: computes what the decoder of a model with an encoder looks at.
        timestamps: replaces scores and token where a text has timestamps, see `sampling`.

    Attributes:
        device: where it runs.
        max_cache_len: tokens that a cache holds.

    Raises:
        EngineFormatError: the engines do not belong together.
    """

    def __init__(
        self,
        prefill: CompiledModule,
        decode: CompiledModule,
        sample: CompiledModule,
        encode: CompiledModule | None = None,
        timestamps: CompiledModule | None = None,
    ) -> None:
        self.prefill, self.decode, self.sample = prefill, decode, sample
        self.encode, self.timestamps = encode, timestamps
        self._weighted = [program for program in (decode, prefill, encode) if program is not None]
        self.device, self._idle, self._lock = decode.device, list[State](), threading.Lock()
        known = _inputs(sample) | _inputs(decode)
        empty, filled = ([t for n, t in _inputs(p).items() if n.startswith(CACHE)] for p in (prefill, decode))
        alike = [(t.dtype, t.shape[1:]) for t in empty] == [(t.dtype, t.shape[1:]) for t in filled]
        widths = {n: known[n].shape[1] for n in WIDE if n in known and len(known[n].shape) == 2}
        fixed = {name: width for name, width in widths.items() if isinstance(width, int)}
        configs = [p.engine.manifest.model.get("attributes", {}).get("config") for p in self._weighted]
        alike &= all(config == configs[0] for config in configs)  # which has such as frequencies of positions
        encoded = "encoded" in _inputs(prefill)
        alike &= timestamps is None or type(getattr(timestamps, "no_timestamps", None)) is int
        if not alike or fixed.keys() != WIDE or "banned" not in known or encoded != (encode is not None):
            hint = "use the files that one call of `save` wrote"
            raise EngineFormatError("these engines do not generate text together", hint=hint)
        self.max_cache_len, self._vocabulary = fixed["mask"], fixed["seen"]
        for program in self._weighted[1:]:
            program.session.store.share(decode.session.store)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        weights: WeightSource | None = None,
        device: torch.device | str | None = None,
        settings: RuntimeSettings | None = None,
        trusted_ops: Sequence[str] = (),
        trust_binaries: bool = False,
    ) -> Self:
        """Load the engines that `save` wrote. The arguments and errors are those of `torch_rtx.load`, but for
        `settings`: values that were written without a version counter, such as through `.data`, are not looked for
        before each token; call `refit` after such writes.
        """
        settings = replace(settings_of(RuntimeSettings, settings), watch_weights=False)
        given: dict[str, Any] = {"trusted_ops": trusted_ops, "trust_binaries": trust_binaries}
        path = Path(folder)
        names = [*PROGRAMS, *[name for name in FURTHER if (path / f"{name}.rtx").exists()]]
        engine = cls(**{name: load(path / f"{name}.rtx", None, device, settings, **given) for name in names})
        if weights is None:  # those in the engines, if they were built with `strip_weights=False`
            weights = {n: t for p in engine._weighted for n, t in (p.engine.weights or {}).items()} or None
        if weights is not None:
            engine.attach(weights)
        return engine

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the engines to a folder, which is made if there is none; see `torch_rtx.save`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name in (*PROGRAMS, *FURTHER):
            program, file = getattr(self, name), path / f"{name}.rtx"
            if program is None:
                file.unlink(missing_ok=True)  # of another engine
            else:
                save(program, file)

    def attach(self, weights: WeightSource) -> None:
        """Use the tensors of a module or state dict themselves, see `CompiledModule.attach`; files are copied."""
        if not isinstance(weights, torch.nn.Module | Mapping):
            self.refit(weights)
            return
        for program in self._weighted:
            program.attach(weights)

    def refit(self, weights: WeightSource, strict: bool = True) -> None:
        """Copy the values of other weights, see `CompiledModule.refit`."""
        if not isinstance(weights, torch.nn.Module):
            weights = tensors_of(weights)  # files are read once
        for program in self._weighted:
            program.refit(weights, strict)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, streamer: Any = None, **options: Any
    ) -> Tensor:
        """The prompts and what follows them, int64 `[batch, length + new tokens]`, on the device of `input_ids`. Where
        there is an encoder, the prompts are those of the decoder.

        Args:
            streamer: gets the prompts and then each token as it comes: an object with `put(tokens)` and `end()`, such
                as a `TextStreamer` of transformers.
            options: the other arguments and the errors are those of `stream`.
        """
        prompt, found = self._begin(input_ids, attention_mask, **options)
        begin = prompt.ids.cpu()
        if streamer is not None:
            streamer.put(begin)
        tokens = [begin]
        for token in found:
            tokens.append(token[:, None])
            if streamer is not None:
                streamer.put(token)
        if streamer is not None:
            streamer.end()
        return torch.cat(tokens, 1).to(input_ids.device)

    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """The tokens that follow the prompts, one by one, each int64 `[batch]` in host memory.

        Args:
            input_ids: the prompts, integers `[batch, length]`, padded on the left. Where there is an encoder, what that
                reads: texts `[batch, length]`, padded anywhere, or features in the sizes of the exported example.
            attention_mask: 0 at padding and 1 elsewhere, of the same shape. None: in prompts `pad_token_id` is padding,
                unless it also ends sequences; in texts for an encoder nothing is. Features have no padding.
            decoder_input_ids: the prompts of a decoder, integers `[batch, length]`. None: `decoder_start_token_id`, by
                default the model's, or else its `bos_token_id`, if its own `generate` begins with that as well.
            decoder_attention_mask: for padding on the left of these; None: nothing is.
            max_new_tokens: the most tokens for each prompt; None: as many as the cache holds.
            min_new_tokens, min_length: the fewest, without the prompt and with it, by default the model's.
            eos_token_id: tokens that end a sequence, by default the model's; None: none does. The iteration ends when
                every sequence has.
            pad_token_id: what follows a sequence that has ended, by default the model's, or the first `eos_token_id`.
            suppress_tokens, begin_suppress_tokens, bad_words_ids: tokens that no text has, and that none begins with;
                tokens that no text has, as lists of one. By default the model's; None: there are none.
            forced_bos_token_id, forced_eos_token_id: the first new token after a prompt of one, such as a language to
                translate to, and the last of `max_new_tokens`, by default the model's; None: they are chosen.
            return_timestamps: texts have timestamps, by default where the model's configuration says so. That is one
                pass over what the encoder reads: transformers' own method goes on from the last timestamp.
            generator: where random numbers come from, by default PyTorch's own on the CPU. Equal numbers give equal
                text on one device.
            do_sample, temperature, top_k, top_p, repetition_penalty: those of `Sampling`.

        Raises:
            InputError: the prompts do not fit the engine or its cache, or an option is out of its range.
            RtxError: the engine has no weights; and those of a call, see `CompiledModule.forward`.
        """
        return self._begin(input_ids, attention_mask, **options)[1]

    def _begin(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> tuple[Prompt, Iterator[Tensor]]:
        """The prompts and the tokens, see `stream`."""
        known = {name: options.pop(name, getattr(self.decode, name, None)) for name in KNOWN}
        pad, ends = known["pad_token_id"], self._tokens_of("eos_token_id", known)
        if pad is not None and type(pad) is not int:
            raise InputError(f"pad_token_id is {pad!r}, not the number of a token")
        if self.encode is None:
            if decoder_input_ids is not None or decoder_attention_mask is not None:
                raise InputError("this engine has no encoder, and so no decoder_input_ids")
            prompt = Prompt(*self._prompts("input_ids", inputs, mask, None if pad in ends else pad))
        else:
            read = self._read(self.encode, inputs, mask)
            start = known["decoder_start_token_id"]
            ids = self._start(start, len(inputs)) if decoder_input_ids is None else decoder_input_ids
            if len(ids) != len(inputs):
                raise InputError(f"there are {len(ids)} decoder_input_ids for {len(inputs)} sources")
            prompt = Prompt(*self._prompts("decoder_input_ids", ids, decoder_attention_mask, None), read)
        count = self._count(prompt.ids.shape[1], max_new_tokens)
        choice = Sampling(**options)
        rules = self._rules(prompt.ids.shape[1], ends, known)
        if rules.timestamps and choice.repetition_penalty != 1:
            raise InputError("a repetition_penalty, which is not applied where texts have timestamps")
        uniforms = None
        if choice.do_sample:
            place = "cpu" if generator is None else generator.device
            uniforms = torch.rand(count, len(prompt.ids), generator=generator, device=place).to(self.device)
        end = End(len(prompt.ids), count, pad if pad is not None else next(iter(ends), 0), rules)
        return prompt, self._tokens(prompt, count, choice, uniforms, rules, end)

    def _tokens_of(self, name: str, known: Mapping[str, Any]) -> tuple[int, ...]:
        """An option that names tokens."""
        return tokens_of(name, known[name], self._vocabulary)

    def _rules(self, length: int, ends: tuple[int, ...], known: Mapping[str, Any]) -> Rules:
        """Those for prompts of this length; `known` are options by name."""
        least, whole = (0 if known[name] is None else known[name] for name in ("min_new_tokens", "min_length"))
        if type(least) is not int or type(whole) is not int or min(least, whole) < 0:
            raise InputError(f"min_new_tokens is {least!r} and min_length {whole!r}, which must be numbers of tokens")
        if known["return_timestamps"] and self.timestamps is None:
            hint = "export with model.generation_config.no_timestamps_token_id, the token before the first timestamp"
            raise InputError("return_timestamps, and the engine knows no timestamps", hint=hint)
        words = known["bad_words_ids"] or []
        if not all(isinstance(word, list) and len(word) == 1 for word in words):
            raise InputError(f"bad_words_ids is {words!r}, which must be lists of one token each")
        bad = [token for (token,) in words if token not in ends]
        forced = self._tokens_of("forced_bos_token_id", known) if length == 1 else ()
        return Rules(
            ends=ends,
            suppress=self._tokens_of("suppress_tokens", known) + tokens_of("bad_words_ids", bad, self._vocabulary),
            begin_suppress=self._tokens_of("begin_suppress_tokens", known),
            least=max(least, whole - length),
            forced_first=next(iter(forced), None),
            forced_last=min(self._tokens_of("forced_eos_token_id", known), default=None),
            timestamps=bool(known["return_timestamps"]),
        )

    def _count(self, length: int, count: int | None) -> int:
        """The most new tokens after prompts of this length."""
        room = self.max_cache_len - length + 1  # the last token needs no place in the cache
        count = room if count is None else count
        if type(count) is not int or count < 1:
            raise InputError(f"max_new_tokens is {count!r}, not a number of tokens")
        if count > room:
            hint = f"shorten the prompts, or export with max_cache_len={length + count - 1} or more"
            said = f"{count} new tokens after prompts of {length}: the cache has room for {room}"
            raise InputError(said, hint=hint)
        return count

    def _start(self, token: int | None, batch: int) -> Tensor:
        """What a decoder begins with."""
        if type(token) is not int:
            hint = "for Whisper: the tokens of start, language, task and, for a text without them, no timestamps"
            raise InputError("decoder_input_ids are missing: this model has more than one way to begin", hint=hint)
        return torch.full((batch, 1), token)

    def _read(self, encode: CompiledModule, source: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """What the encoder reads, on the device, checked.

        Raises:
            InputError: it does not fit.
        """
        kinds = _inputs(encode)
        shape = kinds["source"].shape
        if not isinstance(source, Tensor) or source.dim() != len(shape) or not source.numel():
            raise InputError(f"the encoder reads a tensor with {len(shape)} axes, of which the first is the batch")
        self._check_batch(len(source), shape[0])
        if "source_mask" not in kinds:
            if mask is not None and not bool((mask == 1).all()):
                raise InputError("attention_mask hides parts of features, which the encoder reads as a whole")
            if tuple(source.shape[1:]) != shape[1:]:
                raise InputError(
                    f"features of shape {list(source.shape)}, the engine takes [batch, *{list(shape[1:])}]"
                )
            dtype = aten.DTYPES[kinds["source"].dtype]
            if source.is_floating_point() != dtype.is_floating_point:
                raise InputError(f"features of {source.dtype}, the engine takes {dtype}")
            return (source.to(self.device, dtype),)
        longest = _range(shape[1])[1]
        if source.is_floating_point() or source.shape[1] > longest:
            hint = f"shorten the texts, or export with source={source.shape[1]} or more"
            said = f"the encoder reads up to {longest} tokens, integers [batch, length], not {list(source.shape)}"
            raise InputError(said, hint=hint)
        known = getattr(encode, "vocabulary", None)  # which may be another one than that of the decoder
        mask = self._masked("attention_mask", source, mask, None, known if type(known) is int else self._vocabulary)
        if not bool(mask.any(1).all()):
            raise InputError("a text for the encoder has no token that is not padding")
        return source.to(self.device, torch.int64), mask.to(self.device, torch.int64)

    def _check_batch(self, count: int, dim: Dim) -> None:
        few, many = _range(dim)
        if not few <= count <= many:
            hint = "export with another batch_size, which may be (smallest, largest)"
            raise InputError(f"there are {count} prompts, the engine is for {few} to {many}", hint=hint)

    def _masked(self, name: str, ids: Tensor, mask: Tensor | None, pad: int | None, vocabulary: int) -> Tensor:
        """The mask of texts, checked; the texts as well."""
        if mask is None:
            mask = torch.ones_like(ids) if pad is None else (ids != pad).long()
        if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"{name} must have zeros and ones, in the shape {list(ids.shape)} of the tokens")
        if not bool(((ids >= 0) & (ids < vocabulary)).all()):
            raise InputError(f"there are tokens outside of the {vocabulary} that the model knows")
        return mask

    def _prompts(self, name: str, ids: Tensor, mask: Tensor | None, pad: int | None) -> tuple[Tensor, Tensor]:
        """The prompts and their mask on the device, checked.

        Raises:
            InputError: they do not fit.
        """
        batch, length = _inputs(self.prefill)["input_ids"].shape
        shortest, _ = _range(length)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            raise InputError(f"{name} must be integers of shape [batch, length], with a token in each prompt")
        self._check_batch(len(ids), batch)
        if not shortest <= ids.shape[1] <= self.max_cache_len:
            hint = f"shorten the prompts, or export with max_cache_len={ids.shape[1]} or more"
            said = f"prompts of {ids.shape[1]} tokens, the engine takes {shortest} to {self.max_cache_len}"
            raise InputError(said, hint=hint if ids.shape[1] > shortest else None)
        named = "attention_mask" if self.encode is None else "decoder_attention_mask"
        mask = self._masked(named, ids, mask, pad, self._vocabulary)
        if not bool(mask[:, -1].all()):
            hint = 'tokenizer.padding_side = "left"'
            raise InputError("the last token of a prompt is padding, which belongs before the prompt", hint=hint)
        return ids.to(self.device, torch.int64), mask.to(self.device, torch.int64)

    def _tokens(
        self, prompt: Prompt, count: int, choice: Sampling, uniforms: Tensor | None, rules: Rules, end: End
    ) -> Iterator[Tensor]:
        """See `stream`."""
        bans = rules.bans()
        with self._state(len(prompt.ids)) as state:
            with self._placed():
                heard = () if self.encode is None else (self.encode(*prompt.read), *prompt.read[1:])
                logits = self.prefill(prompt.ids, prompt.mask, prompt.positions, state.cache, *heard)
                state.start(prompt, choice, uniforms)
                state.ban(bans[0])
                logits = logits.masked_fill(state.banned, -torch.inf)
                if rules.forced_first is not None:
                    logits = torch.full_like(logits, -torch.inf)
                    logits[:, rules.forced_first] = 0
                state.token.copy_(logits.argmax(-1, keepdim=True))
                self._choose(state, logits, choice, rules.timestamps)
            pending: deque[Callable[[], Tensor]] = deque()
            for step in range(count):
                with self._placed():
                    pending.append(state.read(step))
                if len(pending) > state.ahead:
                    yield end(pending.popleft()())
                    if end.all:
                        return
                if step + 1 < count:
                    with self._placed():
                        if step + 1 in bans:
                            state.ban(bans[step + 1])
                        if rules.timestamps:
                            state.tensors["previous"].copy_(state.token)
                        (logits,) = self.decode.session(state.step)
                        self._choose(state, logits, choice, rules.timestamps)
            while pending and not end.all:
                yield end(pending.popleft()())

    def _choose(self, state: State, logits: Tensor, choice: Sampling, timed: bool) -> None:
        if timed and self.timestamps is not None:
            (logits,) = self.timestamps.session([logits if given is None else given for given in state.times])
        if not choice.plain:
            self.sample.session([logits if given is None else given for given in state.choice])

    def _placed(self) -> Any:
        """Where work of the device is queued."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @contextmanager
    def _state(self, batch: int) -> Iterator[State]:
        """A state with an empty cache, which nobody else has. One is kept for the next call: a CUDA graph is replayed
        fastest with the tensors that it has seen."""
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is None or kept.batch != batch:
            kept = None  # before the next one is made
            state = State(self, batch)
        else:
            state = kept
            state.acquire()
            torch._foreach_zero_(state.cache)
        try:
            yield state
        finally:
            state.release()
            with self._lock:
                self._idle = [state]
