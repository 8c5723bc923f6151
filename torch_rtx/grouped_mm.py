"""Products of groups of rows with a matrix for each, as experts of a mixture compute them: `torch_rtx.grouped_mm`.

`aten._grouped_mm` is the same for bfloat16, aligned rows, and offsets in order alone, and leaves rows behind the last
group as they were in memory.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: of what PyTorch's call takes


def _grouped_mm(self: Tensor, mat2: Tensor, offs: Tensor, whole: bool = False) -> Tensor:
    """Each row of `self` times the matrix of its group.

    Args:
        self: rows (S, K), those of a group side by side.
        mat2: matrices (G, K, N).
        offs: where each group ends (G), int32 or int64. A group begins where the one before it ends, and is empty where
            it would end before that.
        whole: who calls knows that the ends ascend, and that the last one is the number of rows.

    Returns:
        Rows (S, N) in the dtype of `self`; those behind the last group are 0.
    """
    rows = self.shape[0]
    if not mat2.shape[0]:
        return self.new_zeros(rows, mat2.shape[2])
    ends = offs if whole else offs.clamp(0, rows).cummax(0).values
    if _has_call(self, mat2):
        found = torch.ops.aten._grouped_mm.default(self, mat2, ends.to(torch.int32))
        if whole:
            return found
        return found.masked_fill_(torch.arange(rows, device=self.device)[:, None] >= ends[-1:], 0)
    captured = self.is_cuda and torch.cuda.is_current_stream_capturing()
    return _by_masks(self, mat2, ends) if captured else _by_ranges(self, mat2, ends)


def _by_ranges(self: Tensor, mat2: Tensor, ends: Tensor) -> Tensor:
    """One product for each group; waits for the device."""
    out, begin = self.new_zeros(self.shape[0], mat2.shape[2]), 0
    for end, matrix in zip(ends.tolist(), mat2, strict=True):
        out[begin:end] = self[begin:end] @ matrix
        begin = end
    return out


def _by_masks(self: Tensor, mat2: Tensor, ends: Tensor) -> Tensor:
    """Products of all rows for each group, the last one first: of a CUDA graph, in which nobody may ask how long groups
    are."""
    out, places = self.new_zeros(self.shape[0], mat2.shape[2]), torch.arange(self.shape[0], device=self.device)
    for group in reversed(range(len(mat2))):
        out = torch.where((places < ends[group])[:, None], self @ mat2[group], out)
    return out


def _has_call(self: Tensor, mat2: Tensor) -> bool:
    """PyTorch has a kernel for these operands, and does not wait for the device."""
    if not self.is_cuda or self.dtype != torch.bfloat16 or not self.numel() or not mat2.numel():
        return False
    return _sm(self.device) in (90, 100) and all(map(_is_aligned, (self, mat2)))


def _is_aligned(tensor: Tensor) -> bool:
    strides, sizes = tensor.stride()[-2:], tensor.shape[-2:]
    inner, outer = (1, 0) if strides[1] == 1 else (0, 1)
    whole = strides[outer] * tensor.itemsize % ALIGNMENT == 0 and tensor.data_ptr() % ALIGNMENT == 0
    return strides[inner] == 1 and strides[outer] >= max(sizes[inner], 1) and whole


@cache
def _sm(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _room(self: Tensor, mat2: Tensor, offs: Tensor, whole: bool = False) -> Tensor:
    torch._check(
        self.dim() == 2 and mat2.dim() == 3 and offs.dim() == 1,
        lambda: f"rows, matrices and offsets of {self.dim()}, {mat2.dim()} and {offs.dim()} dimensions, not 2, 3 and 1",
    )
    torch._check(self.shape[1] == mat2.shape[1], lambda: f"rows of {self.shape[1]} by columns of {mat2.shape[1]}")
    torch._check(mat2.shape[0] == offs.shape[0], lambda: f"{mat2.shape[0]} matrices of {offs.shape[0]} groups")
    torch._check(self.dtype == mat2.dtype, lambda: f"a product of {self.dtype} and {mat2.dtype}")
    torch._check(offs.dtype in (torch.int32, torch.int64), lambda: f"offsets of {offs.dtype}")
    return self.new_empty((self.shape[0], mat2.shape[2]))


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_LIBRARY.define("grouped_mm(Tensor self, Tensor mat2, Tensor offs, bool whole=False) -> Tensor")
_LIBRARY.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_mm", _room, "Meta")
