"""The sessions of a graph of torch.compile, one per set of parameters: modules of the same code share a Dynamo graph.

A session is dropped when nobody else has one of its parameters. A weak reference would tell at once, but
`torch.utils.swap_tensors` refuses a tensor that has any. So references are counted, whenever Python has collected
garbage and when a session is added.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from ctypes import c_void_p, sizeof, string_at
from sys import getrefcount

import torch

from torch_rtx.runtime.session import Session

_ALL: list[weakref.ref[Sessions]] = []


def identities(objects: tuple[object, ...]) -> bytes:
    """The ids of `objects` as machine words. In CPython these are the tuple's own memory: one copy makes the key of
    hundreds of parameters, while a tuple of their ids would take as long as the rest of a call."""
    return string_at(id(objects) + tuple.__basicsize__, len(objects) * sizeof(c_void_p))


class Sessions:
    """The sessions of one graph; `template` is the session that theirs are siblings of."""

    def __init__(self, template: Session) -> None:
        self._template = template
        self._found: dict[bytes, tuple[Session, tuple[torch.Tensor, ...]]] = {}
        self._lock = threading.Lock()
        _ALL.append(weakref.ref(self, _ALL.remove))

    def of(self, parameters: tuple[torch.Tensor, ...]) -> Session:
        """The session of these parameters, attached to them. Safe to call from many threads."""
        key = identities(parameters)
        found = self._found.get(key)
        if found is None:
            drop_orphans()
            with self._lock:
                found = self._found.setdefault(key, (self._template.sibling(), parameters))
        session = found[0]
        session.store.update(parameters)
        return session


def release(parameters: Iterable[torch.Tensor]) -> None:
    """Free what sessions hold for any of these parameters: the memory that they had, weights that are computed from
    them, CUDA graphs. The next call brings back what it needs. Waits for calls in progress."""
    drop_orphans()
    wanted = {id(parameter) for parameter in parameters}
    for sessions in [sessions for ref in _ALL[:] if (sessions := ref()) is not None]:
        for session, kept in sessions._found.copy().values():
            if not wanted.isdisjoint(map(id, kept)):
                session.unload_weights(keep=False)


def drop_orphans() -> None:
    """Drop the sessions with a parameter that nobody else has. Takes no lock, as the collector calls it in any
    thread."""
    everything = [entry for ref in _ALL[:] if (entry := ref()) is not None]
    entries = [(sessions, key, kept) for sessions in everything for key, (_, kept) in sessions._found.copy().items()]
    holders = Counter(id(parameter) for _, _, kept in entries for parameter in kept)
    for sessions, key, kept in entries:
        if any(count <= holders[id(one)] for one, count in zip(kept, _references(kept), strict=True)):
            sessions._found.pop(key, None)


def _references(objects: Iterable[object]) -> list[int]:
    """How many references there are to each object."""
    return [getrefcount(one) - _TAKEN for one in objects]


_TAKEN = 0
_TAKEN = _references([object()])[0] - 1  # by `_references` itself, which differs between releases of Python


def _collected(phase: str, info: Mapping[str, int]) -> None:
    if phase == "stop" and info["generation"] > 0:  # not the most frequent collections
        drop_orphans()


gc.callbacks.append(_collected)
