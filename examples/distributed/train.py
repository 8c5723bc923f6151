"""Training on several ranks: data parallel, fully sharded, or both divided and sharded; the losses are those of eager.

torchrun --nproc-per-node 2 examples/distributed/train.py ddp|fsdp|tp              gloo where there are no GPUs
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel


class Block(nn.Module):
    """A layer beside its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., width], and what the layer adds."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Layers one after the other. Dynamo compiles no forward of PyTorch's own modules, such as `nn.Sequential`."""

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., width], through all layers."""
        for layer in self.layers:
            x = layer(x)
        return x


def prepared(kind: str, device: torch.device, backend: str | None) -> nn.Module:
    """The model for this rank, compiled as a whole or layer by layer."""
    torch.manual_seed(0)
    model = Model().to(device)
    if kind == "ddp":  # a graph ends where a bucket of gradients does, so that reductions overlap the backward
        wrapped = DistributedDataParallel(model)
        return torch.compile(wrapped, backend=backend) if backend else wrapped
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (1, ranks) if kind == "tp" else (ranks, 1), mesh_dim_names=("dp", "tp"))
    for layer in model.layers:
        if kind == "tp":
            parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if backend:
            layer.compile(backend=backend)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def train(kind: str, device: torch.device, backend: str | None) -> list[float]:
    """The mean loss of all ranks, per step."""
    model = prepared(kind, device, backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0 if kind == "tp" else dist.get_rank())
    losses = []
    for _ in range(4):
        x = torch.randn(8, 32, generator=generator).to(device)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        if kind != "tp":  # PyTorch has no norm of gradients on several meshes: that of `norm` is on "dp" alone
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach().clone())
        losses.append(mean.item() / dist.get_world_size())
    return losses


def main(kind: str) -> None:
    """Train in eager mode and compiled, and print the losses of both."""
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    for backend in (None, "rtx"):
        losses = train(kind, device, backend)
        if dist.get_rank() == 0:
            print(f"{backend or 'eager'}: {' '.join(f'{loss:.5f}' for loss in losses)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "ddp")
