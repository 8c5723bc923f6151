"""Copies between tensors that lie in memory in many ways."""

from __future__ import annotations

import torch

from torch_rtx.runtime.strided import compact, overwrite_all
from torch_rtx.runtime.watch import same_bits

DTYPES = [torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64, torch.complex64]


def test_many_copies_at_once() -> None:
    """Of several dtypes, dense or not, transposed on one side or on both, each element in memory once."""
    targets, sources = list[torch.Tensor](), list[torch.Tensor]()
    for dtype in DTYPES:
        base = (torch.randn(4, 6) * 3).to(dtype)
        there = torch.zeros(4, 6, dtype=dtype)
        targets += [there, torch.zeros(6, 4, dtype=dtype).t(), torch.zeros(4, 6, dtype=dtype).t()]
        sources += [base, base, base.t()]
        targets += [torch.zeros(4, 12, dtype=dtype)[:, ::2], torch.zeros(1, 6, dtype=dtype).expand(4, 6)]
        sources += [base, base[:1].expand(4, 6)]
        targets += [torch.zeros((), dtype=dtype), torch.zeros(0, dtype=dtype)]
        sources += [base[1, 1], base[0, :0]]
    versions = [target._version for target in targets]
    overwrite_all(targets, sources)
    assert all(
        same_bits(target.contiguous(), source.contiguous()) for target, source in zip(targets, sources, strict=True)
    )
    assert all(target._version > version for target, version in zip(targets, versions, strict=True) if target.numel())


def test_a_part_of_memory_gets_memory_of_its_own() -> None:
    whole, stack = torch.randn(3, 4).t(), torch.randn(2, 3, 4)
    assert compact(whole) is whole
    part = stack[1].t()
    own = compact(part)
    assert torch.equal(own, part)
    assert own.stride() == part.stride()
    assert own.untyped_storage().nbytes() == 48
