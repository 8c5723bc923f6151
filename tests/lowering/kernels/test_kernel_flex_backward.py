"""The kernels of the gradients of `flex_attention` in Triton's interpreter, against PyTorch's own function."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._higher_order_ops.flex_attention import math_attention

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.helpers.flex import Call, alibi, causal, document, from_call, gradients, soft_cap, weighted
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Node, TensorType, attr_values
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.attention_flex_backward import gradient_configs, gradient_kernel
from torch_rtx.lowering.kernels.attention_tiles import in_order
from torch_rtx.lowering.kernels.index import constant
from torch_rtx.lowering.kernels.region import region
from torch_rtx.op_work import FLEX_GRAD_KEY_VALUE, FLEX_GRAD_QUERY
from torch_rtx.runtime.candidate_check import CandidateCheck
from torch_rtx.targets import Target, arch_of

CPU = torch.device("cpu")
SMALL = AttentionConfig(16, 16, 4, 1, 16)
# Products begin before others need what they compute, as with wgmma.
OVERLAPS = "both lists, rows without keys", "alibi, shared heads in two pieces"
torch.manual_seed(1)
SLOPES = torch.rand(4)
IDS = (torch.arange(45) // 13).expand(2, 45).contiguous()
CALLS = {
    "hidden keys": Call(
        lambda s, b, h, q, k: torch.where(q >= k, s * s, -float("inf")),
        sizes=(1, 2, 2, 20, 37, 16),
        dtype=torch.bfloat16,
    ),
    "documents, odd lengths": Call(mask_mod=document(IDS), sizes=(2, 2, 2, 33, 45, 16)),
    "alibi, shared heads in two pieces": Call(alibi(SLOPES), causal, (1, 4, 1, 40, 40, 24)),
    "both lists, rows without keys": Call(
        mask_mod=lambda b, h, q, k: (q >= k) & (q - k < 75) & (q != 5) & ((q < 128) | (q >= 160)),
        sizes=(1, 4, 2, 192, 128, 16),
        block=32,
    ),
    "rows without keys": Call(soft_cap, lambda b, h, q, k: (q > 20) & (k > 1), (1, 2, 1, 40, 40, 16), statistics=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_right(name: str) -> None:
    call = CALLS[name]
    operands, graph, given = gradients(call)
    found = []
    for op in (FLEX_GRAD_QUERY, FLEX_GRAD_KEY_VALUE):
        body, tensors = from_call(graph, given, op)
        config = replace(SMALL, overlaps=name in OVERLAPS)
        kernel = gradient_kernel(region(body), "gradient", config)
        outputs = []
        for value in attr_values(body.outputs):
            assert isinstance(value.type, TensorType)
            outputs.append(torch.full([int(size) for size in value.type.shape], torch.nan, dtype=call.dtype))
        run(kernel, [*tensors, *outputs])
        found += outputs
    assert_right(found, eager(call, operands), eager(call, [one.double() for one in operands]))


def eager(call: Call, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients by PyTorch's definition, which on a CPU has no gradient of its own."""
    width = call.sizes[-1]
    given = [one.clone().requires_grad_() for one in operands]
    score_mod = call.score_mod or (lambda score, *_: score)
    mask_mod = call.mask_mod or (lambda b, *_: b.new_ones((), dtype=torch.bool))
    out, statistic, _ = math_attention(*given, score_mod, (mask_mod,), width**-0.5, {})
    listed = (out, statistic * torch.log(torch.tensor(2.0))) if call.statistics else (out,)
    return list(torch.autograd.grad(weighted(listed), given))


@pytest.mark.parametrize("sizes", [(3, 6), (1, 7), (2, 16)])
def test_order_of_programs(sizes: tuple[int, int]) -> None:
    """Each block of each group has a program, and the first blocks of a few groups start before any other."""
    groups = math.prod(sizes)
    order = [str(one) for one in in_order(constant(5), tuple(map(constant, sizes)), 8)]
    found = [tuple(eval(text, {"program": program}) for text in order) for program in range(5 * groups)]
    assert sorted(found) == [(block, group) for block in range(5) for group in range(groups)]
    near = max(divisor for divisor in range(1, 9) if groups % divisor == 0)
    assert found[: near + 1] == [*((0, group) for group in range(near)), (1, 0)]


def test_tiles_lie_within_blocks() -> None:
    """They are compiled for a target; and the gradient of keys that batches share, a sum over these, stays a call."""
    _, graph, given = gradients(Call(soft_cap, causal, (2, 2, 1, 128, 128, 64), 128))
    body, _ = from_call(graph, given, FLEX_GRAD_KEY_VALUE)
    configs = gradient_configs(region(body), arch_of(90))
    assert all(128 % one.rows == 128 % one.keys == 0 for one in configs)
    with pytest.raises(Unsupported, match="divide"):
        gradient_kernel(region(body), "gradient", AttentionConfig(64, 96, 4, 1))
    assert [one.num_stages for one in configs[:3]] == [2, 3, 3]  # the first shares a multiprocessor, which hides loads
    kernel = gradient_kernel(region(body), "gradient", configs[0])
    for built in compile_kernels([(kernel, Target(90))]).values():
        assert built.problem is None
    shared = parse(str(body).replace("f16[2, 1, 128, 64]", "f16[1, 1, 128, 64]"))
    with pytest.raises(Unsupported, match="batches share"):
        gradient_kernel(region(shared), "gradient", configs[0])


@pytest.mark.parametrize("op", [FLEX_GRAD_QUERY, FLEX_GRAD_KEY_VALUE])
def test_checks_get_weights_of_the_forward(op: str) -> None:
    """With a random statistic of rows a right kernel would compute weights that float16 does not hold, and
    be refused; or the calls would, and be no measure of a wrong one."""
    call = Call(lambda s, b, h, q, k: 4 * s, causal, (1, 2, 1, 64, 96, 16), 32)
    body, _ = from_call(*gradients(call)[1:], op)
    kernel = gradient_kernel(region(body), "gradient", SMALL)
    given = tuple((value.name, value) for value in body.inputs)
    check = CandidateCheck(Node("kernel", "k", given, tuple(attr_values(body.outputs)), body), CPU)
    outputs = [torch.full_like(one, torch.nan) for one in check.expected]
    run(kernel, [*check._inputs, *outputs])
    assert check.problem(lambda *_: outputs) is None
    assert max(one.value for one in check._distances(check.expected)[0]) < 1e-3
    assert "relative error" in str(check.problem(lambda *_: [1.01 * one for one in outputs]))
