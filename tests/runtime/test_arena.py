"""Whole models launched kernel by kernel through the arena, each kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from benchmarks import models
from benchmarks.numerics import assert_right, in_float64
from tests.doubles.interpreter import Interpreted
from tests.lowering.test_fuse import TARGETS, Drawn, execute
from tests.lowering.test_fuse import numbers as concrete
from tests.lowering.test_kernel_models import CPU, fused, kernels, numbers
from torch_rtx import aten
from torch_rtx.ir import Graph, Node, evaluate, verify
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.loops import loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.passes.finish import finish
from torch_rtx.lowering.passes.fuse import fuse
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.code import EMPTY, compile_graph
from torch_rtx.tactics import OWN, Tactic
from torch_rtx.targets import arch_of

PROGRAMS = 4  # of a loop; the interpreter takes its time for each


def interpreted(node: Node, sizes: dict[str, int]) -> Interpreted:
    assert node.body is not None
    kernel = generate(node.body, node.op, arch_of(80), 0)
    assert kernel is not None
    found = region(node.body)
    if found.anchor is None and not found.parts and (programs := evaluate(kernel.grid[0], sizes) or 0) > PROGRAMS:
        config = loop_configs(found)[0]
        kernel = loop_kernel(found, node.op, replace(config, rows=config.rows << (programs // PROGRAMS).bit_length()))
    return Interpreted(kernel)


def whole_nodes(launchers: Mapping[str, Interpreted]) -> dict[str, Any]:
    """The tactics by which these are launched, by the op of kernel nodes."""
    return {op: Tactic("kernel", 0.0, {OWN: launcher}) for op, launcher in launchers.items()}


@pytest.mark.parametrize(("name", "dynamic"), [("bert_base", True), ("llama_decode", False)])
def test_models(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    model, module = fused(name, torch.float32, dynamic)
    graph = module.engine.graph
    launched = {op: interpreted(node, numbers(graph)) for op, node in kernels(graph).items()}
    args, kwargs = models.inputs(name, "small", dtype=torch.float32, seed=7)
    exact = in_float64(model, args, kwargs)
    flat = module._signature.flatten(args, kwargs)
    code = compile_graph(graph, CPU, tactics=whole_nodes(launched))
    assert code.plan.buffers
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in flat]
    launches = sum(node.kind == "kernel" for node in graph.nodes)
    found = module._signature.unflatten(code(inputs, module._store.values))
    assert sum(launcher.launches for launcher in launched.values()) == launches
    with torch.no_grad():
        eager = model(*args, **kwargs)
    assert_right(found, eager, exact)


# ---- random graphs ---------------------------------------------------------------------------------------------------


class Chained(Drawn):
    """With matrix products between the loops, and outputs anywhere: in the middle, views, inputs."""

    def graph(self) -> Graph:
        made = super().graph()
        return replace(made, outputs=(self.values[-1], *self.draw(st.lists(st.sampled_from(self.values), max_size=3))))

    def step(self, x: Any) -> None:
        if self.draw(st.integers(0, 2)) or not x.type.shape:
            super().step(x)
            return
        width = x.type.shape[-1]  # with itself: there is always a partner
        rows = x if len(x.type.shape) == 2 else self.rewriter.emit("aten.view.default", self=x, size=(-1, width))
        turned = self.rewriter.emit("aten.permute.default", self=rows, dims=(1, 0))
        left, right = self.draw(st.permutations((turned, rows)))
        made = self.rewriter.emit("aten.mm.default", self=left, mat2=right)
        self.values.append(self.rewriter.emit("aten.mul.Scalar", self=made, other=0.125))
        self.values.append(made)


@st.composite
def chained(draw: st.DrawFn) -> Graph:
    graph = fuse(dce(Chained(draw).graph(), Inference()), Inference(), TARGETS)
    return finish(graph, Inference())


def poisoned(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that nobody has written to."""
    found = torch.empty_strided(shape, strides, dtype=dtype)
    found.untyped_storage().fill_(255)  # each float of it is no number
    return found


@settings(max_examples=60)
@given(chained(), st.integers(0, 100), st.booleans(), st.data())
def test_random_graphs(graph: Graph, seed: int, static: bool, data: st.DataObject) -> None:
    """Some kernels are launched and others called, for any sizes and for given ones: every result is right."""
    torch.manual_seed(seed)
    sizes = dict.fromkeys(graph.syms, 2 + seed % 5)
    inputs = [torch.randn(concrete(x.type.shape, sizes)).to(aten.DTYPES[x.type.dtype]) for x in graph.inputs]
    exact = execute(graph, [x.double() for x in inputs], sizes, wide=True)
    found = graph if not static else bind(graph, sizes)
    verify(found, aten.ALLOWED)
    nodes = kernels(found)
    called = data.draw(st.sets(st.sampled_from(sorted(nodes)), max_size=1)) if nodes else set()
    launched = {op: interpreted(nodes[op], sizes) for op in nodes.keys() - called}
    with patch.dict(EMPTY, {"cpu": poisoned}):
        code = compile_graph(found, CPU, tactics=whole_nodes(launched))
        got = code([x.clone() for x in inputs], ())
    calls = compile_graph(found, CPU)([x.clone() for x in inputs], ())
    assert_right(got, calls, exact)
