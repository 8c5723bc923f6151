"""Tensors with given strides at addresses that kernels take, and copies that keep how tensors share memory."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence

import torch

from torch_rtx import aten
from torch_rtx.targets import ALIGNMENT

# The dtypes of which one call copies many tensors on every device: as themselves, or as bytes.
_TOGETHER = {dtype: torch.uint8 for dtype in aten.DTYPES.values() if dtype.itemsize == 1} | {
    dtype: dtype
    for dtype in (torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
Span = tuple[int, int]  # of addresses


def restride(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """`tensor` if it has these strides in all dimensions longer than 1, else a copy with them."""
    if tensor.stride() == strides:
        return tensor
    if all(size < 2 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True)):
        return tensor
    return copy_strided(tensor, strides)


def copy_strided(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A copy with these strides."""
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    overwrite(copy, tensor)
    return copy


def copy_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that share memory with one another as `tensors` do, and with nothing else."""
    groups: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    copies = {}
    for address, group in groups.items():
        first, last = span_of(group)
        first -= first % ALIGNMENT
        used = torch.empty(0, dtype=torch.uint8, device=group[0].device)
        used.set_(group[0].untyped_storage(), first, (last - first,), (1,))
        copies[address] = used.clone().untyped_storage(), first
    made = []
    for tensor in tensors:
        memory, first = copies[tensor.untyped_storage().data_ptr()]
        start = tensor.storage_offset() - first // tensor.element_size()
        copy = tensor.new_empty(0).set_(memory, start, tensor.shape, tensor.stride())
        copy = copy.conj() if tensor.is_conj() else copy
        made.append(torch._neg_view(copy) if tensor.is_neg() else copy)
    return made


def span_of(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """The bytes [first, last) of their common memory in which `tensors` lie."""
    starts = [int(tensor.storage_offset()) * tensor.element_size() for tensor in tensors]
    sizes = [aten.extent(tensor.shape, tensor.stride()) * tensor.element_size() for tensor in tensors]
    return min(starts), max(map(operator.add, starts, sizes))


def span_in_memory(given: object) -> Span | None:
    """[start, end) of a tensor's addresses; None for empty and sparse tensors and for other values."""
    if not isinstance(given, torch.Tensor) or given.layout != torch.strided or not given.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(given.shape, given.stride(), strict=True))
    return given.data_ptr(), given.data_ptr() + (last + 1) * given.element_size()


def are_apart(written: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether each of the tensors `written` shares memory neither with another one of these nor with one of `others`,
    as far as the first and last addresses of tensors tell."""
    spans = [(span, True) for one in written if (span := span_in_memory(one)) is not None]
    spans += [(span, False) for one in others if (span := span_in_memory(one)) is not None]
    end, last = 0, 0  # of all that begin before, and of what is written
    for (start, stop), is_written in sorted(spans):
        if start < (end if is_written else last):
            return False
        end, last = max(end, stop), max(last, stop) if is_written else last
    return True


def aligned(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """As `restride`, with an address that is a multiple of ALIGNMENT, as kernels expect."""
    if tensor.stride() == strides and not tensor.data_ptr() % ALIGNMENT:
        return tensor
    placed = restride(tensor, strides)
    return copy_strided(placed, strides) if placed.data_ptr() % ALIGNMENT else placed


def placed(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy at an address that is a multiple of ALIGNMENT."""
    return aligned(tensor, tensor.stride())


def target_of(tensor: torch.Tensor, strides: tuple[int, ...], free: bool = True) -> torch.Tensor:
    """`tensor`, if a kernel can write to it, or else new memory like it, to be copied from.

    Args:
        free: nothing else lies there.
    """
    if free and tensor.stride() == strides and not tensor.data_ptr() % ALIGNMENT:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy values between tensors of one dtype; where both are one tensor, a kernel has written to it already."""
    count_writes([target for target, source in zip(targets, sources, strict=True) if target is source])
    left = [(target, source) for target, source in zip(targets, sources, strict=True) if target is not source]
    if left:
        torch._foreach_copy_([target for target, _ in left], [source for _, source in left])


def count_writes(tensors: Sequence[torch.Tensor]) -> None:
    """Increment the version counters of tensors that kernels have written to, as calls do."""
    torch.autograd.graph.increment_version(tensors)


def overwrite(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values; a dimension of stride 0 has one element in memory, which is written once. Where memory is alike this
    is one copy of it, whose addresses a CUDA graph can be told anew."""
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    with torch.no_grad():
        target.copy_(source)


def overwrite_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """As `overwrite` for each. Those of one dtype and device that lie in memory alike are copied by one call, which on
    CUDA is one launch for many of them; not for the capture of a CUDA graph whose addresses change."""
    groups: dict[Hashable, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target.dtype in _TOGETHER and target.stride() == source.stride() and _is_dense(target):
            words = _TOGETHER[target.dtype]
            if target.dtype != words:
                target, source = target.view(words), source.view(words)
            groups.setdefault((words, target.device, source.device), []).append((target, source))
        else:
            overwrite(target, source)
    with torch.no_grad():
        for pairs in groups.values():
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _is_dense(tensor: torch.Tensor) -> bool:
    """Each element has a place of its own, with none between them."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it if its memory has more than its elements."""
    size = aten.extent(tensor.shape, tensor.stride()) * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() <= size else copy_strided(tensor, tensor.stride())
