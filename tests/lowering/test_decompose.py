"""Decompositions that stand for calls, on PyTorch's own samples of its operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch

from tests.backend.test_op_db import operators
from tests.lowering.kernels.test_kernel_ops import DECLARED, LARGEST, Body, Recorder, assert_near, size
from torch_rtx import aten
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.pipeline import PASSES, Context
from torch_rtx.runtime.code import compile_graph
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import PORTABLE

FEWEST = 48  # operators that are written out


def bodies() -> Iterator[Body]:
    """For each operator the calls that PyTorch makes of a sample in float32 and that no kernel is declared for."""
    for op in operators().values():
        samples = op.sample_inputs("cpu", torch.float32) if op.supports_dtype(torch.float32, "cpu") else ()
        sample = next((one for one in samples if 0 < size(one) <= LARGEST), None)
        if sample is None:
            continue
        with Recorder() as recorder, suppress(Exception):  # it needs a GPU, or more than a call
            op.op(sample.input, *sample.args, **sample.kwargs)
        for call, args, kwargs, result in recorder.calls:
            results = result if isinstance(result, tuple | list) else [result]
            known = str(call) in aten.ALLOWED and not call._schema.is_mutable and not aten.is_random(call)
            if known and str(call) not in DECLARED and all(isinstance(one, torch.Tensor) for one in results):
                with suppress(Exception):  # an argument that no graph has
                    yield Body(call, args, kwargs, result)


def test_samples() -> None:
    """A graph of calls that kernels compute is as right as the call, and gives memory of the same layout."""
    infer, context, found = Inference(), Context(CompilationSettings(), PORTABLE[:1]), set()
    for body in bodies():
        graph = PASSES["decompose"](body.graph, infer, context)
        if graph is body.graph:
            continue
        found.add(body.graph.nodes[0].op)
        results = compile_graph(graph, torch.device("cpu"))(body.tensors, ())
        for one, eager, exact in zip(results, body.results, body.in_float64(), strict=True):
            assert one.stride() == eager.stride(), graph
            assert_near(one, eager, exact)
    assert len(found) >= FEWEST
