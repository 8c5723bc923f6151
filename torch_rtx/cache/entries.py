"""Entries, which serialize a key and a body with digests over every byte; and the cache of entries in a store.

    8 bytes magic | lengths of head and body | digest of the body | digest of all before and of the head | head | body

The head is JSON: the parts of the key, which explain a miss without the body. A damaged entry is a miss, and a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.store import Store, Stored
from torch_rtx.errors import CacheError

log = logging.getLogger("torch_rtx.cache")

# Raise it with every change of an entry's layout or of its body: older entries are then misses.
MAGIC = b"rtxcach3"
PREFIX = struct.Struct("<8sIQ32s")
START = PREFIX.size + 32
HEAD_READ_BYTES = 1 << 16  # enough for the head of nearly every entry
MAX_COMPARED = 64  # most recently used entries to compare a miss with
# Called with the name and the bytes of each entry that this process reads or writes.
USES: list[Callable[[str, bytes], None]] = []


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an entry: its key, the size of its body, and its creation time in seconds since 1970."""

    key: Key
    body_bytes: int
    created: float


def pack(key: Key, body: bytes) -> bytes:
    """Serialize an entry."""
    parts = {name: [part.digest, part.text] for name, part in key.parts.items()}
    head = json.dumps({"parts": parts, "created": time.time()}).encode()
    prefix = PREFIX.pack(MAGIC, len(head), len(body), hashlib.sha256(body).digest())
    return prefix + hashlib.sha256(prefix + head).digest() + head + body


def unpack(name: str, data: bytes) -> tuple[Head, bytes]:
    """Head and body of the entry called `name`.

    Raises:
        CacheError: the bytes are not this entry, or damaged.
    """
    head, end = _head(name, data)
    body = data[end:]
    if len(body) != head.body_bytes or hashlib.sha256(body).digest() != PREFIX.unpack_from(data)[3]:
        raise CacheError(f"entry {name} is damaged")
    return head, body


def _head(name: str, data: bytes) -> tuple[Head, int]:
    """The head of an entry, and the offset of its body; `data` may be truncated after the head."""
    if len(data) < START or not data.startswith(MAGIC):
        raise CacheError(f"entry {name} is not of this version of the cache")
    _, length, body_bytes, _ = PREFIX.unpack_from(data)
    end = START + length
    if hashlib.sha256(data[: PREFIX.size] + data[START:end]).digest() != data[PREFIX.size : START]:
        raise CacheError(f"entry {name} is damaged")
    try:
        fields = json.loads(data[START:end])
        key = Key({str(part): Part(str(digest), str(text)) for part, (digest, text) in fields["parts"].items()})
        head = Head(key, body_bytes, float(fields["created"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"entry {name} has an invalid head: {error}") from None
    if key.digest != name:
        raise CacheError(f"entry {name} has the key {key.digest}")
    return head, end


class EngineCache:
    """Bodies by key in a `Store`. A failure of the store is a miss with one warning, never an exception."""

    _warned: set[object] = set()  # per process: one warning for a full disk, not one per model
    _building: WeakValueDictionary[str, _Lock] = WeakValueDictionary()
    _guard = threading.Lock()

    def __init__(self, store: Store) -> None:
        self.store = store

    @contextmanager
    def building(self, key: Key) -> Iterator[None]:
        """A lock for the lookup and build of `key`, so that the threads of this process build an engine once."""
        with self._guard:
            lock = self._building.setdefault(key.digest, _Lock())
        with lock.lock:
            yield

    def get(self, key: Key) -> bytes | None:
        """The intact body stored under `key`; None on a miss or any failure."""
        return self.body(key.digest)

    def body(self, name: str) -> bytes | None:
        """As `get`, by the digest of the key."""
        try:
            data = self.store.get(name)
        except Exception as error:  # users may pass their own store
            self._warn("the engine cache can't be read, engines are rebuilt:", error)
            return None
        if data is None:
            return None
        try:
            body = unpack(name, data)[1]
        except CacheError as error:
            self.discard(name, error.message)
            return None
        _used(name, data)
        return body

    def put(self, key: Key, body: bytes) -> None:
        """Store `body`; a failure of the store is a warning."""
        data = pack(key, body)
        _used(key.digest, data)
        try:
            self.store.put(key.digest, data)
        except Exception as error:
            self._warn("the engine cache can't be written, this engine is not cached:", error)

    def discard(self, name: str, why: str) -> None:
        """Remove a damaged entry, with a warning."""
        log.warning("damaged entry of the engine cache, the engine is rebuilt: %s", why)
        try:
            self.store.delete(name)
        except Exception as error:
            self._warn("a damaged entry of the engine cache can't be removed:", error)

    def head(self, name: str) -> Head:
        """The head of an entry, read without its body.

        Raises:
            CacheError: there is no such entry, or it is damaged.
            OSError: the store can't be read.
        """
        data = self.store.get(name, HEAD_READ_BYTES)
        if data is not None and len(data) == HEAD_READ_BYTES < START + PREFIX.unpack_from(data)[1]:
            data = self.store.get(name)
        if data is None:
            raise CacheError(f"there is no entry {name}")
        return _head(name, data)[0]

    def entries(self) -> list[Stored]:
        """The entries, most recently used first.

        Raises:
            OSError: the store can't be read.
        """
        return sorted(self.store.entries(), key=lambda entry: entry.used, reverse=True)

    def explain(self, key: Key) -> str:
        """The reason of a miss: how `key` differs from the most similar of the recently used entries."""
        nearest: tuple[str, Key] | None = None
        try:
            for entry in self.entries()[:MAX_COMPARED]:
                try:
                    other = self.head(entry.name).key
                except CacheError:
                    continue
                if other.kind != key.kind:
                    continue
                if nearest is None or len(key.differing(other)) < len(key.differing(nearest[1])):
                    nearest = entry.name, other
        except Exception as error:
            return f"the store can't be read: {error}"
        if nearest is None:
            return "the cache has no entries"
        return f"the nearest entry is {nearest[0][:12]}; {' | '.join(nearest[1].why(key)) or 'it could not be used'}"

    def _warn(self, what: str, error: Exception) -> None:
        kind = what, type(error), getattr(error, "errno", None)
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s %s", what, error)


def _used(name: str, data: bytes) -> None:
    for listener in USES:
        listener(name, data)


class _Lock:
    """A lock that can be weakly referenced."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
