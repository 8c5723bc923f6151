"""Keeps calls and writes of weights apart: a call uses all weights as they are before a write, or all as after it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch


class Gate:
    """Calls pass together, `with gate:`; a write has it alone, `with gate.writing():`.

    A call on CUDA only queues its work. So a write also waits, on its stream, for the streams of earlier calls, and
    later calls on other streams wait for the write. Nothing waits while a stream is captured.

    A call takes no lock: it enters its thread in a list, and then looks for a writer, which looks at the list after it
    has entered itself. The caller keeps writers apart.

    Args:
        cuda: the module `torch.cuda`.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._index = device.index if device.type == "cuda" else None
        self._calls: list[int] = []  # the threads of calls; append and remove are atomic
        self._writer: int | None = None
        self._change = threading.Condition()
        # By handle, the streams that have waited for the last write, and that the next write waits for.
        self._streams: dict[int, Any] = {}
        self._written: Any = None

    def __enter__(self) -> None:
        self._calls.append(get_ident())
        if self._writer is not None:
            self._wait()
        if self._index is not None:
            raw = torch._C._cuda_getCurrentRawStream(self._index)
            if raw not in self._streams:
                try:
                    self._follow(raw)
                except BaseException:
                    self.__exit__()
                    raise

    def __exit__(self, *_: object) -> None:
        self._calls.remove(get_ident())
        if self._writer is not None:
            with self._change:
                self._change.notify_all()

    def _wait(self) -> None:
        """Stand back until there is no writer, unless this thread is the writer or already in a call."""
        thread = get_ident()
        while self._writer not in (None, thread) and self._calls.count(thread) == 1:
            self._calls.remove(thread)
            with self._change:
                self._change.notify_all()
                self._change.wait_for(lambda: self._writer is None)
            self._calls.append(thread)

    def _follow(self, raw: int) -> None:
        """Order the current stream, whose handle is `raw`, after the last write and before the next."""
        if self._capturing():
            return
        stream = self._cuda.current_stream(self._device)
        if self._written is not None:
            stream.wait_event(self._written)
        self._streams[raw] = stream

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait for calls in progress, and hold back others. A call may write within itself."""
        thread = get_ident()
        try:
            with self._change:
                self._writer = thread
                self._change.wait_for(lambda: all(other == thread for other in self._calls))
            with self._in_order():
                yield
        finally:
            with self._change:
                self._writer = None
                self._change.notify_all()

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        if self._index is None or self._capturing():
            yield
            return
        stream = self._cuda.current_stream(self._device)
        for other in self._streams.values():
            stream.wait_event(other.record_event())
        try:
            yield
        finally:
            self._written = stream.record_event()
            self._streams = {torch._C._cuda_getCurrentRawStream(self._index): stream}

    def _capturing(self) -> bool:
        with self._cuda.device(self._device):
            return bool(self._cuda.is_current_stream_capturing())
