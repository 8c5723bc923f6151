"""Entries: a key and a body as one piece of bytes, every one of which a digest covers; and the cache over a store.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.store import Store, Stored
from torch_rtx.errors import CacheError

log = logging.getLogger("torch_rtx.cache")

# Raise it with every change of an entry's layout or of its body: older entries are then misses.
MAGIC = b"rtxcach2"
PREFIX = struct.Struct("<8sIQ32s")
START = PREFIX.size + 32
FIRST_READ = 1 << 16  # holds the head of nearly every entry
MAX_COMPARED = 64  # the most recently used entries that a miss is compared with


@dataclass(frozen=True, slots=True)
class Head:
    """What an entry says about itself: its key, the size of its body, and when it was made, in seconds since 1970."""

    key: Key
    body_bytes: int
    created: float


def pack(key: Key, body: bytes) -> bytes:
    """An entry."""
    parts = {name: [part.digest, part.text] for name, part in key.parts.items()}
    head = json.dumps({"parts": parts, "created": time.time()}).encode()
    prefix = PREFIX.pack(MAGIC, len(head), len(body), hashlib.sha256(body).digest())
    return prefix + hashlib.sha256(prefix + head).digest() + head + body


def unpack(name: str, data: bytes) -> tuple[Head, bytes]:
    """Head and body of the entry called `name`.

    Raises:
        CacheError: the bytes are no entry, another one, or damaged.
    """
    head, end = _head(name, data)
    body = data[end:]
    if len(body) != head.body_bytes or hashlib.sha256(body).digest() != PREFIX.unpack_from(data)[3]:
        raise CacheError(f"entry {name} is damaged")
    return head, body


def _head(name: str, data: bytes) -> tuple[Head, int]:
    """The head of an entry, and where its body begins; `data` may end anywhere after the head."""
    if len(data) < START or not data.startswith(MAGIC):
        raise CacheError(f"entry {name} is no entry of this version of the cache")
    _, length, body_bytes, _ = PREFIX.unpack_from(data)
    end = START + length
    if hashlib.sha256(data[: PREFIX.size] + data[START:end]).digest() != data[PREFIX.size : START]:
        raise CacheError(f"entry {name} is damaged")
    try:
        fields = json.loads(data[START:end])
        key = Key({str(part): Part(str(digest), str(text)) for part, (digest, text) in fields["parts"].items()})
        head = Head(key, body_bytes, float(fields["created"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"entry {name} has a head that is none: {error}") from None
    if key.digest != name:
        raise CacheError(f"entry {name} holds the key {key.digest}")
    return head, end


class EngineCache:
    """Bodies by key in a `Store`. What a store does wrong does not reach the caller: it is a miss, with one warning."""

    _warned: set[object] = set()  # one per process: a full disk is said once, not once per model
    _building: WeakValueDictionary[str, _Lock] = WeakValueDictionary()
    _guard = threading.Lock()

    def __init__(self, store: Store) -> None:
        self.store = store

    @contextmanager
    def building(self, key: Key) -> Iterator[None]:
        """Held while the engine of `key` is looked up or built, so that threads of this process build it once."""
        with self._guard:
            lock = self._building.setdefault(key.digest, _Lock())
        with lock.lock:
            yield

    def get(self, key: Key) -> bytes | None:
        """The body that was put under `key`, intact; None, which is a miss, in every other case."""
        return self.body(key.digest)

    def body(self, name: str) -> bytes | None:
        """The body of the entry called `name`, which is the digest of its key, as `get`."""
        try:
            data = self.store.get(name)
        except Exception as error:  # a store may be anybody's code
            self._warn("the engine cache can't be read, engines are built anew:", error)
            return None
        if data is None:
            return None
        try:
            return unpack(name, data)[1]
        except CacheError as error:
            self.discard(name, error.message)
            return None

    def put(self, key: Key, body: bytes) -> None:
        """Keep `body`; a store that can't is a warning."""
        try:
            self.store.put(key.digest, pack(key, body))
        except Exception as error:
            self._warn("the engine cache can't be written, this engine is not kept:", error)

    def discard(self, name: str, why: str) -> None:
        """Remove an entry that turned out to be of no use, and say so."""
        log.warning("damaged entry of the engine cache, the engine is built anew: %s", why)
        try:
            self.store.delete(name)
        except Exception as error:
            self._warn("a damaged entry of the engine cache can't be removed:", error)

    def head(self, name: str) -> Head:
        """The head of an entry; its body is not read.

        Raises:
            CacheError: there is no such entry, or it is damaged.
            OSError: the store can't be read.
        """
        data = self.store.get(name, FIRST_READ)
        if data is not None and len(data) == FIRST_READ < START + PREFIX.unpack_from(data)[1]:
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
        """Why nothing was found: how `key` differs from the entry that is most like it, of those last used."""
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


class _Lock:
    """A lock that a weak dictionary can hold."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
