"""Gradients of look-ups on a GPU: kernels that add in memory, in plain calls and as CUDA graphs that are replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_rtx
from torch_rtx.backend.entry import rtx

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]
WORDS = 1000
A = torch.ops.aten


class Tied(nn.Module):
    """Words with padding that the last layer shares, positions, two types, and a table that is indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 64, padding_idx=0), nn.Embedding(32, 64)
        self.types, self.bias = nn.Embedding(2, 64), nn.Parameter(torch.randn(63, 32))
        self.norm = nn.LayerNorm(64)

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        at = torch.arange(32, device=ids.device)
        x = self.norm(self.words(ids) + self.places(at) + self.types(types))
        x = x @ x.mT + self.bias[at[:, None] - at].sum(-1)  # negative indices, each many times
        return (x @ self.places.weight) @ self.words.weight.t()


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, WORDS, (rows, 32), device="cuda")
    ids[: rows // 2, 16:] = 0
    ids[:, 3] = 7
    return ids, torch.randint(0, 2, (rows, 32), device="cuda")


def test_training_steps() -> None:
    """Each replay begins with zeros, or with the other addend, also where gradients are added up over steps."""
    torch.manual_seed(0)
    model = Tied().cuda()
    wide, own = copy.deepcopy(model).double(), copy.deepcopy(model)
    compiled: Callable[..., Tensor] = torch.compile(own, backend=rtx, fullgraph=True)
    for step in range(8):
        if step % 2 == 0:
            for one in (model, wide, own):
                one.zero_grad(set_to_none=step % 4 == 0)
        args = batch()
        for call in (model, wide, compiled):
            call(*args).square().mean().backward()
        if step == 3:
            assert torch_rtx.wait(60)
        for (name, eager), exact, got in zip(
            model.named_parameters(), wide.parameters(), own.parameters(), strict=True
        ):
            assert got.grad is not None
            assert eager.grad is not None
            assert exact.grad is not None
            ours, theirs = ((one.double() - exact.grad).norm() / exact.grad.norm() for one in (got.grad, eager.grad))
            assert ours <= max(2 * float(theirs), 1e-5), f"{name} in step {step}: {ours:.1e}, eager {theirs:.1e}"


CALLS: dict[str, Callable[..., Tensor]] = {
    "index_put": lambda x, i, s: x.index_put((i,), s, accumulate=True),
    "index_add": lambda x, i, s: x.index_add(0, i, s, alpha=2),
    "scatter_add": lambda x, i, s: x.scatter_add(0, i[:, None].expand_as(s), s.sin()),
    "scatter_reduce": lambda x, i, s: x.exp().scatter_reduce(0, i[:, None].expand_as(s), s, "sum"),
    "sums of rows": lambda x, i, s: x[:, 0].contiguous().index_add(0, i, s.sum(1, dtype=s.dtype)),
    "an embedding's gradient": lambda x, i, s: A.embedding_dense_backward(s, i, len(x), -1, False),
    "one of two rows": lambda x, i, s: A.embedding_dense_backward(s, i % 2, 2, -1, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_calls(name: str, dtype: torch.dtype) -> None:
    """Thousands of additions to a few rows, and to many."""
    if dtype == torch.int32 and (name in ("scatter_add", "scatter_reduce") or "embedding" in name or "rows" in name):
        dtype = torch.float32  # these compute floats
    torch.manual_seed(0)
    compiled = torch.compile(
        CALLS[name], backend="rtx", fullgraph=True, dynamic=False, options={"specialization_strategy": "eager"}
    )
    for rows, count in ((7, 4096), (5000, 4096), (5000, 1)):
        drawn = [torch.randn(size, 96, device="cuda").mul(9).to(dtype) for size in (rows, count)]
        args = drawn[0], torch.randint(0, rows, (count,), device="cuda"), drawn[1]
        for _ in range(3):
            found = compiled(*args)
        if not dtype.is_floating_point:
            assert torch.equal(found, CALLS[name](*args))
            continue
        exact = CALLS[name](args[0].double(), args[1], args[2].double())
        ours, theirs = (float((one.double() - exact).norm() / exact.norm()) for one in (found, CALLS[name](*args)))
        assert ours <= max(2 * theirs, {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 8e-3))


@torch.no_grad()
def test_deterministic_algorithms() -> None:
    """Other code runs in the other mode, and gives the same bits in each call."""
    torch.manual_seed(0)
    call = CALLS["an embedding's gradient"]
    compiled = torch.compile(call, backend="rtx", options={"specialization_strategy": "eager"})
    args = (
        torch.empty(50, 96, device="cuda"),
        torch.randint(0, 50, (9999,), device="cuda"),
        torch.randn(9999, 96).cuda(),
    )
    compiled(*args)
    torch.use_deterministic_algorithms(True)
    try:
        first = compiled(*args).clone()
        assert all(torch.equal(compiled(*args), first) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)
