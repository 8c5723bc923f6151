"""Recipes with fewer passes over memory give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.runtime.test_batched_recipes import EDGES, recipe
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse
from torch_rtx.runtime.batched_recipes import batched
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.recipe_passes import fewer_passes, joined_inputs
from torch_rtx.runtime.recipes import Form
from torch_rtx.runtime.watch import same_bits

CPU = torch.device("cpu")
QUANTIZED = """
  a: f32[5, 7] = op aten._to_copy.default(self=w, dtype='f32')
  v: f32[5, 1, 7] = op aten.view.default(self=a, size=[5, 1, 7])
  m: f32[5, 1, 7] = op aten.abs.default(self=v)
  x: f32[5, 1, 1] = op aten.amax.default(self=m, dim=[-1], keepdim=True)
  c: f32[5, 1, 1] = op aten.clamp.default(self=x, min=1e-30)
  s: f32[5, 1, 1] = op aten.div.Tensor(self=c, other=127)
  q: f32[5, 1, 7] = op aten.div.Tensor(self=v, other=s)
  r: f32[5, 1, 7] = op aten.round.default(self=q)
  l: f32[5, 1, 7] = op aten.clamp.default(self=r, min=-127, max=127)
  i: i8[5, 1, 7] = op aten._to_copy.default(self=l, dtype='i8')
  f: f32[5, 1, 7] = op aten._to_copy.default(self=i, dtype='f32')
  b: i8[5, 1, 7] = op aten._to_copy.default(self=f, dtype='i8')
  u: i8[5, 1, 7] = op aten.bitwise_xor.Scalar(self=b, other=127)"""
FEWER = """
  v_narrow: f16[5, 1, 7] = op aten.view.default(self=w, size=[5, 1, 7])
  x: f32[5, 1, 1] = op aten.linalg_vector_norm.default(self=v_narrow, ord=inf, dim=[-1], keepdim=True, dtype='f32')
  c: f32[5, 1, 1] = op aten.clamp.default(self=x, min=1e-30)
  s: f32[5, 1, 1] = op aten.div.Tensor(self=c, other=127)
  q: f32[5, 1, 7] = op aten.div.Tensor(self=v_narrow, other=s)
  r: f32[5, 1, 7] = op aten.round.default(self=q)
  l: f32[5, 1, 7] = op aten.clamp.default(self=r, min=-127, max=127)
  i: i8[5, 1, 7] = op aten._to_copy.default(self=l, dtype='i8')
  u: i8[5, 1, 7] = op aten.bitwise_xor.Scalar(self=i, other=127)"""
CAST = "a: f32[5, 7] = op aten._to_copy.default(self=w, dtype='f32')\n"
MOST = CAST + "m: f32[5, 7] = op aten.abs.default(self=a)\n  x: f32[()] = op aten.amax.default(self=m)\n"
# What stays as it is, but for magnitudes.
KEPT = {
    "another operand without dimensions": f"{MOST}  q: f32[5, 7] = op aten.mul.Tensor(self=a, other=x)",
    "two casts": f"{CAST}  q: f32[5, 7] = op aten.mul.Tensor(self=a, other=a)",
    "a number": f"{CAST}  q: f32[5, 7] = op aten.mul.Tensor(self=a, other=0.1)",
    "another call": f"{CAST}  q: f32[5, 7] = op aten.sin.default(self=a)",
    "a cast of what was expanded": """
        e: f16[2, 5, 7](0, 7, 1) = op aten.expand.default(self=w, size=[2, 5, 7])
        a: f32[2, 5, 7] = op aten._to_copy.default(self=e, dtype='f32')
        v: f32[10, 7] = op aten.view.default(self=a, size=[10, 7])
        c: f32[10, 7] = op aten.neg.default(self=v)""",
}


def members(dtype: torch.dtype, device: torch.device = CPU) -> list[torch.Tensor]:
    """Four matrices, with what is special among their elements."""
    found = [torch.randn(5, 7) * 10.0**power for power in (-6, 0, 0, 2)]
    found[2].view(-1)[: len(EDGES)] = EDGES
    found[1][3, 3] = torch.nan
    return [one.to(device, dtype) for one in found]


def ran(graph: Graph, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results, on the device of the operands."""
    return compile_graph(graph, given[0].device)(list(given), ())


def test_calls_that_are_left() -> None:
    single = recipe(QUANTIZED, "f16[5, 7]")
    assert str(fewer_passes(single)) == str(recipe(FEWER, "f16[5, 7]"))


def check_bits(device: torch.device) -> None:
    """Those of members alone and together are those of the calls as they were."""
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        for calls in (QUANTIZED, *KEPT.values()):
            single, given = recipe(calls.replace("f16", name), f"{name}[5, 7]"), members(dtype, device)
            want = [ran(single, [one])[0] for one in given]
            alone = [ran(fewer_passes(single), [one])[0] for one in given]
            assert all(map(same_bits, alone, want))
            graph = batched(single)
            if graph is not None:
                (found,) = ran(fewer_passes(graph), [torch.stack(given)])
                assert all(map(same_bits, found.unbind(), want))


def test_bits() -> None:
    check_bits(CPU)


@pytest.mark.gpu
def test_bits_on_a_gpu(gpu: torch.device) -> None:
    check_bits(gpu)


@pytest.mark.parametrize("calls", KEPT.values(), ids=KEPT)
def test_calls_that_stay(calls: str) -> None:
    single = recipe(calls, "f16[5, 7]")
    ops = {node.op for node in fewer_passes(single).nodes}
    assert "aten._to_copy.default" in ops
    if "amax" not in calls:
        assert str(fewer_passes(single)) == str(single)


def test_a_cast_that_is_a_result_stays() -> None:
    single = parse(f"graph import {{\n  input w: i8[5, 7]\n  {CAST}  return [a]\n}}")
    assert str(fewer_passes(single)) == str(single)


def test_a_result_is_no_parameter() -> None:
    back = "b: f16[5, 7] = op aten._to_copy.default(self=a, dtype='f16')"
    single = recipe(f"{CAST}  {back}", "f16[5, 7]")
    assert str(fewer_passes(single)) == str(single)


CONCATENATED = """graph import {
  input a: f16[2, 3]
  input s: f32[2, 1]
  input b: f16[4, 3]
  c: f16[6, 3] = op aten.cat.default(tensors=[b, a], dim=0)
  n: f16[6, 3] = op aten.neg.default(self=c)
  m: f32[2, 1] = op aten.neg.default(self=s)
  return [n, m]
}"""


def test_concatenated_parameters_are_stacked_once() -> None:
    form = Form(parse(CONCATENATED), CPU)
    graph = batched(parse(CONCATENATED))
    assert graph is not None
    assert form.together is not None
    graph, joined = joined_inputs(graph)
    assert joined == [(1,), (2, 0)]
    assert [node.op for node in graph.nodes] == ["aten.neg.default"] * 2
    given = [[torch.randn(2, 3).half(), torch.randn(2, 1), torch.randn(4, 3).half()] for _ in range(3)]
    found = form.together(given)
    for index, own in enumerate(given):
        assert all(map(same_bits, (one[index] for one in found), form.code(own, ())))


def test_parameters_that_are_read_again_are_stacked_alone() -> None:
    again = "neg.default(self=s)\n  k: f16[4, 3] = op aten.neg.default(self=b)"
    graph = batched(parse(CONCATENATED.replace("neg.default(self=s)", again).replace("[n, m]", "[n, m, k]")))
    assert graph is not None
    assert joined_inputs(graph) == (graph, [(0,), (1,), (2,)])
