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


def newest(cuda: Any, name: str) -> Any:
    """The variant of a driver function that takes edge data: cuda-bindings 12 call it `NAME_v2`."""
    return getattr(cuda, f"{name}_v2", None) or getattr(cuda, name)


@contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread allocate memory, load code and synchronize while others capture CUDA graphs. PyTorch's captures
    fail by default if any thread does so."""
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
    """A stream of its own. PyTorch hands out 32 streams in turn, so a capture could catch work of another user of the
    same stream. Without the driver API, which captures need too, it is one of those."""
    cuda = driver()
    if cuda is None:
        return torch.cuda.Stream(device)
    context = context_of(cuda, device.index)  # a thread that has not called the CUDA runtime has none
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
