"""Kernels that add to an operand in memory, in generated code: in whose memory they do, and what is copied before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from tests.doubles.interpreter import Interpreted
from tests.lowering.test_kernel_models import CPU, kernels
from tests.lowering.test_passes import graph as parsed
from tests.lowering.test_training_graphs import recorded
from tests.runtime.test_arena import interpreted, poisoned, whole_nodes
from torch_rtx.accumulation import continued
from torch_rtx.ir import Graph, evaluate, verify
from torch_rtx.lowering.pipeline import lower
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.candidate_check import CandidateCheck
from torch_rtx.runtime.code import EMPTY, Code, compile_graph
from torch_rtx.runtime.graph_params import kernel_uses
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.node_cost import cost
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import Target

HEAD = """
input x: f32[9, 24]
input y: f32[9, 24]
input g: f32[5, 7, 24]
input i: i64[5, 7]
input j: i64[5, 7]
"""
# Programs, and how many tensors are copied before a kernel adds to them.
PROGRAMS = {
    "an embedding": ("v: f32[9, 24] = EMBEDDING(i, -1)\nreturn [v]", 0),
    "an embedding with padding": ("v: f32[9, 24] = EMBEDDING(i, 3)\nreturn [v]", 0),
    "a table with several uses": (
        """
a: f32[9, 24] = op aten.exp.default(self=x)
v: f32[9, 24] = EMBEDDING(i, -1)
s: f32[9, 24] = op aten.add.Tensor(self=a, other=v)
w: f32[9, 24] = EMBEDDING(j, 2)
t: f32[9, 24] = op aten.add.Tensor(self=w, other=s)
return [t]""",
        0,
    ),
    "results of equal zeros": (
        "z: f32[9, 24] = ZEROS\nv: f32[9, 24] = PUT(z, i)\nw: f32[9, 24] = PUT(z, j)\nreturn [v, w]",
        0,
    ),
    "a sum in the arena": (
        "v: f32[9, 24] = EMBEDDING(i, -1)\nw: f32[9, 24] = op aten.exp.default(self=v)\nreturn [w]",
        0,
    ),
    "a sum that a library reads": (
        """
v: f32[9, 24] = EMBEDDING(i, -1)
d: f32[9, 24], _ = op aten.cummax.default(self=v, dim=0)
return [d]""",
        0,
    ),
    "an input": ("v: f32[9, 24] = PUT(x, i)\nreturn [v, x]", 1),
    "a result that the caller gets, too": (
        "a: f32[9, 24] = op aten.exp.default(self=x)\nv: f32[9, 24] = PUT(a, i)\nreturn [a, v]",
        1,
    ),
    "a view that the caller gets, too": (
        """
a: f32[9, 24] = op aten.exp.default(self=x)
b: f32[216] = op aten.view.default(self=a, size=[216])
v: f32[9, 24] = PUT(a, i)
return [b, v]""",
        1,
    ),
    "a tensor that is read again, by a view": (
        """
a: f32[9, 24] = op aten.exp.default(self=x)
b: f32[24, 9](1, 24) = op aten.t.default(self=a)
v: f32[9, 24] = PUT(a, i)
m: f32[9, 9] = op aten.matmul.default(self=v, other=b)
return [m]""",
        1,
    ),
    "a tensor that two kernels add to": (
        """
a: f32[9, 24] = op aten.exp.default(self=x)
v: f32[9, 24] = PUT(a, i)
w: f32[9, 24] = PUT(a, j)
return [v, w]""",
        1,
    ),
    "a result of a library": (
        "d: f32[9, 24] = op aten.lgamma.default(self=x)\nv: f32[9, 24] = PUT(d, i)\nreturn [v]",
        1,
    ),
    "an input that is written": (
        "v: f32[9, 24] = EMBEDDING(i, -1)\nop aten.copy_.default(self=x, src=v)\nreturn []",
        0,
    ),
    "an input that gets what a kernel adds to": (
        """
a: f32[9, 24] = op aten.exp.default(self=x)
op aten.copy_.default(self=y, src=a)
v: f32[9, 24] = PUT(a, i)
return [v]""",
        0,
    ),
}


def program(text: str, head: str = HEAD) -> Graph:
    """The graph of a text with short forms of calls."""
    text = re.sub(
        r"PUT\((\w), (\w)\)", r"op aten.index_put.default(self=\1, indices=[\2], values=g, accumulate=True)", text
    )
    text = re.sub(
        r"EMBEDDING\((\w), (.*?)\)",
        r"op aten.embedding_dense_backward.default(grad_output=g, indices=\1, num_weights=9, padding_idx=\2, "
        "scale_grad_by_freq=False)",
        text,
    )
    graph = parsed(head + text.replace("ZEROS", "op aten.zeros.default(size=[9, 24], dtype='f32', device='main')"))
    verify(graph, ALLOWED)
    return graph


def launched(graph: Graph, sizes: dict[str, int] | None = None) -> Code:
    nodes = kernels(graph)
    return compile_graph(
        graph, CPU, tactics=whole_nodes({op: interpreted(nodes[op], sizes or {}) for op in nodes}), distinct=True
    )


def inputs_of(graph: Graph, sizes: dict[str, int] | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    found = []
    for value in graph.inputs:
        shape = [evaluate(dim, sizes or {}) for dim in value.type.shape]  # type: ignore[union-attr]
        is_float = value.type.dtype == "f32"  # type: ignore[union-attr]
        found.append(torch.randn(shape) if is_float else torch.randint(0, 9, shape))
    return found


def assert_same(before: Graph, code: Code, sizes: dict[str, int] | None = None) -> None:
    """The results, and the inputs afterwards; in memory that nobody has written to before."""
    one, two = inputs_of(before, sizes), inputs_of(before, sizes)
    right = compile_graph(before, CPU)(one, ())
    with patch.dict(EMPTY, {"cpu": poisoned}):
        found = code(two, ())
    torch.testing.assert_close([*found, *two], [*right, *one])


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    text, copies = PROGRAMS[name]
    before = program(text)
    graph, _ = lower(before, CompilationSettings(), targets=(Target(80),))
    code = launched(graph)
    run = inline_kernels(graph, code.tactics)
    assert any(map(continued, run.nodes))
    assert sum(node.op == "aten.clone.default" for node in run.nodes) == copies
    assert_same(before, code)
    uses = kernel_uses(run)
    for node in run.nodes:
        for result, operand in continued(node).items():
            assert uses.get(result) == uses.get(operand.name)  # one memory: all addresses in it are set, or none


def test_addresses_in_a_cuda_graph() -> None:
    """A replay sets one address in the kernel that writes zeros, and two in the one that adds to them."""
    graph, _ = lower(program(PROGRAMS["an embedding"][0]), CompilationSettings(), targets=(Target(80),))
    zeros, sums = (node.results[0].name for node in graph.nodes)
    assert kernel_uses(graph)[sums] == kernel_uses(graph)[zeros] == (zeros, (0, 1, 1))


def test_a_kernel_is_checked_alone() -> None:
    """It adds to a copy of random contents; one that adds nothing is found out."""
    graph, _ = lower(program(PROGRAMS["an embedding with padding"][0]), CompilationSettings(), targets=(Target(80),))
    node = graph.nodes[1]
    launcher = interpreted(node, {})
    check = CandidateCheck(node, CPU)
    with patch.dict(EMPTY, {"cpu": poisoned}):
        assert check.problem(check.code(whole_nodes({node.op: launcher}))) is None
    with patch.object(Interpreted, "__call__", lambda *_: None):
        assert "relative error" in str(check.problem(check.code(whole_nodes({node.op: launcher}))))


def test_bytes_that_are_moved() -> None:
    """Of the table, what is added to it is read and written."""
    graph, _ = lower(program(PROGRAMS["an embedding"][0]), CompilationSettings(), targets=(Target(80),))
    zeros, sums = (cost(node, {}) for node in graph.nodes)
    assert zeros is not None
    assert sums is not None
    added, positions = 5 * 7 * 24 * 4, 5 * 7 * 8
    assert (zeros.read, zeros.written) == (0, 9 * 24 * 4)
    assert (sums.read, sums.written) == (2 * added + positions, added)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms() -> None:
    """Nothing adds in the order in which threads come; sums of few rows have an order."""
    before = program(
        "u: f32[2, 24] = FEW\nv: f32[9, 24] = EMBEDDING(i, -1)\nw: f32[9, 24] = PUT(x, i)\nreturn [u, v, w]".replace(
            "FEW",
            "op aten.embedding_dense_backward.default(grad_output=g, indices=j, num_weights=2, padding_idx=-1, "
            "scale_grad_by_freq=False)",
        )
    )
    with deterministic():
        graph, _ = lower(before, CompilationSettings(), targets=(Target(80),))
    assert not any(map(continued, graph.nodes))
    called = [node.op.split(".")[1] for node in graph.nodes if node.kind == "extern"]
    assert called == ["embedding_dense_backward", "index_put"]
    graph, _ = lower(before, CompilationSettings(), targets=(Target(80),))
    assert sum(len(continued(node)) for node in graph.nodes) == 2
    assert all(node.kind == "kernel" for node in graph.nodes)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_program_is_compiled_again_in_the_other_mode() -> None:
    compiled = torch.compile(lambda x, i: torch.ops.aten.embedding_dense_backward(x, i, 9, -1, False), backend="rtx")
    args = torch.randn(5, 24), torch.tensor([1, 1, 0, 8, 1])
    modes = []
    for mode in (False, True, False):
        torch.use_deterministic_algorithms(mode)
        try:
            with recorded() as graphs:
                compiled(*args)
            modes.append([any(map(continued, graph.nodes)) for graph in graphs])
        finally:
            torch.use_deterministic_algorithms(False)
    assert modes == [[True], [False], []]


def test_sizes_of_a_call() -> None:
    head = HEAD.replace("5, 7", "s0, 7").replace("input x", "dim s0 = 2, 64, 1\ninput x")
    before = program("v: f32[9, 24] = EMBEDDING(i, 0)\nreturn [v]", head)
    graph, _ = lower(before, CompilationSettings(), targets=(Target(80),))
    for size in (2, 13):
        assert_same(before, launched(graph, {"s0": size}), {"s0": size})


def test_memory_is_counted_once() -> None:
    """A sum takes no more memory than what it starts from."""
    graph, _ = lower(program(PROGRAMS["a sum in the arena"][0]), CompilationSettings(), targets=(Target(80),))
    assert launched(graph).plan.memory({}).arena == 1024
    returned = replace(graph, outputs=(*graph.outputs, graph.nodes[1].outputs[0]))
    memory = launched(returned).plan.memory({})
    assert (memory.arena, memory.others) == (0, 2048)
