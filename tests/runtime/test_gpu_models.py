"""Every model of the zoo on the GPU, in half precision, with CUDA graphs, against eager by the float64 criterion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import torch_rtx
from benchmarks import models
from benchmarks.cases import BF16
from benchmarks.numerics import assert_right, in_float64, tensors
from tests.runtime.pools import graph_pools
from torch_rtx.backend.entry import rtx

pytestmark = pytest.mark.gpu


def cases() -> list[Any]:
    """Full size in the model's own half precision, small size in the other."""
    rows = []
    for name in models.names():
        own, other = (torch.bfloat16, torch.float16) if name in BF16 else (torch.float16, torch.bfloat16)
        rows += [
            pytest.param(name, "full", own, id=f"{name}-full"),
            pytest.param(name, "small", other, id=f"{name}-small"),
        ]
    return rows


def fresh_inputs(name: str, size: models.Size, dtype: torch.dtype, seed: int) -> models.Inputs:
    return models.inputs(name, size, dtype=dtype, device="cuda", seed=seed)


@pytest.mark.parametrize(("name", "size", "dtype"), cases())
def test_compiled(name: str, size: models.Size, dtype: torch.dtype) -> None:
    model, args, kwargs = models.build(name, size, dtype=dtype, device="cuda")
    eager_model = copy.deepcopy(model)
    torch._dynamo.reset()
    options = {"require_full_compilation": True, "specialization_strategy": "none"}
    compiled = torch.compile(model, backend=rtx, fullgraph=True, options=options)
    before = graph_pools()
    kept: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    with torch.no_grad():
        for seed in range(4):  # plain, capture, replay, replay
            args, kwargs = fresh_inputs(name, size, dtype, seed)
            exact = in_float64(eager_model, args, kwargs)
            eager = eager_model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            got = compiled(*args, **kwargs)
            assert_right(got, eager, exact)
            kept.append((tensors(got), [t.clone() for t in tensors(got)]))
    for held, copies in kept:  # no later call changed what an earlier one returned
        assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    (pool,) = graph_pools() - before
    assert pool.disabled is None
    assert (pool.captures, pool.replays) == (1, 3)


@pytest.mark.parametrize("name", models.names())
def test_exported(name: str, tmp_path: Any) -> None:
    model, args, kwargs = models.build(name, "small", dtype=torch.float16, device="cuda")
    eager_model = copy.deepcopy(model)
    torch_rtx.save(torch_rtx.compile(model, args, kwargs), tmp_path / "m.rtx")
    settings = torch_rtx.RuntimeSettings(specialization_strategy="none")
    loaded = torch_rtx.load(tmp_path / "m.rtx", weights=model, settings=settings, trust_binaries=True)
    for seed in range(3):
        args, kwargs = fresh_inputs(name, "small", torch.float16, seed)
        exact = in_float64(eager_model, args, kwargs)
        with torch.no_grad():
            eager = eager_model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        assert_right(loaded(*args, **kwargs), eager, exact)
    assert loaded.session.pool is not None
    assert loaded.session.pool.disabled is None
    assert loaded.session.pool.replays == 2
