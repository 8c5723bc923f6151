"""`flex_attention` from capture to file: under torch.compile, in engines, and what stays PyTorch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import torch_rtx
from tests.helpers.flex import Call, alibi, captured, causal, soft_cap, uncompiled
from torch_rtx.errors import InvalidIR
from torch_rtx.op_work import FLEX
from torch_rtx.runtime.example_lists import fill_lists
from torch_rtx.score_mods import modification

LENGTH = 48
TEXT = "graph import {{\n  dim d0 = 0, None, 1\n  input q: i32[()]\n  input x0: f32[d0]\n  {}\n  return [t0]\n}}"


class Attention(nn.Module):
    """ALiBi, and a block mask that comes as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.rand(2))
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor, *lists: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, mask_mod=causal)  # type: ignore[arg-type]
        mixed = flex_attention(query, key, value, score_mod=alibi(self.slopes), block_mask=mask)
        return mixed.transpose(1, 2).flatten(2)  # type: ignore[union-attr]


def lists() -> list[Tensor]:
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16)
    found = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    return [one for one in found if one is not None]


@torch.no_grad()
def test_engine(tmp_path: Path) -> None:
    """Captured for a GPU without one, saved and loaded: kernels for each target, and the same numbers."""
    model, given = Attention().eval(), (torch.randn(2, LENGTH, 32), *lists())
    with uncompiled():
        expected = model(*given)
    module = torch_rtx.compile(model, given, device="cuda", targets=["sm_80"], require_full_compilation=True)
    assert [node.kind for node in module.engine.graph.nodes if "flex_attention" in node.op] == ["kernel"]
    torch_rtx.save(module, tmp_path / "model.rtx")
    loaded = torch_rtx.load(tmp_path / "model.rtx")
    loaded.refit(model)
    torch.testing.assert_close(loaded(*given), expected)


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of projections, and of heads that share keys; PyTorch itself trains on GPUs alone."""
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    project, x = nn.Linear(32, 64), torch.randn(2, LENGTH, 32)
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16)
    options: dict[str, Any] = {"score_mod": soft_cap, "block_mask": mask, "enable_gqa": True}

    def loss(x: Tensor) -> Any:
        parts = project(x).split((32, 16, 16), -1)
        return flex_attention(*(one.unflatten(-1, (-1, 8)).transpose(1, 2) for one in parts), **options).square().sum()

    torch._dynamo.reset()
    torch.compile(loss, backend="rtx", options={"require_full_compilation": True})(x).backward()
    found = [one.grad for one in project.parameters()]
    project.zero_grad()
    torch.compile(loss, backend="aot_eager")(x).backward()
    torch.testing.assert_close(found, [one.grad for one in project.parameters()])


@torch.no_grad()
def test_open_sizes() -> None:
    """Sizes and numbers that a modification captures may be open."""

    def function(x: Tensor, window: int) -> Any:
        heads = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return flex_attention(heads, heads, heads, lambda s, b, h, q, k: torch.where(q - k < window, s, s / 2))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="rtx", dynamic=True, options={"require_full_compilation": True})
    for length, window in ((20, 3), (31, 5)):
        x = torch.randn(2, length, 32)
        with uncompiled():
            expected = function(x, window)
        torch.testing.assert_close(compiled(x, window), expected)


@torch.no_grad()
def test_what_no_text_expresses_falls_back() -> None:
    table = torch.randn(40, 8)
    call = Call(lambda s, b, h, q, k: s + table[q].sum(), dtype=torch.float32)
    operands, function = call.operands(), call.function()
    with uncompiled():
        expected = function(*operands)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="rtx")(*operands), expected)


def test_engines_hold_scalar_modifications_alone() -> None:
    assert modification(TEXT.format("t0: f32[()] = op aten.index.Tensor(self=x0, indices=[q])"))
    for line, message in (
        ("t0: f32[()] = op aten.sum.default(self=x0)", "allow-list"),
        ("t0: f32[d0] = op aten.neg.default(self=x0)", "single numbers"),
        ("t0: f32[()] = op aten.add.Tensor(self=x0, other=q)", "whole tensor"),
        ("t0: f32[()] = op aten.index.Tensor(self=x0, indices=[])", "each dimension"),
        ("t0: f32[()] = op aten.full.default(size=[1000000000000], fill_value=1)", "single numbers"),
    ):
        with pytest.raises(InvalidIR, match=message):
            modification(TEXT.format(line))


def test_lists_of_all_queries() -> None:
    """A kernel reads the lists of each block of queries: an engine has a call only if there are as many."""
    operands, found = torch.randn(3, 1, 1, 64, 16), lists()
    call = torch.ops.torch_rtx.flex_attention.default
    call(*operands[..., :LENGTH, :], found, [], scale=1.0, block_size=[16, 16])
    for blocks, message in ((found, "of 4 blocks"), (found[:1], "no lists"), (found[::-1], "dimensions")):
        with pytest.raises(RuntimeError, match=message):
            call(*operands, blocks, [], scale=1.0, block_size=[16, 16])


def test_checks_get_lists_of_a_causal_mask() -> None:
    """A check that runs the call alone lists blocks, each once."""
    call = Call(mask_mod=causal, sizes=(1, 1, 1, 64, 64, 16), block=16, dtype=torch.float32)
    body, given = captured(call.function(), *call.operands())
    (node,) = [node for node in body.nodes if node.op == FLEX]
    inputs = [torch.zeros_like(one) for one in given]
    fill_lists(body, inputs, ())
    values = dict(zip(body.inputs, inputs, strict=True))
    count, which, full, whole = (values[one] for one in node.arg("blocks"))  # type: ignore[union-attr, index, arg-type]
    assert count.flatten().tolist() == [1, 1, 1, 1]
    assert which[0, 0, :, 0].tolist() == [0, 1, 2, 3]
    assert full.flatten().tolist() == [0, 1, 2, 3]
    assert whole[0, 0, 3, :3].tolist() == [0, 1, 2]
