"""A chat in the terminal: a language model is exported once, and answers token by token; needs transformers.

    python examples/chat.py "Hello" "Tell me more"        # a tiny model with random weights, which writes letters
    python examples/chat.py --model meta-llama/Llama-3.2-1B-Instruct --engine llama    # asks for messages

With `--engine`, engines are kept in a folder, and the next start loads them. The weights are the model's own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from torch_rtx.integrations.transformers import GenerationEngine, export_generate

warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)  # torch.export's own
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Letters:
    """A tokenizer with the part of transformers' interface that a chat needs: a token is a letter."""

    letters = "\0\n abcdefghijklmnopqrstuvwxyz.,?!"

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: Any) -> dict[str, torch.Tensor]:
        """The token ids of a conversation, one message on each line; letters that are unknown are left out."""
        text = "".join(message["content"].lower() + "\n" for message in conversation)
        return {"input_ids": torch.tensor([[i for c in text if (i := self.letters.find(c)) >= 0]])}

    def decode(self, tokens: list[int], **_: Any) -> str:
        """The text of token ids."""
        return "".join(self.letters[token % len(self.letters)] for token in tokens)


def tiny() -> tuple[Any, Letters]:
    """A Llama of random weights that knows a few letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(Letters.letters), **sizes, initializer_range=0.3, eos_token_id=1)
    return LlamaForCausalLM(config).eval(), Letters()


def pretrained(name: str) -> tuple[Any, Any]:
    """A model of Hugging Face or of a folder, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map=DEVICE)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def prompt(engine: GenerationEngine, tokenizer: Any, conversation: list[dict[str, str]], answer: int) -> torch.Tensor:
    """The token ids of a conversation `[1, length]`, whose oldest messages are forgotten if `answer` further tokens
    would have no room in the cache."""
    while True:
        given = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = given["input_ids"]
        if ids.shape[1] + answer <= engine.max_cache_len or len(conversation) == 1:
            return ids
        del conversation[0]


def answer(engine: GenerationEngine, tokenizer: Any, ids: torch.Tensor, **options: Any) -> Iterator[str]:
    """The parts of an answer, as they come."""
    tokens: list[int] = []
    said = ""
    for token in engine.stream(ids, **options):
        tokens.append(int(token))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the rest of the letter is still to come
            yield text[len(said) :]
            said = text


def rate(work: Any, count: int) -> float:
    """Tokens per second of a call that makes `count` of them."""
    start = perf_counter()
    work()
    return count / (perf_counter() - start)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("messages", nargs="*", help="what to say; without, it is asked for")
    parser.add_argument("--model", help="the name or the folder of a model")
    parser.add_argument("--engine", type=Path, help="a folder for the engines")
    parser.add_argument("--cache", type=int, default=2048, help="tokens of a conversation")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    model, tokenizer = pretrained(given.model) if given.model else tiny()
    model.to(DEVICE)
    if given.engine and given.engine.exists():
        engine = GenerationEngine.load(given.engine, weights=model)
    else:
        engine = export_generate(model, max_cache_len=given.cache)
        if given.engine:
            engine.save(given.engine)

    conversation: list[dict[str, str]] = []
    generator = torch.Generator().manual_seed(given.seed)
    options = {"max_new_tokens": given.tokens, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    for message in given.messages or iter(lambda: input("> "), ""):
        conversation.append({"role": "user", "content": message})
        ids, parts = prompt(engine, tokenizer, conversation, given.tokens), []
        for part in answer(engine, tokenizer, ids, generator=generator, **options):
            print(part, end="", flush=True)
            parts.append(part)
        print()
        conversation.append({"role": "assistant", "content": "".join(parts)})
    if conversation:
        ids, fixed = ids.to(DEVICE), {"max_new_tokens": given.tokens, "do_sample": False, "eos_token_id": None}
        own = rate(lambda: engine.generate(ids, **{k: v for k, v in fixed.items() if k != "do_sample"}), given.tokens)
        eager = rate(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **fixed), given.tokens)
        print(f"{own:.0f} tokens per second; {eager:.0f} by model.generate in eager", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
