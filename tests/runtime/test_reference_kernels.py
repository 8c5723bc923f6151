"""Kernels in the reference tier: their bodies run call by call, or they are launched as their code expects it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from tests.helpers.kernels import GRAPH, S
from torch_rtx.errors import InputError, InvalidIR
from torch_rtx.ir import Dim, Graph, Sym, dim_expr, verify
from torch_rtx.irparse import parse
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.check import bind_sizes, check_inputs
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings
from torch_rtx.tactics import OWN, Tactic

CPU = torch.device("cpu")


class Launched:
    """Stands for a launcher: `compute` gets the inputs' elements in memory order and returns those of the outputs.

    Args:
        counts: elements of each tensor in memory, as dims: inputs, then outputs.
    """

    def __init__(self, compute: Callable[..., Sequence[Sequence[float]]], counts: Sequence[Dim], inputs: int) -> None:
        self.compute, self.inputs = compute, inputs
        self.scalars, self.grid = tuple(counts), (S, 2, 1)
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, pointers: Sequence[int], scalars: Sequence[int], grid: tuple[int, int, int]) -> None:
        self.calls.append((tuple(pointers), tuple(scalars), grid))
        assert all(pointer % 16 == 0 for pointer in pointers)
        memory = [(ctypes.c_float * n).from_address(p) for p, n in zip(pointers, scalars, strict=True) if n]
        results = self.compute(*map(list, memory[: self.inputs]))
        for target, values in zip(memory[self.inputs :], results, strict=True):
            target[:] = values


def add() -> Launched:
    return Launched(lambda x, y: [[a + b for a, b in zip(x, y, strict=True)]], (S, S, S), 2)


def whole(kernels: Mapping[str, Any]) -> dict[str, Any]:
    """Tactics that launch whole nodes."""
    return {op: Tactic("kernel", 1.0, {OWN: kernel}) for op, kernel in kernels.items()}


def run(graph: Graph, *inputs: torch.Tensor, **kernels: Any) -> list[torch.Tensor]:
    verify(graph, ALLOWED)
    return compile_graph(graph, CPU, tactics=whole(kernels))(inputs, ())


def expected(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    c = -(x + y) + y
    return [x + y, c, c.exp() * 2 + c, c.exp()]


def check(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(got) == len(wanted)
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, check_stride=True)


# ---- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7])
def test_bodies(size: int) -> None:
    x, y = torch.randn(2, size)
    check(run(GRAPH, x, y), expected(x, y))


@pytest.mark.quick
def test_inlined_graph() -> None:
    """Names inside a body are new ones: `k3_a` of the outer graph and of the body, and `a` of both, are four values."""
    graph = parse(str(GRAPH).replace("input y:", "input k3_a:").replace("=y", "=k3_a"))
    inlined = inline_kernels(graph, {})
    assert (
        str(inlined)
        == """\
graph fused {
  dim s = 1, 1048576, 1
  input x: f32[s]
  input k3_a: f32[s]
  a: f32[s] = op aten.add.Tensor(self=x, other=k3_a)
  b: f32[s] = extern aten.neg.default(self=a)
  c: f32[s] = op aten.add.Tensor(self=b, other=k3_a)  # model.add @ model.py:3
  e: f32[s] = op aten.exp.default(self=c)
  k3_k3_a: f32[s] = op aten.mul.Scalar(self=e, other=2.0)
  d: f32[s] = op aten.add.Tensor(self=k3_k3_a, other=c)
  return [a, c, d, e]
}
"""
    )
    x, y = torch.randn(2, 5)
    check(run(graph, x, y), expected(x, y))
    kept = inline_kernels(graph, whole({"add": add()}))
    assert [node.kind for node in kept.nodes] == ["kernel", "extern", "kernel", "op", "op", "op"]
    assert inline_kernels(graph, whole({"add": add(), "both": add()})) is graph


ODD = """\
graph fused {
  input x: f32[2]
  input k0_t: f32[2]
  p: f32[2], q: f32[2], r: f32[2] = kernel k(in0=x) graph import {
    input in0: f32[2]
    t: f32[2] = op aten.neg.default(self=in0)
    u: f32[2], i: i64[2] = op aten.sort.default(self=t)
    return [in0, u, u]
  }
  return [p, q, r, k0_t]
}
"""


def test_outputs_that_are_inputs_or_equal() -> None:
    """A kernel writes every output to memory of its own."""
    x, other = torch.tensor([1.0, 2.0]), torch.zeros(2)
    graph = parse(ODD)
    p, q, r, same = run(graph, x, other)
    assert [t.tolist() for t in (p, q, r)] == [[1, 2], [-2, -1], [-2, -1]]
    assert len({t.data_ptr() for t in (x, p, q, r)}) == 4
    assert same is other
    assert "k0_tx" in compile_graph(graph, CPU).source


@pytest.mark.quick
def test_session_runs_bodies_or_launches() -> None:
    x, y = torch.randn(2, 9)
    launcher = add()
    for kernels in ({}, {"add": launcher}):
        session = Session(GRAPH, WeightStore(GRAPH, CPU, {}), RuntimeSettings(), tactics=whole(kernels))  # type: ignore[arg-type]
        check(session([x, y]), expected(x, y))
        check(session.sibling()([x, y]), expected(x, y))
    assert len(launcher.calls) == 4


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 7])
def test_launches(size: int) -> None:
    x, y = torch.randn(2, size).clone(), torch.randn(size)
    launcher = add()
    got = run(GRAPH, x[0].clone(), y, add=launcher)
    check(got, expected(x[0], y))
    assert [call[1:] for call in launcher.calls] == [((size,) * 3, (size, 2, 1))] * 2
    (first, second), outputs = [call[0] for call in launcher.calls], [got[0], got[1]]
    assert first[1] == second[1] == y.data_ptr()  # what fits is not copied
    assert [first[2], second[2]] == [t.data_ptr() for t in outputs]


def test_inputs_at_odd_addresses() -> None:
    memory = torch.randn(21)
    x, y = memory[1:10], memory[11:20]
    assert x.data_ptr() % 16 != 0
    launcher = add()
    check(run(GRAPH, x, y, add=launcher), expected(x, y))
    assert launcher.calls[0][0][0] != x.data_ptr()


STRIDED = """\
graph fused {
  dim s = 0, 64, 1
  input x: f32[s, 3](1, s)
  y: f32[3, s](1, 3) = kernel k(in0=x) graph import {
    dim s = 0, 64, 1
    input in0: f32[s, 3](1, s)
    t: f32[3, s] = op aten.t.default(self=in0)
    y: f32[3, s](1, 3) = op aten.neg.default(self=t)
    return [y]
  }
  z: f32[3, s](1, 3) = extern aten.exp.default(self=y)
  return [y, z]
}
"""


@pytest.mark.parametrize("size", [0, 1, 5])
def test_strides(size: int) -> None:
    """The code of a kernel knows the strides of the capture: inputs that came with others are copied."""

    def negate(x: list[float]) -> list[list[float]]:
        columns = [x[i * size : (i + 1) * size] for i in range(3)]  # x is column by column, y row by row of its columns
        return [[-columns[i][j] for j in range(size) for i in range(3)]]

    graph = parse(STRIDED)
    count = graph.inputs[0].type.shape[0]  # type: ignore[union-attr]
    for x in (torch.randn(size, 3), torch.randn(3, size).t(), torch.randn(size, 6)[:, ::2]):
        launcher = Launched(negate if size else list, (dim_expr("*", 3, count),) * 2, 1)
        launcher.grid = (count, 1, 1)  # type: ignore[assignment]
        y, z = run(graph, x, k=launcher)
        assert torch.equal(y, -x.t())
        assert torch.equal(z, y.exp())
        assert y.stride() == torch.empty_strided((3, size), (1, 3)).stride()
        assert launcher.calls[0][1:] == ((3 * size,) * 2, (size, 1, 1))


def test_no_inputs_and_no_dims() -> None:
    text = "graph fused {\n  y: f32[()] = kernel k() graph import {\n"
    text += "    y: f32[()] = op aten.full.default(size=[], fill_value=2.0)\n    return [y]\n  }\n  return [y]\n}\n"
    launcher = Launched(lambda: [[3.0]], (1,), 0)
    launcher.grid = (1, 1, 1)  # type: ignore[assignment]
    assert run(parse(text))[0].item() == 2
    (y,) = run(parse(text), k=launcher)
    assert (y.item(), y.shape) == (3, ())


def test_dims_must_be_known() -> None:
    launcher = add()
    launcher.scalars = (GRAPH.syms["s"], S, Sym("unknown"))
    with pytest.raises(InvalidIR, match="no input determines the dim unknown"):
        run(GRAPH, torch.ones(2), torch.ones(2), add=launcher)


PRODUCT = """graph fused {
  dim a = 2, None, 1
  dim b = 2, None, 1
  input x: f32[(2 * a * b), 3]
  input h: int[a]
  input w: int[b]
  y: f32[a, (2 * b), 3] = view aten.view.default(self=x, size=[a, (2 * b), 3])
  return [y]
}
"""


def test_a_size_before_the_numbers_that_it_is_a_product_of() -> None:
    """As the tokens of a video before its height and width."""
    graph, x = parse(PRODUCT), torch.randn(40, 3)
    check_inputs(graph, (x, 4, 5), CPU)
    assert bind_sizes(graph, (x, 4, 5)) == {"a": 4, "b": 5}
    (y,) = compile_graph(graph, CPU)((x, 4, 5), ())
    assert torch.equal(y, x.view(4, 10, 3))
    with pytest.raises(InputError, match="dimension 0 of input 'x' is 40, expected .* = 48"):
        check_inputs(graph, (x, 4, 6), CPU)


def test_values_are_dropped() -> None:
    """What a launch copied is gone after it, and kernels take part in the bookkeeping of last uses."""
    source = compile_graph(GRAPH, CPU, tactics=whole({"add": add(), "both": add()})).source  # type: ignore[dict-item]
    lines = [line.strip() for line in source.splitlines()]
    assert lines.count("del _in0, _in1") == 2
    assert "del b, y" in lines or "del y, b" in lines
    assert sum("= _aligned(" in line for line in lines) == 4  # what a kernel wrote needs no check
