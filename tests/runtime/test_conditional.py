"""Control flow in CUDA graphs: recorded once, and decided by data at each replay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torch_rtx
from tests.backend.test_control_flow import LOOP, Model, condition, decided
from tests.doubles.fake_conditionals import ConditionalDriver, install_conditionals
from tests.doubles.fake_graphs import DEVICE, SIZES, FakeGraph, add, adders, program
from torch_rtx.irparse import parse
from torch_rtx.runtime import cudagraph
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.cudagraph import GraphPool, why_not

# Doubles x while its sum is below 100, and adds a kernel's x + x to it once.
LOOPING = """
  input x: f32[s]
  t: f32[()] = extern aten.sum.default(self=x)
  p: bool[()] = extern aten.lt.Scalar(self=t, other=100)
  q: bool[()], y: f32[s] = fallback torch_rtx.while_loop(state=[p, x], operands=[]) graph fused {
    dim s = 1, 64, 1
    input a: bool[()]
    input b: f32[s]
    c: f32[s] = extern aten.mul.Scalar(self=b, other=2)
    d: f32[()] = extern aten.sum.default(self=c)
    e: bool[()] = extern aten.lt.Scalar(self=d, other=100)
    return [e, c]
  }
  z: f32[s] = kernel k(in0=y, in1=y) KERNEL
  return [z]"""
# Each pass keeps what was there before it: of state that moves, nothing is overwritten before it is read.
MOVING = """
  input x: f32[s]
  t: f32[()] = extern aten.sum.default(self=x)
  p: bool[()] = extern aten.lt.Scalar(self=t, other=100)
  q: bool[()], y: f32[s], z: f32[s] = fallback torch_rtx.while_loop(state=[p, x, x], operands=[]) graph fused {
    dim s = 1, 64, 1
    input a: bool[()]
    input b: f32[s]
    input c: f32[s]
    d: f32[s] = extern aten.add.Tensor(self=b, other=c)
    e: f32[()] = extern aten.sum.default(self=d)
    f: bool[()] = extern aten.lt.Scalar(self=e, other=100)
    return [f, d, b]
  }
  return [z]"""
# -x where the sum is positive; else 3 x, or 5 x if the sum is below -100.
BRANCHING = """
  input x: f32[s]
  t: f32[()] = extern aten.sum.default(self=x)
  p: bool[()] = extern aten.gt.Scalar(self=t, other=0)
  y: f32[s] = fallback torch_rtx.cond(pred=p, operands=[x, t]) graph import {
    dim s = 1, 64, 1
    input in0: f32[s]
    input in1: f32[()]
    then: f32[s] = fallback torch_rtx.call(operands=[in0, in1]) graph fused {
      dim s = 1, 64, 1
      input a: f32[s]
      input b: f32[()]
      c: f32[s] = extern aten.neg.default(self=a)
      return [c]
    }
    other: f32[s] = fallback torch_rtx.call(operands=[in0, in1]) graph fused {
      dim s = 1, 64, 1
      input a: f32[s]
      input b: f32[()]
      p: bool[()] = extern aten.lt.Scalar(self=b, other=-100)
      y: f32[s] = fallback torch_rtx.cond(pred=p, operands=[a]) graph import {
        dim s = 1, 64, 1
        input in0: f32[s]
        then: f32[s] = fallback torch_rtx.call(operands=[in0]) graph fused {
          dim s = 1, 64, 1
          input a: f32[s]
          c: f32[s] = extern aten.mul.Scalar(self=a, other=5)
          return [c]
        }
        other: f32[s] = fallback torch_rtx.call(operands=[in0]) graph fused {
          dim s = 1, 64, 1
          input a: f32[s]
          c: f32[s] = extern aten.mul.Scalar(self=a, other=3)
          return [c]
        }
        return [then, other]
      }
      return [y]
    }
    return [then, other]
  }
  return [y]"""

# One branch returns its operand, twice; the other one writes elsewhere.
PASSING = """
  input x: f32[s]
  t: f32[()] = extern aten.sum.default(self=x)
  p: bool[()] = extern aten.gt.Scalar(self=t, other=0)
  y: f32[s], z: f32[s] = fallback torch_rtx.cond(pred=p, operands=[x]) graph import {
    dim s = 1, 64, 1
    input in0: f32[s]
    u: f32[s], v: f32[s] = fallback torch_rtx.call(operands=[in0]) graph fused {
      dim s = 1, 64, 1
      input a: f32[s]
      return [a, a]
    }
    u2: f32[s], v2: f32[s] = fallback torch_rtx.call(operands=[in0]) graph fused {
      dim s = 1, 64, 1
      input a: f32[s]
      b: f32[s] = extern aten.neg.default(self=a)
      c: f32[s] = extern aten.mul.Scalar(self=a, other=3)
      return [b, c]
    }
    return [u, v]
  }
  c: f32[s] = extern aten.sub.Tensor(self=y, other=z)
  d: f32[s] = extern aten.add.Tensor(self=c, other=x)
  return [d]"""

# One branch returns one number as often as there are elements.
EXPANDED = """
  input x: f32[s]
  t: f32[()] = extern aten.sum.default(self=x)
  p: bool[()] = extern aten.gt.Scalar(self=t, other=0)
  y: f32[s] = fallback torch_rtx.cond(pred=p, operands=[x]) graph import {
    dim s = 1, 64, 1
    input in0: f32[s]
    u: f32[s] = fallback torch_rtx.call(operands=[in0]) graph fused {
      dim s = 1, 64, 1
      input a: f32[s]
      b: f32[1] = extern aten.sum.dim_IntList(self=a, dim=[0], keepdim=True)
      c: f32[s](0) = view aten.expand.default(self=b, size=[s])
      return [c]
    }
    v: f32[s] = fallback torch_rtx.call(operands=[in0]) graph fused {
      dim s = 1, 64, 1
      input a: f32[s]
      b: f32[s] = extern aten.neg.default(self=a)
      return [b]
    }
    return [u, v]
  }
  return [y]"""

COUNTER = """\
  weight p: bool[()].cpu = graph import {
    p: bool[()].cpu = op aten.full.default(size=[], fill_value=True, dtype='bool', device='cpu')
    return [p]
  }
"""


def looped(x: torch.Tensor) -> torch.Tensor:
    while x.sum() < 100:
        x = x * 2
    return x + x


def moved(x: torch.Tensor) -> torch.Tensor:
    before = x
    while x.sum() < 100:
        x, before = x + before, x
    return before


def passed(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x - 3 * x + x


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x.sum().expand(x.shape) if x.sum() > 0 else -x


def branched(x: torch.Tensor) -> torch.Tensor:
    return -x if x.sum() > 0 else x * (5 if x.sum() < -100 else 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(LOOPING, looped), (MOVING, moved), (PASSING, passed), (BRANCHING, branched), (EXPANDED, expanded)],
)
def test_replays_decide(text: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for any number of passes, none among them, and for each branch."""
    api = ConditionalDriver(SIZES, {"entry": add})
    api.contexts.current = 1100
    install_conditionals(monkeypatch, api)
    graph = program(text)
    compiled = compile_graph(graph, torch.device("cpu"), tactics=adders(graph, api) if "KERNEL" in text else {})
    pool = GraphPool(graph, lambda code, *given: code.run(*given), DEVICE, 4)
    store: Any = SimpleNamespace(generation=0, values=[])
    with torch.no_grad():
        for scale in (1, 1, 50, -1, 0.01, -50):
            x = scale * torch.rand(16)
            if text in (LOOPING, MOVING):
                x = x.abs()
            (result,) = pool("key", compiled, [x], store)
            torch.testing.assert_close(result, expected(x))
    assert (pool.captures, pool.replays) == (1, 5)
    assert "conditional" in FakeGraph.last.kinds()


def test_what_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the host may decide during a capture, those of the device later."""
    monkeypatch.setattr(cudagraph, "driver", object)
    monkeypatch.setattr(cudagraph, "has_conditional_nodes", lambda: True)
    assert why_not(parse(LOOP)) is None
    draws = LOOP.replace("aten.relu.default(self=b)", "aten.rand_like.default(self=b)")
    assert "random" in str(why_not(parse(draws)))
    stacked = LOOP.replace("operands=[]", "operands=[], stacked=True")
    stacked = stacked.replace("q: bool[()], y: f32[2]", "q: bool[3], y: f32[3, 2]")
    assert "the host decides" in str(why_not(parse(stacked)))
    counter = LOOP.replace("  input p: bool[()]\n", "").replace("bool[()]", "bool[()].cpu")
    counter = counter.replace("  input x: f32[2]\n", "  input x: f32[2]\n" + COUNTER)
    assert why_not(parse(counter)) is None
    assert "runs on cpu" in str(why_not(parse(counter.replace("return [y]", "return [q, y]"))))
    monkeypatch.setattr(cudagraph, "has_conditional_nodes", lambda: False)
    assert "no conditional nodes" in str(why_not(parse(LOOP)))


@pytest.mark.gpu
@pytest.mark.parametrize("function", [condition, decided])
def test_on_a_gpu(function: Any) -> None:
    """One CUDA graph, whatever the data decides."""
    model = Model(function).cuda()
    module = torch_rtx.compile(model, (torch.rand(4, 4, device="cuda"),))
    with torch.no_grad():
        module(torch.rand(4, 4, device="cuda"))  # from here on, kernels for this size are compiled
        assert torch_rtx.wait(60)
        for scale in (1.0, 1.0, 1.0, -1.0, 0.001, 20.0):
            x = scale * torch.rand(4, 4, device="cuda")
            torch.testing.assert_close(module(x), model(x))
    stats = module.session.stats()
    assert (stats.captures, stats.no_graphs) == (1, None)
