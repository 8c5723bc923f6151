"""LoRA with PEFT on a compiled model, merged at the end; needs peft.

python examples/training/peft_lora.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(backend: str | None) -> list[float]:
    """The loss of each step of a tiny Llama whose own weights are frozen, and that of the merged model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).to(DEVICE)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    if backend:
        model.compile(backend=backend)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.randint(0, 50, (4, 12), device=DEVICE)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.merge_adapter()  # the same compiled model, whose weights have other values now
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in train("rtx")))
