"""Text from engines of models with an encoder, against the tokens of transformers' own `generate` in eager."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import torch_rtx  # noqa: E402
from torch_rtx.errors import EngineFormatError, InputError, SettingsError  # noqa: E402
from torch_rtx.integrations.generation import GenerationEngine  # noqa: E402
from torch_rtx.integrations.sampling import Timestamps  # noqa: E402
from torch_rtx.integrations.transformers import (  # noqa: E402
    Decode,
    Encode,
    Prefill,
    _caches,
    _Program,
    _tensors,
    export_generate,
)

TIMES = 21  # the first timestamp
VOCABULARY, PLACES, SOURCE, START, END, PAD = 37, 16, 8, 2, 1, 0
ENDS = {"decoder_start_token_id": START, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 3}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BOTH = {**LAYERS, "vocab_size": VOCABULARY, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **ENDS}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 4,
}
SOUNDS = {"max_source_positions": 20, "max_target_positions": 32, "tie_word_embeddings": False}
KINDS: dict[str, dict[str, Any]] = {
    "Whisper": {**BOTH, **SOUNDS, "num_mel_bins": 8, "init_std": 0.5, "begin_suppress_tokens": None},
    "Speech2Text": {**BOTH, **SOUNDS, "input_feat_per_channel": 8, "init_std": 0.5, "conv_channels": 8},
    "T5": {**T5, **ENDS, "initializer_factor": 5.0, "tie_word_embeddings": False},
    "Bart": {**BOTH, "max_position_embeddings": 32, "init_std": 0.5, "forced_eos_token_id": END},
    "Marian": {**BOTH, "max_position_embeddings": 32, "init_std": 0.5, "forced_eos_token_id": None},
}
TEXT = torch.tensor([[7, 3, 22, 9, 30]])
PADDED = torch.tensor([[5, 8, 6, PAD, PAD], [13, 4, 11, 28, 5]])
ASKED = torch.tensor([[START, 5, 9, 17]])  # as the language, the task and no timestamps
TWICE = ASKED.expand(2, -1)


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    name = {"Marian": "MarianMTModel"}.get(kind, f"{kind}ForConditionalGeneration")
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind] | changes)
    return getattr(transformers, name)(config).eval()


def sounds(batch: int, seed: int = 0, kind: str = "Whisper") -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *((8, 40) if kind == "Whisper" else (40, 8)), generator=noise)


def expected(model: Any, source: Tensor, begin: Tensor | None = None, **options: Any) -> Tensor:
    """Begin and text; Whisper's own method returns what is new, up to the end."""
    given = {} if begin is None else {"decoder_input_ids": begin.expand(len(source), -1)}
    found: Tensor = model.generate(source, do_sample=False, **given, **{"max_new_tokens": 8, **options})
    return torch.cat([*given.values(), found], 1) if source.is_floating_point() and found.shape[1] <= 8 else found


def with_times(model: Any, most: int | None = 4) -> Any:
    config = copy.deepcopy(model.generation_config)
    vars(config).update(no_timestamps_token_id=TIMES - 1, max_initial_timestamp_index=most)
    return config


def exported(model: Any, **options: Any) -> GenerationEngine:
    """It knows timestamps, and the model does not: Whisper's own method would take a text with them for several."""
    plain, model.generation_config = model.generation_config, with_times(model)
    engine = export_generate(model, max_cache_len=PLACES, **options)
    model.generation_config = plain
    return engine


@pytest.fixture(scope="module")
def hearing() -> Any:
    return tiny("Whisper")


@pytest.fixture(scope="module")
def writer(hearing: Any) -> GenerationEngine:
    """For two sounds."""
    return exported(hearing, batch_size=2, source=sounds(1).double(), strip_weights=False)


@pytest.fixture(scope="module")
def translator() -> tuple[Any, GenerationEngine]:
    """For two texts."""
    model = tiny("Marian")
    return model, export_generate(model, max_cache_len=PLACES, batch_size=2, source=SOURCE)


def test_the_first_token_of_a_decoder():
    model = tiny("Bart")
    assert _Program(model).decoder_start_token_id == START
    model.generation_config.decoder_start_token_id = None
    assert _Program(model).decoder_start_token_id == ENDS["bos_token_id"]  # as `generate` of transformers
    assert _Program(tiny("Whisper")).decoder_start_token_id is None  # it has a `generate` of its own


# ---- what a model's programs compute ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "narrow"), [*((kind, True) for kind in KINDS), ("Whisper", False), ("T5", False)])
@torch.no_grad()
def test_programs_of_any_model(kind: str, narrow: bool) -> None:
    model = tiny(kind)
    text = kind in ("T5", "Bart", "Marian")
    found = _caches(model, PLACES, None, narrow, SOURCE if text else sounds(1, kind=kind))
    encode, prefill = Encode(model), Prefill(model, found.empty, None if narrow else PLACES)
    decode = Decode(model, found.filled, found.width)
    tokens = set[int]()
    for source in (TEXT, PADDED, TEXT[:, :1]) if text else (sounds(1, kind=kind), sounds(2, 1, kind)):
        padding = (source != PAD).long()
        encoded, batch = encode(source, *[padding] * text), len(source)
        wide = torch.nn.functional.pad(padding, (0, SOURCE - padding.shape[1])) if text else padding
        cache = [torch.zeros((batch, *t.shape[1:]), dtype=t.dtype) for t in _tensors(found.filled)]
        ids = ASKED.expand(batch, -1)
        positions = torch.arange(ids.shape[1]).expand(batch, -1)
        token = prefill(ids, torch.ones_like(ids), positions, cache, encoded, *[padding] * text).argmax(-1, True)
        said, position, at = [ids, token.clone()], positions[:, -1:] + 1, torch.tensor(ids.shape[1])
        for _ in range(7):
            mask, banned = torch.ones(batch, PLACES, dtype=torch.long), torch.zeros(VOCABULARY, dtype=torch.bool)
            decode(token, position, at, mask, banned, cache, *[wide] * text)
            said.append(token.clone())
        given = {"attention_mask": padding} if text else {}
        wanted = expected(model, source, ASKED, eos_token_id=None, forced_eos_token_id=None, **given)
        assert torch.equal(torch.cat(said, 1), wanted)
        tokens |= set(wanted.flatten().tolist())
    assert len(tokens) > 6  # it says something, and not the same all the time


# ---- engines ---------------------------------------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.8},
    {"suppress_tokens": [4, 11, 23], "begin_suppress_tokens": [6, 12]},
    {"eos_token_id": "third"},
    {"eos_token_id": "third", "min_new_tokens": 5},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("begin", [ASKED, ASKED[:, :1]], ids=["asked", "start"])
def test_what_is_heard_is_what_transformers_hears(
    hearing: Any, writer: GenerationEngine, begin: Tensor, rules: dict[str, Any]
) -> None:
    for source in (sounds(2), sounds(2, 1)):
        options = {"eos_token_id": None, **rules}
        plain = expected(hearing, source, begin, eos_token_id=None)
        if options["eos_token_id"] is not None:
            options["eos_token_id"] = int(plain[0, begin.shape[1] + 2])
        wanted = expected(hearing, source, begin, **options)
        found = writer.generate(source, decoder_input_ids=begin.expand(len(source), -1), max_new_tokens=8, **options)
        for row, (one, other) in enumerate(zip(found.tolist(), wanted.tolist(), strict=True)):
            ends = options["eos_token_id"]  # which Whisper's own method leaves out
            cut = [t for t in one[begin.shape[1] :] if t not in (ends, PAD)] if ends is not None else one
            assert cut == [t for t in other if t not in (ends, PAD)][begin.shape[1] * (ends is not None) :], row
        if "suppress_tokens" in rules:
            banned = [*rules["suppress_tokens"], *rules["begin_suppress_tokens"]]
            assert any(token in plain[:, begin.shape[1] :] for token in banned)  # the rules have something to do


@pytest.mark.parametrize("rules", [{}, {"eos_token_id": None, "repetition_penalty": 1.5}], ids=["plain", "penalty"])
def test_texts_of_any_length_are_read(translator: tuple[Any, GenerationEngine], rules: dict[str, Any]) -> None:
    model, engine = translator
    for ids in (PADDED, PADDED.flip(1), PADDED[:, :1], PADDED.flip(0).repeat(1, 2)[:, :SOURCE]):
        mask = (ids != PAD).long()
        for begin in (None, ASKED):
            wanted = expected(model, ids, begin, attention_mask=mask, **rules)
            given = None if begin is None else begin.expand(2, -1)
            found = engine.generate(ids, mask, decoder_input_ids=given, max_new_tokens=8, **rules)
            assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_what_a_text_must_begin_and_end_with(
    translator: tuple[Any, GenerationEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the generation configurations of BART and of Marian have it."""
    model, engine = translator
    rules = {"forced_bos_token_id": 5, "forced_eos_token_id": END, "min_length": 6, "bad_words_ids": [[PAD], [9]]}
    for name, value in rules.items():
        monkeypatch.setitem(engine.decode._carried, name, value)
    for begin in (None, ASKED):
        for tokens in (3, 8):
            wanted = expected(model, PADDED, begin, max_new_tokens=tokens, **rules)
            given = None if begin is None else begin.expand(2, -1)
            found = engine.generate(PADDED, decoder_input_ids=given, max_new_tokens=tokens)
            changed = {**rules, "forced_bos_token_id": 7, "bad_words_ids": [[END]]}
            other = engine.generate(PADDED, decoder_input_ids=given, max_new_tokens=tokens, **changed)
            assert torch.equal(other, expected(model, PADDED, begin, max_new_tokens=tokens, **changed))
            assert torch.equal(found, wanted)
            assert (wanted[0, 1], wanted[0, -1]) == (5, END)
    drawn = engine.generate(PADDED, max_new_tokens=4, do_sample=True)
    assert (drawn[0, 1], drawn[0, -1]) == (5, END)


def timed(model: Any, source: Tensor, begin: Tensor, **options: Any) -> Tensor:
    """What transformers writes with timestamps in one pass."""
    from transformers.generation import WhisperTimeStampLogitsProcessor as Rule

    rule = Rule(with_times(model), begin_index=begin.shape[1])
    given = {"decoder_input_ids": begin.expand(len(source), -1), "do_sample": False, "max_new_tokens": 12, **options}
    found: Tensor = transformers.GenerationMixin.generate(model, source, logits_processor=[rule], **given)
    return found


def test_timestamps(hearing: Any, writer: GenerationEngine) -> None:
    begin = ASKED[:, :3]
    for seed in range(6):
        source = sounds(2, seed)
        for rules in ({}, {"suppress_tokens": [23, 24, 30]}):
            given = {"decoder_input_ids": begin.expand(2, -1), "max_new_tokens": 12, "eos_token_id": None, **rules}
            wanted = timed(hearing, source, begin, eos_token_id=None, **rules)
            assert torch.equal(writer.generate(source, return_timestamps=True, **given), wanted)
    drawn = writer.generate(source, return_timestamps=True, do_sample=True, temperature=4.0, **given)[:, 3:]
    assert bool((drawn[:, 0] >= TIMES).all())
    assert bool((drawn[:, 1:] < TIMES).any())
    for option in ({"repetition_penalty": 1.2}, {}):
        engine = writer if option else GenerationEngine(writer.prefill, writer.decode, writer.sample, writer.encode)
        with pytest.raises(InputError, match="repetition_penalty" if option else "knows no timestamps"):
            engine.stream(source, return_timestamps=True, **given, **option)


@pytest.mark.parametrize("most", [None, 4])
def test_which_tokens_may_follow_timestamps(hearing: Any, most: int | None) -> None:
    """All states that texts of random scores come through."""
    from transformers.generation import WhisperTimeStampLogitsProcessor as Rule

    torch.manual_seed(0)
    rule, rows = Rule(with_times(hearing, most), begin_index=2), 200
    text, token = torch.full((rows, 2), 5), torch.zeros(rows, 1, dtype=torch.long)
    previous, before, latest = (torch.full((rows, 1), value) for value in (-1, TIMES, -1))
    for _ in range(10):
        logits = 3 * torch.randn(rows, VOCABULARY)
        wanted = rule(text, logits)
        assert torch.equal(Timestamps(TIMES - 1, END, most)(logits, token, previous, before, latest), wanted)
        assert torch.equal(token[:, 0], wanted.argmax(-1))
        previous = wanted.softmax(-1).nan_to_num(1).multinomial(1)  # of the tokens that may follow, if there are any
        text = torch.cat([text, previous], 1)


def test_a_folder_takes_other_weights(writer: GenerationEngine, hearing: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    given = {"decoder_input_ids": TWICE, "max_new_tokens": 8, "eos_token_id": None}
    source, other = sounds(2), tiny("Whisper", 1)
    writer.save(tmp_path)
    loaded = GenerationEngine.load(tmp_path)  # with the weights in it
    assert torch.equal(loaded.generate(source, **given), expected(hearing, source, ASKED, eos_token_id=None))
    save_file(dict(other.state_dict()), tmp_path / "other.safetensors")
    wanted = expected(other, source, ASKED, eos_token_id=None)
    loaded.refit(tmp_path / "other.safetensors")
    assert torch.equal(loaded.generate(source, **given), wanted)
    assert torch.equal(GenerationEngine.load(tmp_path, other).generate(source, **given), wanted)
    (tmp_path / "encode.rtx").unlink()
    with pytest.raises(EngineFormatError, match="do not generate text together"):
        GenerationEngine.load(tmp_path)


def test_tokens_are_streamed_and_drawn(writer: GenerationEngine) -> None:
    def text(seed: int, **options: Any) -> Tensor:
        drawn = {"do_sample": True, "generator": torch.Generator().manual_seed(seed), "suppress_tokens": [4, 6]}
        given = {"decoder_input_ids": TWICE, "max_new_tokens": 12, "eos_token_id": None, **drawn, **options}
        return torch.stack(list(writer.stream(sounds(2), **given)))

    assert torch.equal(text(3), text(3))
    assert not torch.equal(text(3), text(4))
    assert torch.equal(text(3, top_k=1), text(0, do_sample=False))
    often = [text(seed, temperature=9.0) for seed in range(8)]
    assert not torch.isin(torch.cat(often), torch.tensor([4, 6])).any()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """By library calls, by kernels, and by CUDA graphs."""
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    heard, read = tiny("Whisper", **sizes).cuda(), tiny("T5").cuda()
    writer = exported(heard, batch_size=(1, 2), source=sounds(1).cuda())
    translator = export_generate(read, max_cache_len=PLACES, batch_size=(1, 2), source=SOURCE)
    writer.save(tmp_path)
    loaded = GenerationEngine.load(tmp_path, weights=heard, trust_binaries=True)
    for again in range(3):
        for source in (sounds(1, 3).cuda(), sounds(2, 4).cuda()):
            begin = ASKED.cuda().expand(len(source), -1)
            for rules in ({}, {"suppress_tokens": [4, 6], "begin_suppress_tokens": [12]}):
                wanted = expected(heard, source, begin, eos_token_id=None, **rules)
                for engine in (writer, loaded):
                    given = {"decoder_input_ids": begin, "max_new_tokens": 8, "eos_token_id": None, **rules}
                    assert torch.equal(engine.generate(source, **given), wanted), again
            wanted = timed(heard, source, begin, eos_token_id=None)
            given |= {"max_new_tokens": 12, "suppress_tokens": None, "begin_suppress_tokens": None}
            assert torch.equal(loaded.generate(source, return_timestamps=True, **given), wanted), again
        for ids in (TEXT.cuda(), PADDED.cuda(), TEXT[:, :2].cuda()):
            mask = (ids != PAD).long()
            wanted = expected(read, ids, attention_mask=mask, eos_token_id=None)
            assert torch.equal(translator.generate(ids, mask, max_new_tokens=8, eos_token_id=None), wanted), again
        torch_rtx.wait()


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (sounds(2), {"decoder_input_ids": None}, "decoder_input_ids are missing"),
    (sounds(2)[:, :, :39], {}, r"shape \[2, 8, 39\], the engine takes \[batch, \*\[8, 40\]\]"),
    (sounds(1)[0], {}, "a tensor with 3 axes"),
    (sounds(2).long(), {}, r"features of torch.int64, the engine takes torch.float32"),
    (sounds(3), {}, "3 prompts, the engine is for 2 to 2"),
    (sounds(2), {"decoder_input_ids": ASKED}, "1 decoder_input_ids for 2 sources"),
    (sounds(2), {"attention_mask": torch.zeros(2, 40)}, "hides parts of features"),
    (sounds(2), {"decoder_input_ids": TWICE + 30}, "outside of the 37"),
    (sounds(2), {"suppress_tokens": [37]}, r"suppress_tokens is \[37\].*below 37"),
    (sounds(2), {"min_new_tokens": -1}, "min_new_tokens is -1"),
    (sounds(2), {"eos_token_id": 1.5}, r"eos_token_id is 1.5.*below 37"),
    (sounds(2), {"pad_token_id": [1]}, r"pad_token_id is \[1\]"),
    (sounds(2), {"bad_words_ids": [[3, 4]]}, r"bad_words_ids is \[\[3, 4\]\]"),
    (sounds(2), {"max_new_tokens": 14}, "the cache has room for 13"),
]


@pytest.mark.parametrize(("source", "options", "message"), WRONG, ids=[message[:20] for *_, message in WRONG])
def test_wrong_arguments(writer: GenerationEngine, source: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        writer.stream(source, **{"decoder_input_ids": TWICE, **options})


def test_wrong_texts(translator: tuple[Any, GenerationEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    assert translator[1].encode.vocabulary == VOCABULARY
    for ids, mask, message in (
        (PADDED.repeat(1, 2), None, r"up to 8 tokens.*\[2, 10\]\n.*source=10"),
        (PADDED.float(), None, "integers"),
        (PADDED, torch.zeros_like(PADDED), "no token that is not padding"),
        (PADDED + VOCABULARY, None, "outside of the 37"),
    ):
        with pytest.raises(InputError, match=message):
            translator[1].stream(ids, mask)
    monkeypatch.setitem(translator[1].encode._carried, "vocabulary", 28)
    with pytest.raises(InputError, match="outside of the 28"):
        translator[1].stream(PADDED)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("Whisper", {}, {"source": None}, r"encoder for input_features, and source is None\n.*source=input_features"),
    ("T5", {}, {"source": None}, r"encoder for text, and source is None\n.*source=512"),
    ("Bart", {}, {"source": 33}, "the encoder has 32 positions"),
    ("Whisper", {}, {"max_cache_len": 33}, "the model has 32 positions"),
    ("Whisper", {"no_speech_threshold": 0.6}, {}, "asks for: no_speech_threshold=0.6"),
    ("Bart", {"num_beams": 4, "no_repeat_ngram_size": 3}, {"source": 8}, "num_beams=4, no_repeat_ngram_size=3"),
    ("Bart", {"bad_words_ids": [[3], [4, 5]]}, {"source": 8}, r"bad_words_ids=\[\[3\], \[4, 5\]\]"),
]


@pytest.mark.parametrize(
    ("kind", "asked", "options", "message"), REFUSED, ids=[message[:20] for *_, message in REFUSED]
)
def test_what_can_not_be_exported(kind: str, asked: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = tiny(kind)
    vars(model.generation_config).update(asked)
    with pytest.raises(SettingsError, match=message):
        export_generate(model, **{"max_cache_len": PLACES, "source": sounds(1), **options})
