"""Up to which sizes process groups add up tensors by kernels, see `one_shot`: measured once, the same on all ranks.

All ranks of a group come here before its first graph with collectives runs. They need GPUs of one host that see each
other's memory. Each rank times all ways inside of CUDA graphs; the slowest rank counts. What a rank finds, the others
learn through the store of torch.distributed, so that all come to the same end.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from torch_rtx.one_shot import ROOMS, Room
from torch_rtx.runtime.ranks import exchanged

log = logging.getLogger(__name__)
SIZES = tuple(kib << 10 for kib in (8, 32, 128, 512, 2048))  # of operands, in bytes
KERNELS = "one_shot_all_reduce_copy_out", "two_shot_all_reduce_out"
DTYPES = (torch.bfloat16, torch.float32)  # that PyTorch's kernel adds up
RANKS = (2, 4, 8)  # for which it is compiled
CALLS, REPLAYS = 10, 5


def choose(name: str, group: Any, device: torch.device, key: str) -> int:
    """Decide for the group `name`; all of its ranks have to call this. Returns the bytes of the largest tensor that is
    added up by kernels; 0: none is.

    Args:
        group: the process group.
        device: of this rank.
        key: names this decision in the store.
    """
    ROOMS.pop(name, None)
    rank, size = group.rank(), group.size()

    def all_say(question: str, answer: bool) -> bool:
        return exchanged(f"{key} {question}", str(answer), rank, size) == ["True"] * size

    if device.type != "cuda" or size not in RANKS or not all(hasattr(torch.ops.symm_mem, name) for name in KERNELS):
        return 0  # the same on all ranks
    properties = torch.cuda.get_device_properties(device)
    places = exchanged(f"{key} place", f"{socket.gethostname()} {properties.uuid}", rank, size)
    if not all_say("see each other", _see(device, places)):
        return 0
    buffers = _shared(group, device)
    if not all_say("share memory", buffers is not None) or buffers is None:
        return 0
    limits = 0, 0
    try:
        limits = _faster_until(buffers, name, group, f"{key} times")
    except RuntimeError as error:
        log.warning("sums over the group %s can't be measured: %s", name, error)
    alike = exchanged(f"{key} limits", str(limits), rank, size) == [str(limits)] * size
    one_shot, limit = limits if alike else (0, 0)
    log.info("the group %s adds up to %d KiB by kernels, to %d KiB in one shot", name, limit >> 10, one_shot >> 10)
    if limit:
        ROOMS[name] = Room(one_shot, limit, buffers)
    return limit


def _see(device: torch.device, places: list[str | None]) -> bool:
    """Whether this rank's GPU reads the memory of all others: on the same host, and visible to this process."""
    here = {
        f"{socket.gethostname()} {torch.cuda.get_device_properties(index).uuid}": index
        for index in range(torch.cuda.device_count())
    }
    others = [here.get(place or "") for place in places]
    if None in others or len({*others}) < len(places):
        return False
    return all(one == device.index or torch.cuda.can_device_access_peer(device, one) for one in others)


def _shared(group: Any, device: torch.device) -> dict[torch.dtype, torch.Tensor] | None:
    """Memory that all ranks see, as a tensor of each dtype; None if PyTorch can't make it."""
    try:
        import torch.distributed._symmetric_memory as symmetric

        memory = symmetric.empty(SIZES[-1] // 2, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(memory, group)
    except (ImportError, RuntimeError, TypeError) as error:
        log.info("no memory that the ranks share: %s", error)
        return None
    return {dtype: memory.view(dtype) for dtype in DTYPES}


def _faster_until(buffers: dict[torch.dtype, torch.Tensor], name: str, group: Any, key: str) -> tuple[int, int]:
    """The largest sizes up to which one shot is the fastest way on the slowest rank, and up to which a kernel is faster
    than NCCL; 0: it never is."""
    one_shot = limit = 0
    for size in SIZES:
        tensor = torch.zeros(size // 2, dtype=torch.bfloat16, device=buffers[torch.bfloat16].device)
        ways = [partial(Room(most, size, buffers).add_up, tensor, name) for most in (size, 0)]
        ways.append(partial(torch.distributed.all_reduce, tensor, group=group))
        mine = " ".join(str(_us(way, tensor.device)) for way in ways)
        said = exchanged(f"{key} {size}", mine, group.rank(), group.size())
        times = [[float(number) for number in one.split()] for one in said if one is not None]
        if len(times) < group.size():
            return 0, 0
        one, two, nccl = (max(column) for column in zip(*times, strict=True))
        log.debug("a sum of %d KiB: %.1f us in one shot, %.1f in two, NCCL %.1f", size >> 10, one, two, nccl)
        if min(one, two) >= nccl:
            break
        if one <= two and one_shot == limit:
            one_shot = size
        limit = size
    return one_shot, limit


def _us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of a call inside of a CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        graph.replay()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / CALLS)
    return min(times)
