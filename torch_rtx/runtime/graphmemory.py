"""The memory pool of CUDA graphs, which all graphs of a session, or of several sessions, share.

A graph needs its memory only during a replay, since each replay brings inputs in and results out. Graphs can therefore
use the same memory if their replays run one after another. What a forward graph saves lies in blocks, which outlive its
replay: only its backward graph shares that memory, and writes gradients over what it has read. Gradients that library
calls write lie in memory of the session.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from operator import gt
from typing import Any

import torch

from torch_rtx.runtime.driver import new_stream
from torch_rtx.runtime.strided import copy_strided, span_of

MOVES = 3  # in a row, after which gradients get memory of their own
_IDLE: dict[int, list[torch.cuda.Stream]] = defaultdict(list)  # by device, the streams of memories that are gone


class GraphMemory:
    """Memory that graphs on `device` share.

    Attributes:
        lock: must be held around `follow` and the launch after it, and while results are in this memory.
        handle: PyTorch's handle of the memory pool.
        stream: the driver's handle of the stream of the last replay; -1 before the first.
        threads: those that have called forward graphs of training steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.handle: Any = None
        self._stream: torch.cuda.Stream | None = None
        self.stream, self.threads = -1, set[int]()

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


class ResultMemory:
    """Where the backward graphs of a session leave results of library calls: a tensor of ordinary memory for each. A
    replay can't point such a call to another tensor; a copy would take time, and the memory twice. Graphs for other
    sizes of the inputs have gradients of the same sizes, and so they use the same tensors.

    Attributes:
        is_usable: results seldom stay with somebody until the next backward, except as `.grad`, which can move.
    """

    def __init__(self) -> None:
        self.is_usable, self._refused = True, 0
        self._tensors: list[torch.Tensor] = []

    def allocator(self, empty: Callable[..., torch.Tensor], taken: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        """For one capture, a function as in `code.EMPTY`, which appends what it returns to `taken`; `empty` makes new
        tensors."""
        free = list(self._tensors)

        def take(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            like = (shape, strides, dtype)
            at = next((i for i, one in enumerate(free) if (one.shape, one.stride(), one.dtype) == like), None)
            if at is None:
                self._tensors.append(empty(*like))
            taken.append(self._tensors[-1] if at is None else free.pop(at))
            return taken[-1]

        return take

    def count_refusals(self, refused: bool) -> None:
        """Tell before each replay whether it could not be, since somebody had a result that could not move."""
        self._refused = self._refused + 1 if refused else 0
        self.is_usable = self.is_usable and self._refused < MOVES


class Kept:
    """Memory that no replay may overwrite while somebody has a tensor there.

    Args:
        memories: the tensors in each that the graph and its session have.

    Attributes:
        storages: the memories.
    """

    def __init__(self, memories: Iterable[Sequence[torch.Tensor]]) -> None:
        memories = list(memories)
        self.storages = [tensors[0].untyped_storage() for tensors in memories]
        self._handles = [storage._cdata for storage in self.storages]
        self._references = list(map(references, memories))

    def is_held(self) -> bool:
        """Somebody has a tensor in one of them."""
        return any(map(gt, map(_USES, self._handles), self._references))

    def move_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Give those that are still `.grad` of `parameters` memory of their own."""
        move_gradients(parameters, dict(zip(self._handles, self._references, strict=True)))


class Block:
    """Memory in which a forward graph saves tensors, and its backward graph leaves gradients.

    Args:
        tensors: what is saved there.
        references: of the forward graph to this memory, see `references`.
        memory: of the forward graph.
        graph: keeps PyTorch from freeing the memory pool.

    Attributes:
        parts: the bytes [start, end) of each saved tensor.
        handle: of the memory pool.
        takes_gradients: they seldom have to move. A loop that clears `.grad` after its forward would move them in each
            step, one that accumulates them does so once for several backwards.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], references: int, memory: GraphMemory, graph: torch.cuda.CUDAGraph
    ) -> None:
        self.storage = tensors[0].untyped_storage()
        self.parts = [span_of([tensor]) for tensor in tensors]
        self.memory, self.handle, self._graph = memory, memory.handle, graph
        self.takes_gradients, self._moves = True, 0
        self._cdata, self._references = self.storage._cdata, references
        self._views: dict[torch.dtype, torch.Tensor] = {}
        _BLOCKS[self.storage.data_ptr()] = self

    def is_held(self) -> bool:
        """Somebody else has a tensor here."""
        return _USES(self._cdata) > self._references

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole block; one tensor per dtype, which counts as a reference of the graph."""
        if dtype not in self._views:
            made = torch.empty(0, dtype=dtype, device=self.storage.device)
            self._views[dtype] = made.set_(self.storage, 0, (self.storage.nbytes() // dtype.itemsize,), (1,))
            self._references += 1
        return self._views[dtype]

    def count_moves(self, moved: bool) -> None:
        """Tell before each forward whether gradients had to move, or should have moved."""
        self._moves = self._moves + 1 if moved else 0
        self.takes_gradients = self.takes_gradients and self._moves < MOVES

    def move_gradients(self, parameters: Iterable[torch.Tensor], moving: bool) -> None:
        """Give those that are still `.grad` memory of their own; if not `moving`, count that they should have moved."""
        self.count_moves(move_gradients(parameters, {self._cdata: self._references}, moving))


def move_gradients(parameters: Iterable[torch.Tensor], references: Mapping[int, int], moving: bool = True) -> bool:
    """Whether some `.grad` lie in memory of a graph, which has so many `references` to each, by handle. If `moving`,
    they get memory of their own, but not while somebody has another tensor there: it may be a view of `.grad`, which is
    to follow it."""
    gradients = [parameter.grad for parameter in parameters if parameter.is_leaf]
    dense = {id(g): g for g in gradients if type(g) is torch.Tensor and g.layout == torch.strided}
    inside = defaultdict[int, list[torch.Tensor]](list)
    for gradient in dense.values():
        handle = gradient.untyped_storage()._cdata
        if handle in references:
            inside[handle].append(gradient)
    for handle, found in inside.items() if moving else ():
        if _USES(handle) == references[handle] + len(found):
            for gradient in found:
                gradient.data = copy_strided(gradient.detach(), gradient.stride())
    return bool(inside)


def accumulating() -> list[torch.Tensor]:
    """The parameters to whose `.grad` autograd adds results of the node that it runs now."""
    following = getattr(_NODE(), "next_functions", ())
    return [one.variable for one, _ in following if isinstance(one, _ACCUMULATE)]


def references(tensors: Sequence[torch.Tensor]) -> int:
    """How often these tensors, none of which is a view for autograd, and an `UntypedStorage` refer to the memory that
    they share. Its count of uses alone would also have what is about to go, such as frames of a traceback."""
    return min(1 + len(set(map(id, tensors))), _USES(tensors[0].untyped_storage()._cdata))


def block_of(tensors: Iterable[torch.Tensor]) -> Block | None:
    """The largest block in which some of `tensors` lie."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    found = [block for address in addresses if (block := _BLOCKS.get(address)) is not None]
    return max(found, key=lambda block: block.storage.nbytes(), default=None)


_USES: Callable[[int], int] = torch._C._storage_Use_Count  # references to the memory of a tensor
_NODE: Callable[[], Any] = torch._C._current_autograd_node
_ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
_BLOCKS: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()  # by address
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
