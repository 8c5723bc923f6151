"""What PyTorch holds at most while it runs a model op by op, in bytes, without a GPU to ask."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PIECE = 512  # bytes that PyTorch's allocator for GPUs rounds to


class _Held(TorchDispatchMode):
    """Counts the tensors that are made, until their memory is free again."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in given:
                given.add(x.untyped_storage())
                nbytes = -(-x.untyped_storage().nbytes() // PIECE) * PIECE
                self._count(nbytes)
                weakref.finalize(x.untyped_storage(), self._count, -nbytes)
        return result

    def _count(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)


def most_held(run: Callable[[], object]) -> int:
    """The most bytes that tensors made in `run` take at once, its results among them; what operators allocate inside of
    themselves is not seen."""
    with torch.no_grad(), _Held() as held:
        result = run()
    del result
    return held.most
