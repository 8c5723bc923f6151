"""Positions that the body of a kernel computes are compared with sizes before calls use them."""

from __future__ import annotations

import pytest
import torch

from torch_rtx.errors import RtxError
from torch_rtx.irparse import parse
from torch_rtx.runtime.candidate_check import CandidateCheck
from torch_rtx.runtime.index_check import limits

CPU = torch.device("cpu")
# Where the mask is not that of the program, the last position stays -100.
MASKED = """
  p: i64[8] = op aten.constant_pad_nd.default(self=labels, pad=[0, 1], value=-100)
  i: i64[8] = op aten.masked_fill.Scalar(self=p, mask=mask, value=0)
  j: i64[8, 1] = op aten.unsqueeze.default(self=i, dim=1)
"""
CLAMPED = """
  p: i64[8] = op aten.constant_pad_nd.default(self=labels, pad=[0, 1], value=-100)
  i: i64[8] = op aten.clamp.default(self=p, min=0, max=4)
  j: i64[8, 1] = op aten.unsqueeze.default(self=i, dim=1)
"""
CALLS = {
    "a gather": "r: f16[8, 1] = op aten.gather.default(self=x, dim=1, index=j)",
    "a scatter": "r: f16[8, 5] = op aten.scatter.value(self=x, dim=-1, index=j, value=1.0)",
    "an index": "r: f16[8, 8] = op aten.index.Tensor(self=x, indices=[None, i])",
    "an embedding": "r: f16[8, 5] = op aten.embedding.default(weight=x, indices=i)",
    "the gradient of one": "r: f16[5, 5] = op aten.embedding_dense_backward.default("
    "grad_output=x, indices=i, num_weights=5, padding_idx=-1, scale_grad_by_freq=False)",
}


def check_of(call: str, positions: str) -> CandidateCheck:
    result = call.partition(" = ")[0].removeprefix("r: ")
    (node,) = parse(f"""graph fused {{
      input x: f16[8, 5]
      input labels: i64[7]
      input mask: bool[8]
      r: {result} = kernel k(in0=x, in1=labels, in2=mask) graph import {{
        input x: f16[8, 5]
        input labels: i64[7]
        input mask: bool[8]
        {positions.strip()}
        {call}
        return [r]
      }}
      return [r]
    }}""").nodes
    return CandidateCheck(node, CPU)


@pytest.mark.parametrize("name", CALLS)
def test_positions_outside_are_an_error_and_not_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such a call ends the process."""
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **_: torch.zeros(size, dtype=torch.int64))  # no mask
    with pytest.raises(RtxError, match="would get positions outside of a dimension of size (5|8)"):
        check_of(CALLS[name], MASKED)


@pytest.mark.parametrize("name", CALLS)
def test_positions_inside(name: str) -> None:
    check = check_of(CALLS[name], CLAMPED)
    assert check.problem(check.code({})) is None


def test_positions_are_drawn_from_all_of_a_table() -> None:
    """An input that is nothing but positions, and none that is a number, too."""
    graph = parse("""graph fused {
      input table: f32[1000, 4]
      input bins: f32[300, 4]
      input i: i32[7, 1]
      input j: i64[7]
      input k: i64[7]
      input n: i64[7]
      input g: f32[7, 4]
      v: f32[1000, 4] = kernel k(in0=table, in1=i, in2=g, in3=n) graph import {
        input table: f32[1000, 4]
        input i: i32[7, 1]
        input g: f32[7, 4]
        input n: i64[7]
        a: i64[7, 1] = op aten._to_copy.default(self=i, dtype='i64')
        b: i64[7] = op aten.view.default(self=a, size=[7])
        m: bool[7] = op aten.eq.Scalar(self=b, other=3)
        o: bool[7, 1] = op aten.unsqueeze.default(self=m, dim=1)
        h: f32[7, 4] = op aten.masked_fill.Scalar(self=g, mask=o, value=0)
        v: f32[1000, 4] = op aten.index_put.default(self=table, indices=[b], values=h, accumulate=True)
        return [v]
      }
      w: f32[300, 4] = extern aten.index_add.default(self=bins, dim=0, index=j, source=g)
      x: f32[1000, 4] = extern aten.index_add.default(self=v, dim=0, index=j, source=g)
      l: i64[7] = extern aten.add.Tensor(self=k, other=1)
      y: f32[7, 4] = extern aten.index_select.default(self=table, dim=0, index=k)
      return [w, x, y, l]
    }""")
    assert limits(graph) == {"i": 1000, "j": 300}


PUTS = {
    "index_put": ("i: i64[4]", "aten.index_put.default(self=x, indices=[i], values=s)"),
    "index_copy": ("i: i64[4]", "aten.index_copy.default(self=x, dim=0, index=i, source=s)"),
    "scatter": ("i: i64[4, 6]", "aten.scatter.src(self=x, dim=0, index=i, src=s)"),
}


@pytest.mark.parametrize("name", PUTS)
def test_positions_of_values_that_are_put_in_place_differ(name: str) -> None:
    """Else two runs of the calls need not agree."""
    index, call = PUTS[name]
    (node,) = parse(f"""graph fused {{
      input x: f32[5, 6]
      input {index}
      input s: f32[4, 6]
      r: f32[5, 6] = kernel k(in0=x, in1=i, in2=s) graph import {{
        input x: f32[5, 6]
        input {index}
        input s: f32[4, 6]
        r: f32[5, 6] = op {call}
        return [r]
      }}
      return [r]
    }}""").nodes
    for _ in range(3):
        positions = CandidateCheck(node, CPU)._inputs[1].t().reshape(-1, 4)
        assert all(len(set(row)) == 4 for row in positions.tolist())


def test_ends_of_groups_ascend() -> None:
    (node,) = parse("""graph fused {
      input x: f32[9, 4]
      input w: f32[6, 4, 2]
      input o: i32[6]
      r: f32[9, 2] = kernel k(in0=x, in1=w, in2=o) graph import {
        input x: f32[9, 4]
        input w: f32[6, 4, 2]
        input o: i32[6]
        r: f32[9, 2] = op torch_rtx.grouped_mm.default(self=x, mat2=w, offs=o)
        return [r]
      }
      return [r]
    }""").nodes
    drawn = torch.stack([CandidateCheck(node, CPU)._inputs[2] for _ in range(20)])
    assert (drawn.diff(dim=1) >= 0).all()
    assert 0 <= drawn.min() < 4 < drawn.max() <= 9
