"""What two ranks check about training: gradients of data parallel, fully sharded and divided models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.distributed.ranks import device
from torch_rtx.runtime.session import watched_calls

WIDTH = 8


class Block(nn.Module):
    """An MLP beside its input. Dynamo compiles no forward of PyTorch's own modules, such as `nn.Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    """Two blocks, whose activations are kept or computed again."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.again = nn.ModuleList(Block() for _ in range(2)), again
        self.to(device() if dist.is_initialized() else "cpu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return x


def batches() -> list[Tensor]:
    """What each rank computes with, the second one with more."""
    return [
        torch.randn(4 + rank, WIDTH, generator=torch.Generator().manual_seed(rank)).to(device())
        for rank in range(dist.get_world_size())
    ]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def right(norm: float | None = None) -> list[Tensor]:
    """The gradients of the whole model, for the mean of all ranks' losses."""
    whole = Model()
    torch.stack([loss_of(whole, x) for x in batches()]).mean().backward()
    if norm is not None:
        nn.utils.clip_grad_norm_(whole.parameters(), norm)
    return [parameter.grad for parameter in whole.parameters() if parameter.grad is not None]


def whole_of(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(model: nn.Module, expected: list[Tensor]) -> None:
    for (name, one), other in zip(model.named_parameters(), expected, strict=True):
        gradient = whole_of(one.grad)
        message = f"{name}: {{}}".format
        torch.testing.assert_close(gradient, other, msg=message, rtol=1e-4, atol=1e-5)


@contextlib.contextmanager
def graphs(forward: int, backward: int) -> Iterator[None]:
    """As many graphs run inside, and nothing in them falls back. A backward on a GPU has a thread of its own."""
    with watched_calls() as calls:
        yield
    fallbacks = [node.op for session, _ in calls for node in session.graph.nodes if node.kind == "fallback"]
    assert (len(calls), fallbacks) == (forward + backward * (device().type == "cpu"), [])


def data_parallel() -> None:
    """A graph ends where a bucket of gradients does, so that the backward of one overlaps the reduction of another."""
    x = batches()[dist.get_rank()]
    model = Model()
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    compiled = torch.compile(wrapped, backend="rtx")
    with graphs(2, 2):
        loss_of(compiled, x).backward()
    compare(model, right())
    model.zero_grad()
    with wrapped.no_sync():
        (0.5 * loss_of(compiled, x)).backward()
    assert not torch.allclose(model.layers[0].up.weight.grad, 0.5 * right()[0])
    (0.5 * loss_of(compiled, x)).backward()
    compare(model, right())


def fully_sharded() -> None:
    """A graph per layer, forward and backward, with activations that are computed again, and a norm of all ranks."""
    x = batches()[dist.get_rank()]
    model = Model(again=True)
    for layer in model.layers:
        layer.compile(backend="rtx")
        fully_shard(layer)
    fully_shard(model)
    with graphs(2, 4):
        loss_of(model, x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    compare(model, right(0.1))
    with torch.no_grad(), watched_calls() as calls:
        torch.testing.assert_close(model(x), Model()(x))
    assert len(calls) == 2
    for session, _ in calls:  # parameters are elsewhere in each call: no copies of them, and no CUDA graphs
        assert (session.store.parameters, session.settings.cuda_graph_strategy) == ((), "disabled")


def sharded_and_divided(folder: str) -> list[float]:
    """Both at once, in bfloat16 with reductions in float32, saved after a step; returns the losses of two steps."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device().type, (1, ranks), mesh_dim_names=("dp", "tp"))
    model = Model()
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        layer.compile(backend="rtx")
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    x, losses = batches()[0], []
    for step in range(2):
        with graphs(2, 2):
            loss = loss_of(model, x)
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    return losses
