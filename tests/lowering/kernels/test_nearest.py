"""Numbers that are rounded to integers of 8 bits, in Triton's interpreter against PyTorch, bit for bit."""

import pytest
import torch

from tests.doubles.interpreter import run
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.loops import loop_kernel
from torch_rtx.lowering.kernels.region import region

BODY = """graph import {{
  input in0: f32[12, 64]
  whole: f32[12, 64] = op aten.round.default(self=in0)
  moved: f32[12, 64] = op aten.add.Tensor(self=whole, other={zero})
  limited: f32[12, 64] = op aten.clamp.default(self=moved, min={low}, max={high})
  byte: {dtype}[12, 64] = op aten._to_copy.default(self=limited, dtype='{dtype}')
  return [byte]
}}
"""


@pytest.mark.parametrize(
    ("dtype", "zero", "low", "high", "by_sum"),
    [
        ("i8", 0, -127, 127, True),
        ("i8", -3, -128, 127, True),
        ("u8", 0, 0, 255, True),
        ("u8", 131, 0, 255, True),
        ("i8", 0, -7, 8, True),
        ("i8", 0, -100, 127.5, False),  # 127.5 is cut off, not rounded
        ("i8", 0.5, -100, 100, False),
        ("i8", 300, -100, 100, False),
    ],
)
def test_nearest(dtype: str, zero: float, low: float, high: float, by_sum: bool) -> None:
    kernel = loop_kernel(region(parse(BODY.format(dtype=dtype, zero=zero, low=low, high=high))), "kernel")
    assert ("rint" not in kernel.source) == by_sum
    halves, edges = torch.arange(-260, 260) / 2, [-torch.inf, torch.inf, 3e38, -0.0, 127.49999, 2.0**22 + 1, -(2.0**31)]
    tiny = torch.tensor([*edges, *(0.5 + sign * 2.0**-25 for sign in (-1, 1))])
    given = torch.cat([halves, tiny, torch.randn(12 * 64 - len(halves) - len(tiny)) * 90]).view(12, 64)
    found = torch.zeros(12, 64, dtype=torch.int8 if dtype == "i8" else torch.uint8)
    run(kernel, [given, found])
    assert torch.equal(found, (given.round() + zero).clamp(low, high).to(found.dtype))
