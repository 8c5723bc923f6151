"""The kernels of every model on the GPU, in each form that code comes in, by the float64 criterion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # builds; running needs the driver alone

import torch_rtx
from benchmarks import models
from benchmarks.numerics import assert_right, in_float64
from torch_rtx.runtime.inline import launched
from torch_rtx.settings import CompilationSettings, RuntimeSettings
from torch_rtx.tactics import OWN

pytestmark = pytest.mark.gpu
# Code for this GPU, and the PTX of older generations through the driver's compiler, within their limits.
FORMS = ("current", "compute_80", "compute_86", "compute_89", "compute_75")
DYNAMIC = ("bert_base", "vit_b_16", "resnet50")


def built(name: str, form: str, dtype: torch.dtype, tactics: str, dynamic: bool = False) -> tuple[Any, Any]:
    model, args, kwargs = models.build(name, "small", dtype=dtype, device="cuda")
    shapes = None
    if dynamic:
        batch = torch.export.Dim("batch", min=1, max=64)
        given = torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: {0: batch}, (args, kwargs))
        shapes = dict(given[1]) if kwargs and not args else given[0]
    settings = CompilationSettings(targets=(form,))
    runtime = RuntimeSettings(tactics=tactics, specialization_strategy="none")
    return model, torch_rtx.compile(copy.deepcopy(model), args, kwargs, shapes, settings, runtime)


def check(name: str, model: Any, module: Any, dtype: torch.dtype, batch: int | None = None, seed: int = 0) -> None:
    sizes = {} if batch is None else {"batch": batch}
    args, kwargs = models.inputs(name, "small", dtype=dtype, device="cuda", seed=seed, **sizes)
    exact = in_float64(model, args, kwargs)
    with torch.no_grad():
        eager = copy.deepcopy(model)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    assert_right(module(*args, **kwargs), eager, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", models.names())
def test_generated(name: str, form: str) -> None:
    """Every kernel runs, none of its calls; plain, captured and replayed."""
    model, module = built(name, form, torch.float16, "kernel")
    ops = {node.op for node in module.engine.graph.nodes if node.kind == "kernel"}
    assert ops
    built_whole = {
        op
        for op, found in module.engine.kernels.tactics.items()
        if any(OWN in tactic.kernels for tactics in found.values() for tactic in tactics)
    }
    assert launched(module.session.tactics).keys() >= ops & built_whole
    missing = ops - built_whole
    assert not missing, f"no kernel was built for {missing}"
    for seed in range(3):
        check(name, model, module, torch.float16, seed=seed)
    assert module.session.pool is not None
    assert module.session.pool.disabled is None


@pytest.mark.parametrize("tactics", ["best", "library"])
@pytest.mark.parametrize("name", models.names())
def test_tactics(name: str, tactics: str) -> None:
    model, module = built(name, "current", torch.bfloat16, tactics)
    for op, tactic in module.session.tactics.items():
        (offered,) = module.engine.kernels.tactics[op].values()
        kinds = [one.kind for one in offered]
        assert tactic.kind == ("library" if tactics == "library" and "library" in kinds else kinds[0])
    for seed in range(2):
        check(name, model, module, torch.bfloat16, seed=seed)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_batch(name: str) -> None:
    model, module = built(name, "current", torch.float16, "kernel", dynamic=True)
    for batch in (1, 3, 16):
        check(name, model, module, torch.float16, batch)


@pytest.mark.parametrize("name", ["bert_base", "gpt2", "resnet50"])
def test_torch_compile(name: str) -> None:
    model, args, kwargs = models.build(name, "small", dtype=torch.float16, device="cuda")
    torch._dynamo.reset()
    from torch_rtx.backend.entry import rtx

    options = {"targets": "current", "tactics": "kernel"}
    compiled = torch.compile(copy.deepcopy(model), backend=rtx, fullgraph=True, options=options)
    for seed in range(3):
        with torch.no_grad():
            check(name, model, compiled, torch.float16, seed=seed)
