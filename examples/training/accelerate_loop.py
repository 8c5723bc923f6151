"""A loop with Accelerate and `dynamo_backend="rtx"`: gradient accumulation, clipping, a scheduler; needs accelerate.

    python examples/training/accelerate_loop.py

A script that names no backend needs no change:
`accelerate launch -m torch_rtx.integrations.accelerate script.py --its-arguments`.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_rtx.integrations.accelerate  # noqa: F401  makes `rtx` a name that Accelerate takes


def train(backend: str | None) -> list[float]:
    """The loss of each batch of a small regression."""
    torch.manual_seed(0)
    accelerator = Accelerator(dynamo_backend=backend, gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    x = torch.randn(24, 8)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for _ in range(3):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in train("rtx")))
