"""Sizes of which PyTorch before 2.13 does not know the smaller one."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils._sympy.functions import Max, Min, MinMaxBase

from torch_rtx.backend import ordered_sizes
from torch_rtx.backend.capture import capture_export
from torch_rtx.backend.ordered_sizes import extreme_multiple, ordered_multiples

n = sympy.Symbol("n", positive=True, integer=True)
any_sign = sympy.Symbol("k", integer=True)


class RepeatedHeads(nn.Module):
    """Keys `[batch, length, 2 * 32]` of two heads, for eight heads of queries."""

    def forward(self, keys: Tensor) -> Tensor:
        batch, length, _ = keys.shape
        heads = keys.view(batch, length, 2, 32).transpose(1, 2)
        return heads[:, :, None].expand(batch, 2, 4, length, 32).reshape(batch, 8, length, 32) * 2


def test_of_multiples_of_one_number_one_decides() -> None:
    assert extreme_multiple(Min, {32 * n, 128 * n}) == {32 * n}
    assert extreme_multiple(Max, {32 * n, 128 * n, n}) == {128 * n}
    assert extreme_multiple(Min, {-n, 2 * n}) == {-n}
    for undecided in ({n, 2 * n + 1}, {any_sign, 2 * any_sign}, {n, n**2}):
        assert extreme_multiple(Min, undecided) == undecided


def test_minima_inside_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered_sizes, "_KNOWN_TO_PYTORCH", False)  # as in PyTorch 2.11
    monkeypatch.setattr(MinMaxBase, "_collapse_known_multiplicative_terms", lambda values: None, raising=False)
    with ordered_multiples():
        assert Min(32 * n, 128 * n) == 32 * n
        assert Max(Min(n, 3 * n), 0) == n
    assert Min(32 * n, 128 * n).func is Min


def test_repeated_heads_have_any_length() -> None:
    length = torch.export.Dim("length", min=1, max=512)
    program = capture_export(RepeatedHeads(), (torch.zeros(1, 16, 64),), dynamic_shapes=({1: length},))
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (1, 512)
