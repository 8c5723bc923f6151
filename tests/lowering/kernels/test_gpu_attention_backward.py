"""Attention of training steps on a GPU: kernels against the libraries' calls, and either side of a step by a kernel
with the other one by a call."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

from benchmarks.numerics import assert_right
from tests.lowering.kernels.kernel_bodies import body
from tests.lowering.kernels.test_gpu_kernels import target_of
from tests.lowering.kernels.test_kernel_attention_backward import Call
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.ir import Graph, attr_values
from torch_rtx.lowering.kernels.body_builder import kernel
from torch_rtx.runtime.candidate_check import CandidateCheck, random_tensor
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.launch import load_tactics

pytestmark = pytest.mark.gpu
CALLS = {
    "a window": Call(
        batch=8,
        heads=3,
        queries=49,
        keys=49,
        width=32,
        outer=True,
        mask="H[8, 3, 49, 49](9408, 3136, 64, 1)",
        wanted=True,
    ),
    "a mask": Call(
        batch=2, heads=4, queries=128, keys=128, width=64, outer=True, mask="H[2, 4, 128, 128](128, 0, 0, 1)"
    ),
    "flash": Call(batch=2, heads=4, queries=197, keys=197, width=64, library="flash", outer=True),
    "causal": Call(batch=2, heads=4, queries=100, keys=100, width=64, library="flash", options=", is_causal=True"),
    "few keys": Call(batch=2, heads=2, queries=300, keys=77, width=80, library="flash", outer=True),
    "shared heads": Call(batch=2, heads=6, shared_heads=2, queries=64, keys=64, width=64, library="flash"),
}
DEVICE = torch.device("cuda", 0)


def whole(text: str, dtype: str, name: str) -> Graph:
    """A graph of one kernel node."""
    graph = body(text, dtype)
    outputs = tuple(attr_values(graph.outputs))
    return Graph("fused", graph.inputs, nodes=(kernel(name, graph.inputs, graph.nodes, outputs),), outputs=outputs)


def by_kernel(graph: Graph) -> Code:
    """Code that launches the kernel of the node of `graph`."""
    table, report = build_kernels(graph, [target_of("native")])
    assert not report.missing, str(report)
    return compile_graph(graph, DEVICE, tactics=load_tactics(table, graph, DEVICE, "kernel"))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", CALLS)
def test_right(name: str, dtype: str) -> None:
    call = CALLS[name]
    for text, op in ((call.forward(), "forward"), (call.backward(), "backward")):
        graph = whole(text, dtype, op)
        (node,) = graph.nodes
        check = CandidateCheck(node, DEVICE)
        table, report = build_kernels(graph, [target_of("native")])
        assert not report.missing, str(report)
        tactics = load_tactics(table, graph, DEVICE, "kernel")
        assert tactics[op].kernels
        assert check.problem(check.code(tactics)) is None


@pytest.mark.parametrize("name", CALLS)
def test_kernels_and_calls_take_what_the_other_saves(name: str) -> None:
    call = CALLS[name]
    forward, backward = whole(call.forward(), "bf16", "forward"), whole(call.backward(), "bf16", "backward")
    generator = torch.Generator(DEVICE).manual_seed(0)
    given = [random_tensor(value, DEVICE, generator, 2) for value in forward.inputs]
    gradient = random_tensor(backward.inputs[0], DEVICE, generator, 2)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in (gradient, *given)]
    library = compile_graph(forward, DEVICE), compile_graph(backward, DEVICE)
    ours = by_kernel(forward), by_kernel(backward)
    exact_saved = library[0](wide[1:], ())
    exact = library[1]([*wide, *exact_saved], ())
    expected = library[1]([gradient, *given, *library[0](given, ())], ())
    for first, second in ((ours[0], library[1]), (library[0], ours[1]), ours):
        saved = first(given, ())
        assert_right(second([gradient, *given, *saved], ()), expected, list(exact))
