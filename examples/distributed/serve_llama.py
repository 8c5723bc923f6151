"""Tensor parallel text generation with transformers: torchrun serves a model that is divided among its ranks.

    torchrun --nproc-per-node 2 examples/distributed/serve_llama.py                  a tiny model, on gloo without GPUs
    torchrun --nproc-per-node 4 examples/distributed/serve_llama.py meta-llama/Llama-3.1-8B-Instruct "Once upon a time"

It needs transformers. Every rank runs the same program, and gets the same tokens.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def tiny_model(folder: str) -> str:
    """A model with random weights, which the first rank writes."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, eos_token_id=None)
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    return folder


def generate(model: torch.nn.Module, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """The tokens that follow, the most probable ones. A static cache keeps the shapes of all steps the same."""
    options = {"max_new_tokens": new, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with torch.no_grad():
        return model.generate(tokens, **options)[0, tokens.shape[1] :]


def main(arguments: list[str]) -> None:
    """Generate with the model as it is, and compiled."""
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    name = arguments[0] if arguments else tiny_model(os.path.join(tempfile.gettempdir(), "rtx-tiny-llama"))
    dtype = torch.bfloat16 if gpus else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, tp_plan="auto", dtype=dtype).eval()
    tokens = torch.arange(1, 9)[None].to(device)
    tokenizer = AutoTokenizer.from_pretrained(name) if arguments else None
    if tokenizer is not None:
        tokens = tokenizer(" ".join(arguments[1:]) or "Once upon a time", return_tensors="pt").input_ids.to(device)
    expected = generate(model, tokens, 16)
    model.forward = torch.compile(model.forward, backend="rtx")
    found = generate(model, tokens, 16)
    if dist.get_rank() == 0:
        print("eager:", expected.tolist() if tokenizer is None else tokenizer.decode(expected))
        print("rtx:  ", found.tolist() if tokenizer is None else tokenizer.decode(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
