"""The memory of CUDA graphs: that of all graphs of a session, or of several sessions, is one.

A graph needs its memory only while it is replayed, since inputs come in and results go out by each replay. So graphs
can lie in the same memory if their replays follow each other.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from torch_rtx.runtime.driver import new_stream

_IDLE: dict[int, list[torch.cuda.Stream]] = defaultdict(list)  # streams that captured for memories that are gone


class GraphMemory:
    """Memory that graphs on `device` share. The lock is held where one is given to the device.

    Attributes:
        lock: to be held around `follow` and the launch after it, and while results are still in this memory.
        handle: what PyTorch knows it by.
        stream: the driver's handle of the stream of the last replay; -1: there was none.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.handle: Any = None
        self._stream: torch.cuda.Stream | None = None
        self.stream = -1

    @cached_property
    def capture_stream(self) -> torch.cuda.Stream:
        """The stream that captures its graphs, which no other memory has: libraries keep a workspace per stream, and
        graphs of two memories may be replayed at once. To be read by one thread at a time."""
        idle = _IDLE[self._device.index]
        stream = idle.pop() if idle else new_stream(self._device)
        weakref.finalize(self, idle.append, stream).atexit = False
        return stream

    def begin(self) -> Sequence[object]:
        """Captures follow, one at a time. Where no graph is left, they begin a new memory: PyTorch gives one back with
        the last of its graphs. Returns those that are left, which the caller has to hold until its own is captured."""
        graphs = list(self._graphs)
        if not graphs:
            self.handle = torch.cuda.graph_pool_handle()
        return graphs

    def hold(self, graph: object) -> None:
        """A graph was captured in it."""
        self._graphs.add(graph)

    def leave(self) -> None:
        """Capture elsewhere from now on; what is captured stays, and its replays go on following each other."""
        self._graphs = weakref.WeakSet()

    def follow(self, raw: int) -> None:
        """Order what the current stream, whose handle is `raw`, is given from now on after the last replay."""
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self.stream = stream, raw


_SHARED: weakref.WeakValueDictionary[tuple[int, int], GraphMemory] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def shared_memory(device: torch.device) -> GraphMemory:
    """The memory of graphs that are captured by calls on the current stream: their replays follow each other there in
    any case."""
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    with _LOCK:
        found = _SHARED.get(key)
        if found is None:
            found = _SHARED[key] = GraphMemory(device)
        return found
