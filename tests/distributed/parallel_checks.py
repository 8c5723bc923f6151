"""What two ranks check about models divided among them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import torch_rtx
from tests.distributed.ranks import device
from torch_rtx.collectives import is_collective
from torch_rtx.errors import RefitError, SettingsError
from torch_rtx.runtime.session import watched_calls

WIDTH = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Block(nn.Module):
    """Attention and a gated MLP, as in a Llama."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (-1, WIDTH // self.heads)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Tokens to scores."""

    def __init__(self, vocabulary: int = 20, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def divided(model: Model, mesh: DeviceMesh, vocabulary: bool = False, sequence: bool = False) -> Model:
    """Divide each layer among the ranks of `mesh`: the products, and the vocabulary or the sequence as well."""
    plan: dict[str, Any] = dict.fromkeys(("q", "k", "v", "gate", "up"), ColwiseParallel())
    plan |= dict.fromkeys(("o", "down"), RowwiseParallel())
    if sequence:
        plan |= dict.fromkeys(("norm", "norm2"), SequenceParallel())
        plan |= dict.fromkeys(("q", "k", "v", "gate", "up"), ColwiseParallel(input_layouts=Shard(1)))
        plan |= dict.fromkeys(("o", "down"), RowwiseParallel(output_layouts=Shard(1)))
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    outer: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate())}
    if vocabulary:
        outer["embed"] = RowwiseParallel(input_layouts=Replicate())
    if sequence:
        outer["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        outer["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model, mesh, outer)
    return model


def tp_mesh() -> DeviceMesh:
    return init_device_mesh(device().type, (dist.get_world_size(),), mesh_dim_names=("tp",))


def inference(vocabulary: bool, sequence: bool) -> tuple[int, int]:
    """Check a divided model against the whole one, for several sizes; returns how many collectives are in the graph,
    and how many graphs there are."""
    whole = Model().to(device())
    with torch.no_grad(), watched_calls() as calls:
        model = divided(copy.deepcopy(whole), tp_mesh(), vocabulary, sequence)
        compiled = torch.compile(model, backend="rtx", fullgraph=True, dynamic=True)
        for batch, length in ((2, 6), (6, 8), (4, 10)):
            tokens = torch.randint(0, 20, (batch, length), device=device())
            torch.testing.assert_close(compiled(tokens), whole(tokens), **CLOSE)
    session, _ = calls[0]
    assert not [node for node in session.graph.nodes if node.kind == "fallback"]
    return sum(map(is_collective, session.graph.nodes)), len({one.specializer for one, _ in calls})


def training(sequence: bool) -> list[str]:
    """Check the gradients of a divided model against those of the whole one; returns the fallbacks of its graphs."""
    whole = Model().to(device())
    tokens = torch.randint(0, 20, (2, 6), device=device())
    model = divided(copy.deepcopy(whole), tp_mesh(), True, sequence)
    with watched_calls() as calls:
        loss = torch.compile(model, backend="rtx", fullgraph=True)(tokens).square().mean()
        loss.backward()
    expected = whole(tokens).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert one.grad is not None, name
        gradient = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
        torch.testing.assert_close(gradient, other.grad, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
    assert len(calls) == (2 if device().type == "cpu" else 1)  # a backward on a GPU has a thread of its own
    return [node.op for session, _ in calls for node in session.graph.nodes if node.kind == "fallback"]


def returned() -> None:
    """A function returns a DTensor. Its mesh is not that of its input, but an equal one: DTensor remembers the results
    of operations, with the mesh of the first one."""
    for mesh in (tp_mesh(), tp_mesh()):
        torch._dynamo.reset()
        x = distribute_tensor(torch.arange(24.0, device=device()).view(8, 3), mesh, [Shard(0)])
        found = torch.compile(lambda x: x.sum(0), backend="rtx", fullgraph=True)(x)
        assert found.placements == x.sum(0).placements
        torch.testing.assert_close(found.full_tensor(), x.full_tensor().sum(0))


def loaded(path: str, weights: str, tokens: list[Tensor], others: str) -> list[list[Tensor]]:
    """Load an engine with this rank's part of the whole weights, and refit it by others; returns what it computes
    with both."""
    mesh = tp_mesh()
    module = torch_rtx.load(path, weights=weights, groups=mesh)
    first = [module(one) for one in tokens]
    module.refit(others)
    again = torch_rtx.load(path, groups={"tp": mesh.get_group("tp")})
    again.refit(torch_rtx.runtime.weight_files.read_weights(others))
    torch.testing.assert_close(again(tokens[0]), module(tokens[0]))
    return [first, [module(one) for one in tokens]]


def refused(path: str, foreign: str, weights: str) -> None:
    """What an engine does without its group, with another one, for another rank, or with other weights."""
    group = dist.group.WORLD
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for groups, problem in (
        (None, "needs the process group 'tp' of 2 ranks"),
        ({"dp": group}, "needs the process group 'tp' of 2 ranks"),
        ({"tp": alone}, "is for 2 ranks"),
        ({"tp": 2}, "'tp' is a int, not a process group"),
    ):
        with pytest.raises(SettingsError, match=problem):
            torch_rtx.load(path, groups=groups)
    if dist.get_rank() == 0:
        with pytest.raises(SettingsError, match="the engine is for rank 1 of 'tp', and this is 0"):
            torch_rtx.load(foreign, groups={"tp": group})
    with pytest.raises(RefitError, match=r"head\.weight"):
        torch_rtx.load(path, weights=weights, groups={"tp": group})
