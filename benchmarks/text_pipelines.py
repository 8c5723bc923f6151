"""Pipelines that write text: Llama's `generate`, and Whisper, which writes down what it hears."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_rtx
from benchmarks import timing
from benchmarks.cases import Workload
from benchmarks.pipelines import SETTLE_S, Pipeline

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
WHISPER = {
    "d_model": 768,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
}
HEARD = 80, 3000  # mel bins and frames of 30 s
START = [50258, 50259, 50359, 50363]  # Whisper's tokens before a text: English, transcribe, no timestamps
ANY_TOKEN = {"suppress_tokens": None, "begin_suppress_tokens": None}
LENGTHS = {"full": (32, 128, 512), "small": (8, 12, 32)}  # of prompts, of what follows, and of the cache
WHISPER_PLACES = 448  # all that the model has, as an application would export it
WHISPER_TOKENS = {"full": 100, "small": 6}
MODES = {"rtx": "rtx", "reduce-overhead": "inductor", "max-autotune": "inductor"}


def build(workload: Workload, peer: str, device: str, folder: Path, warm: bool) -> Pipeline:
    """The pipeline of a workload by a peer.

    Args:
        folder: for its files.
        warm: an earlier process has left them there.
    """
    dtype = getattr(torch, workload.dtype)
    torch.manual_seed(0)
    if peer == "rtx-engine":
        return _engine(workload, device, dtype, folder, warm)
    import transformers  # an application that loads an engine needs neither this nor a compiler

    from torch_rtx.backend.entry import rtx

    if "rtx" not in torch.compiler.list_backends():
        torch._dynamo.register_backend(rtx, name="rtx")  # without an installation nobody knows the name
    transformers.logging.set_verbosity_error()
    make = _whisper if workload.model == "whisper_small" else _llama
    model, given, tokens = make(workload, device, dtype)
    asked: dict[str, Any] = {**given, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    asked["eos_token_id"] = None
    compiled = dict(asked)
    if peer in MODES:
        mode = peer if peer != "rtx" else "reduce-overhead"
        config = transformers.CompileConfig(backend=MODES[peer], mode=mode, fullgraph=True)
        config._compile_all_devices = True  # as on a GPU
        compiled |= {"cache_implementation": "static", "compile_config": config}
        if workload.model == "whisper_small":
            encoder = {"backend": "rtx"} if peer == "rtx" else {"mode": mode}
            model.model.encoder.compile(**encoder)
    result = partial(model.generate, **compiled)
    return Pipeline(result, result, partial(_check, model, given, asked, result))


def _llama_sizes(workload: Workload) -> dict[str, Any]:
    return TINY if workload.size == "small" else LLAMA_8B if workload.model == "llama_8b" else LLAMA_1B


def _llama(workload: Workload, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any], int]:
    """The model, the arguments of `generate`, and the number of new tokens."""
    import transformers

    config, (_, tokens, _) = transformers.LlamaConfig(**_llama_sizes(workload)), LENGTHS[workload.size]
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model, {"input_ids": _prompt(workload, device)}, tokens


def _prompt(workload: Workload, device: str) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    size = workload.batch, LENGTHS[workload.size][0]
    return torch.randint(3, _llama_sizes(workload)["vocab_size"], size, generator=noise).to(device)


def _whisper(workload: Workload, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any], int]:
    """The same for Whisper."""
    import transformers

    small = workload.size == "small"
    sizes = dict.fromkeys(WHISPER, 2) | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1} if small else WHISPER
    config = transformers.WhisperConfig(**sizes, vocab_size=51865, decoder_start_token_id=START[0])
    with torch.device(device):
        model = transformers.WhisperForConditionalGeneration(config).to(dtype).eval()
    start = torch.tensor([START] * workload.batch, device=device)
    given = {
        "input_features": _sound(workload, device, dtype),
        "decoder_input_ids": start,
        **ANY_TOKEN,
    }
    return model, given, WHISPER_TOKENS[workload.size]


def _sound(workload: Workload, device: str, dtype: torch.dtype) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    return torch.randn(workload.batch, *HEARD, generator=noise).to(device, dtype)


def _check(model: Any, given: dict[str, Any], asked: dict[str, Any], result: Callable[[], Tensor]) -> None:
    """Compare texts, see `same_text`."""
    found = result().clone()
    if "input_features" in given:
        model.model.encoder._compiled_call_impl = None
        heard = {"input_features": given["input_features"]}
        name, start = "decoder_input_ids", given["decoder_input_ids"].shape[1]
        expected = model.generate(**asked)
        length = start + asked["max_new_tokens"]  # some releases return the new tokens alone
        whole = [t if t.shape[1] == length else torch.cat([given[name], t], 1) for t in (found, expected)]
        found, expected = whole
    else:
        heard, name, start = {}, "input_ids", given["input_ids"].shape[1]
        expected = model.generate(**asked)
    same_text(model, found, expected, start, lambda one, text: one(**heard_as(heard, one), **{name: text}))


def heard_as(heard: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Features in the dtype of a model."""
    return {name: tensor.to(model.dtype) for name, tensor in heard.items()}


def same_text(model: Any, found: Tensor, expected: Tensor, start: int, call: Callable[[Any, Tensor], Any]) -> None:
    """Check that texts are equal until rounding may have chosen another token: where the float32 model's scores of the
    two tokens differ by no more than twice what eager's own scores are off there, for each of them.

    Args:
        start: where the new tokens begin.
        call: what the model says of a text, with `logits [batch, length, vocabulary]`.

    Raises:
        AssertionError: a text differs for no such reason.
    """
    assert found.shape == expected.shape, f"texts of shape {list(found.shape)}, eager's are {list(expected.shape)}"
    exact: Any = None
    for row in range(len(found)):
        differing = (found[row] != expected[row]).nonzero()[:, 0]
        if not len(differing):
            continue
        place = int(differing[0])
        assert place >= start, f"text {row} has another prompt"
        exact = exact or copy.deepcopy(model).float()
        eager, truth = (call(one, expected[:, :place]).logits[row, -1].float() for one in (model, exact))
        gap = float((truth[expected[row, place]] - truth[found[row, place]]).abs())
        limit = 4 * float((eager - truth).abs().max())
        assert gap <= limit, f"text {row} differs at token {place - start}, by {gap:.2g} where {limit:.2g} is rounding"


# ---- engines ---------------------------------------------------------------------------------------------------------


def _engine(workload: Workload, device: str, dtype: torch.dtype, folder: Path, warm: bool) -> Pipeline:
    """An engine of a model, or one from the files that it has kept: that needs no model."""
    from torch_rtx.integrations.generation import GenerationEngine

    whisper = workload.model == "whisper_small"
    _, tokens, places = LENGTHS[workload.size]
    given: dict[str, Any] = {"max_new_tokens": WHISPER_TOKENS[workload.size] if whisper else tokens}
    source = _sound(workload, device, dtype) if whisper else _prompt(workload, device)
    if whisper:
        given |= {"decoder_input_ids": torch.tensor([START] * workload.batch), **ANY_TOKEN}
    model, asked = None, dict[str, Any]()
    if warm:
        engine = GenerationEngine.load(folder / "engine", device=device, trust_binaries=True)
        engine.attach(_random_weights(engine, device))
    else:
        from torch_rtx.integrations.transformers import export_generate

        model, asked, _ = (_whisper if whisper else _llama)(workload, device, dtype)
        heard = {"source": source} if whisper else {}
        places = WHISPER_PLACES if whisper else places
        engine = export_generate(model, max_cache_len=places, batch_size=workload.batch, **heard)
    result = partial(engine.generate, source, eos_token_id=None, **given)

    def check() -> None:
        options = {"max_new_tokens": given["max_new_tokens"], "do_sample": False, "eos_token_id": None}
        _check(model, asked, asked | options, result)

    more = partial(_rates, engine, result, device)
    return Pipeline(result, result, check, more, lambda: engine.save(folder / "engine"))


def _random_weights(engine: Any, device: str) -> dict[str, Tensor]:
    """In the place of a file with weights."""
    from torch_rtx import aten

    weights = {}
    for program in engine._weighted:
        for parameter in program.engine.graph.parameters:
            if not parameter.constant and parameter.name not in weights:
                kind = {"dtype": aten.DTYPES[parameter.type.dtype], "device": device}
                weights[parameter.name] = 0.02 * torch.randn(tuple(parameter.type.shape), **kind)
    return weights


def _rates(engine: Any, plain: Any, device: str) -> Iterator[dict[str, Any]]:
    """Tokens per second of texts that `plain` makes, prompts included, beside the steps of the decoding engine alone;
    and sampled."""
    from torch_rtx.integrations.choices import Sampling

    tokens = plain.keywords["max_new_tokens"]
    prompt, _ = engine._begin(*plain.args, **plain.keywords)

    def per_second(call: Callable[[], Any], count: int) -> float:
        timing.synchronize(device)
        start = time.perf_counter()
        call()
        timing.synchronize(device)
        return count / (time.perf_counter() - start)

    def steps() -> None:
        for _ in range(tokens - 1):
            engine.decode.session(state.step)

    with engine._state(len(prompt.ids)) as state:
        bare = []
        for _ in range(3):
            state.start(prompt, Sampling(), None)
            bare.append(per_second(steps, tokens - 1))
    rate = max(per_second(plain, tokens) for _ in range(3))
    yield {"tokens_per_s": rate, "bare_steps_per_s": max(bare), "of_bare": rate / max(bare)}
    sampled = partial(plain, do_sample=True, temperature=0.8, top_k=50, top_p=0.9)
    for _ in range(2):
        sampled()
        torch_rtx.wait(SETTLE_S / 2)
    yield {"sampled_tokens_per_s": max(per_second(sampled, tokens) for _ in range(2))}
