"""The CUDA driver API, through the package `cuda-bindings` where it is installed."""

from __future__ import annotations

from functools import cache
from typing import Any


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
