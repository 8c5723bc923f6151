"""Split forms on a GPU: what their kernels give, against the calls that they stand for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.numerics import assert_right
from tests.lowering.kernels.test_gpu_kernels import FORMS, target_of
from tests.lowering.kernels.test_kernel_split import BUILT, forced, kernel_graph, random_inputs
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.ir import kernel_nodes
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import load_tactics
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BUILT)
def test_right(name: str, form: str) -> None:
    """Plain, captured and replayed, and the same bits each time."""
    target = target_of(form)
    if target.sm < 80 and "bf16" in str(BUILT[name]):
        pytest.skip("sm_75 has no bf16")
    graph = kernel_graph(BUILT[name], "k")
    table, _ = build_kernels(graph, [target], forced(4))
    device = torch.device("cuda", torch.cuda.current_device())
    tactics = load_tactics(table, graph, device, "split")
    (split,) = (tactic for tactic in table.tactics["k"][target] if tactic.kind == "split")
    assert split.body is not None
    assert launched(tactics).keys() == {node.op for node in kernel_nodes(split.body)}
    session = Session(graph, WeightStore(graph, device, {}), RuntimeSettings(), tactics=tactics)
    inputs = [tensor.to(device) for tensor in random_inputs(BUILT[name], 1000)]
    exact = compile_graph(BUILT[name], device)([x.double() if x.is_floating_point() else x for x in inputs], ())
    first, *others = [[tensor.clone() for tensor in session(inputs)] for _ in range(4)]
    assert_right(first, compile_graph(BUILT[name], device)(inputs, ()), exact)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
