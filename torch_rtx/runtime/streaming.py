"""Weight streaming: weights beyond a budget stay in host memory and are copied to the device ahead of their use.

`stream` plans for a graph; a `Streamer` executes the plan. Generated code calls `begin` first, `wait` before the first
use of a load and `release` after the last. Copies run on a stream of their own and are ordered by events: a copy waits
for the computations whose weights it overwrites, and computations wait for the copies that they use. A capture works
alike: the first event that the copy stream waits for brings it into the capture, which waits for the last copy.

No copy starts ahead of its call: replays of a CUDA graph follow each other as a whole, and the weights at the start of
the program stay on the device.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch

from torch_rtx import aten
from torch_rtx.ir import MAIN, Graph, Node, TensorType, attr_values
from torch_rtx.runtime.driver import driver, new_stream
from torch_rtx.runtime.streamplan import ALIGNMENT, Plan, WeightUse, budget_bytes, make_plan
from torch_rtx.settings import read_budget

log = logging.getLogger(__name__)
TINY = 64 << 10  # bytes; smaller weights stay on the device: their copies take longer to start than to run


@dataclass(frozen=True)
class Summary:
    """Where the weights of a session are, in bytes.

    Attributes:
        resident: weights that stay on the device, among them all smaller than 64 KiB.
        staging: the buffer on the device that the other weights share.
        streamed: bytes that each call copies to the device, in `copies` copies.
        host: weights in host memory.
    """

    resident: int
    staging: int
    streamed: int
    host: int
    copies: int

    def __str__(self) -> str:
        sizes = (f"{size / 2**20:.1f} MiB" for size in (self.resident, self.streamed, self.staging, self.host))
        resident, streamed, staging, host = sizes
        return (
            f"{resident} of weights stay on the device, {streamed} per call are streamed in {self.copies} copies "
            f"through {staging} of staging, {host} are in host memory"
        )


def stream(
    graph: Graph, device: torch.device, budget: int | str | None, trusted_ops: frozenset[str] = frozenset()
) -> Streamer | None:
    """The streamer for the weights of `graph` (level fused); None if all fit on the device.

    Args:
        budget: `RuntimeSettings.weight_streaming_budget`.
        trusted_ops: operators outside the allow-list that the graph may call.

    Raises:
        SettingsError: the budget is too small.
    """
    if budget is None:
        return None
    uses = weight_uses(graph, trusted_ops)
    plan = make_plan(uses, budget_bytes(uses, read_budget(budget)))
    if not plan.loads:
        log.info("all weights fit in weight_streaming_budget=%r: none is streamed", budget)
        return None
    streamer = Streamer(plan, graph, device)
    log.info("%s", streamer.summary)
    return streamer


def weight_uses(graph: Graph, trusted_ops: frozenset[str] = frozenset()) -> list[WeightUse]:
    """How the nodes of `graph` use its weights. A weight is fixed to the device if it is written, returned, tiny,
    passed to a Python function (which may keep it), or on another device."""
    indices = {weight.value.name: index for index, weight in enumerate(graph.weights)}
    spans: list[list[list[int]]] = [[] for _ in graph.weights]
    views: dict[str, list[list[int]]] = {}  # by name, the spans of the weights that a view is of
    kept = {indices[name] for name in graph.written if name in indices}
    owner = {}
    for position, node in enumerate(graph.nodes):
        used: list[list[int]] = []
        for value in node.inputs:
            if value.name in indices:
                used.append([position, position])
                spans[indices[value.name]].append(used[-1])
                owner[id(used[-1])] = indices[value.name]
            used += views.get(value.name, ())
        for span in used:
            span[1] = position
        if node.op == "python":
            kept |= {owner[id(span)] for span in used}
        elif aten.may_alias(node, trusted_ops):
            views |= {value.name: used for value in node.outputs if value is not None}
    for value in attr_values(graph.outputs):
        kept |= {indices[value.name]} if value.name in indices else set()
        kept |= {owner[id(span)] for span in views.get(value.name, ())}
    found = []
    for index, weight in enumerate(graph.weights):
        type_ = weight.value.type
        assert isinstance(type_, TensorType)
        size, disjoint = nbytes(type_), _disjoint(spans[index])
        fixed = index in kept or size < TINY or type_.device != MAIN or not disjoint
        name = ", ".join(weight.names) or weight.value.name
        found.append(WeightUse(name, size if type_.device == MAIN else 0, disjoint, fixed))
    return found


def _disjoint(spans: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Merge overlapping spans, which must be sorted."""
    merged: list[tuple[int, int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def nbytes(type_: TensorType) -> int:
    """Bytes from the first to the last element of a tensor, gaps included."""
    return aten.extent(numbers(type_.shape), numbers(type_.strides)) * aten.DTYPES[type_.dtype].itemsize


def numbers(dims: Sequence[object]) -> list[int]:
    """The dims of a static type."""
    assert all(isinstance(dim, int) for dim in dims)
    return [dim for dim in dims if isinstance(dim, int)]


Lines = tuple[Sequence[str], Mapping[int, Sequence[str]], Mapping[int, Sequence[str]]]


class Copies(Protocol):
    """Orders copies and computations on a device."""

    def begin(self) -> None:
        """A call begins on the current stream."""

    def follow(self) -> None:
        """Later copies wait for all earlier computations."""

    def copy(self, index: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy load `index`."""

    def wait(self, index: int) -> None:
        """Later computations wait for the copy of load `index`."""

    def enter(self) -> None:
        """The current stream waits for all earlier calls."""

    def leave(self) -> None:
        """A call or replay has been queued on the current stream."""

    def finish(self) -> None:
        """Block the host until all earlier calls have ended."""


class Streamer:
    """Streams the weights of one session. All calls share the staging, so that each is queued in a `turn`.

    Attributes:
        plan, summary: which weights stay and which are streamed.
        hosts: the streamed weights in host memory, by index; written only in `idle`.
        pageable: the reason why host memory is not pinned, so that CUDA graphs can't copy from it; None if it is.

    Args:
        copies: None: the device's own.
    """

    @torch.inference_mode(False)
    def __init__(self, plan: Plan, graph: Graph, device: torch.device, copies: Copies | None = None) -> None:
        self.plan = plan
        self._copies: Copies = copies or _AtOnce()
        self._lock = threading.RLock()
        indices = sorted({load.weight for load in plan.loads})
        types = {index: graph.weights[index].value.type for index in indices}
        sizes = {index: nbytes(type_) for index, type_ in types.items() if isinstance(type_, TensorType)}
        ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()))
        starts = dict(zip(indices, [0, *ends], strict=False))
        host = torch.empty(ends[-1], dtype=torch.uint8)
        staging = torch.empty(plan.staging, dtype=torch.uint8, device=device)
        self._staging = staging.untyped_storage()
        self.pageable: str | None = None
        if copies is None and device.type == "cuda":
            copies_on = new_stream(device)
            self.pageable = _pinned(host, device)
            self._copies = _Streams(device, copies_on)
            end = weakref.finalize(self, _close, host, self.pageable is None, copies_on, device)
            end.atexit = False  # the end of the process frees everything
        self.hosts = {i: _tensor(host[starts[i] : starts[i] + sizes[i]], types[i]) for i in indices}
        self._bytes, self._tensors = [], []
        self._issued: dict[int | None, list[int]] = {}
        for number, load in enumerate(plan.loads):
            start, size = starts[load.weight], sizes[load.weight]
            target = staging[load.offset : load.offset + size]
            self._bytes.append((target, host[start : start + size]))
            self._tensors.append(_tensor(target, types[load.weight]))
            self._issued.setdefault(load.after, []).append(number)
        self.summary = Summary(plan.resident, plan.staging, plan.streamed, ends[-1], len(plan.loads))

    def begin(self) -> None:
        """Start the copies that wait for no release. Generated code calls this first."""
        self._copies.begin()
        self._issue(None)

    def wait(self, index: int) -> torch.Tensor:
        """The weight of a load on the device, valid for computations that are queued before `release`."""
        self._copies.wait(index)
        return self._tensors[index]

    def release(self, index: int) -> None:
        """All uses of a load are queued: start the copies that reuse its memory."""
        if index in self._issued:
            self._copies.follow()
            self._issue(index)

    def _issue(self, after: int | None) -> None:
        for index in self._issued.get(after, ()):
            self._copies.copy(index, *self._bytes[index])

    def free(self) -> None:
        """Free the staging until `allocate`; called in `idle`, as this is, and no call may run in between."""
        self._staging.resize_(0)

    def allocate(self) -> None:
        """Make the staging again if it was freed, maybe elsewhere."""
        self._staging.resize_(self.plan.staging)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Held during a call or replay: calls of several threads and streams run one after another."""
        with self._lock:
            self._copies.enter()
            try:
                yield
            finally:
                self._copies.leave()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Held while `hosts` are written: no call runs, neither on the host nor on the device."""
        with self._lock:
            self._copies.finish()
            yield

    def lines(self, graph: Graph, nodes: Sequence[Sequence[Node]]) -> Lines:
        """The lines of generated code for `graph`: the first lines, and by position those before and after a node.

        Args:
            nodes: the nodes that each node of `graph` is inlined to; positions count these.
        """
        ends = [0, *accumulate(map(len, nodes))]
        names = [weight.value.name for weight in graph.weights]
        before: dict[int, list[str]] = {}
        after: dict[int, list[str]] = {}
        for index, load in enumerate(self.plan.loads):
            before.setdefault(ends[load.first], []).append(f"{names[load.weight]} = _stream.wait({index})")
            if index in self._issued:
                after.setdefault(ends[load.last + 1] - 1, []).append(f"_stream.release({index})")
        unbound = ", ".join(names[index] for index in self.hosts)  # a use without `wait` raises
        return [f"del {unbound}", "_stream.begin()"], before, after


def _tensor(memory: torch.Tensor, type_: object) -> torch.Tensor:
    assert isinstance(type_, TensorType)
    return memory.view(aten.DTYPES[type_.dtype]).as_strided(numbers(type_.shape), numbers(type_.strides))


class _AtOnce:
    """Copies on the CPU, which are synchronous."""

    def copy(self, index: int, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, index: int) -> None:
        pass

    def begin(self) -> None:
        pass

    follow = enter = leave = finish = begin


class _Streams:
    """Copies on CUDA, in order on a stream of their own.

    Args:
        stream: the stream for copies, see `new_stream`.
        cuda: the module `torch.cuda`.
    """

    def __init__(self, device: torch.device, stream: Any, cuda: Any = torch.cuda) -> None:
        self._device, self._stream, self._cuda = device, stream, cuda
        self._copied: dict[int, Any] = {}
        self._compute: Any = None  # the stream of the call
        self._done: Any = None  # the end of the last call

    def begin(self) -> None:
        self._compute = self._cuda.current_stream(self._device)
        self._copied = {}
        self.follow()

    def follow(self) -> None:
        self._stream.wait_event(self._compute.record_event())

    def copy(self, index: int, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._copied[index] = self._stream.record_event()

    def wait(self, index: int) -> None:
        self._compute.wait_event(self._copied[index])

    def enter(self) -> None:
        if self._done is not None and not self._capturing():
            self._cuda.current_stream(self._device).wait_event(self._done)

    def leave(self) -> None:
        if not self._capturing():
            stream = self._cuda.current_stream(self._device)
            stream.wait_event(self._stream.record_event())  # a failed call has not waited for all of its copies
            self._done = stream.record_event()

    def finish(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def _capturing(self) -> bool:
        """The caller captures the call, and no event from outside may order it."""
        with self._cuda.device(self._device):
            return bool(self._cuda.is_current_stream_capturing())


def _pinned(memory: torch.Tensor, device: torch.device) -> str | None:
    """Pin host memory, so that copies from it are asynchronous; returns the reason if that fails, else None."""
    cuda, reason = driver(), "the package cuda-bindings is not installed"
    if cuda is not None:
        with torch.cuda.device(device):
            (status,) = cuda.cuMemHostRegister(memory.data_ptr(), memory.numel(), 0)
        if status == 0:
            return None
        reason = f"{memory.numel()} bytes can't be pinned: {status.name}"
    log.warning("streamed weights are copied from pageable memory, which is slower: %s", reason)
    return reason


def _close(memory: torch.Tensor, pinned: bool, stream: Any, device: torch.device) -> None:
    """Free a streamer's CUDA resources, after its last copy."""
    torch.cuda.synchronize(device)
    cuda = driver()
    if pinned:
        cuda.cuMemHostUnregister(memory.data_ptr())
    if cuda is not None:  # else the stream is one of PyTorch's
        cuda.cuStreamDestroy(stream.cuda_stream)
