"""Gradients of tensors that a modification of scores captures: capture against PyTorch's autograd, and kernels in
Triton's interpreter against the operator's definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as module

import torch_rtx
from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.helpers.flex import Call, alibi, causal, document, from_call, gradients
from torch_rtx.errors import InvalidIR
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.attention_flex_backward import gradient_configs, gradient_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.op_work import FLEX_GRAD_CAPTURED
from torch_rtx.runtime.code import compile_graph
from torch_rtx.score_mods import terms_of
from torch_rtx.targets import Target, arch_of

HEADS, QUERIES, KEYS = 4, 20, 37
SMALL = AttentionConfig(16, 16, 4, 1, 16)
IDS = (torch.arange(KEYS) % 2).expand(2, KEYS).contiguous()
torch.manual_seed(2)


def parameter(*size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(size).to(dtype))


TABLE, SLOPES, NUMBER = parameter(HEADS, 9), parameter(HEADS), nn.Parameter(torch.tensor(0.5))
ROWS, COLUMNS, BIAS = parameter(QUERIES), parameter(KEYS), parameter(HEADS, QUERIES, KEYS)
NARROW, MATRIX = parameter(HEADS, dtype=torch.bfloat16), parameter(3, 3)
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3},
}
MODS: dict[str, Callable[..., Tensor]] = {
    "table, slopes, number": lambda s, b, h, q, k: (
        NUMBER * s + TABLE[h, (q - k).clamp(-4, 4) + 4] + TABLE[h, -(k % 9)] * s + SLOPES.exp()[-1 - h] * (k - q)
    ),
    "rows, columns, all": lambda s, b, h, q, k: torch.where(
        k != 2, s * NARROW[h] + ROWS[q] * COLUMNS[k] + BIAS[h, q, k] * b, -float("inf")
    ),
    "products": lambda s, b, h, q, k: s + (MATRIX @ MATRIX)[q % 3, k % 3] + TABLE.sum() * k / 10,
}
CALLS = {
    "table, slopes, number": Call(mask_mod=document(IDS), sizes=(2, HEADS, 2, QUERIES, KEYS, 16), block=16),
    "rows, columns, all": Call(
        mask_mod=causal, sizes=(2, HEADS, HEADS, QUERIES, KEYS, 24), block=16, dtype=torch.bfloat16
    ),
    "products": Call(sizes=(1, HEADS, 2, QUERIES, KEYS, 16)),
}
CAPTURED = [TABLE, SLOPES, NUMBER, ROWS, COLUMNS, BIAS, NARROW, MATRIX]


@pytest.mark.parametrize("name", ["table, slopes, number", "rows, columns, all"])
def test_kernels(name: str) -> None:
    """Sums over rows, over columns, and at places of each score; of heads that share keys; with lists of blocks."""
    call = CALLS[name]
    call.score_mod = MODS[name]
    _, graph, given = gradients(call)
    body, tensors = from_call(graph, given, FLEX_GRAD_CAPTURED)
    (node,) = body.nodes
    kernel = gradient_kernel(region(body), "gradient", SMALL)
    start = torch.randn(tensors[0].shape)  # the kernel adds to what is there
    found = start.clone()
    at = body.inputs.index(node.arg("self"))  # type: ignore[arg-type]
    tensors = [found if index == at else one for index, one in enumerate(tensors)]
    run(kernel, [*tensors, found])
    ((definition, exact),) = _by_definition(body, tensors, start, at)
    assert_right([found], [definition], [exact])


def _by_definition(body: Any, tensors: list[Tensor], start: Tensor, at: int) -> list[tuple[Tensor, Tensor]]:
    results = []
    for wide in (False, True):
        given = [start if index == at else one for index, one in enumerate(tensors)]
        given = [one.double() if wide and one.is_floating_point() else one for one in given]
        (result,) = compile_graph(body, torch.device("cpu"))(given, ())
        results.append(result)
    return [(results[0], results[1])]


@pytest.mark.parametrize("name", ["rows, columns, all", "products"])
def test_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step has the gradients of autograd through a matrix of scores, with the dtype of each tensor."""
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    call = CALLS[name]
    call.score_mod, call.dtype = MODS[name], torch.float32
    operands = [one.requires_grad_() for one in call.operands()]
    factors = torch.arange(operands[0].numel()).view(operands[0].shape).cos()
    read = [*operands, *CAPTURED]
    torch._dynamo.reset()
    step = torch.compile(call.function(), backend="rtx", options={"require_full_compilation": True})
    found = torch.autograd.grad((step(*operands) * factors).sum(), read, allow_unused=True)
    expected = torch.autograd.grad((_written_out(call, *operands) * factors).sum(), read, allow_unused=True)
    assert [one is None for one in found] == [one is None for one in expected]
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, **({} if right is None else TOLERANCES[right.dtype]))


def _written_out(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The call as products and a softmax."""
    batch, heads, queries, width = query.shape
    times = heads // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    sizes = (batch, 1, 1, 1), (heads, 1, 1), (queries, 1), (key.shape[2],)
    b, h, q, k = (torch.arange(shape[0]).view(shape) for shape in sizes)
    assert call.score_mod is not None
    scores = call.score_mod(query @ key.mT * width**-0.5, b, h, q, k)
    if call.mask_mod is causal:
        scores = torch.where(q >= k, scores, -torch.inf)
    elif call.mask_mod is not None:
        scores = torch.where(IDS[b, q] == IDS[b, k], scores, -torch.inf)
    return scores.softmax(-1) @ value


def test_tiles_are_compiled() -> None:
    call = Call(alibi(SLOPES), causal, (1, HEADS, 2, 128, 128, 64), 128)
    _, graph, given = gradients(call)
    body, _ = from_call(graph, given, FLEX_GRAD_CAPTURED)
    kernel = gradient_kernel(region(body), "gradient", gradient_configs(region(body), arch_of(90))[0])
    assert kernel.source.count("tl.atomic_add") == 1
    for built in compile_kernels([(kernel, Target(90))]).values():
        assert built.problem is None


def test_what_is_no_sum_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is named."""
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    call = Call(lambda s, b, h, q, k: s * SLOPES.logcumsumexp(0)[h], sizes=(1, 4, 4, 16, 16, 16), dtype=torch.float32)
    operands = [one.requires_grad_() for one in call.operands()]
    torch._dynamo.reset()
    options = {"require_full_compilation": True}
    result = torch.compile(call.function(), backend="rtx", options=options)(*operands).sum()
    with pytest.raises(torch_rtx.PartitionError, match="flex_attention_backward: a gradient of a captured tensor that"):
        result.backward()


def test_texts_that_fit_no_tensor() -> None:
    text = "graph import {\n  input q: i32[()]\n  input g: f32[()]\n  return [g, q]\n}"
    _, (term,) = terms_of(text, [7, 3], [1, 1], [1])
    assert (term.offset, term.size) == (7, (3,))
    for sizes, ranks, targets in (
        ([7], [2], [0]),
        ([7], [1], [1]),
        ([7, 3], [2], [0]),
        ([7], [1], []),
        ([-7], [1], [0]),
    ):
        with pytest.raises(InvalidIR):
            terms_of(text, sizes, ranks, targets)
