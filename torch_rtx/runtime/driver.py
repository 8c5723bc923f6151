"""The CUDA driver API, through the package `cuda-bindings` where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@cache
def driver() -> Any:
    """The driver API, or None where its bindings are not installed."""
    try:
        from cuda.bindings import driver  # not a requirement: only GPU machines have it
    except ImportError:
        return None
    return driver


def checked(answer: tuple[Any, ...]) -> Any:
    """The result of a driver call.

    Raises:
        RuntimeError: the call failed.
    """
    status, *results = answer
    if status != 0:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return results[0] if results else None


@contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread allocate memory, load code and wait while others capture CUDA graphs. PyTorch's captures forbid
    that to all threads by default, and fail when one does it nevertheless."""
    cuda = driver()
    if cuda is None:
        yield
        return
    exchange = cuda.cuThreadExchangeStreamCaptureMode
    before = checked(exchange(cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    try:
        yield
    finally:
        checked(exchange(before))


def new_stream(device: torch.device) -> Any:
    """A stream that nobody else gets: PyTorch hands out 32 in turn, and the work of whoever got the same one would be
    captured instead of run. Without the driver API it is one of those; nothing is captured then."""
    cuda = driver()
    if cuda is None:
        return torch.cuda.Stream(device)
    context = context_of(cuda, device.index)  # a thread that made no call of the runtime yet has none
    checked(cuda.cuCtxPushCurrent(context))
    try:
        raw = checked(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
    finally:
        checked(cuda.cuCtxPopCurrent())
    return torch.cuda.ExternalStream(int(raw), device)


@cache
def context_of(api: Any, index: int) -> Any:
    """The primary context of a device, which PyTorch uses too; `api` is the driver API."""
    checked(api.cuInit(0))
    return checked(api.cuDevicePrimaryCtxRetain(checked(api.cuDeviceGet(index))))
