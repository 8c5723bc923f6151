"""Small sums over ranks as kernels: each rank reads what the others have from memory that all of them see.

NCCL needs several microseconds more for the small sums of a decode step, whatever their size. PyTorch's one-shot kernel
copies the operand to the shared memory of the group, waits for the other ranks, adds up what all have in the order of
the ranks, and waits again, so that the next call may use the same memory. Of larger operands, each rank adds up a part,
and reads the other parts from the ranks that have added them up: two shots, which move less. Calls of a group follow
each other on one stream, as those of NCCL have to. In a CUDA graph they are kernels like any other, on the stream of
the call. Sums that take long stay with NCCL, which has a stream of its own, so that other kernels run beside them.

`ROOMS` has the groups that use it, and up to which sizes; `runtime.one_shot_choice` measures that. All ranks of a group
have the same entry, since a rank that called NCCL would wait for the others forever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

ALIGNMENT = 16  # bytes: of addresses and sizes


@dataclass(frozen=True)
class Room:
    """The shared memory of a process group.

    Attributes:
        one_shot: bytes of the largest operand that each rank adds up as a whole.
        limit: of the largest that is added up in it, in two shots above `one_shot`.
        buffers: by dtype, the memory as a tensor of one dimension.
    """

    one_shot: int
    limit: int
    buffers: Mapping[torch.dtype, torch.Tensor]

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is added up here. Depends on nothing in which ranks differ, such as addresses."""
        if tensor.dtype not in self.buffers or not 0 < tensor.nbytes <= self.limit or tensor.nbytes % ALIGNMENT:
            return False
        return tensor.is_contiguous() and tensor.device == self.buffers[tensor.dtype].device

    def add_up(self, tensor: torch.Tensor, group_name: str) -> None:
        """Make `tensor` the sum of what all ranks of the group have in its place."""
        own = tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
        shared = self.buffers[tensor.dtype][: tensor.numel()].view(tensor.shape)
        if tensor.nbytes <= self.one_shot:
            torch.ops.symm_mem.one_shot_all_reduce_copy_out(shared, own, "sum", group_name, own)
        else:
            shared.copy_(own)
            torch.ops.symm_mem.two_shot_all_reduce_out(shared, "sum", group_name, own)
        if own is not tensor:
            tensor.copy_(own)


ROOMS: dict[str, Room] = {}  # by the name of a process group


def _all_reduce(input: torch.Tensor, reduce_op: str, group_name: str) -> torch.Tensor:
    room = ROOMS.get(group_name)
    if room is not None and reduce_op == "sum" and room.takes(input):
        room.add_up(input, group_name)
        return input
    started: torch.Tensor = torch.ops._c10d_functional.all_reduce_.default(input, reduce_op, group_name)
    return started


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_LIBRARY.define("all_reduce_(Tensor(a!) input, str reduce_op, str group_name) -> Tensor(a!)")
_LIBRARY.impl("all_reduce_", _all_reduce, "CompositeExplicitAutograd")
_LIBRARY.impl("all_reduce_", lambda input, reduce_op, group_name: input, "Meta")
