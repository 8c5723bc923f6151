"""Calls that write a part of a copy: `torch_rtx.slice_scatter` and others, which are PyTorch's but for the copy.

PyTorch copies the whole memory that a tensor lies in, so that the result begins in it where the tensor does. A result
in an arena would copy the arena, and what is returned would begin far behind the start of its memory, from where
PyTorch counts when it makes a view of an input of it. Here the copy is of the tensor alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")


def _copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides, in memory of its own; of a tensor with repeated elements a contiguous one."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _declare(name: str, view: Callable[..., Tensor]) -> None:
    """The operator `name`, which writes `src` to `view(copy, ...)`."""
    call = getattr(aten, name).default

    def scattered(self: Tensor, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = _copied(self)
        view(made, *args, **kwargs).copy_(src)
        return made

    _LIBRARY.define(str(call._schema).removeprefix("aten::"))
    _LIBRARY.impl(name, scattered, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, call, "Meta")


VIEWS = {
    "slice_scatter": aten.slice.Tensor,
    "select_scatter": aten.select.int,
    "diagonal_scatter": aten.diagonal.default,
}
for _name, _view in VIEWS.items():
    _declare(_name, _view)
