"""Stand-ins for CUDA's streams and events, which say what happens before what (vector clocks)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_rtx.ir import Graph, TensorType, Value, Weight
from torch_rtx.runtime.streaming import Streamer, _Streams
from torch_rtx.runtime.streamplan import Plan

Clock = dict[str, int]


@dataclass(eq=False)
class FakeEvent:
    clock: Clock
    synchronized: bool = False

    def synchronize(self) -> None:
        self.synchronized = True


@dataclass(eq=False)
class FakeStream:
    """A stream: `clock` has, per stream, how many of its operations come before the next one of this stream."""

    name: str
    clock: Clock = field(default_factory=dict)
    waited: list[FakeEvent] = field(default_factory=list)

    def run(self) -> Clock:
        """An operation; returns its time."""
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def record_event(self) -> FakeEvent:
        return FakeEvent(dict(self.clock))

    def wait_event(self, event: FakeEvent) -> None:
        self.waited.append(event)
        for name, count in event.clock.items():
            self.clock[name] = max(count, self.clock.get(name, 0))


class FakeCuda:
    """The part of `torch.cuda` that streaming uses; `current` is the caller's stream."""

    def __init__(self) -> None:
        self.current = FakeStream("caller")
        self.capturing = False

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def device(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        stream.run()  # the copy that is made inside
        yield
        self.current = before


class Recorded:
    """A streamer over fake streams, called as generated code does, with a record of uses and copies.

    Args:
        sizes: of the weights, in bytes.
    """

    def __init__(self, cuda: FakeCuda, copies: FakeStream, plan: Plan, sizes: Sequence[int]) -> None:
        self.cuda, self.plan, self.sizes = cuda, plan, sizes
        self.events: list[tuple[str, int, str, Clock]] = []  # what, which load, on which stream, when
        record = self.events

        class Streams(_Streams):
            def copy(self, index: int, target: torch.Tensor, source: torch.Tensor) -> None:
                super().copy(index, target, source)
                record.append(("copy", index, copies.name, dict(copies.clock)))

        types = [TensorType("u8", (size,), (1,)) for size in sizes]
        self.graph = Graph("fused", weights=tuple(Weight(Value(f"w{i}", t), (f"w{i}",)) for i, t in enumerate(types)))
        streams: Any = Streams(torch.device("cpu"), copies, cuda)
        self.streamer = Streamer(plan, self.graph, torch.device("cpu"), streams) if plan.loads else None

    def call(self, positions: range) -> None:
        """One call of the program."""
        if self.streamer is None:
            return
        with self.streamer.turn():
            self.streamer.begin()
            for position in positions:
                here = list(enumerate(self.plan.loads))
                for index, load in here:
                    if load.first == position:
                        self.streamer.wait(index)
                time = self.cuda.current.run()
                for index, load in here:
                    if load.first <= position <= load.last:
                        self.events.append(("use", index, self.cuda.current.name, time))
                for index, load in here:
                    if load.last == position:
                        self.streamer.release(index)

    def check(self) -> None:
        """Uses come after their copies, copies after the uses of what they overwrite."""
        for number, (what, index, _, time) in enumerate(self.events):
            for before, other, stream, earlier in self.events[:number]:
                concerned = self._shared(index, other) if what == "copy" and before == "use" else index == other
                if concerned and (what, before) in (("use", "copy"), ("copy", "use")):
                    assert time.get(stream, 0) >= earlier[stream], (what, index, before, other)

    def _shared(self, one: int, other: int) -> bool:
        """Whether two loads share memory."""
        a, b = self.plan.loads[one], self.plan.loads[other]
        return a.offset < b.offset + self.sizes[b.weight] and b.offset < a.offset + self.sizes[a.weight]
