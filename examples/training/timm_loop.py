"""timm's model, optimizer, scheduler and moving average, as its train.py uses them; needs timm.

    python examples/training/timm_loop.py

timm's own train.py takes the backend as `--torchcompile rtx`.
"""

from __future__ import annotations

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(backend: str | None) -> list[float]:
    """The loss of each step of a tiny vision transformer, and that of its moving average."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, drop_path_rate=0.1, **sizes).to(DEVICE)
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=4)
    task = torch.compile(model, backend=backend) if backend else model
    images, labels = torch.randn(8, 3, 16, 16, device=DEVICE), torch.arange(8, device=DEVICE) % 5
    losses = []
    for step in range(4):
        loss = torch.nn.functional.cross_entropy(task(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        scheduler.step(step + 1)
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(torch.nn.functional.cross_entropy(ema.module.eval()(images), labels).item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in train("rtx")))
