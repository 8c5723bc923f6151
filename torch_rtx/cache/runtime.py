"""The runtime cache: kernels compiled just in time and measured tactics, in one file that processes share.

An entry is bytes under a kind, a key and the device that it was created on. Callers never wait for a write, and
failures of the file never reach them: an unusable file is a warning, and the cache then works in memory.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from torch_rtx.cache.runtime_file import (
    GPU,
    KINDS,
    DeviceKey,
    Entry,
    Identity,
    RuntimeFile,
    export_file,
    identity_of,
    is_busy,
    rename_damaged,
)
from torch_rtx.errors import CacheDamaged, CacheError

log = logging.getLogger("torch_rtx.cache")

MEMORY_BYTES = 64 << 20  # limit of the values in memory, and of those that wait for an unwritable file
BATCH_SECONDS = 0.05  # the writer waits this long for more entries to write at once
RETRY_SECONDS = 5.0  # between attempts to use a file that failed
READ_TIMEOUT, WRITE_TIMEOUT = 0.05, 2.0  # seconds to wait for locks of other processes
CLOSE_TIMEOUT = 5.0  # seconds
NEVER, GONE, DAMAGED, UNUSABLE = "never met", "evicted meanwhile", "damaged", "the file can't be used"

# Called with each entry that this process reads or writes.
USES: list[Callable[[Entry], None]] = []
_warned: set[tuple[str, str]] = set()  # per process: one warning for a full disk, not one per session
_caches: set[RuntimeCache] = set()
_fork_locks: list[threading.Lock] = []  # acquired during a fork
_abandoned: list[RuntimeFile | None] = []  # connections of the parent process; a forked child must not close them


@dataclass(frozen=True)
class RuntimeCacheStats:
    """Counters of a cache in this process, and the size of its file.

    Attributes:
        hits: number of lookups that found an entry.
        misses: number of other lookups, by reason.
        entries, bytes: size of the file, over all devices; 0 if it can't be read.
        waiting: number of entries not written yet.
        problem: why the file can't be used now; None if it can.
    """

    hits: int
    misses: Mapping[str, int]
    entries: int
    bytes: int
    waiting: int
    problem: str | None


def mismatch(kind: str, made: DeviceKey, here: DeviceKey) -> tuple[int, str] | None:
    """(severity, reason) why an entry created on `made` does not apply to `here`; None if it applies.

    Binaries run on GPUs of their SM version, with their driver version or a newer one. Measured tactics are valid for
    one GPU model. Both are valid only for the versions that created them. Figures of a GPU are valid for its model and
    driver.
    """
    if made.sm != here.sm or (kind != "kernel" and made.name != here.name):
        return 3, f"another GPU: {made.name}"
    if kind == GPU:
        return None if made.driver == here.driver else (1, f"measured with driver {made.driver}")
    if made.versions != here.versions:
        return 2, f"made by other versions: {made.versions}"
    if made.driver > here.driver:
        return 1, f"needs driver >= {made.driver}"
    return None


class RuntimeCache:
    """Entries of one device, in memory and in the file `path`, which may have entries of other devices, too.

    A damaged, locked or unwritable file never raises: it is logged once. A damaged file is renamed to `path.damaged`
    and replaced by a new one; a file of a newer release or another program is not touched, and a file that other users
    may change is not used. Thread-safe.

    Args:
        path: the file; the first write creates it.
        device: the device of all entries to put and get.
        size: limit of the file in bytes; the least recently used entries are evicted.
    """

    def __init__(self, path: str | os.PathLike[str], device: DeviceKey, *, size: int = 512 << 20) -> None:
        self.path, self.device, self.size = os.path.abspath(os.fspath(path)), device, size
        self._hits, self._misses = 0, Counter[str]()
        self._recent = _LruCache(MEMORY_BYTES)
        self._problem: str | None = None
        self._closed = False
        self._reset()
        _caches.add(self)
        with self._reading:
            self._open_reader()

    def _reset(self) -> None:
        """Reset to the state of a new cache: new locks; no thread, connections or pending writes."""
        self._changed = threading.Condition()  # also guards all state in memory
        self._reading, self._writing = threading.Lock(), threading.Lock()  # one per connection; acquired first
        self._reader: RuntimeFile | None = None
        self._writer: RuntimeFile | None = None
        self._thread: threading.Thread | None = None
        self._waiting: dict[tuple[str, str], Entry] = {}
        self._uses: dict[int, float] = {}
        self._bad: set[tuple[int, bytes]] = set()
        self._damaged: Identity | None = None
        self._read_again = self._write_again = 0.0

    # ---- foreground ----

    def get(self, kind: str, key: str) -> bytes | None:
        """The value under a kind (`KINDS`) and a key that applies to this device; None on a miss.

        Raises:
            CacheError: the kind is unknown, or the key can't be encoded as UTF-8.
        """
        _check(kind, key)
        with self._changed:
            waiting = self._waiting.get((kind, key))
            value = self._recent.get((kind, key)) if waiting is None else waiting.value
            if value is not None:
                self._hits += 1
                self._used(kind, key, value)
                return value
        value, reason = self._read(kind, key)
        with self._changed:
            if value is None:
                self._misses[reason] += 1
            else:
                self._hits += 1
                if (kind, key) not in self._waiting:
                    self._recent.put((kind, key), value)
        if value is not None:
            self._used(kind, key, value)
        log.debug("runtime cache: %s of %s %s", "hit" if value is not None else f"miss ({reason})", kind, key)
        return value

    def put(self, kind: str, key: str, value: bytes) -> None:
        """Store a value for this device. `get` returns it at once; a background thread writes it.

        Raises:
            CacheError: the kind is unknown, or the key can't be encoded as UTF-8.
        """
        _check(kind, key)
        entry = Entry(kind, key, self.device, value, time.time())
        self._used(kind, key, value)
        with self._changed:
            self._recent.put((kind, key), value)
            if not self._closed:
                self._waiting[kind, key] = entry
                self._wake()

    def _used(self, kind: str, key: str, value: bytes) -> None:
        for listener in USES:
            listener(Entry(kind, key, self.device, value, time.time()))

    def flush(self, timeout: float | None = None) -> bool:
        """Write all pending entries and times of use now. Returns True if the file has all of them.

        Args:
            timeout: seconds to wait for the background thread; None: no limit, though the thread has its own.
        """
        if not self._writing.acquire(timeout=-1 if timeout is None else timeout):
            return False
        try:
            return self._write()
        finally:
            self._writing.release()

    def close(self) -> None:
        """Write all pending entries and close the file. Later puts stay in memory. Runs at exit, too."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_TIMEOUT)
        self.flush(CLOSE_TIMEOUT)
        with self._reading:
            self._close_reader()
            self._read_again = float("inf")
        if self._writing.acquire(timeout=0):  # else the background thread hangs in the file system
            self._close_writer()
            self._writing.release()
        _caches.discard(self)

    @property
    def stats(self) -> RuntimeCacheStats:
        """Hits, misses by reason, and the size of the file."""
        entries = size = 0
        with self._reading:
            file = self._open_reader()
            if file is not None:
                try:
                    entries, size = file.size()
                except CacheError as error:
                    self._drop_reader(error)
        with self._changed:
            waiting, problem = len(self._waiting), self._problem
            return RuntimeCacheStats(self._hits, dict(self._misses), entries, size, waiting, problem)

    # ---- export and import ----

    def save(self, path: str | os.PathLike[str]) -> int:
        """Export all entries, of all devices, to the file `path`, replacing it. Returns their number.

        Raises:
            CacheError: the new file can't be written, or is in use.
        """
        self.flush()
        return export_file(self._entries(), path)

    def _entries(self) -> Iterator[Entry]:
        """Every intact entry: those of the file, then those not written yet."""
        with self._changed:
            waiting = list(self._waiting.values())
        try:
            with closing(self._file()) as file:
                yield from intact(file)
        except FileNotFoundError:
            pass
        except CacheError as error:
            self._warn("can't be read, only the entries in memory are saved:", error)
        yield from waiting

    def load(self, path: str | os.PathLike[str]) -> int:
        """Merge new and newer entries of a file that `save` wrote, or of another cache. Other processes may use both
        files meanwhile. Returns the number of merged entries; damaged ones are skipped with a warning.

        Raises:
            FileNotFoundError: the file does not exist or is empty.
            CacheError: it is not a runtime cache, or of a newer release.
        """
        self.flush()
        with closing(RuntimeFile(path)) as other:
            try:
                with closing(self._file(create=True, timeout=WRITE_TIMEOUT)) as own:
                    return own.merge(intact(other), self.size)
            except CacheError as error:
                self._warn("can't be written, entries for this device are loaded into memory:", error)
            count = 0
            for entry in intact(other):
                if mismatch(entry.kind, entry.device, self.device) is None:
                    self.put(entry.kind, entry.key, entry.value)
                    count += 1
            return count

    def prune(self, *, size: int | None = None, days: float | None = None, inapplicable: bool = False) -> int:
        """Remove entries from the file. Returns their number.

        Args:
            size: limit in bytes; removes the least recently used entries beyond it.
            days: removes entries unused for this many days.
            inapplicable: removes entries of this GPU that no longer apply to it: those of other versions, or of a
                newer driver. With `days`, those for which both hold.

        Raises:
            CacheError: the file can't be written.
        """

        def outdated(kind: str, made: DeviceKey) -> bool:
            found = mismatch(kind, made, self.device)
            return found is not None and found[0] < 3

        self.flush()
        before = None if days is None else time.time() - days * 86400
        try:
            with closing(self._file()) as file:
                return file.prune(size, before, outdated if inapplicable else None)
        except FileNotFoundError:
            return 0

    def _file(self, *, create: bool = False, timeout: float = 30.0) -> RuntimeFile:
        return RuntimeFile(self.path, create=create, timeout=timeout, private=True)

    # ---- reading ----

    def _read(self, kind: str, key: str) -> tuple[bytes | None, str]:
        """The value in the file, or None and the reason of the miss."""
        with self._reading:
            file = self._open_reader()
            if file is None:
                return None, UNUSABLE if self._problem else NEVER
            try:
                return self._look_up(file, kind, key)
            except CacheError as error:
                self._drop_reader(error)
                return None, UNUSABLE

    def _look_up(self, file: RuntimeFile, kind: str, key: str) -> tuple[bytes | None, str]:
        found = [(mismatch(kind, made, self.device), row, made) for row, made in file.find(kind, key)]
        candidates = [(made.name == self.device.name, made.driver, row) for why, row, made in found if why is None]
        reason = min((why for why, _, _ in found if why is not None), default=(0, NEVER))[1]
        for *_, row in sorted(candidates, reverse=True):
            read = file.read(row)
            if read is None:
                reason = GONE
                continue
            digest, entry = read
            if entry is not None and (entry.kind, entry.key) == (kind, key):
                with self._changed:
                    self._uses[row] = time.time()
                return entry.value, ""
            self._warn("has a damaged entry, which is ignored:", CacheError(f"{kind} {key}"))
            reason = DAMAGED
            with self._changed:
                self._bad.add((row, digest))
                self._wake()
        return None, reason

    def _open_reader(self) -> RuntimeFile | None:
        """The connection to read with, opened on demand; None if the file can't be read now. Requires `_reading`."""
        if self._reader is None and time.monotonic() >= self._read_again:
            identity = identity_of(self.path)
            try:
                self._reader = self._file(timeout=READ_TIMEOUT)
                self._problem = None
            except FileNotFoundError:
                pass  # the first write creates it
            except CacheError as error:
                self._drop_reader(error, identity)
        return self._reader

    def _drop_reader(self, error: CacheError, identity: Identity | None = None) -> None:
        """After an error: close the reader until the next retry; the background thread renames a damaged file."""
        if self._reader is not None and isinstance(error, CacheDamaged):
            identity = self._reader.identity
        self._close_reader()
        self._read_again = time.monotonic() + RETRY_SECONDS
        self._problem = error.message
        if not isinstance(error, CacheDamaged):
            self._warn("can't be read:", error)
            return
        with self._changed:
            self._damaged = identity
            self._wake()

    # ---- writing ----

    def _wake(self) -> None:
        """Notify the background thread; starts it on demand. Requires `_changed`."""
        if self._thread is None and not self._closed:
            thread = threading.Thread(target=self._run, name="torch_rtx runtime cache", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down: `close` writes the pending entries
                return
            self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        """The background thread: writes in batches until the cache is closed."""
        while not self._closed:
            with self._changed:
                while not self._closed and not self._due():
                    work = self._waiting or self._bad or self._damaged
                    self._changed.wait(max(self._write_again - time.monotonic(), 0.0) if work else None)
                self._changed.wait_for(lambda: self._closed, BATCH_SECONDS)
            if not self._closed:
                with self._writing:
                    self._write()

    def _due(self) -> bool:
        work = self._waiting or self._bad or self._damaged
        return bool(work) and time.monotonic() >= self._write_again

    def _write(self) -> bool:
        """Write all pending entries. Returns True if the file has them. Requires `_writing`."""
        with self._changed:
            entries, uses, bad = list(self._waiting.values()), dict(self._uses), set(self._bad)
            if not (entries or uses or bad or self._damaged):
                return True
        for _ in range(2):  # the second attempt writes to a new file
            try:
                file = self._open_writer()
                if entries or uses or bad:
                    file.write(self._within_limit(entries), self.size, uses=uses.items(), damaged=bad)
            except CacheDamaged as error:
                self._damaged = self._damaged or (self._writer.identity if self._writer else identity_of(self.path))
                uses, bad = {}, set()  # rows of the damaged file
                log.debug("%s", error)
            except CacheError as error:
                if not (entries or bad or self._damaged):  # only times of use, and the file is read-only
                    self._written(entries, uses, bad)
                    return True
                self._not_written(error)
                return False
            except Exception:  # drop the entries: they would fail again and block all later ones
                log.warning("%d entries of the runtime cache can't be written:", len(entries), exc_info=True)
                self._written(entries, uses, bad)
                return False
            else:
                self._written(entries, uses, bad)
                return True
        self._not_written(CacheError(f"{self.path} is damaged"))
        return False

    def _within_limit(self, entries: list[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if len(entry.value) <= self.size:
                yield entry
            else:
                log.info("%s %s exceeds the size limit of the runtime cache", entry.kind, entry.key)

    def _written(self, entries: list[Entry], uses: dict[int, float], bad: set[tuple[int, bytes]]) -> None:
        with self._changed:
            for entry in entries:
                if self._waiting.get((entry.kind, entry.key)) is entry:
                    del self._waiting[entry.kind, entry.key]
            self._uses = {row: used for row, used in self._uses.items() if uses.get(row) != used}
            self._bad -= bad
            self._problem = None
            if not self._closed:
                self._read_again = 0.0

    def _not_written(self, error: CacheError) -> None:
        self._warn("can't be written, new entries stay in memory:", error)
        with self._changed:
            self._problem = error.message
            self._write_again = time.monotonic() + RETRY_SECONDS
            excess = sum(len(entry.value) for entry in self._waiting.values()) - MEMORY_BYTES
            while excess > 0:
                excess -= len(self._waiting.pop(next(iter(self._waiting))).value)

    def _open_writer(self) -> RuntimeFile:
        """The connection to write with, to the file now at `path`; renames a damaged file first."""
        if self._damaged is not None:
            self._replace_damaged(self._damaged)
        here = identity_of(self.path)
        if any(file is not None and file.identity != here for file in (self._writer, self._reader)):
            self._disconnect()  # another process removed or renamed the file
        if self._writer is None:
            self._writer = self._file(create=True, timeout=WRITE_TIMEOUT)
        return self._writer

    def _disconnect(self) -> None:
        """Close both connections to a removed or renamed file, and forget its row numbers."""
        with self._reading:
            self._close_reader()
            self._read_again = 0.0
        self._close_writer()
        with self._changed:
            self._uses, self._bad = {}, set()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _replace_damaged(self, identity: Identity) -> None:
        self._disconnect()
        try:
            renamed = rename_damaged(self.path, identity)
        except OSError as error:
            raise CacheError(f"{self.path} is damaged and can't be renamed: {error}") from None
        self._damaged = None
        if renamed is not None:
            log.warning("the runtime cache %s is damaged and was renamed to %s", self.path, renamed)

    def _warn(self, what: str, error: CacheError) -> None:
        if (what, error.message) not in _warned:
            _warned.add((what, error.message))
            # A reader may find the file locked by its creator and retries; a writer warns if the lock persists.
            level = logging.INFO if is_busy(error) and what == "can't be read:" else logging.WARNING
            log.log(level, "the runtime cache %s %s %s", self.path, what, error)


class _LruCache:
    """Values by key, at most `limit` bytes of them; evicts the least recently used."""

    def __init__(self, limit: int) -> None:
        self._values: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._bytes, self._limit = 0, limit

    def get(self, key: tuple[str, str]) -> bytes | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: tuple[str, str], value: bytes) -> None:
        self._bytes += len(value) - len(self._values.pop(key, b""))
        self._values[key] = value
        while self._bytes > self._limit:
            self._bytes -= len(self._values.popitem(last=False)[1])


def intact(file: RuntimeFile) -> Iterator[Entry]:
    """The intact entries of a file; warns of damaged ones."""
    damaged = 0
    try:
        for entry in file.entries():
            if entry is None:
                damaged += 1
            else:
                yield entry
    except CacheDamaged as error:
        log.warning("the rest of a runtime cache is skipped: %s", error)
    if damaged:
        log.warning("%d damaged entries of the runtime cache %s are skipped", damaged, file.path)


def _check(kind: str, key: str) -> None:
    if kind not in KINDS:
        raise CacheError(f"unknown kind of entry {kind!r}", hint=f"kinds are {', '.join(KINDS)}")
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:
            raise CacheError(f"the key {key!r} can't be encoded as UTF-8") from None


def _close_all() -> None:
    for cache in list(_caches):
        cache.close()


def _before_fork() -> None:
    """Keep all threads out of SQLite during a fork: the child would inherit locks that nobody releases."""
    for cache in list(_caches):
        _fork_locks.extend(lock for lock in (cache._writing, cache._reading) if lock.acquire(timeout=READ_TIMEOUT))


def _after_fork_in_parent() -> None:
    while _fork_locks:
        _fork_locks.pop().release()


def _after_fork_in_child() -> None:
    """Reset every cache: a child must neither use nor close its parent's SQLite connections. The parent writes its own
    pending entries."""
    _fork_locks.clear()
    for cache in _caches:
        _abandoned.extend((cache._reader, cache._writer))
        cache._reset()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
