"""The operator that launches kernels that others wrote: `torch_rtx.launch`, see `foreign`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import clone_preserve_strides

from torch_rtx.foreign import known


def _launch(kernel: str, tensors: Sequence[Tensor], written: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """Launch a kernel on copies of the tensors that it writes.

    Args:
        kernel, tensors, written, sizes: see `foreign.Launch`.

    Returns:
        The copies, with the strides of the tensors.

    Raises:
        KernelError: this process does not know the kernel, or can't launch it.
    """
    given = _copied(tensors, written)
    known(kernel).run(given, sizes)
    return [given[position] for position in written]


def _types(kernel: str, tensors: Sequence[Tensor], written: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    given = _copied(tensors, written)
    return [given[position] for position in written]


def _copied(tensors: Sequence[Tensor], written: Sequence[int]) -> list[Tensor]:
    torch._check(all(0 <= position < len(tensors) for position in written), lambda: f"no tensors {written}")
    return [clone_preserve_strides(x) if position in written else x for position, x in enumerate(tensors)]


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_LIBRARY.define("launch(str kernel, Tensor[] tensors, int[] written, SymInt[] sizes) -> Tensor[]")
_LIBRARY.impl("launch", _launch, "CompositeExplicitAutograd")
_LIBRARY.impl("launch", _types, "Meta")
