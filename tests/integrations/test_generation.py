"""Text from engines and from what `generate` compiles, against the tokens of transformers' own `generate` in eager."""

from __future__ import annotations

import copy
import random
import runpy
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import torch_rtx  # noqa: E402
from tests.paths import ROOT  # noqa: E402
from torch_rtx.errors import CaptureError, EngineFormatError, InputError, SettingsError  # noqa: E402
from torch_rtx.integrations.generation import GenerationEngine  # noqa: E402
from torch_rtx.integrations.sampling import Sampler  # noqa: E402
from torch_rtx.integrations.transformers import (  # noqa: E402
    Decode,
    Prefill,
    _caches,
    _check_static_cache,
    export_generate,
)

VOCABULARY, PLACES, END, PAD = 37, 16, 1, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,  # so that the best tokens differ clearly
    "eos_token_id": END,
    "pad_token_id": PAD,
    "bos_token_id": 2,
}
MIXED = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "GPT2": {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 32},
    "Qwen2": {},
    "Gemma3": {"head_dim": 4, **MIXED},
    "Mistral": {"sliding_window": 4},
    "Mixtral": {"num_local_experts": 2},
    "Bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 16},
}
CLASSES = {"GPT2": ("GPT2LMHeadModel", "GPT2Config"), "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig")}
TEXT = torch.tensor([[7, 3, 22, 9, 30]])
PADDED = torch.tensor([[PAD, PAD, 5, 8, 6], [13, 4, 11, 28, 5]])


def tiny(kind: str = "Llama", seed: int = 0, **changes: Any) -> Any:
    name, config = CLASSES.get(kind, (f"{kind}ForCausalLM", f"{kind}Config"))
    torch.manual_seed(seed)
    sizes = {**SIZES, **KINDS.get(kind, {}), **changes}
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


def expected(model: Any, ids: Tensor, **options: Any) -> Tensor:
    given = {"attention_mask": (ids != PAD).long(), "do_sample": False, "max_new_tokens": 8, **options}
    found: Tensor = model.generate(ids, **given)
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(num_hidden_layers=1)


@pytest.fixture(scope="module")
def engine(model: Any) -> GenerationEngine:
    """For one or two prompts."""
    return export_generate(model, max_cache_len=PLACES, batch_size=(1, 2))


# ---- what a model's programs compute ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "narrow"), [*((k, k != "Bloom") for k in KINDS), ("Llama", False), ("Gemma3", False)])
@torch.no_grad()
def test_programs_of_any_model(kind: str, narrow: bool) -> None:
    model = tiny(kind)
    found = _caches(model, PLACES, None, narrow)
    assert found.vocabulary == VOCABULARY
    prefill, decode = Prefill(model, found.empty, None if narrow else PLACES), Decode(model, found.filled)
    assert prefill.state_dict().keys() == model.state_dict().keys()
    for ids in (TEXT, PADDED, TEXT[:, :1]):
        padding, (batch, length) = (ids != PAD).long(), ids.shape
        cache = [
            torch.zeros((batch, *t.shape[1:]), dtype=t.dtype)
            for layer in found.filled.layers
            for t in (layer.keys, layer.values)
        ]
        positions = (padding.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([padding, torch.ones(batch, PLACES - length, dtype=torch.long)], 1)
        token = prefill(ids, padding, positions, cache).argmax(-1, keepdim=True)
        text, position, at = [ids, token.clone()], positions[:, -1:] + 1, torch.tensor(length)
        for _ in range(7):
            decode(token, position, at, mask, torch.zeros(VOCABULARY, dtype=torch.bool), cache)
            text.append(token.clone())
        assert torch.equal(torch.cat(text, 1), expected(model, ids, eos_token_id=None))


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.8}], ids=["plain", "penalty"])
@pytest.mark.parametrize("ids", [TEXT, PADDED, TEXT[:, :1], TEXT.repeat(1, 2)], ids=["text", "padded", "one", "long"])
def test_greedy_text_is_that_of_transformers(model: Any, engine: GenerationEngine, ids: Tensor, options: Any) -> None:
    wanted = expected(model, ids, max_new_tokens=7, eos_token_id=None, **options)
    assert torch.equal(engine.generate(ids, max_new_tokens=7, eos_token_id=None, **options), wanted)
    ends = [int(wanted[0, ids.shape[1] + 2])]  # what the first text has as its third token
    wanted = expected(model, ids, max_new_tokens=7, eos_token_id=ends, pad_token_id=PAD, **options)
    assert torch.equal(engine.generate(ids, max_new_tokens=7, eos_token_id=ends, **options), wanted)


def test_a_folder_has_no_weights_and_takes_any(model: Any, engine: GenerationEngine, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    engine.save(tmp_path / "engine")
    other = tiny(num_hidden_layers=1, seed=1)
    save_file(dict(other.state_dict()), tmp_path / "other.safetensors")
    loaded = GenerationEngine.load(tmp_path / "engine", weights=model)
    assert torch.equal(loaded.generate(TEXT), engine.generate(TEXT))
    loaded.refit(tmp_path / "other.safetensors")
    wanted = expected(other, TEXT)
    assert torch.equal(loaded.generate(TEXT, max_new_tokens=8), wanted)
    assert torch.equal(GenerationEngine.load(tmp_path / "engine", other).generate(TEXT, max_new_tokens=8), wanted)
    (tmp_path / "engine" / "decode.rtx").write_bytes((tmp_path / "engine" / "sample.rtx").read_bytes())
    with pytest.raises(EngineFormatError, match="do not generate text together"):
        GenerationEngine.load(tmp_path / "engine")


def test_programs_of_models_that_differ_in_a_number_alone(engine: GenerationEngine) -> None:
    """Their shapes fit each other; they would write some other text."""
    decode, made = copy.copy(engine.decode), engine.decode.engine
    facts = made.manifest.model["attributes"]
    changed = {**facts, "config": {**facts["config"], "rms_norm_eps": 0.1}}
    decode.engine = replace(made, manifest=replace(made.manifest, model={**made.manifest.model, "attributes": changed}))
    with pytest.raises(EngineFormatError, match="do not generate text together"):
        GenerationEngine(engine.prefill, decode, engine.sample)


def test_large_weights_are_there_once(engine: GenerationEngine) -> None:
    engine.generate(TEXT, max_new_tokens=2)
    own, others = engine.prefill.session.store.values, {v.data_ptr() for v in engine.decode.session.store.values}
    assert all(value.data_ptr() in others for value in own if value.numel() >= SIZES["hidden_size"] ** 2)


def test_what_the_benchmark_of_pipelines_measures(engine: GenerationEngine, tmp_path: Path) -> None:
    from benchmarks.text_pipelines import _random_weights, _rates

    rates, sampled = _rates(engine, partial(engine.generate, TEXT, max_new_tokens=8, eos_token_id=None), "cpu")
    assert rates["tokens_per_s"] == pytest.approx(rates["of_bare"] * rates["bare_steps_per_s"])
    assert sampled["sampled_tokens_per_s"] > 0
    engine.save(tmp_path)
    loaded = GenerationEngine.load(tmp_path)
    loaded.attach(_random_weights(loaded, "cpu"))
    assert loaded.generate(TEXT, max_new_tokens=2).shape == (1, 7)


def test_tokens_come_one_by_one_and_nothing_follows_the_last(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, session = [], engine.decode.session

    class Counting:
        def __call__(self, inputs: Any) -> Any:
            steps.append(None)
            return session(inputs)

    monkeypatch.setattr(engine.decode, "session", Counting())
    text = engine.generate(TEXT, max_new_tokens=4, eos_token_id=None)
    assert len(steps) == 3
    stream = engine.stream(TEXT, max_new_tokens=4, eos_token_id=None)
    found = [next(stream)]
    assert len(steps) == 3
    found += [next(stream)]
    assert len(steps) == 4
    del stream  # a reader may stop at any time
    assert torch.equal(torch.stack(found, 1), text[:, 5:7])
    assert torch.equal(engine.generate(TEXT, max_new_tokens=4, eos_token_id=None), text)


def test_a_streamer_gets_what_transformers_gives_it(model: Any, engine: GenerationEngine) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.found: list[Any] = []

        def put(self, tokens: Tensor) -> None:
            self.found.append(tokens.tolist())

        def end(self) -> None:
            self.found.append("end")

    own, theirs = Streamer(), Streamer()
    engine.generate(TEXT, max_new_tokens=4, streamer=own)
    expected(model, TEXT, max_new_tokens=4, streamer=theirs)
    assert own.found == theirs.found


def test_seeds_decide_what_is_drawn(engine: GenerationEngine) -> None:
    def text(seed: int, ids: Tensor = PADDED, **options: Any) -> Tensor:
        drawn = torch.Generator().manual_seed(seed)
        given = {"max_new_tokens": 10, "eos_token_id": None, "do_sample": True, "generator": drawn, **options}
        return engine.generate(ids, **given)

    assert torch.equal(text(3), text(3))
    assert torch.equal(text(3, max_new_tokens=5), text(3)[:, :10])
    assert not torch.equal(text(3), text(4))
    best = engine.generate(PADDED, max_new_tokens=10, eos_token_id=None)
    assert torch.equal(text(3, top_k=1), best)
    assert torch.equal(text(3, temperature=1e-3), best)
    assert torch.equal(text(3, top_p=1e-6), best)


def test_threads_have_caches_of_their_own(engine: GenerationEngine) -> None:
    prompts = [TEXT, PADDED[1:], TEXT.flip(1)]
    wanted = [engine.generate(ids, max_new_tokens=8, eos_token_id=None) for ids in prompts]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        found[index] = engine.generate(prompts[index], max_new_tokens=8, eos_token_id=None)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[index], text) for index, text in enumerate(wanted))


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (torch.ones(1, 17, dtype=torch.long), {}, r"17 tokens, the engine takes 1 to 16\n.*max_cache_len=17"),
    (TEXT, {"max_new_tokens": 13}, r"13 new tokens after prompts of 5: the cache has room for 12\n.*max_cache_len=17"),
    (TEXT, {"max_new_tokens": 0}, "max_new_tokens is 0"),
    (TEXT.repeat(4, 1), {}, "4 prompts, the engine is for 1 to 3"),
    (TEXT[0], {}, r"shape \[batch, length\]"),
    (TEXT.float(), {}, "must be integers"),
    (TEXT + VOCABULARY, {}, "outside of the 37"),
    (PADDED.flip(1), {}, r"belongs before the prompt\n.*padding_side"),
    (TEXT, {"attention_mask": torch.ones(1, 4)}, r"shape \[1, 5\]"),
    (TEXT, {"temperature": 0.0}, r"temperature is 0.0.*\n.*do_sample=False"),
    (TEXT, {"top_p": 1.5}, "top_p is 1.5"),
    (TEXT, {"top_k": 0}, "top_k is 0"),
    (TEXT, {"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
]


@pytest.mark.parametrize(("ids", "options", "message"), WRONG, ids=[message[:20] for *_, message in WRONG])
def test_wrong_arguments(engine: GenerationEngine, ids: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.stream(ids, **options)


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (lambda: torch.nn.Linear(2, 2), {}, SettingsError, "a Linear does not generate text"),
    (tiny, {"max_cache_len": 64}, SettingsError, "the model has 32 positions"),
    (tiny, {"batch_size": (4, 2)}, SettingsError, r"batch_size=\(4, 2\)"),
    (tiny, {"min_prompt_len": 17}, SettingsError, "min_prompt_len=17"),
    (lambda: tiny().to("meta"), {}, CaptureError, "device='cuda'"),
]


@pytest.mark.parametrize(
    ("build", "options", "kind", "message"), REFUSED, ids=[message[:20] for *_, message in REFUSED]
)
def test_what_can_not_be_exported(
    build: Callable[[], Any], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        export_generate(build(), **{"max_cache_len": PLACES, **options})


def test_a_model_that_a_static_cache_misleads_is_refused() -> None:
    """GPT-Neo's mask for a step is that of the last place of the cache, whichever the token has."""
    attention = [[["global", "local"], 1]]
    model = tiny("GPTNeo", num_layers=2, num_heads=4, attention_types=attention, window_size=4)
    with pytest.raises(SettingsError, match="a GPTNeoForCausalLM computes other scores with a static cache: an"):
        export_generate(model, max_cache_len=PLACES)


def test_a_model_that_may_take_a_static_cache_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "torch_rtx")
    model = tiny("Roberta", max_position_embeddings=40, is_decoder=True)
    assert not model._can_compile_fullgraph
    _check_static_cache(model, PLACES)
    assert not caplog.messages
    _check_static_cache(model.to("meta"), PLACES)
    assert caplog.messages == ["whether a RobertaForCausalLM takes a static cache is not known without its weights"]


@pytest.mark.gpu
def test_on_a_gpu_tokens_are_read_late(tmp_path: Path) -> None:
    model = tiny("Qwen2", hidden_size=64, intermediate_size=64).cuda()
    prompts = [TEXT.cuda(), PADDED.cuda()]
    engine = export_generate(model, max_cache_len=PLACES, batch_size=(1, 2))
    engine.save(tmp_path)
    loaded = GenerationEngine.load(tmp_path, weights=model, trust_binaries=True)
    for again in range(3):  # by library calls, by kernels, and by CUDA graphs
        for ids in prompts:
            wanted = expected(model, ids, max_new_tokens=10)
            for found in (engine, loaded):
                assert torch.equal(found.generate(ids, max_new_tokens=10), wanted), again
            drawn = [
                engine.generate(ids, max_new_tokens=9, do_sample=True, generator=torch.Generator().manual_seed(1))
                for _ in range(2)
            ]
            assert torch.equal(*drawn)
        torch_rtx.wait()


def test_the_chat(
    model: Any, engine: GenerationEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    chat = runpy.run_path(str(ROOT / "examples" / "chat.py"))
    letters = chat["Letters"]()
    assert len(letters.letters) <= VOCABULARY
    monkeypatch.setitem(chat["main"].__globals__, "tiny", lambda: (model, letters))
    monkeypatch.setitem(chat["main"].__globals__, "export_generate", lambda *_, **__: engine)
    monkeypatch.setitem(chat["main"].__globals__, "DEVICE", "cpu")
    for _ in range(2):  # builds, and loads
        chat["main"](["hi", "a long one", "--tokens", "4", "--engine", str(tmp_path / "engine")])
        said = capsys.readouterr()
        assert "tokens per second" in said.err
    options = {"max_new_tokens": 4, "eos_token_id": None}
    ids = chat["prompt"](engine, letters, [{"content": "forgotten"}, {"content": "abc"}, {"content": "de"}], 6)
    assert letters.decode(ids[0].tolist()) == "abc\nde\n"
    text = letters.decode(engine.generate(ids, **options)[0, ids.shape[1] :].tolist())
    assert "".join(chat["answer"](engine, letters, ids, **options)) == text


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8, "repetition_penalty": 1.4}],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    from transformers.generation import logits_process as processors

    torch.manual_seed(0)
    rows, count = 20000, 12
    logits, prompt = torch.randn(1, count) * 2, torch.tensor([[3, 5, 5]])
    theirs = logits
    for name, kind in (
        ("repetition_penalty", processors.RepetitionPenaltyLogitsProcessor),
        ("temperature", processors.TemperatureLogitsWarper),
        ("top_k", processors.TopKLogitsWarper),
        ("top_p", processors.TopPLogitsWarper),
    ):
        theirs = kind(options[name])(prompt, theirs) if name in options else theirs
    seen = torch.zeros(rows, count, dtype=torch.bool).scatter_(1, prompt.expand(rows, -1), True)
    uniforms = ((torch.arange(rows) + 0.5) / rows).unsqueeze(1)  # all numbers alike, in place of random ones
    numbers = [torch.full((rows,), float(options.get(n, 1))) for n in ("top_p", "temperature", "repetition_penalty")]
    token, least = torch.zeros(rows, 1, dtype=torch.long), torch.full((rows,), options.get("top_k", count) - 1)
    chosen = Sampler()(logits.expand(rows, -1), token, seen, uniforms, torch.tensor(0), least, *numbers)
    assert torch.equal(chosen, token[:, 0])
    assert bool(seen.gather(1, token).all())
    found = torch.bincount(chosen, minlength=count) / rows
    torch.testing.assert_close(found, theirs.softmax(-1)[0], atol=2 / rows, rtol=0)


def test_numbers_at_the_edges_choose_tokens_that_may_be_chosen() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 5.0, 5.0]] * 3)
    logits[2] = torch.nan
    uniforms = torch.tensor([[0.0], [1.0 - 2**-24], [0.5]])
    token, one = torch.zeros(3, 1, dtype=torch.long), torch.ones(3)
    given = token, torch.zeros(3, 4, dtype=torch.bool), uniforms, torch.tensor(0), torch.tensor([3, 3, 3])
    chosen = Sampler()(logits, *given, one, one, one)
    assert chosen[:2].tolist() == [2, 0]  # the first of the best ones, and the last that has a probability


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled() -> Any:
    config = transformers.CompileConfig(backend="rtx", fullgraph=True)
    config._compile_all_devices = True  # on the CPU, too
    return {"cache_implementation": "static", "max_cache_len": PLACES, "compile_config": config}


def small() -> Any:
    return tiny("GPT2", n_layer=1, num_key_value_heads=4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_generate_compiles_a_step_once_for_all_lengths(recorder: Any) -> None:
    model = small()
    for ids in (TEXT[:, :3], TEXT, TEXT[:, 1:]):
        wanted = expected(model, ids)
        assert torch.equal(expected(model, ids, **compiled()), wanted)
    assert len(recorder) == 1
    assert torch.equal(expected(model, ids, **compiled(), prefill_chunk_size=2), wanted)
    assert len(recorder) == 3  # the first chunk has other arguments than a later one


@pytest.mark.usefixtures("fresh_dynamo")
def test_forty_lengths_have_two_graphs(recorder: Any) -> None:
    model, draw = tiny(num_hidden_layers=1), random.Random(0)
    run = torch.compile(model, backend="rtx")
    with torch.no_grad():
        for length in (5, 6, *(draw.randint(2, 32) for _ in range(38))):
            ids = torch.randint(VOCABULARY, (1, length))
            given = {"attention_mask": torch.ones_like(ids), "use_cache": False}
            torch.testing.assert_close(run(ids, **given).logits, model(ids, **given).logits)
    assert len(recorder) == 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_cache_that_is_marked_as_static_and_varies_in_size(recorder: Any) -> None:
    """As that of cross-attention, which is as long as the text of the encoder."""

    def attend(query: Tensor, keys: Tensor) -> Tensor:
        return (query @ keys.mT).softmax(-1) @ keys

    step = torch.compile(attend, backend="rtx")
    for length in (5, 4, 3):
        query, keys = torch.randn(2, 1, 4), torch.randn(2, length, 4)
        torch._dynamo.mark_static_address(keys)
        for _ in range(2):
            torch.testing.assert_close(step(query, keys), attend(query, keys))
            keys.mul_(0.5)
    assert len(recorder) == 2


Texts = tuple[list[Tensor], list[Tensor], int]  # wanted, found, and how many graphs are compiled


def prompts(device: str) -> Texts:
    """A compiled forward: prompts of any length are two graphs, and the step one."""
    model, eager = small().to(device), small().to(device)
    model.forward = torch.compile(model.forward, backend="rtx")
    static = {"cache_implementation": "static", "max_cache_len": PLACES, "disable_compile": True}
    texts = [ids.to(device) for ids in (TEXT[:, :3], TEXT, TEXT[:, 1:], TEXT.repeat(1, 2)[:, :7])]
    return [expected(eager, ids) for ids in texts], [expected(model, ids, **static) for ids in texts], 3


def assisted(device: str) -> Texts:
    """Another model drafts tokens, which the compiled one checks: as many at once as there are."""
    model, eager, other = (tiny("GPT2", seed, n_layer=1, num_key_value_heads=4).to(device) for seed in (0, 0, 1))
    model.forward = torch.compile(model.forward, backend="rtx")
    texts = [ids.to(device) for ids in (TEXT, TEXT[:, 1:])]
    return [expected(eager, i) for i in texts], [expected(model, i, assistant_model=other) for i in texts], 6


def encoder(device: str) -> Texts:
    """T5, with texts of several lengths."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=PAD, initializer_factor=3.0)
    model = transformers.T5ForConditionalGeneration(config).eval().to(device)
    texts = [ids.to(device) for ids in (TEXT, TEXT[:, 1:], TEXT[:, 2:], PADDED)]
    return [expected(model, i) for i in texts], [expected(model, i, **compiled()) for i in texts], 3


def sound(device: str) -> Texts:
    """Whisper."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "init_std": 0.3}
    ends = {"decoder_start_token_id": 2, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 3}
    lengths = {"max_source_positions": 20, "max_target_positions": 32, "vocab_size": VOCABULARY}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = transformers.WhisperConfig(**layers, **widths, **ends, **lengths, **none)
    model = transformers.WhisperForConditionalGeneration(config).eval().to(device)
    sounds = [torch.randn(batch, 8, 40).to(device) for batch in (1, 1, 2)]
    given = {"max_new_tokens": 8, "do_sample": False}
    static = {name: value for name, value in compiled().items() if name != "max_cache_len"}
    return [model.generate(s, **given) for s in sounds], [model.generate(s, **given, **static) for s in sounds], 2


@pytest.mark.gpu
@pytest.mark.parametrize("texts", [prompts, assisted, encoder, sound])
@pytest.mark.usefixtures("fresh_dynamo")
def test_generate_on_a_gpu(texts: Callable[[str], Texts], recorder: Any) -> None:
    wanted, found, graphs = texts("cuda")
    assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
    assert len(recorder) <= graphs
