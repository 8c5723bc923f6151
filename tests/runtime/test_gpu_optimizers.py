"""Compiled optimizer steps on a GPU: parameters and states are eager's, and are written in place, under CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import torch_rtx
from tests.runtime.pools import graph_pools
from torch_rtx.backend.entry import rtx
from torch_rtx.ir import has_parts

pytestmark = pytest.mark.gpu
SHAPES = [(300, 64), (2,), (64,), (0, 3), (), *[(256, 64), (256,), (64, 256), (64,), (64, 64), (33, 7)] * 6]
KINDS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, 1e-2, foreach=True, capturable=True),
    "adam, for loop": lambda ps: torch.optim.Adam(ps, 1e-2, foreach=False, capturable=True, amsgrad=True),
    "adam, a tensor as rate": lambda ps: torch.optim.Adam(ps, torch.tensor(1e-2, device="cuda"), capturable=True),
    "sgd": lambda ps: torch.optim.SGD(ps, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
}


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_steps(kind: str) -> None:
    torch._dynamo.reset()
    expected, found = parameters(), parameters()
    optimizers = [KINDS[kind](expected), KINDS[kind](found)]
    steps: list[Callable[[], object]] = [optimizers[0].step, torch.compile(optimizers[1].step, backend=rtx)]

    def run(count: int) -> None:
        for _ in range(count):
            for one, other in zip(expected, found, strict=True):
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
            for step in steps:
                step()

    run(4)
    assert torch_rtx.wait(120)
    run(8)
    for one, other in zip([*expected, *states(optimizers[0])], [*found, *states(optimizers[1])], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    replaying = [pool for pool in graph_pools() if pool.replays and pool.written]
    assert replaying, "the step is no CUDA graph"
    nodes = [node for pool in replaying for node in pool.graph.nodes if node.body is not None]
    assert any(has_parts(node.body) for node in nodes if node.body is not None)
    before, versions = torch.cuda.memory_allocated(), [parameter._version for parameter in found]
    torch.cuda.reset_peak_memory_stats()
    steps[1]()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < sum(parameter.nbytes for parameter in found) / 2, "new parameters lie beside the old ones"
    assert all(parameter._version > old for parameter, old in zip(found, versions, strict=True))


def test_clipped_gradients() -> None:
    torch._dynamo.reset()
    given = [nn.Parameter(torch.zeros(shape, device="cuda")) for shape in [(300, 64), (64, 512), (7,), (512, 64)]]
    clip = torch.compile(lambda: nn.utils.clip_grad_norm_(given, 1.0, foreach=True), backend=rtx)
    for call in range(10):
        for parameter in given:
            parameter.grad = torch.randn_like(parameter)
        norms = torch.stack([parameter.grad.double().norm() for parameter in given])
        wanted = [parameter.grad.double() / norms.norm() for parameter in given]
        total = clip()
        torch.testing.assert_close(total.double(), norms.norm(), rtol=1e-5, atol=0.0)
        for parameter, right in zip(given, wanted, strict=True):
            torch.testing.assert_close(parameter.grad.double(), right, rtol=1e-4, atol=1e-7)
        if call == 3:
            assert torch_rtx.wait(120)
