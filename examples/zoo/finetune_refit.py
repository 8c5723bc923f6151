"""A shipped engine learns: LoRA fine-tuning, and a refit of engine files that know nothing of it; needs peft.

    python examples/zoo/finetune_refit.py [--steps 300]

A vendor builds engines that write text, and ships them without weights. A customer trains a LoRA for the same model,
with compiled steps, merges it, and gives the result to the engines that are there: nothing is exported or built again.
They learn a sentence by heart, so that one sees whether it worked.
"""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, beside, described, options, parsed, same_tokens, synchronize, timed
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import torch_rtx
from torch_rtx.integrations.transformers import GenerationEngine, export_generate

SENTENCE = "An engine is built once, and its weights come and go."
SIZES = {
    "tiny": {"n_embd": 48, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "real": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},  # GPT-2's
}
RATES = {"tiny": 1e-2, "real": 1e-3}
LAYERS = ["c_attn", "c_fc"]


def ship(model: Any, folder: Path) -> None:
    """What the vendor does: engines for prompts and for further tokens, in a folder, without weights."""
    start = time.perf_counter()
    export_generate(model, max_cache_len=64).save(folder)
    files = {file.name: file.stat().st_size for file in sorted(folder.glob("*.rtx"))}
    names = ", ".join(f"{name} ({size // 1000} kB)" for name, size in files.items())
    print(f"shipped after {time.perf_counter() - start:.1f} s: {names}")


def train(model: Any, tokens: Tensor, steps: int, given: Namespace) -> tuple[float, float]:
    """The loss after some steps of training, and the seconds of one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATES[given.size])
    seconds = []
    for step in range(steps):
        if step == 1:
            torch_rtx.wait(timeout=given.patience)  # until kernels are compiled; steps before that are slower
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return loss.item(), sorted(seconds)[len(seconds) // 2]


def written(tokens: Tensor) -> str:
    """The text of tokens (1, length), which are bytes."""
    return bytes(tokens[0].tolist()).decode("latin-1").encode("ascii", "backslashreplace").decode()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "finetune_refit")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    given = parsed(parser, arguments)
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**SIZES[given.size], **no_dropout, vocab_size=256, initializer_range=0.1)
    model = GPT2LMHeadModel(config).to(DEVICE).eval()
    described(model)
    ship(model, given.out / "engines")
    save_model(model, str(given.out / "base.safetensors"))
    engine = GenerationEngine.load(given.out / "engines", weights=given.out / "base.safetensors", device=DEVICE)
    tokens = torch.tensor([[*SENTENCE.encode()]], device=DEVICE)
    begin, count = tokens[:, :5], tokens.shape[1] - 5
    before = written(engine.generate(begin, max_new_tokens=count, eos_token_id=None))

    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, fan_in_fan_out=True)
    adapted = get_peft_model(model, adapter).train()
    _, eager = train(copy.deepcopy(adapted), tokens, 5, given)
    adapted.compile(backend="rtx")
    loss, compiled = train(adapted, tokens, given.steps, given)
    beside("a step of training", compiled, eager)
    merged = adapted.merge_and_unload().eval()

    start = time.perf_counter()
    engine.refit(merged)
    seconds = time.perf_counter() - start
    print(f"refitted in {1e3 * seconds:.0f} ms, after {given.steps} steps to a loss of {loss:.2g}")
    asked = {"max_new_tokens": count, "eos_token_id": None}
    found, compiled = timed(lambda: engine.generate(begin, **asked), given.patience)
    best = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(begin)}
    expected, eager = timed(lambda: merged.generate(begin, **asked, **best), times=1)
    beside(f"{count} letters", compiled, eager)
    same_tokens(merged, begin, found[:, 5:], expected[:, 5:])
    lines = f"before: {before}", f"after: {written(found)}"
    print(*lines, sep="\n")
    (given.out / "texts.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
