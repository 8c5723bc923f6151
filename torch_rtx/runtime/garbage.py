"""Pauses of Python's garbage collection.

A capture of a CUDA graph must not be interrupted by the destruction of another one. And tracing and lowering a model
make millions of small objects, nearly all of which live until the end: each collection goes through them again, and
through the objects of the model and of PyTorch, which takes a fifth of the time of a compilation.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses, _enabled = 0, False  # how many contexts are open, and whether there were collections before the first one


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in this process until the end of the context; of several at once, of the last one."""
    global _pauses, _enabled
    with _lock:
        if not _pauses:
            _enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _enabled:
                gc.enable()
