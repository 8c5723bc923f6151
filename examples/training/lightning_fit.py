"""A LightningModule: `torch.compile(module, backend="rtx")`, then `fit`; needs lightning.

python examples/training/lightning_fit.py
"""

from __future__ import annotations

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(lightning.LightningModule):
    """A small network whose losses are kept in `losses`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of a batch of pairs [N, 8], [N, 1]."""
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], batch: list[torch.Tensor], index: int) -> None:
        """Keep the loss; unlike `training_step`, this is not compiled."""
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(backend: str | None) -> list[float]:
    """The loss of each step; the last batch is smaller."""
    torch.manual_seed(0)
    module = Regression()
    x = torch.randn(20, 8)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(torch.compile(module, backend=backend) if backend else module, loader)
    return module.losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in train("rtx")))
