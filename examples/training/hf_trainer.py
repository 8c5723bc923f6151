"""The Trainer of transformers with `torch_compile_backend="rtx"`; needs accelerate.

    python examples/training/hf_trainer.py

Without the import of the integration, `model.compile(backend="rtx")` before `Trainer(model=model, ...)` does the same.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import torch_rtx.integrations.accelerate  # noqa: F401  makes `rtx` a name that the Trainer takes


def train(backend: str | None) -> list[float]:
    """The loss of each step of a tiny GPT-2 with gradient accumulation and clipping."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    texts = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (8, 12))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            torch_compile_backend=backend,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=texts)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    print("losses:", *(f"{float(loss):.4f}" for loss in train("rtx")))
