"""The memory pool of CUDA graphs, which all graphs of a session, or of several sessions, share.

A graph needs its memory only during a replay, since each replay brings inputs in and results out. Graphs can therefore
use the same memory if their replays run one after another.
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

_IDLE: dict[int, list[torch.cuda.Stream]] = defaultdict(list)  # by device, the streams of memories that are gone


class GraphMemory:
    """Memory that graphs on `device` share.

    Attributes:
        lock: must be held around `follow` and the launch after it, and while results are in this memory.
        handle: PyTorch's handle of the memory pool.
        stream: the driver's handle of the stream of the last replay; -1 before the first.
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
        """The stream that captures the graphs. No other memory uses it: libraries keep a workspace per stream, and
        graphs of two memories may be replayed at once. Not thread-safe."""
        idle = _IDLE[self._device.index]
        stream = idle.pop() if idle else new_stream(self._device)
        weakref.finalize(self, idle.append, stream).atexit = False
        return stream

    def begin(self) -> Sequence[object]:
        """Call before a capture. Starts a new pool if no graph is left, since PyTorch frees a pool with its last graph.
        Returns the graphs that are left, which the caller must hold until its own graph is captured."""
        graphs = list(self._graphs)
        if not graphs:
            self.handle = torch.cuda.graph_pool_handle()
        return graphs

    def hold(self, graph: object) -> None:
        """Register a graph that was captured in this memory; it is held weakly."""
        self._graphs.add(graph)

    def leave(self) -> None:
        """Let the next capture start a new pool. The graphs in the old one stay, and their replays stay in order."""
        self._graphs = weakref.WeakSet()

    def follow(self, raw: int) -> None:
        """Make the current stream, whose handle is `raw`, wait for the last replay."""
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream, self.stream = stream, raw


_SHARED: weakref.WeakValueDictionary[tuple[int, int], GraphMemory] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def shared_memory(device: torch.device) -> GraphMemory:
    """The memory of all graphs that calls on the current stream capture: one stream replays them in order anyway."""
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    with _LOCK:
        found = _SHARED.get(key)
        if found is None:
            found = _SHARED[key] = GraphMemory(device)
        return found
