"""A whole step in one compiled function: compiled autograd captures what the backward does beside the compiled graph,
such as hooks on gradients and their accumulation.

    python examples/training/compiled_autograd.py
"""

from __future__ import annotations

import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(backend: str | None) -> list[float]:
    """The loss of each step of a small regression whose gradients a hook halves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / 2)
    x = torch.randn(16, 8, device=DEVICE)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        return loss.detach()

    losses = []
    with torch._dynamo.config.patch(compiled_autograd=backend is not None):
        call = torch.compile(step, backend=backend) if backend else step
        for _ in range(3):
            losses.append(call(x).item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in train("rtx")))
