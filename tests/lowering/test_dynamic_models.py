"""Models at sizes that may change: their kernels for one combination of sizes are those of an engine for it alone."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import torch_rtx
from benchmarks import models
from benchmarks.numerics import assert_right, in_float64
from benchmarks.suites.shapes import dynamic_shapes
from torch_rtx.backend import program_cache
from torch_rtx.ir import Graph, kernel_nodes
from torch_rtx.op_work import ANCHORS
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.check import bind_sizes
from torch_rtx.runtime.region_keys import region_key
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable

LENGTH = 32
# Kernels of a call of the dynamic engine besides: rotary tables, which are weights where the length is fixed.
MORE = {"gpt2": 0, "bert_base": 0, "qwen3": 3}
IMAGES = ("resnet50",)  # of a batch that changes
# Each model at one batch, of 1, whose axis is gone, or of several; both are there.
CASES = [
    ("gpt2", 2),
    ("bert_base", 1),
    ("qwen3", 1),
    *((name, 2) for name in IMAGES),
]


@cache
def engine(name: str, batch: int, dynamic: bool) -> tuple[nn.Module, torch_rtx.CompiledModule, models.Inputs]:
    """A small model, its engine with the graph that it has for a GPU, and inputs."""
    length = None if name in IMAGES else LENGTH
    model, *inputs = models.build(name, "small", batch=batch, length=length, dtype=torch.float16)
    shapes = None
    if dynamic:
        trace = [(batch, length), (batch + (batch > 1), length), (batch, length and length - 8)]
        shapes = dynamic_shapes(model, [models.inputs(name, "small", batch=b, length=n) for b, n in trace])
    settings = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):  # nothing is launched here
        module = torch_rtx.compile(copy.deepcopy(model), *inputs, dynamic_shapes=shapes, settings=settings)
    args, kwargs = inputs
    return model, module, (args, kwargs)


def bound(module: torch_rtx.CompiledModule, inputs: models.Inputs) -> Graph:
    """The graph of an engine for the sizes of these inputs."""
    graph = module.engine.graph
    flat: list[Any] = [*inputs[0], *inputs[1].values()]
    return bind(graph, bind_sizes(graph, flat))


def around_products(graph: Graph) -> Counter[str]:
    """How often each kernel around a product, a convolution or attention runs."""
    bodies = [node.body for node in kernel_nodes(graph) if node.body is not None]
    return Counter(region_key(body) for body in bodies if any(node.op in ANCHORS for node in body.nodes))


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_kernels_of_one_size(name: str, batch: int) -> None:
    _, static, inputs = engine(name, batch, dynamic=False)
    _, dynamic, _ = engine(name, batch, dynamic=True)
    assert dynamic.engine.graph.syms
    wanted, found = static.engine.graph, bound(dynamic, inputs)
    kinds = [Counter(node.kind for node in graph.nodes if node.kind != "view") for graph in (wanted, found)]
    assert kinds[1] == kinds[0] + Counter(kernel=MORE.get(name, 0))
    assert around_products(wanted) <= around_products(found)


@pytest.mark.parametrize(("name", "batch"), [(name, batch) for name, batch in CASES if name in MORE])
def test_one_engine_is_right_at_all_lengths(name: str, batch: int) -> None:
    model, module, _ = engine(name, batch, dynamic=True)
    for length in (LENGTH, 7):
        args, kwargs = models.inputs(name, "small", batch=batch, length=length, dtype=torch.float16)
        with torch.no_grad():
            eager = model(*args, **kwargs)
        assert_right(module(*args, **kwargs), eager, in_float64(model, args, kwargs))
