"""Convolutions of libraries that write into the arena."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torch_rtx.irparse import parse
from torch_rtx.runtime import code, convolve
from torch_rtx.runtime.plan import Plan

CPU = torch.device("cpu")
TEXT = """graph fused {{
  input in0: {dtype}[2, 8, 6, 6](288, 1, 48, 8)
  input in1: {dtype}[4, {depth}, 3, 3]({step}, 1, {row}, {depth})
  v1: {dtype}[2, 4, 4, 4](64, 1, 16, 4) = extern aten.convolution.default(input=in0, weight=in1, bias=None, \
stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups={groups})
  v2: {dtype}[2, 4, 4, 4](64, 1, 16, 4) = extern aten.relu.default(self=v1)
  return [v2]
}}
"""


def graph(dtype: str = "bf16", groups: int = 1):
    depth = 8 // groups
    return parse(TEXT.format(dtype=dtype, depth=depth, step=9 * depth, row=3 * depth, groups=groups))


def tensors(bias: bool = False) -> list[torch.Tensor]:
    shapes = ((2, 8, 6, 6), (4, 8, 3, 3), *[(4,)] * bias)
    made = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    return [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in made]


@pytest.mark.parametrize(
    ("given", "cudnn", "inside"),
    [
        pytest.param({}, True, True, id="half"),
        pytest.param({}, False, False, id="without cuDNN"),
        pytest.param({"dtype": "f32"}, True, False, id="float"),
        pytest.param({"groups": 2}, True, False, id="groups"),
    ],
)
def test_which_lie_in_the_arena(given, cudnn, inside):
    plan = Plan(graph(**given), frozenset(), frozenset(), cudnn=cudnn)
    assert ("v1" in plan.index) == inside


def test_code_writes_into_the_arena(monkeypatch):
    """By way of a copy here, where no library can."""
    x, weight = tensors()
    usual = code.compile_graph(graph(), CPU)
    monkeypatch.setattr(code, "Plan", lambda *given: Plan(*given[:-1], cudnn=True))
    inside = code.compile_graph(graph(), CPU)
    assert "out=v1" in inside.source
    assert "out=v1" not in usual.source
    assert torch.equal(inside([x, weight], ())[0], usual([x, weight], ())[0])


@pytest.mark.parametrize("bias", [False, True])
def test_cudnn_gets_what_the_program_has_set(monkeypatch, bias):
    asked = []

    def computed(input, weight, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32, *, out):
        asked.append((benchmark, deterministic, out.data_ptr()))
        return out.copy_(F.conv2d(input, weight, None, stride, padding, dilation, groups))

    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *given: torch._C._ConvBackend.Cudnn)
    given = tensors(bias)
    out = torch.empty(2, 4, 4, 4, dtype=torch.bfloat16)
    # By no assignment to a flag, which PyTorch's own tests forbid in a process that imports them.
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=True)
    with flags, torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_convolution.out", computed, "CPU")
        pair = given if bias else [*given, None]
        convolve.convolve(*pair, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, out=out)
    assert asked == [(True, False, out.data_ptr())]
    expected = F.conv2d(*given[:2])
    assert torch.equal(out, expected + given[2][:, None, None] if bias else expected)
