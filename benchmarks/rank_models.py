"""A Llama for several GPUs: with a static cache, divided among ranks, or sharded for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; `context` is the length of its cache."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    layers: int

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads


# Few of the 32 layers of the 8B model: what is compiled for one layer is not compiled in less time for another.
LLAMA_8B = Shape(4096, 14336, 32, 8, 128256, 4096, 4)
LLAMA_1B = Shape(2048, 8192, 32, 8, 128256, 2048, 16)
SMALL = Shape(64, 128, 8, 4, 128, 32, 2)


class Layer(nn.Module):
    """Attention and a gated MLP; with `batch`, a cache of the part of the heads that one of `parts` ranks has."""

    def __init__(self, shape: Shape, batch: int = 0, parts: int = 1) -> None:
        super().__init__()
        width, kv = shape.width, shape.kv_heads * shape.head
        self.head, self.cached = shape.head, batch > 0
        self.norm, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, kv, bias=False)
        self.v, self.o = nn.Linear(width, kv, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, shape.inner, bias=False), nn.Linear(width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, width, bias=False)
        if batch:
            size = batch, shape.kv_heads // parts, shape.context, shape.head
            self.register_buffer("keys", torch.zeros(size), persistent=False)
            self.register_buffer("values", torch.zeros(size), persistent=False)

    def forward(self, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, length, width] at the positions `at` [length]; without a cache, or with more than one position,
        these are the first ones."""
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        half = self.head // 2
        q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k))
        mask = None
        if self.cached:
            self.keys.index_copy_(2, at, k)
            self.values.index_copy_(2, at, v)
            if x.shape[1] == 1:
                k, v = self.keys, self.values
                mask = (torch.arange(k.shape[2], device=x.device) <= at[:, None])[None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Tokens [batch, length] at positions [length] to scores [batch, length, vocabulary].

    Args:
        batch: size of the cache; 0: there is none, the model is trained.
        parts: among how many ranks `divided` will divide it.
    """

    def __init__(self, shape: Shape, batch: int = 0, parts: int = 1) -> None:
        super().__init__()
        self.head_width = shape.head
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape, batch, parts) for _ in range(shape.layers))
        self.norm, self.head = nn.RMSNorm(shape.width, 1e-5), nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        x = self.embed(tokens)
        steps = torch.arange(0, self.head_width, 2, device=tokens.device)
        angles = at[:, None] * 500000.0 ** (-steps / self.head_width)
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, at, cos, sin)
        return self.head(self.norm(x))


def divided(model: Llama, mesh: DeviceMesh) -> Llama:
    """The model of a rank: heads, the width of the MLPs and the vocabulary are divided over `mesh`."""
    plan: dict[str, Any] = dict.fromkeys(("q", "k", "v", "gate", "up"), ColwiseParallel())
    plan |= dict.fromkeys(("o", "down"), RowwiseParallel())
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    return model


def tokens_of(shape: Shape, size: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """Random tokens [*size], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape.vocabulary, tuple(size), generator=generator).to(device)
