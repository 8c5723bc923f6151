"""The comparison of a kernel's results with those in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rtx.errors import RtxError
from torch_rtx.irparse import parse
from torch_rtx.runtime import candidate_check, reference
from torch_rtx.runtime.benchmark import RUNS
from torch_rtx.runtime.candidate_check import LINE, CandidateCheck, InputPool, relative_error


class LargestDouble(TorchDispatchMode):
    """The most elements that a tensor of float64 has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("shape", [(), (0,), (7,), (16, 33), (3, 64, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_errors_are_those_of_the_whole(
    shape: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate_check, "PIECE", 64)
    right = torch.randn(shape)
    mine = (right + 0.01 * torch.randn(shape)).bfloat16()
    if transposed:
        mine, right = (tensor.permute(tuple(range(tensor.dim()))[::-1]) for tensor in (mine, right))
    with LargestDouble() as doubles:
        found = relative_error(mine, right)
    expected = (mine.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert doubles.most <= 64


def test_what_is_not_finite_is_so_in_both() -> None:
    right = torch.ones(8)
    right[3], mine = torch.inf, right.clone()
    assert relative_error(mine, right) == float("inf")
    mine[3] = -torch.inf
    assert relative_error(mine, right) == 0
    mine[4] = torch.nan
    assert relative_error(mine, right) == float("inf")


CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.9, 1.0])
def test_timed_runs_read_more_than_a_cache_holds(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, all of the pool, whatever the size of an input is."""
    size = 64 * LINE
    monkeypatch.setattr(candidate_check, "ROTATED_ON_CPU", size)
    pool, rows = InputPool(CPU), int(share * size) // 8
    like = torch.empty(2, rows).t()
    begin = pool.like(torch.empty(1)).untyped_storage().data_ptr()
    read = torch.zeros(size + LINE, dtype=torch.bool)
    for _ in range(24):
        found = pool.like(like)
        assert (found.shape, found.stride()) == ((rows, 2), (1, rows))
        start = found.data_ptr() - begin
        assert start % LINE == 0
        assert start + like.nbytes <= size
        read[start : start + -(-like.nbytes // LINE) * LINE] = True
    assert bool(read[:size].all())


def test_timed_runs_take_no_memory_of_their_own() -> None:
    graph = parse(
        """graph fused {
  input a: f32[8, 16]
  input b: bf16[16, 4](1, 16)
  input i: i64[8]
  v0: f32[8, 16] = kernel mixed(in0=a, in1=b, in2=i) graph import {
    input in0: f32[8, 16]
    input in1: bf16[16, 4](1, 16)
    input in2: i64[8]
    p0: f32[8, 16] = op aten.index.Tensor(self=in0, indices=[in2])
    return [p0]
  }
  return [v0]
}"""
    )
    check, pool = CandidateCheck(graph.nodes[0], CPU), InputPool(CPU)
    state = torch.get_rng_state()
    first, *others = [run.args[0] for run in check.runs(check.code({}), pool)]
    assert torch.equal(state, torch.get_rng_state())
    assert len(others) == RUNS - 1
    memory = pool.like(torch.empty(1)).untyped_storage().data_ptr()
    for a, b, i in (first, *others):
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() == memory
        assert (a.shape, b.shape, b.stride()) == ((8, 16), (16, 4), (1, 16))
        assert bool(a.isfinite().all())
        assert bool(b.isfinite().all())
        assert 0 <= int(i.min()) <= int(i.max()) < 8  # they are positions
    for index in range(3):
        assert len({given[index].data_ptr() for given in (first, *others)}) == RUNS


def test_what_the_pool_can_not_hold() -> None:
    pool = InputPool(CPU)
    for tensor in (torch.ones(3, dtype=torch.int32), torch.ones(0), torch.ones(pool.size)):
        assert not pool.holds(tensor)
    assert pool.holds(torch.ones(pool.size // 4))


def test_a_backward_gets_what_its_forward_saves() -> None:
    """Of random numbers in its place a library makes wrong gradients, by which any would pass."""
    (node,) = parse(
        """graph fused {
      input x: f32[2, 4, 6, 8]
      input o: f32[2, 4, 6, 8]
      input s: f32[2, 4, 6](24, 1, 4)
      d: f32[2, 4, 6, 8] = kernel k(in0=x, in1=o, in2=s) graph import {
        input a: f32[2, 4, 6, 8]
        input b: f32[2, 4, 6, 8]
        input c: f32[2, 4, 6](24, 1, 4)
        y: f32[2, 4, 6, 8] = op aten.neg.default(self=a)
        d: f32[2, 4, 6, 8], e: f32[2, 4, 6, 8], f: f32[2, 4, 6, 8], g: f32[0] = op torch_rtx.attention_backward.default(
        grad_out=y, query=y, key=a, value=a, attn_mask=None, out=b, logsumexp=c, library='cpu')
        return [d]
      }
      return [d]
    }""".replace("(\n        grad", "(grad")
    ).nodes
    check = CandidateCheck(node, torch.device("cpu"))
    x, out, _ = check._inputs
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(-x, x, x))
    assert max(one.value for one in check._distances(check.expected)[0]) < 5e-6


QUANTIZED = """graph fused {
  input x: f16[64, 96]
  input y: f16[64, 96]
  a: f16[64, 96], q: i8[64, 96] = kernel k(in0=x, in1=y) graph import {
    input x: f16[64, 96]
    input y: f16[64, 96]
    a: f16[64, 96] = op aten.mul.Tensor(self=x, other=y)
    w: f32[64, 96] = op aten._to_copy.default(self=a, dtype='f32')
    s: f32[64, 96] = op aten.mul.Tensor(self=w, other=30.0)
    r: f32[64, 96] = op aten.round.default(self=s)
    b: f32[64, 96] = op aten.clamp.default(self=r, min=-127, max=127)
    q: i8[64, 96] = op aten._to_copy.default(self=b, dtype='i8')
    return [a, q]
  }
  return [a, q]
}"""


def test_rounded_integers_differ_as_often_as_eagers_do() -> None:
    """A kernel keeps in float32 what calls round to halves first, so that both round some numbers otherwise."""
    check = CandidateCheck(parse(QUANTIZED).nodes[0], CPU)

    def kernel(inputs: Any, symbols: Any) -> list[torch.Tensor]:
        x, y = (tensor.float() for tensor in inputs)
        return [(x * y).half(), (x * y * 30).round().clamp(-127, 127).to(torch.int8)]

    def wrong(inputs: Any, symbols: Any) -> list[torch.Tensor]:
        product, rounded = kernel(inputs, symbols)
        return [product, torch.where(torch.rand(rounded.shape) < 0.05, rounded + 1, rounded)]

    differs = check._distances(check.expected)[0][1].value
    assert differs > candidate_check.MIDWAY  # that is what midway between two integers does not explain
    assert check.problem(kernel) is None  # type: ignore[arg-type]
    assert "output 1 differs" in (check.problem(wrong) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "most"), [("f32", 127), ("f16", 7)])
def test_integers_are_all_that_results_can_bear(dtype: str, most: int) -> None:
    """Codes of int8 use all their bits, unless sums of products would leave the range of the result."""
    (node,) = parse(f"""graph fused {{
      input x: i8[32, 4096]
      input y: i8[4096, 32]
      z: {dtype}[32, 32] = kernel k(in0=x, in1=y) graph import {{
        input x: i8[32, 4096]
        input y: i8[4096, 32]
        a: i32[32, 32] = op aten._int_mm.default(self=x, mat2=y)
        z: {dtype}[32, 32] = op aten._to_copy.default(self=a, dtype='{dtype}')
        return [z]
      }}
      return [z]
    }}""").nodes
    check = CandidateCheck(node, CPU)
    assert [int(x.max()) for x in check._inputs] == [most] * 2
    assert bool(check.expected[0].isfinite().all())
    assert float(check.expected[0].abs().min()) != float(check.expected[0].abs().max())


@pytest.mark.parametrize("dtype", ["f16", "f8e5m2"])
def test_what_overflows_in_calls_alone_hides_no_error(dtype: str) -> None:
    """Calls round what a kernel keeps in float32, and results that float64 holds: elements that overflow there
    are not compared, and all others are."""
    (node,) = parse(f"""graph fused {{
      input x: f16[64, 64]
      r: {dtype}[64, 64] = kernel k(in0=x) graph import {{
        input x: f16[64, 64]
        a: f16[64, 64] = op aten.mul.Tensor(self=x, other=32768.0)
        b: f16[64, 64] = op aten.mul.Tensor(self=a, other=0.0078125)
        r: {dtype}[64, 64] = op aten._to_copy.default(self=b, dtype='{dtype}')
        return [r]
      }}
      return [r]
    }}""").nodes
    check = CandidateCheck(node, CPU)

    def kernel(inputs: Any, _: Any, factor: Any = 256) -> list[torch.Tensor]:
        return [(factor * inputs[0].float()).to(check.expected[0].dtype)]

    assert not bool(check.expected[0].float().isfinite().all())
    assert check.problem(kernel) is None  # type: ignore[arg-type]
    assert check.problem(check.code({})) is None
    wrong = check.problem(lambda inputs, _: kernel(inputs, _, torch.where(inputs[0].abs() < 1, 128, 256)))  # type: ignore[arg-type]
    assert "relative error" in (wrong or "")


def test_calls_that_do_not_run_in_float64_are_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (node,) = parse(
        """graph fused {
      input x: f16[64, 64]
      r: f16[64, 64] = kernel k(in0=x) graph import {
        input x: f16[64, 64]
        r: f16[64, 64] = op aten.exp.default(self=x)
        return [r]
      }
      return [r]
    }"""
    ).nodes

    def lacking(graph: Any) -> Any:
        raise NotImplementedError("not implemented for 'Double'\nand more")

    monkeypatch.setattr(reference, "in_float64", lacking)
    check = CandidateCheck(node, CPU)
    assert check.problem(check.code({})) is None
    assert "relative error" in (check.problem(lambda inputs, _: [1.01 * inputs[0].exp()]) or "")  # type: ignore[arg-type]
    assert "k is compared with its calls, which fail in float64: not implemented for 'Double'" in caplog.text
    monkeypatch.setattr(reference, "in_float64", _out_of_memory)
    check = CandidateCheck(node, CPU)
    with pytest.raises(RtxError, match="out of memory"):
        check.problem(lambda inputs, _: [inputs[0].exp()])  # type: ignore[arg-type]


def _out_of_memory(graph: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")
