"""Every declared operator as a kernel on a GPU, on PyTorch's own samples, against the ATen call on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")
pytest.importorskip("expecttest", reason="PyTorch's samples need it")

from tests.lowering.kernels.test_gpu_kernels import target_of
from tests.lowering.kernels.test_kernel_ops import BUILT_CHUNKS, CALLS, Body, assert_near, built, compilable, of_chunk
from torch_rtx.runtime.launch import load_tactics
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings

pytestmark = pytest.mark.gpu


def check(bodies: list[Body]) -> None:
    """Compile all of them, launch them, and compare each result."""
    graph, table = built(bodies, target_of("native"))
    device = torch.device("cuda", torch.cuda.current_device())
    tactics = load_tactics(table, graph, device)
    settings = RuntimeSettings(cuda_graph_strategy="disabled")
    session = Session(graph, WeightStore(graph, device, {}), settings, tactics=tactics)
    results = iter(session([tensor.to(device) for body in bodies for tensor in body.tensors]))
    torch.cuda.synchronize()
    for body in bodies:
        for eager, exact in zip(body.results, body.in_float64(), strict=True):
            found = next(results).cpu()
            try:
                assert_near(found, eager, exact)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{body.graph}") from None


@pytest.mark.parametrize("chunk", range(BUILT_CHUNKS))
def test_samples(chunk: int, all_dtypes: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(of_chunk(chunk, all_dtypes))


def test_calls() -> None:
    bodies = []
    for make in CALLS.values():
        op, args, *kwargs = make()
        given = kwargs[0] if kwargs else {}
        bodies.append(Body(op, args, given, op(*args, **given)))
    check(compilable(bodies))
