"""Every declared operator as a kernel on a GPU, on PyTorch's own samples, against the ATen call on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")
pytest.importorskip("expecttest", reason="PyTorch's samples need it")

from tests.lowering.kernels.test_gpu_kernels import target_of
from tests.lowering.kernels.test_kernel_ops import (
    BUILT_CHUNKS,
    CALLS,
    FLOATS,
    Body,
    assert_near,
    assert_same_bits,
    built,
    compilable,
    exact_calls,
    of_chunk,
)
from torch_rtx.runtime.launch import load_tactics
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings

pytestmark = pytest.mark.gpu


def launched(bodies: list[Body]) -> list[torch.Tensor]:
    """The results of all of them, compiled and launched, on the CPU."""
    graph, table = built(bodies, target_of("native"))
    device = torch.device("cuda", torch.cuda.current_device())
    tactics = load_tactics(table, graph, device)
    settings = RuntimeSettings(cuda_graph_strategy="disabled")
    session = Session(graph, WeightStore(graph, device, {}), settings, tactics=tactics)
    return [result.cpu() for result in session([tensor.to(device) for body in bodies for tensor in body.tensors])]


def check(bodies: list[Body]) -> None:
    """Launch all of them, and compare each result."""
    results = iter(launched(bodies))
    for body in bodies:
        for eager, exact in zip(body.results, body.in_float64(), strict=True):
            found = next(results)
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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit(dtype: torch.dtype) -> None:
    """Against eager on the GPU, which differs from the CPU's in signs of zero and in long quotients."""
    aten = torch.ops.aten
    bodies, expected = [], []
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    limits = [(aten.clamp.default, (zeros, *pair)) for pair in ((0, None), (-0.0, None), (None, 0.0), (None, -0.0))]
    limits += [(op.default, (zeros,)) for op in (aten.relu, aten.relu6)]
    limits += [(op.default, (zeros, -zeros)) for op in (aten.maximum, aten.minimum)]
    for op, args, kwargs in (*exact_calls(dtype), *((op, args, {}) for op, args in limits)):
        bodies.append(Body(op, args, kwargs, op(*args, **kwargs)))
        expected.append(op(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in args), **kwargs).cpu())
    for body, found, right in zip(bodies, launched(bodies), expected, strict=True):
        assert_same_bits(found, right, body.graph)
