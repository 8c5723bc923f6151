"""The comparison of a kernel's results with those in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rtx.runtime import candidate_check
from torch_rtx.runtime.candidate_check import relative_error


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
