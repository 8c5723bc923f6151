"""Positions that the body of a kernel computes are compared with sizes before calls use them."""

from __future__ import annotations

import pytest
import torch

from torch_rtx.errors import RtxError
from torch_rtx.irparse import parse
from torch_rtx.runtime.candidate_check import CandidateCheck, InputPool
from torch_rtx.runtime.index_check import limits, numbers_in

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


def test_only_indexing_counts_from_the_end() -> None:
    """A gather at -1 ends the process on a GPU."""
    before = CLAMPED.replace("min=0, max=4", "min=-1, max=-1")
    check_of(CALLS["an index"], before)
    with pytest.raises(RtxError, match="would get positions outside of a dimension of size 5"):
        check_of(CALLS["a gather"], before)


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


@pytest.mark.parametrize("whole", [False, True])
def test_ends_of_groups_ascend(whole: bool) -> None:
    text = """graph fused {
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
    }"""
    (node,) = parse(text.replace("offs=o", f"offs=o, whole={whole}")).nodes
    drawn = torch.stack([CandidateCheck(node, CPU)._inputs[2] for _ in range(20)])
    assert (drawn.diff(dim=1) >= 0).all()
    assert 0 <= drawn.min() < 4 < drawn.max() <= 9
    assert bool((drawn[:, -1] == 9).all()) == whole


WINDOWS = "grad_output=g, self=x, kernel_size=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1], ceil_mode=False"


@pytest.mark.parametrize("dtype", ["i64", "i16"])
def test_places_of_pooled_elements_lie_in_their_windows(dtype: str) -> None:
    """A kernel looks for them there; calls put a gradient wherever they say. Training saves them in few bytes."""
    (node,) = parse(
        """graph fused {
      input g: f32[2, 3, 4, 4](48, 1, 12, 3)
      input x: f32[2, 3, 8, 8](192, 1, 24, 3)
      input i: DTYPE[2, 3, 4, 4](48, 1, 12, 3)
      r: f32[2, 3, 8, 8](192, 1, 24, 3) = kernel k(in0=g, in1=x, in2=i) graph import {
        input g: f32[2, 3, 4, 4](48, 1, 12, 3)
        input x: f32[2, 3, 8, 8](192, 1, 24, 3)
        input i: DTYPE[2, 3, 4, 4](48, 1, 12, 3)
        j: i64[2, 3, 4, 4](48, 1, 12, 3) = op aten._to_copy.default(self=i, dtype='i64')
        r: f32[2, 3, 8, 8](192, 1, 24, 3) = op aten.max_pool2d_with_indices_backward.default(WINDOWS, indices=PLACES)
        return [r]
      }
      return [r]
    }""".replace("WINDOWS", WINDOWS)
        .replace("PLACES", "i" if dtype == "i64" else "j")
        .replace("DTYPE", dtype)
    ).nodes
    drawn = CandidateCheck(node, CPU)._inputs[2]
    assert drawn.stride() == (48, 1, 12, 3)
    rows, columns = drawn // 8, drawn % 8
    windows = 2 * torch.arange(4)
    assert bool(((rows - windows[:, None]).abs() <= 1).all())
    assert bool(((columns - windows).abs() <= 1).all())
    assert len(drawn.unique()) > 16


# The places of a sort are the numbers of elements before each: as many as there are elements if `earlier` is any mask.
SORT = """graph fused {
  input x: i64[8]
  weight earlier: bool[8, 8] = graph import {
    a: i64[8] = op aten.arange.default(end=8, dtype='i64', device='main')
    b: i64[8, 1] = op aten.view.default(self=a, size=[8, 1])
    c: bool[8, 8] = op aten.lt.Tensor(self=a, other=b)
    return [c]
  }
  r: i64[8] = kernel k(in0=x, in1=earlier) graph import {
    input x: i64[8]
    input earlier: bool[8, 8]
    p: i64[8] = op aten.sum.dim_IntList(self=earlier, dim=[1])
    r: i64[8] = op aten.scatter.src(self=x, dim=0, index=p, src=x)
    return [r]
  }
  return [r]
}"""


def test_operands_that_depend_on_nothing_are_what_they_are() -> None:
    graph = parse(SORT)
    (node,), (weight,) = graph.nodes, graph.weights
    assert weight.recipe is not None
    check, pool = CandidateCheck(node, CPU, {"earlier": weight.recipe}), InputPool(CPU)
    runs = check.runs(check.code({}), pool)
    for run in runs:
        assert torch.equal(run.args[0][1], torch.ones(8, 8).tril(-1).bool())
    assert len({run.args[0][1].data_ptr() for run in runs}) == len(runs)


@pytest.mark.parametrize("kind", ["f32", "i64"])
def test_timed_runs_compute_the_positions_that_were_checked(kind: str) -> None:
    (node,) = parse(f"""graph fused {{
      input x: {kind}[64]
      input t: f32[3]
      r: f32[64] = kernel k(in0=x, in1=t) graph import {{
        input x: {kind}[64]
        input t: f32[3]
        a: {kind}[64] = op aten.abs.default(self=x)
        p: i64[64] = op aten._to_copy.default(self=a, dtype='i64')
        r: f32[64] = op aten.index.Tensor(self=t, indices=[p])
        return [r]
      }}
      return [r]
    }}""").nodes
    for _ in range(20):
        try:
            check = CandidateCheck(node, CPU)
        except RtxError:
            continue  # a normal number is above 3
        for run in check.runs(check.code({}), InputPool(CPU)):
            assert torch.equal(run.args[0][0], check._inputs[0])
            run()


def test_numbers_are_no_positions() -> None:
    """Codes of weights may be any integers; what positions, masks and lengths of shifts depend on may not."""
    graph = parse("""graph fused {
      input codes: i8[6, 4]
      input words: i32[6]
      input length: i32[6]
      input mask: i64[6]
      input place: i32[6]
      input x: f32[6, 4]
      v: f32[6, 4] = kernel k(in0=codes, in1=words, in2=length, in3=mask, in4=place, in5=x) graph import {
        input codes: i8[6, 4]
        input words: i32[6]
        input length: i32[6]
        input mask: i64[6]
        input place: i32[6]
        input x: f32[6, 4]
        a: f32[6, 4] = op aten._to_copy.default(self=codes, dtype='f32')
        b: i32[6] = op aten.bitwise_right_shift.Tensor(self=words, other=length)
        c: i32[6] = op aten.bitwise_and.Scalar(self=b, other=15)
        d: f32[6] = op aten._to_copy.default(self=c, dtype='f32')
        e: bool[6] = op aten._to_copy.default(self=mask, dtype='bool')
        f: f32[6] = op aten.masked_fill.Scalar(self=d, mask=e, value=0)
        g: i32[6] = op aten.add.Tensor(self=place, other=1)
        h: f32[6, 4] = op aten.index.Tensor(self=x, indices=[g])
        i: f32[6, 4] = op aten.mul.Tensor(self=a, other=h)
        j: f32[6, 1] = op aten.view.default(self=f, size=[6, 1])
        v: f32[6, 4] = op aten.mul.Tensor(self=i, other=j)
        return [v]
      }
      return [v]
    }""")
    assert numbers_in(graph) == {"codes", "words"}
