"""Mixed precision in float16 with GradScaler and clipping, and with a compiled optimizer step.

python examples/training/grad_scaler.py
"""

from __future__ import annotations

import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(backend: str | None) -> list[float]:
    """The loss of each step of a small regression; the gradients of one step overflow, which the scaler leaves out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    call = torch.compile(model, backend=backend) if backend else model
    if backend:
        optimizer.step = torch.compile(optimizer.step, backend=backend)
    x = torch.randn(16, 8, device=DEVICE)
    losses = []
    for step in range(4):
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.mse_loss(call(x).float(), x.sum(1, keepdim=True))
        scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in train("rtx")))
