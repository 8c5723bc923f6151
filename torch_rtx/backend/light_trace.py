"""`torch.export` without work that an inference has no use for.

For each call of a model PyTorch describes the stack, a hundred frames that are those of the call before but for a few.
And where a model switches gradients, as `@torch.no_grad()` does, PyTorch divides the program and joins it again, also
where nothing changes; with gradients disabled it refuses a model that begins with gradients enabled, since the part
before them is empty. A program for inference needs no switches: nothing differentiates it, and what a model
differentiates itself is traced in the mode that it asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import FrameSummary, StackSummary
from types import CodeType, FrameType
from typing import Any

import torch
from torch.fx import proxy
from torch.fx.experimental import proxy_tensor


@contextmanager
def light_trace() -> Iterator[None]:
    """Inside, a trace records the same stacks and calls in less time, and no switches of gradients. What a PyTorch does
    not have is not replaced. It is a change for all threads: hold Dynamo's lock around it."""
    mode: Any = getattr(proxy_tensor, "PreDispatchTorchFunctionMode", None)
    places = [(proxy, "CapturedTraceback", _stacks())] if hasattr(proxy, "CapturedTraceback") else []
    if mode is not None:
        places.append((mode, "__torch_function__", _without_switches(mode.__torch_function__)))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _stacks() -> type:
    """A stand-in for PyTorch's `CapturedTraceback` that remembers what it has said of a line."""
    known: dict[tuple[CodeType, int], FrameSummary] = {}

    class Stack:
        def __init__(self, frame: FrameType | None) -> None:
            self.frame = frame

        @classmethod
        def extract(cls) -> Stack:
            return cls(sys._getframe(1))

        def summary(self) -> StackSummary:
            found, frame = StackSummary(), self.frame
            while frame is not None:
                place = frame.f_code, frame.f_lineno
                if place not in known:
                    known[place] = FrameSummary(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
                found.append(known[place])
                frame = frame.f_back
            found.reverse()
            return found

    return Stack


def _without_switches(record: Any) -> Any:
    """`record`, a `__torch_function__` that puts switches of gradients into the program, without those."""

    def switching(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return func(*args, **(kwargs or {}))
        return record(self, func, types, args, kwargs)

    return switching
