"""The float64 criterion: a result is right when its error against a float64 run is at most twice eager's own error."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_rtx.runtime.candidate_check import relative_error, tolerance


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in a result, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def widened(tree: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The same with tensors of its own, those of floats in `dtype`."""

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

    return pytree.tree_map_only(torch.Tensor, widen, tree)


def in_float64(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """What a float64 copy of `model` returns for the same, equally rounded weights and inputs.

    Args:
        dtype: a narrower one, for a model that does not fit.
    """

    args, kwargs = widened((args, dict(kwargs)), dtype)
    with torch.no_grad():
        return tensors(copy.deepcopy(model).to(dtype)(*args, **kwargs))


def assert_right(got: Any, eager: Any, reference: list[torch.Tensor]) -> float:
    """Check every tensor of a result; returns the worst error relative to the limit."""
    worst = 0.0
    ours, theirs = tensors(got), tensors(eager)
    assert len(ours) == len(theirs) == len(reference), f"{len(ours)} tensors, eager returns {len(theirs)}"
    for index, (mine, eagers, exact) in enumerate(zip(ours, theirs, reference, strict=True)):
        kinds = (mine.shape, mine.dtype, mine.device), (eagers.shape, eagers.dtype, eagers.device)
        assert kinds[0] == kinds[1], f"output {index} is {kinds[0]}, eager's is {kinds[1]}"
        if not mine.is_floating_point():
            assert torch.equal(mine, eagers), f"output {index} differs from eager's"
            continue
        limit = max(2 * relative_error(eagers, exact), tolerance(mine.dtype))
        error = relative_error(mine, exact)
        assert error <= limit, f"output {index}: error {error:.2e} against float64, eager's allows {limit:.2e}"
        worst = max(worst, error / limit)
    return worst
