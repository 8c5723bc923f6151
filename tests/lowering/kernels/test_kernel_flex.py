"""The kernel of `flex_attention` in Triton's interpreter, against PyTorch's own function without a compiler."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.helpers.flex import Call, alibi, captured, causal, document, relative, shifted, soft_cap, uncompiled, window
from tests.lowering.kernels.kernel_bodies import FLOATS, check_split_graph, split
from torch_rtx.errors import Unsupported
from torch_rtx.ir import TensorType, attr_values
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig
from torch_rtx.lowering.kernels.attention_flex import flex_configs, flex_kernel
from torch_rtx.lowering.kernels.generate import tactics
from torch_rtx.lowering.kernels.region import region
from torch_rtx.tactics import OWN
from torch_rtx.targets import Target, arch_of

SMALL = AttentionConfig(16, 16, 4, 1, 16)
torch.manual_seed(1)
SLOPES, BIAS, DISTANCES = torch.rand(4), torch.randn(4, 40, 40), torch.randn(4, 81)
IDS = (torch.arange(45) // 13).expand(2, 45).contiguous()
HIDDEN = torch.tensor([0, 20])  # the first query of each batch that sees anything
CALLS = {
    "documents, odd lengths, bfloat16": Call(
        mask_mod=document(IDS), sizes=(2, 2, 2, 33, 45, 16), dtype=torch.bfloat16, statistics=True
    ),
    "alibi and causal": Call(alibi(SLOPES), causal, block=64),
    "soft cap, window, heads in two pieces": Call(soft_cap, window, (1, 4, 2, 40, 40, 24)),
    "relative bias": Call(relative(DISTANCES), causal, (1, 4, 4, 40, 40, 16)),
    "bias, rows without keys": Call(
        shifted(BIAS), lambda b, h, q, k: (q >= HIDDEN[b]) & (k > 1), (2, 2, 2, 40, 40, 16), statistics=True
    ),
    "decoding": Call(alibi(SLOPES), lambda b, h, q, k: k <= 30 - b, (2, 4, 2, 1, 70, 16)),
    "hidden keys, numbers of the capture": Call(
        lambda s, b, h, q, k: torch.where(q >= k, s * SLOPES.sum() + torch.tensor(0.5) * h, -float("inf")),
        sizes=(1, 2, 1, 33, 45, 16),
    ),
}


def check(call: Call, config: AttentionConfig) -> None:
    """The kernel, eager, and eager in float64."""
    operands, function = call.operands(), call.function()
    body, given = captured(function, *operands)
    kernel = flex_kernel(region(body), "flex", config)
    outputs = []
    for value in attr_values(body.outputs):
        assert isinstance(value.type, TensorType)
        dtype = torch.float32 if value.type.dtype == "f32" else call.dtype
        outputs.append(torch.full([int(size) for size in value.type.shape], torch.nan, dtype=dtype))
    run(kernel, [*given, *outputs])
    with uncompiled():
        eager, exact = function(*operands), function(*(one.double() for one in operands))
    listed = eager if isinstance(eager, tuple) else (eager,)
    assert len(listed) == len(outputs)
    assert_right(outputs, listed, exact if isinstance(exact, tuple) else (exact,))


@pytest.mark.parametrize("name", CALLS)
def test_right(name: str) -> None:
    check(CALLS[name], AttentionConfig(32, 16, 4, 1) if CALLS[name].block == 64 else SMALL)


def test_blocks_that_are_not_listed_are_not_read() -> None:
    call = Call(mask_mod=window)
    query, key, value = call.operands()
    body, given = captured(call.function(), query, key, value)
    kernel = flex_kernel(region(body), "k", SMALL)
    clean, unlisted = torch.empty_like(query), torch.empty_like(query)
    run(kernel, [*given, clean])
    counts = [tensor for tensor in given if tensor.dtype == torch.int32 and tensor.dim() == 3]
    assert counts
    for count in counts:
        count.zero_()
    run(kernel, [*given, unlisted])
    assert not unlisted.any()
    assert clean.any()


def test_pages() -> None:
    """A cache in pages, whose places tensors hold: PyTorch's own lists and modifications."""
    torch.manual_seed(0)
    length, page = 40, 16
    pages = PagedAttention(n_pages=8, page_size=page, max_batch_size=2, device="cpu")
    for batch in (1, 0):
        pages.reserve(torch.tensor(batch), torch.tensor(length))
    key, value, query = torch.randn(3, 2, 2, length, 16)
    keys, values = torch.zeros(2, 1, 2, 8 * page, 16)
    pages.assign(torch.arange(2), torch.arange(length).expand(2, -1), key, value, keys, values)
    mask = create_block_mask(causal, 2, 1, length, length, device="cpu", BLOCK_SIZE=page)
    options = {"score_mod": pages.get_score_mod(alibi(SLOPES)), "block_mask": pages.convert_logical_block_mask(mask)}
    body, given = captured(lambda *given: flex_attention(*given, **options), query, keys, values)
    found = torch.full_like(query, torch.nan)
    run(flex_kernel(region(body), "k", SMALL), [*given, found])
    with uncompiled():
        torch.testing.assert_close(found, flex_attention(query, key, value, alibi(SLOPES), mask))


@pytest.mark.parametrize("name", ["decoding", "decoding without a mask"])
def test_shares(name: str) -> None:
    """Few queries: the keys are divided among programs, and a second kernel adds what these found."""
    call = CALLS["decoding"] if name == "decoding" else Call(alibi(SLOPES), sizes=(1, 4, 2, 2, 70, 16))
    body, given = captured(call.function(), *call.operands())
    exact = parse(re.sub(FLOATS, "f64", str(body)))
    check_split_graph(body, exact, 4, [*given], {})
    (node,) = body.nodes
    assert node.outputs[1] is None


def test_few_queries_are_split() -> None:
    call = Call(alibi(SLOPES), lambda b, h, q, k: k <= 900, (1, 4, 1, 1, 1024, 64), 128)
    body, _ = captured(call.function(), *call.operands())
    body = parse(str(body).replace("1024, 64]", "65536, 64]").replace("[1, 1, 1, 8]", "[1, 1, 1, 512]"))
    assert split(body, "flex", 90) is not None


def test_tiles_lie_within_blocks() -> None:
    """They are compiled for every target."""
    call = Call(alibi(torch.rand(2)), causal, (1, 2, 1, 128, 128, 64), 128)
    body, _ = captured(call.function(), *call.operands())
    found = region(body)
    for sm in (80, 90, 120):
        assert all(128 % one.rows == 128 % one.keys == 0 for one in flex_configs(found, arch_of(sm)))
    with pytest.raises(Unsupported, match="divide"):
        flex_kernel(found, "k", AttentionConfig(64, 96, 4, 1))
    wanted = []
    for sm in (80, 86, 89, 90, 120):
        kernel = next(tactics(body, "flex", arch_of(sm))).kernels[OWN]
        wanted.append((kernel, Target(sm)))
    for built in compile_kernels(wanted).values():
        assert built.problem is None
