"""What the ranks of torch.distributed decide once for all of them, through its store of keys and values.

These are no collectives: a rank may ask at any time, in any thread, and one that never asks keeps nobody waiting for
longer than a timeout. Without other ranks, or where the store is gone, each process decides for itself. A store that
failed is not asked again for a while: each failure writes a trace to the log of PyTorch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch

log = logging.getLogger(__name__)
FIRST_S = 120.0  # to wait for the rank that builds what all need
SAID_S = 5.0  # to wait for what a rank is about to say
SILENT_S = 300.0  # without a question to a store that failed
POLL_S = 0.02  # between questions: a blocking wait would keep the threads of NCCL from the store


_failed = -inf  # when the store failed


def shared_store() -> Any | None:
    """The store that all ranks see; None: there are no others, or it has failed."""
    dist = torch.distributed
    if time.monotonic() < _failed + SILENT_S:
        return None
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if dist.get_backend() == "fake":
        return None
    try:
        return dist.PrefixStore("torch_rtx", dist.distributed_c10d._get_default_store())
    except (RuntimeError, ValueError) as error:  # the groups have ended since
        _alone(error)
        return None


def place() -> tuple[int, int]:
    """The number of this rank, and how many there are."""
    dist = torch.distributed
    return (0, 1) if shared_store() is None else (dist.get_rank(), dist.get_world_size())


@contextmanager
def one_rank_first(key: str, seconds: float = FIRST_S) -> Iterator[None]:
    """The first rank enters at once, the others when it has left, or after so many seconds. What it made is in a cache
    then, if all ranks have the same."""
    store = shared_store()
    first = store is None or _first(store, key)
    if not first and not _appears(store, f"{key} done", seconds):
        log.warning("another rank has not built %s within %.0f s: this one builds it, too", key[:12], seconds)
    try:
        yield
    finally:
        if first and store is not None:
            _set(store, f"{key} done", "yes")


def agreed(key: str, value: str) -> str:
    """What the first rank said of `key`, which may be this one and `value`."""
    store = shared_store()
    if store is None:
        return value
    if _first(store, key):
        _set(store, key, value)
        return value
    return said(key, SAID_S) or value


def say(key: str, value: str) -> None:
    """Tell all ranks that ask for `key`."""
    store = shared_store()
    if store is not None:
        _set(store, key, value)


def said(key: str, seconds: float = 0.0) -> str | None:
    """What a rank said of `key`, within so many seconds; None: none has."""
    store = shared_store()
    if store is None or not _appears(store, key, seconds):
        return None
    try:
        return str(store.get(key).decode())
    except RuntimeError as error:
        _alone(error)
        return None


def exchanged(key: str, value: str, rank: int, size: int, seconds: float = FIRST_S) -> list[str | None]:
    """What each of the ranks 0 to `size - 1` says of `key`, this one, `rank`, among them; None: nothing within so many
    seconds. Nobody says anything where there is no store."""
    store = shared_store()
    if store is None:
        return []
    _set(store, f"{key} {rank}", value)
    end = time.monotonic() + seconds
    return [said(f"{key} {other}", max(0.0, end - time.monotonic())) for other in range(size)]


def _first(store: Any, key: str) -> bool:
    """No rank has asked this before."""
    try:
        return bool(store.add(f"{key} claims", 1) == 1)
    except RuntimeError as error:
        _alone(error)
        return True


def _set(store: Any, key: str, value: str) -> None:
    try:
        store.set(key, value)
    except RuntimeError as error:
        _alone(error)


def _appears(store: Any, key: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    try:
        while not store.check([key]):
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
    except RuntimeError as error:
        _alone(error)
        return False
    return True


def _alone(error: Exception) -> None:
    global _failed
    _failed = time.monotonic()
    log.warning("the store of the ranks fails, this one decides for itself: %s", str(error).partition("\n")[0])
