"""Peers that go wrong, for the tests of the benchmarks: each in its own way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.peers import Peer, Prepared, Subject, register


def _wrong(subject: Subject) -> Prepared:
    """Right in form, and a thousandth off in every number."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = subject.model(*args, **kwargs)
        return {name: 1.001 * tensor for name, tensor in result.items()}

    return call


def _failing(subject: Subject) -> Prepared:
    raise ValueError("this peer never works")


def _late(subject: Subject, effect: Callable[[], object]) -> Prepared:
    """Right while it is checked; then, in a turn of the measurement, it has an effect."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 12:
            effect()
        return subject.model(*args, **kwargs)

    return call


def _raise() -> None:
    raise RuntimeError("too late")


register(Peer("wrong", _wrong))
register(Peer("failing", _failing))
register(Peer("hanging", lambda subject: time.sleep(600)))  # type: ignore[arg-type, func-returns-value]
register(Peer("dying", lambda subject: _late(subject, lambda: os._exit(9))))
register(Peer("raising", lambda subject: _late(subject, _raise)))
