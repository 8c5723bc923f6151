"""Weight streaming: weights beyond a budget stay in host memory and are copied to the device ahead of their use.

`stream` plans for a graph; a `Streamer` carries the plan out. Generated code calls `begin` first, `wait` before a load
is used and `release` after. Copies run on a stream of their own: a copy waits for the computations whose weights it
overwrites, and computations wait for the copies that they use, by events. A capture takes the same path: the first
event that the copy stream waits for brings it into the capture, and the last copy is waited for before the end.

Nothing is copied ahead for the next call: replays of a CUDA graph follow each other as a whole, and the weights that a
call begins with are among those that stay.
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
from torch_rtx.runtime.plan import aliases
from torch_rtx.runtime.streamplan import ALIGNMENT, Plan, WeightUse, budget_bytes, make_plan
from torch_rtx.settings import read_budget

log = logging.getLogger(__name__)
TINY = 64 << 10  # bytes; a copy of fewer takes as long to begin as to run, so that these weights stay on the device


@dataclass(frozen=True)
class Summary:
    """What streaming does to the weights of a session, in bytes.

    Attributes:
        resident: of weights that stay on the device, among them all of less than 64 KiB.
        staging: of the buffer on the device that the others share.
        streamed: what each call copies to the device, in `copies` pieces.
        host: of weights in host memory.
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
    """What streams the weights of `graph` (level fused); None where all of them stay.

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
    """How the nodes of `graph` use its weights. Those that have to stay on the device: what is written, returned, tiny,
    given to a Python function (which may keep it), or on another device."""
    indices = {weight.value.name: index for index, weight in enumerate(graph.weights)}
    spans: list[list[list[int]]] = [[] for _ in graph.weights]
    views: dict[str, list[list[int]]] = {}  # of weights, by name: the spans that each of them is part of
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
        elif aliases(node, trusted_ops):
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
    """Spans that are in the order of their beginnings, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def nbytes(type_: TensorType) -> int:
    """Bytes from the first element of a tensor to its last, with what lies between."""
    return aten.extent(_numbers(type_.shape), _numbers(type_.strides)) * aten.DTYPES[type_.dtype].itemsize


def _numbers(dims: Sequence[object]) -> list[int]:
    assert all(isinstance(dim, int) for dim in dims)  # parameters are static
    return [dim for dim in dims if isinstance(dim, int)]


Lines = tuple[Sequence[str], Mapping[int, Sequence[str]], Mapping[int, Sequence[str]]]


class Copies(Protocol):
    """What a streamer needs to know of a device: how copies and computations are put in order."""

    def begin(self) -> None:
        """A call begins, on the current stream."""

    def follow(self) -> None:
        """Copies from now on come after all computations so far."""

    def copy(self, index: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a load."""

    def wait(self, index: int) -> None:
        """Computations from now on come after the copy of a load."""

    def enter(self) -> None:
        """What the caller's stream is given from now on comes after all calls so far."""

    def leave(self) -> None:
        """A call, or the replay of one, has been given to the current stream."""

    def finish(self) -> None:
        """Wait, on the host, for the end of all calls so far."""


class Streamer:
    """Streams the weights of one session. Its calls share the staging: each is given to the device in a `turn`.

    Attributes:
        plan, summary: what stays, what is streamed.
        hosts: the streamed weights in host memory, by index; to be written in `idle` alone.
        pageable: why host memory could not be pinned, so that CUDA graphs can't copy from it; None if it is.

    Args:
        copies: how to copy; None: as the device does.
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
        self.pageable: str | None = None
        if copies is None and device.type == "cuda":
            copies_on = new_stream(device)
            self.pageable = _pinned(host, device)
            self._copies = _Streams(device, copies_on)
            end = weakref.finalize(self, _close, host, self.pageable is None, copies_on, device)
            end.atexit = False  # the process gives everything back
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
        """Start the copies that need not wait for a release. The first call of generated code."""
        self._copies.begin()
        self._issue(None)

    def wait(self, index: int) -> torch.Tensor:
        """The weight of a load on the device, for computations that the current stream is given before `release`."""
        self._copies.wait(index)
        return self._tensors[index]

    def release(self, index: int) -> None:
        """All that uses a load has been given to the current stream: start the copies that need its place."""
        if index in self._issued:
            self._copies.follow()
            self._issue(index)

    def _issue(self, after: int | None) -> None:
        for index in self._issued.get(after, ()):
            self._copies.copy(index, *self._bytes[index])

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around a call or the replay of one: calls of several threads and streams follow each other."""
        with self._lock:
            self._copies.enter()
            try:
                yield
            finally:
                self._copies.leave()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Around writes to `hosts`: no call is running, on the device either."""
        with self._lock:
            self._copies.finish()
            yield

    def lines(self, graph: Graph, nodes: Sequence[Sequence[Node]]) -> Lines:
        """The calls of generated code for `graph`, a line each: those that come first, and by position those before and
        those after a node.

        Args:
            nodes: what takes the place of each node of `graph`; positions count these.
        """
        ends = [0, *accumulate(map(len, nodes))]
        names = [weight.value.name for weight in graph.weights]
        before: dict[int, list[str]] = {}
        after: dict[int, list[str]] = {}
        for index, load in enumerate(self.plan.loads):
            before.setdefault(ends[load.first], []).append(f"{names[load.weight]} = _stream.wait({index})")
            if index in self._issued:
                after.setdefault(ends[load.last + 1] - 1, []).append(f"_stream.release({index})")
        unbound = ", ".join(names[index] for index in self.hosts)  # a use without `wait` is an error, not host memory
        return [f"del {unbound}", "_stream.begin()"], before, after


def _tensor(memory: torch.Tensor, type_: object) -> torch.Tensor:
    assert isinstance(type_, TensorType)
    return memory.view(aten.DTYPES[type_.dtype]).as_strided(_numbers(type_.shape), _numbers(type_.strides))


class _AtOnce:
    """On the CPU: a copy has ended when it is asked for."""

    def copy(self, index: int, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, index: int) -> None:
        pass

    def begin(self) -> None:
        pass

    follow = enter = leave = finish = begin


class _Streams:
    """On CUDA: copies run on a stream of their own, in the order in which they are asked for.

    Args:
        stream: the one for copies, see `new_stream`.
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
            stream.wait_event(self._stream.record_event())  # a call that failed did not wait for all of its copies
            self._done = stream.record_event()

    def finish(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    def _capturing(self) -> bool:
        """Whether the call becomes part of a caller's graph, which no event from outside may order."""
        with self._cuda.device(self._device):
            return bool(self._cuda.is_current_stream_capturing())


def _pinned(memory: torch.Tensor, device: torch.device) -> str | None:
    """Lock memory to its place, so that the device can copy from it on its own; why not, if it can't be."""
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
    """Give back what a streamer had on CUDA, when no copy is running."""
    torch.cuda.synchronize(device)
    cuda = driver()
    if pinned:
        cuda.cuMemHostUnregister(memory.data_ptr())
    if cuda is not None:  # else the stream is one of PyTorch's
        cuda.cuStreamDestroy(stream.cuda_stream)
