"""The kernels of the gradients of `flex_attention` in Triton's interpreter, against PyTorch's own function."""

from __future__ import annotations

import pytest
import torch
from torch._higher_order_ops.flex_attention import math_attention

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.helpers.flex import Call, alibi, causal, document, from_call, gradients, shifted, soft_cap, weighted, window
from torch_rtx.errors import Unsupported
from torch_rtx.ir import TensorType, Value, attr_values
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.attention_flex_backward import gradient_configs, gradient_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.op_work import FLEX_GRAD_KEY_VALUE, FLEX_GRAD_QUERY
from torch_rtx.targets import Target, arch_of

SMALL = AttentionConfig(16, 16, 4, 1, 16)
torch.manual_seed(1)
SLOPES, BIAS = torch.rand(4), torch.randn(4, 40, 40)
IDS = (torch.arange(45) // 13).expand(2, 45).contiguous()
CALLS = {
    "nothing": Call(sizes=(2, 2, 2, 20, 37, 16)),
    "window, shared heads": Call(mask_mod=window, sizes=(1, 4, 2, 40, 40, 16)),
    "document, odd lengths": Call(mask_mod=document(IDS), sizes=(2, 2, 2, 33, 45, 16)),
    "alibi, heads in two pieces": Call(alibi(SLOPES), causal, (1, 4, 1, 40, 40, 24)),
    "bias": Call(shifted(BIAS), causal, dtype=torch.bfloat16),
    "rows without keys": Call(soft_cap, lambda b, h, q, k: (q > 20) & (k > 1), (1, 2, 2, 40, 40, 16), statistics=True),
    "scores that hide keys": Call(lambda s, b, h, q, k: torch.where(q >= k, s * s, -float("inf"))),
}


@pytest.mark.parametrize("name", CALLS)
def test_right(name: str) -> None:
    call = CALLS[name]
    operands, graph, given = gradients(call)
    found = []
    for op in (FLEX_GRAD_QUERY, FLEX_GRAD_KEY_VALUE):
        body, tensors = from_call(graph, given, op)
        kernel = gradient_kernel(region(body), "gradient", SMALL)
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


def test_compiles() -> None:
    call = Call(soft_cap, causal, (1, 2, 1, 128, 128, 64), 128)
    _, graph, given = gradients(call)
    wanted = []
    for op, sm in ((FLEX_GRAD_QUERY, 80), (FLEX_GRAD_KEY_VALUE, 90)):
        body, _ = from_call(graph, given, op)
        configs = gradient_configs(region(body), arch_of(sm))
        assert all(128 % one.rows == 128 % one.keys == 0 for one in configs)
        wanted.append((gradient_kernel(region(body), "gradient", configs[0]), Target(sm)))
    with pytest.raises(Unsupported, match="divide"):
        gradient_kernel(region(body), "gradient", AttentionConfig(64, 96, 4, 1))
    for built in compile_kernels(wanted, workers=1).values():
        assert built.problem is None


def test_keys_that_batches_share() -> None:
    """Their gradient is a sum over batches, which stays a call."""
    call = Call(sizes=(2, 2, 2, 20, 20, 16))
    _, graph, given = gradients(call)
    body, _ = from_call(graph, given, FLEX_GRAD_KEY_VALUE)
    (node,) = body.nodes
    key, value = node.arg("key"), node.arg("value")
    text = str(body)
    for one in (key, value):
        assert isinstance(one, Value)
        text = text.replace(f"{one.name}: f16[2, 2,", f"{one.name}: f16[1, 2,")
    for one in node.results:
        text = text.replace(f"{one.name}: f16[2, 2,", f"{one.name}: f16[1, 2,")
    with pytest.raises(Unsupported, match="batches share"):
        gradient_kernel(region(parse(text)), "gradient", SMALL)
