"""An engine for every rank, built in one process, and loaded by torchrun with a checkpoint of the whole model.

python examples/distributed/engines.py build model.rtx                           needs no GPU
torchrun --nproc-per-node 2 examples/distributed/engines.py run model.rtx
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torch_rtx

RANKS = 2


class Mlp(nn.Module):
    """A gated layer beside its input."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., width], and what the layer adds."""
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def divided(mesh: DeviceMesh) -> nn.Module:
    """The model of one rank, without data."""
    with torch.device("meta"):
        model = Mlp()
    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def build(path: str) -> None:
    """Write the engine, and a checkpoint of the whole model beside it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engines = torch_rtx.compile_ranks(divided, (torch.randn(4, 64),), mesh={"tp": RANKS}, device=device)
    assert len(engines) == 1, "the ranks run different programs: save one engine for each"
    torch_rtx.save(engines[0], path)
    torch.manual_seed(0)
    save_file(Mlp().state_dict(), f"{path}.safetensors")
    print(f"{path}: an engine for {RANKS} ranks")


def run(path: str) -> None:
    """Load the engine on this rank, with its part of the checkpoint, and compare it with the whole model."""
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    mesh = init_device_mesh(device.type, (RANKS,), mesh_dim_names=("tp",))
    module = torch_rtx.load(path, weights=f"{path}.safetensors", device=device, groups=mesh)
    torch.manual_seed(0)
    whole, x = Mlp().to(device), torch.ones(4, 64, device=device)
    error = (module(x) - whole(x)).abs().max().item()
    print(f"rank {dist.get_rank()}: {sum(p.numel() for p in module.parameters())} numbers, error {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    {"build": build, "run": run}[sys.argv[1]](sys.argv[2])
