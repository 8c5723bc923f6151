"""Calls that address memory by an offset, where results lie anywhere in the memory of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torch_rtx import aten
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.addressing import count_from_tensors

strided, scatter = torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default
START = 5  # elements before each result


class Placed(fx.Interpreter):
    """Runs a graph with each result in the middle of memory of NaN, as an arena has it; also inputs in `placed`."""

    placed: frozenset[str] = frozenset()

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        is_view = isinstance(n.target, torch._ops.OpOverload) and aten.is_view(n.target)
        if not isinstance(found, torch.Tensor) or is_view or (n.op != "call_function" and n.name not in self.placed):
            return found
        memory = torch.full((aten.extent(found.shape, found.stride()) + 2 * START,), torch.nan).to(found.dtype)
        return memory.as_strided(found.shape, found.stride(), START).copy_(found)


def traced(function: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return make_fx(function)(*map(mode.from_tensor, args))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: strided(x + 1, [3], [2], 0),
        lambda x: strided(x + 1, [3], [2], 1),
        lambda x: strided((x + 1)[2:], [2, 2], [1, 2], 0),  # before the view
        lambda x: strided((x + 1)[2:], [2], [1], 2),
        lambda x: strided((x + 1).view(2, 4).t(), [4], [1]),  # from its own start
        lambda x: strided((x + 1).split(4)[1], [2], [1], 1),
        lambda x: strided((x + 1).view(torch.int32), [2], [1], 0).view(torch.float32),
        lambda x: torch.ops.aten.as_strided_copy.default(x + 1, [2], [3], storage_offset=1),
        lambda x: scatter(x + 1, x[:4].view(2, 2), [2, 2], [1, 2], 0),
        lambda x: scatter(x + 1, x[:4].view(2, 2), [2, 2], [1, 2], 3),
        lambda x: scatter((x + 1)[2:], x[:2], [2], [1], 4),
        lambda x: strided(x[2:], [3], [1], 0) + strided(x + 1, [3], [1], 1),  # the first is the caller's
    ],
)
def test_results_lie_anywhere(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(8)
    gm = traced(function, x)
    count_from_tensors(gm)
    gm.graph.lint()
    torch.testing.assert_close(Placed(gm).run(x), function(x), rtol=0, atol=0)


def test_tensors_of_the_caller_are_addressed_as_they_were() -> None:
    gm = traced(lambda x: strided(x, [3], [2], 1), torch.randn(8))
    count_from_tensors(gm)
    memory = torch.randn(9)
    assert torch.equal(gm(memory[2:]), memory.as_strided((3,), (2,), 1))


def test_what_the_forward_saved_lies_anywhere() -> None:
    """A backward also reads inputs of the forward and gradients, which are the caller's."""

    def backward(mul: torch.Tensor, tangent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return strided(mul, [3], [2], 1) + strided(x, [3], [1], 0) + tangent

    gm = traced(backward, torch.ones(8), torch.ones(3), torch.ones(8))
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), ("mul", "tangents_1", "primals_1"), strict=True):
        node.name = name
    count_from_tensors(gm)
    mul, tangent, x = torch.randn(8), torch.randn(3), torch.randn(9)
    run = Placed(gm)
    run.placed = frozenset(("mul",))
    expected = mul.as_strided((3,), (2,), 1) + x[:3] + tangent
    torch.testing.assert_close(run.run(mul, tangent, x[1:]), expected, rtol=0, atol=0)


def test_memory_that_no_tensor_holds() -> None:
    gm = traced(lambda x: strided((x + 1)[4:].view(torch.int32), [2], [1], 0), torch.randn(8))
    with pytest.raises(Unsupported, match=r"as_strided.default at an offset outside of the tensor that it is given"):
        count_from_tensors(gm)
