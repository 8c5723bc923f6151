"""GPT-2 writes, by transformers' own `generate`: one compiled step serves prompts of all lengths; needs transformers.

    python examples/zoo/gpt2.py                                                  # random weights
    python examples/zoo/gpt2.py --model openai-community/gpt2 "The lighthouse" "In the beginning there was"

Nothing changes but two arguments of `generate`. A model with random weights knows bytes, and writes nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import DEVICE, ON_GPU, beside, described, options, parsed, same_tokens, timed
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, CompileConfig, GPT2Config, GPT2LMHeadModel, logging

PROMPTS = "The lighthouse", "It was a dark and stormy night", "Sizes are numbers; weights come and go."
TINY = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}


def model_of(name: str | None, size: str) -> tuple[Any, Callable[[str], list[int]], Callable[[list[int]], str]]:
    """GPT-2, and the ways from text to tokens and back."""
    dtype = torch.float16 if ON_GPU else torch.float32
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = GPT2LMHeadModel.from_pretrained(name)
        described(model, name)
        return model.to(DEVICE, dtype).eval(), tokenizer.encode, tokenizer.decode
    torch.manual_seed(0)
    config = GPT2Config(**(TINY if size == "tiny" else {}), vocab_size=256, initializer_range=0.1)
    model = GPT2LMHeadModel(config)
    described(model)

    def text(tokens: list[int]) -> str:
        return bytes(tokens).decode("latin-1").encode("ascii", "backslashreplace").decode()

    return model.to(DEVICE, dtype).eval(), lambda words: [*words.encode()], text


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "gpt2")
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", help="a folder or a name on the Hub")
    parser.add_argument("--tokens", type=int, help="of each text")
    given = parsed(parser, arguments)
    logging.set_verbosity_error()
    model, encode, decode = model_of(given.model, given.size)
    count = given.tokens or (128 if ON_GPU else 16)
    compiler = CompileConfig(backend="rtx", fullgraph=True)
    compiler._compile_all_devices = True  # on a CPU as well
    static = {"cache_implementation": "static", "max_cache_len": 64 + count, "compile_config": compiler}
    always = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    graphs, written = counters["stats"]["unique_graphs"], []
    for prompt in given.prompts:
        start = torch.tensor([encode(prompt)], device=DEVICE)
        write = partial(model.generate, start, attention_mask=torch.ones_like(start), max_new_tokens=count, **always)
        expected, eager = timed(write, times=1)
        found, compiled = timed(partial(write, **static), given.patience)
        beside(f"a prompt of {start.shape[1]} tokens, for each further one", compiled / count, eager / count)
        same_tokens(model, start, found[:, start.shape[1] :], expected[:, start.shape[1] :])
        written.append(decode(found[0].tolist()))
    print(
        f"{counters['stats']['unique_graphs'] - graphs} graph compiled for prompts of all lengths", *written, sep="\n"
    )
    (given.out / "texts.txt").write_text("\n\n".join(written) + "\n")


if __name__ == "__main__":
    main()
