"""Runs engines that generate text: a prompt goes in, tokens come out while further ones are computed.

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
from torch_rtx.ir import Dim, Sym, TensorType, evaluate
from torch_rtx.runtime.module import CompiledModule, load, save
from torch_rtx.runtime.weight_sources import WeightSource, tensors_of
from torch_rtx.settings import RuntimeSettings, settings_of

PROGRAMS = ("prefill", "decode", "sample")
CACHE = "cache_"  # what the names of its tensors begin with
WIDE = {"token", "position", "mask", "seen", "uniforms"}  # inputs with a row for each sequence
AHEAD = 2  # steps that are queued on a GPU while the host waits for a token
_DEFAULT: Any = object()


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names and the meaning are those of transformers.

    Args:
        do_sample: draw it; False: take the best one, which `temperature`, `top_k` and `top_p` do not change.
        temperature: divides the scores before probabilities are computed, above 0.
        top_k: draw from so many of the best tokens; None: from all.
        top_p: draw from the fewest tokens that have this probability together, above 0 and at most 1.
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely, below 1 more.

    Raises:
        InputError: a number is out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            given = getattr(self, name)
            if not isinstance(given, int | float) or not 0 < given < float("inf") or (name == "top_p" and given > 1):
                hint = "do_sample=False takes the best token" if name == "temperature" else None
                raise InputError(
                    f"{name} is {given!r}, not a number above 0{' up to 1' * (name == 'top_p')}", hint=hint
                )
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k is {self.top_k!r}, not a number of tokens", hint="top_k=None draws from all")

    @property
    def plain(self) -> bool:
        """The best token is taken as the model has it."""
        return not self.do_sample and self.repetition_penalty == 1


class State:
    """The tensors of one running generation, which its programs write to, and what the host reads of them.

    Attributes:
        tensors: by the names that they have as inputs of the programs.
        cache: those that hold what the model knows of earlier tokens.
        step, choice: the inputs of `decode` and of `sample`, the latter with None in place of the scores.
    """

    @torch.inference_mode(False)  # whose tensors could not be written to in other calls
    def __init__(self, engine: GenerationEngine, batch: int) -> None:
        self.batch, self.tensors = batch, dict[str, Tensor]()
        for program in (engine.decode, engine.sample):
            sizes = dict.fromkeys(program.engine.graph.syms, batch)  # no other size varies
            for name, type_ in _inputs(program).items():
                shape: list[Any] = [evaluate(dim, sizes) for dim in type_.shape]
                if name != "logits":
                    self.tensors[name] = torch.zeros(shape, dtype=aten.DTYPES[type_.dtype], device=engine.device)
        self.cache = [tensor for name, tensor in self.tensors.items() if name.startswith(CACHE)]
        self.step = [self.tensors[name] for name in _inputs(engine.decode)]
        self.choice = [self.tensors.get(name) for name in _inputs(engine.sample)]
        self.token = self.tensors["token"]
        self._cuda = engine.device.type == "cuda"
        self.ahead = AHEAD if self._cuda else 0
        self._places = [torch.empty(batch, dtype=torch.int64, pin_memory=self._cuda) for _ in range(self.ahead + 1)]
        self._released: Any = None

    def start(self, ids: Tensor, mask: Tensor, positions: Tensor, sampling: Sampling, uniforms: Tensor | None) -> None:
        """Set everything but the cache, which a prompt has filled."""
        tensors, length = self.tensors, ids.shape[1]
        tensors["mask"].fill_(1)[:, :length] = mask
        tensors["length"].fill_(length)
        tensors["position"].copy_(positions[:, -1:] + 1)
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
    """Generates text with the engines of a causal language model; made by `export_generate` and `load`.

    Several threads may use one engine: each running generation has a cache of its own. Weights may be changed at any
    time; those that change during a generation are used from its next token on.

    Args:
        prefill: computes the scores after a prompt `[batch, length]`, and fills the cache.
        decode: the same for one further token, which it replaces by the one with the best score.
        sample: replaces it by another choice, see `sampling`.

    Attributes:
        device: where it runs.
        max_cache_len: tokens that a cache holds.

    Raises:
        EngineFormatError: the engines do not belong together.
    """

    def __init__(self, prefill: CompiledModule, decode: CompiledModule, sample: CompiledModule) -> None:
        self.prefill, self.decode, self.sample = prefill, decode, sample
        self.device, self._idle, self._lock = decode.device, list[State](), threading.Lock()
        known = _inputs(sample) | _inputs(decode)
        empty, filled = ([t for n, t in _inputs(p).items() if n.startswith(CACHE)] for p in (prefill, decode))
        alike = [(t.dtype, t.shape[1:]) for t in empty] == [(t.dtype, t.shape[1:]) for t in filled]
        widths = {n: known[n].shape[1] for n in WIDE if n in known and len(known[n].shape) == 2}
        fixed = {name: width for name, width in widths.items() if isinstance(width, int)}
        configs = [p.engine.manifest.model.get("attributes", {}).get("config") for p in (prefill, decode)]
        if not alike or fixed.keys() != WIDE or configs[0] != configs[1]:  # such as other frequencies of positions
            hint = "use the files that one call of `save` wrote"
            raise EngineFormatError("these engines do not generate text together", hint=hint)
        self.max_cache_len, self._vocabulary = fixed["mask"], fixed["seen"]
        prefill.session.store.share(decode.session.store)

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
        engine = cls(*[load(path / f"{name}.rtx", None, device, settings, **given) for name in PROGRAMS])
        if weights is None:
            weights = engine.decode.engine.weights  # if it was built with `strip_weights=False`
        if weights is not None:
            engine.attach(weights)
        return engine

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the engines to a folder, which is made if there is none; see `torch_rtx.save`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            save(getattr(self, name), path / f"{name}.rtx")

    def attach(self, weights: WeightSource) -> None:
        """Use the tensors of a module or state dict themselves, see `CompiledModule.attach`; files are copied."""
        if not isinstance(weights, torch.nn.Module | Mapping):
            self.refit(weights)
            return
        for program in (self.decode, self.prefill):
            program.attach(weights)

    def refit(self, weights: WeightSource, strict: bool = True) -> None:
        """Copy the values of other weights, see `CompiledModule.refit`."""
        if not isinstance(weights, torch.nn.Module):
            weights = tensors_of(weights)  # files are read once
        for program in (self.decode, self.prefill):
            program.refit(weights, strict)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, streamer: Any = None, **options: Any
    ) -> Tensor:
        """The prompts and what follows them, int64 `[batch, length + new tokens]`, on the device of `input_ids`.

        Args:
            streamer: gets the prompts and then each token as it comes: an object with `put(tokens)` and `end()`, such
                as a `TextStreamer` of transformers.
            options: the other arguments and the errors are those of `stream`.
        """
        found = self.stream(input_ids, attention_mask, **options)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        tokens = []
        for token in found:
            tokens.append(token)
            if streamer is not None:
                streamer.put(token)
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids.long(), torch.stack(tokens, 1).to(input_ids.device)], 1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = _DEFAULT,
        pad_token_id: int | None = _DEFAULT,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """The tokens that follow the prompts, one by one, each int64 `[batch]` in host memory.

        Args:
            input_ids: the prompts, integers `[batch, length]`, padded on the left.
            attention_mask: 0 at padding and 1 elsewhere, of the same shape; None: `pad_token_id` is padding, unless it
                also ends sequences.
            max_new_tokens: the most tokens for each prompt; None: as many as the cache holds.
            eos_token_id: tokens that end a sequence, by default the model's; None: none does. The iteration ends when
                every sequence has.
            pad_token_id: what follows a sequence that has ended, by default the model's, or the first `eos_token_id`.
            generator: where random numbers come from, by default PyTorch's own on the CPU. Equal numbers give equal
                text on one device.
            sampling: arguments of `Sampling`: `do_sample`, `temperature`, `top_k`, `top_p`, `repetition_penalty`.

        Raises:
            InputError: the prompts do not fit the engine or its cache, or an option is out of its range.
            RtxError: the engine has no weights; and those of a call, see `CompiledModule.forward`.
        """
        ends = getattr(self.decode, "eos_token_id", None) if eos_token_id is _DEFAULT else eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        pad = getattr(self.decode, "pad_token_id", None) if pad_token_id is _DEFAULT else pad_token_id
        ids, mask = self._prompts(input_ids, attention_mask, None if pad in ends else pad)
        room = self.max_cache_len - ids.shape[1] + 1  # the last token needs no place in the cache
        count = room if max_new_tokens is None else max_new_tokens
        if type(count) is not int or count < 1:
            raise InputError(f"max_new_tokens is {count!r}, not a number of tokens")
        if count > room:
            hint = f"shorten the prompts, or export with max_cache_len={ids.shape[1] + count - 1} or more"
            said = f"{count} new tokens after prompts of {ids.shape[1]}: the cache has room for {room}"
            raise InputError(said, hint=hint)
        choice = Sampling(**sampling)
        uniforms = None
        if choice.do_sample:
            place = "cpu" if generator is None else generator.device
            uniforms = torch.rand(count, len(ids), generator=generator, device=place).to(self.device)
        end = _End(len(ids), ends, pad if pad is not None else next(iter(ends), 0))
        return self._tokens(ids, mask, count, choice, uniforms, end)

    def _prompts(self, ids: Tensor, mask: Tensor | None, pad: int | None) -> tuple[Tensor, Tensor]:
        """The prompts and their mask on the device, checked.

        Raises:
            InputError: they do not fit.
        """
        (few, many), (shortest, _) = map(_range, _inputs(self.prefill)["input_ids"].shape)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            raise InputError("input_ids must be integers of shape [batch, length], with a token in each prompt")
        if not few <= len(ids) <= many:
            hint = "export with another batch_size, which may be (smallest, largest)"
            raise InputError(f"there are {len(ids)} prompts, the engine is for {few} to {many}", hint=hint)
        if not shortest <= ids.shape[1] <= self.max_cache_len:
            hint = f"shorten the prompts, or export with max_cache_len={ids.shape[1]} or more"
            said = f"prompts of {ids.shape[1]} tokens, the engine takes {shortest} to {self.max_cache_len}"
            raise InputError(said, hint=hint if ids.shape[1] > shortest else None)
        if mask is None:
            mask = torch.ones_like(ids) if pad is None else (ids != pad).long()
        if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"attention_mask must have zeros and ones, in the shape {list(ids.shape)} of input_ids")
        if not bool(mask[:, -1].all()):
            hint = 'tokenizer.padding_side = "left"'
            raise InputError("the last token of a prompt is padding, which belongs before the prompt", hint=hint)
        if not bool(((ids >= 0) & (ids < self._vocabulary)).all()):
            raise InputError(f"input_ids has tokens outside of the {self._vocabulary} that there are")
        return ids.to(self.device, torch.int64), mask.to(self.device, torch.int64)

    def _tokens(
        self, ids: Tensor, mask: Tensor, count: int, choice: Sampling, uniforms: Tensor | None, end: _End
    ) -> Iterator[Tensor]:
        """See `stream`."""
        with self._state(len(ids)) as state:
            with self._placed():
                positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
                logits = self.prefill(ids, mask, positions, state.cache)
                state.start(ids, mask, positions, choice, uniforms)
                state.token.copy_(logits.argmax(-1, keepdim=True))
                self._choose(state, logits, choice)
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
                        (logits,) = self.decode.session(state.step)
                        self._choose(state, logits, choice)
            while pending and not end.all:
                yield end(pending.popleft()())

    def _choose(self, state: State, logits: Tensor, choice: Sampling) -> None:
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


class _End:
    """Sees sequences end, and pads them.

    Attributes:
        all: every sequence has ended.
    """

    def __init__(self, batch: int, ends: Sequence[int], pad: int) -> None:
        self._ended, self._ends, self._pad = torch.zeros(batch, dtype=torch.bool), torch.tensor(ends), pad
        self.all = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """The tokens `[batch]` of a step, padding where a sequence has ended before."""
        tokens = tokens.masked_fill(self._ended, self._pad)
        if len(self._ends):
            self._ended |= torch.isin(tokens, self._ends)
            self.all = bool(self._ended.all())
        return tokens
