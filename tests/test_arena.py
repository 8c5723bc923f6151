"""Whole models launched kernel by kernel through the arena, each kernel in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import models
from benchmarks.numerics import assert_right, in_float64
from tests.interpreter import Interpreted
from tests.test_kernel_models import CPU, fused, kernels, numbers
from torch_rtx.ir import Node, evaluate
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.loops import loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.runtime.code import compile_graph

PROGRAMS = 4  # of a loop; the interpreter takes its time for each


def interpreted(node: Node, sizes: dict[str, int]) -> Interpreted:
    assert node.body is not None
    kernel = generate(node.body, node.op, 80, 0)
    assert kernel is not None
    found = region(node.body)
    if found.anchor is None and (programs := evaluate(kernel.grid[0], sizes) or 0) > PROGRAMS:
        config = loop_configs(found)[0]
        kernel = loop_kernel(found, node.op, replace(config, rows=config.rows << (programs // PROGRAMS).bit_length()))
    return Interpreted(kernel)


@pytest.mark.parametrize(("name", "dynamic"), [("bert_base", True), ("gpt2", False), ("llama_decode", False)])
def test_models(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    model, module = fused(name, torch.float32, dynamic)
    graph = module.engine.graph
    launched = {op: interpreted(node, numbers(graph)) for op, node in kernels(graph).items()}
    args, kwargs = models.inputs(name, "small", dtype=torch.float32, seed=7)
    exact = in_float64(model, args, kwargs)
    flat = module._signature.flatten(args, kwargs)
    code = compile_graph(graph, CPU, kernels=launched)  # type: ignore[arg-type]
    assert code.plan.buffers
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in flat]
    launches = sum(node.kind == "kernel" for node in graph.nodes)
    found = module._signature.unflatten(code(inputs, module._store.values))
    assert sum(launcher.launches for launcher in launched.values()) == launches
    with torch.no_grad():
        eager = model(*args, **kwargs)
    assert_right(found, eager, exact)
