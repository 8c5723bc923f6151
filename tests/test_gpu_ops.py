"""Every declared operator as a kernel on a GPU, on PyTorch's own samples, against the ATen call on the CPU."""

from __future__ import annotations

import warnings
from contextlib import suppress

import pytest
import torch

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")
pytest.importorskip("expecttest", reason="PyTorch's samples need it")

from tests.test_gpu_kernels import target_of
from tests.test_kernel_ops import CALLS, Body, assert_near, names, sampled
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, Node, Value, attr_values
from torch_rtx.lowering.kernels.loops import loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.runtime.launch import launchers
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings

pytestmark = pytest.mark.gpu
CHUNKS = 8


def compilable(bodies: list[Body]) -> list[Body]:
    """Those that kernels have; that no others are refused is for the tests without a GPU."""
    found = []
    for body in bodies:
        with suppress(Unsupported):
            loop_kernel(region(body.graph), "kernel")
            found.append(body)
    return found


def program(bodies: list[Body]) -> Graph:
    """A graph with a kernel for each body, and inputs and outputs of its own for each."""
    nodes, inputs, outputs = [], [], []
    for index, body in enumerate(bodies):
        own = [Value(f"k{index}_{value.name}", value.type) for value in body.graph.inputs]
        results = tuple(Value(f"k{index}_{v.name}", v.type) for v in attr_values(body.graph.outputs))
        args = tuple((value.name, given) for value, given in zip(body.graph.inputs, own, strict=True))
        nodes.append(Node("kernel", f"k{index}", args, results, body=body.graph))
        inputs += own
        outputs += results
    return Graph("fused", tuple(inputs), nodes=tuple(nodes), outputs=tuple(outputs))


def check(bodies: list[Body]) -> None:
    """Compile all of them, launch them, and compare each result."""
    graph, target, device = program(bodies), target_of("native"), torch.device("cuda", torch.cuda.current_device())

    def generate(node: Node, _: object, config: int) -> object:
        assert node.body is not None
        return loop_kernel(region(node.body), node.op) if config == 0 else None

    table, report = build_kernels(graph, [target], generate)  # type: ignore[arg-type]
    assert not report.missing, str(report)
    kernels = launchers(table, graph, device)
    settings = RuntimeSettings(cuda_graph_strategy="disabled")
    session = Session(graph, WeightStore(graph, device, {}), settings, kernels=kernels)
    results = iter(session([tensor.to(device) for body in bodies for tensor in body.tensors]))
    torch.cuda.synchronize()
    for body in bodies:
        for eager, exact in zip(body.results, body.in_float64(), strict=True):
            found = next(results).cpu()
            try:
                assert_near(found, eager, exact)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{body.graph}") from None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_samples(chunk: int, all_dtypes: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(compilable([body for name in names()[chunk::CHUNKS] for body in sampled(name, all_dtypes)]))


def test_calls() -> None:
    bodies = []
    for make in CALLS.values():
        op, args, *kwargs = make()
        given = kwargs[0] if kwargs else {}
        bodies.append(Body(op, args, given, op(*args, **given)))
    check(compilable(bodies))
