"""The runtime cache: what was learnt on a device while programs ran, shared by processes and kept in one file.

Kernels that were compiled just in time and tactics that were chosen by measuring are entries: bytes under a kind and a
key, with the device that they were learnt on. A caller never waits for the file to be written, and nothing that is
wrong with it reaches the caller: a file that can't be used is a warning, and the cache then works in memory.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from torch_rtx.cache.runtime_file import (
    KINDS,
    DeviceKey,
    Entry,
    Identity,
    RuntimeFile,
    export_file,
    identity_of,
    is_busy,
    set_aside,
)
from torch_rtx.errors import CacheDamaged, CacheError

log = logging.getLogger("torch_rtx.cache")

MEMORY = 64 << 20  # most bytes of values that a process holds, and most that wait for a file that can't be written
GATHER = 0.05  # seconds that the writer waits for more to write at once
RETRY = 5.0  # seconds until a file that could not be used is tried again
READ_TIMEOUT, WRITE_TIMEOUT = 0.05, 2.0  # seconds to wait for other processes that hold the file
CLOSE_TIMEOUT = 5.0
NEVER, GONE, DAMAGED, UNUSABLE = "never met", "evicted meanwhile", "damaged", "the file can't be used"

_warned: set[tuple[str, str]] = set()  # of this process: a full disk is said once, not once per session
_caches: set[RuntimeCache] = set()
_held: list[threading.Lock] = []  # while the process forks
_abandoned: list[RuntimeFile | None] = []  # connections of the process that this one was forked from


@dataclass(frozen=True)
class RuntimeCacheStats:
    """What a cache did in this process, and what its file holds.

    Attributes:
        hits: how often an entry was found.
        misses: how often none was, by reason.
        entries, bytes: what the file holds, of all devices; 0 if it can't be read.
        waiting: entries that are not written yet.
        problem: why the file can't be used now; None if it can.
    """

    hits: int
    misses: Mapping[str, int]
    entries: int
    bytes: int
    waiting: int
    problem: str | None


def obstacle(kind: str, made: DeviceKey, here: DeviceKey) -> tuple[int, str] | None:
    """Why an entry that was learnt on `made` does not apply to `here`, after how far off it is; None if it applies.

    Binaries run on GPUs of their SM version, with the driver that they were made with or a newer one; measured choices
    are those of one GPU model. Both are for the versions that made them.
    """
    if made.sm != here.sm or (kind == "tactic" and made.name != here.name):
        return 3, f"another GPU: {made.name}"
    if made.versions != here.versions:
        return 2, f"made by other versions: {made.versions}"
    if made.driver > here.driver:
        return 1, f"needs driver >= {made.driver}"
    return None


class RuntimeCache:
    """Entries for one device, in memory and in the file `path`, which holds those of other devices too.

    A file that is damaged, locked or can't be written never raises: it is logged once. A damaged one is renamed to
    `path.damaged`, and a new one begun; one that another release or program made is left alone. All methods may be
    called from many threads.

    Args:
        path: the file; it is made when there is something to write.
        device: what entries are put for and looked up for.
        size: most bytes of the file; the entries that were used least recently go first.
    """

    def __init__(self, path: str | os.PathLike[str], device: DeviceKey, *, size: int = 512 << 20) -> None:
        self.path, self.device, self.size = os.path.abspath(os.fspath(path)), device, size
        self._hits, self._misses = 0, Counter[str]()
        self._recent = _Recent(MEMORY)
        self._problem: str | None = None
        self._closed = False
        self._start_over()
        _caches.add(self)
        with self._reading:
            self._reader_now()

    def _start_over(self) -> None:
        """No locks, thread, connections or work: as a new cache, and in a forked process, has none."""
        self._changed = threading.Condition()  # and the lock of everything in memory
        self._reading, self._writing = threading.Lock(), threading.Lock()  # of a connection each; taken before it
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
        """The value that was put under a kind, "kernel" or "tactic", and a key, and applies to this device.

        Raises:
            CacheError: there is no such kind, or the key is no text.
        """
        _check(kind, key)
        with self._changed:
            waiting = self._waiting.get((kind, key))
            value = self._recent.get((kind, key)) if waiting is None else waiting.value
            if value is not None:
                self._hits += 1
                return value
        value, reason = self._read(kind, key)
        with self._changed:
            if value is None:
                self._misses[reason] += 1
            else:
                self._hits += 1
                if (kind, key) not in self._waiting:
                    self._recent.put((kind, key), value)
        log.debug("runtime cache: %s of %s %s", "hit" if value is not None else f"miss ({reason})", kind, key)
        return value

    def put(self, kind: str, key: str, value: bytes) -> None:
        """Keep a value for this device. It is found from now on, and written in the background.

        Raises:
            CacheError: there is no such kind, or the key is no text.
        """
        _check(kind, key)
        entry = Entry(kind, key, self.device, value, time.time())
        with self._changed:
            self._recent.put((kind, key), value)
            if not self._closed:
                self._waiting[kind, key] = entry
                self._wake()

    def flush(self, timeout: float | None = None) -> bool:
        """Write now what is waiting, and when entries were used. Whether the file has all of it.

        Args:
            timeout: seconds to wait for the background thread; None: as long as it takes, which is limited.
        """
        if not self._writing.acquire(timeout=-1 if timeout is None else timeout):
            return False
        try:
            return self._write()
        finally:
            self._writing.release()

    def close(self) -> None:
        """Write what is waiting and let go of the file. What is put later stays in memory. Done at exit, too."""
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
        if self._writing.acquire(timeout=0):  # else the thread hangs in a file system
            self._close_writer()
            self._writing.release()
        _caches.discard(self)

    @property
    def stats(self) -> RuntimeCacheStats:
        """Hits, misses by reason, and what the file holds."""
        entries = size = 0
        with self._reading:
            file = self._reader_now()
            if file is not None:
                try:
                    entries, size = file.size()
                except CacheError as error:
                    self._lost_reader(error)
        with self._changed:
            waiting, problem = len(self._waiting), self._problem
            return RuntimeCacheStats(self._hits, dict(self._misses), entries, size, waiting, problem)

    # ---- whole files ----

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write all entries, of all devices, to a file of their own, in place of `path`. Returns how many.

        Raises:
            CacheError: the new file can't be written, or is in use.
        """
        self.flush()
        return export_file(self._entries(), path)

    def _entries(self) -> Iterator[Entry]:
        """Every intact entry: those of the file, then those that could not be written."""
        with self._changed:
            waiting = list(self._waiting.values())
        try:
            with closing(RuntimeFile(self.path)) as file:
                yield from intact(file)
        except FileNotFoundError:
            pass
        except CacheError as error:
            self._warn("can't be read, what is in memory is saved alone:", error)
        yield from waiting

    def load(self, path: str | os.PathLike[str]) -> int:
        """Take in the entries of a file that `save` wrote, or of another process's cache: those that are new or newer.
        Others may use both files meanwhile. Returns how many; damaged ones are left out, with a warning.

        Raises:
            FileNotFoundError: there is no file, or nothing in it.
            CacheError: it is no runtime cache, or of a newer release.
        """
        self.flush()
        with closing(RuntimeFile(path)) as other:
            try:
                with closing(RuntimeFile(self.path, create=True, timeout=WRITE_TIMEOUT)) as own:
                    return own.merge(intact(other), self.size)
            except CacheError as error:
                self._warn("can't be written, what applies is loaded into memory:", error)
            count = 0
            for entry in intact(other):
                if obstacle(entry.kind, entry.device, self.device) is None:
                    self.put(entry.kind, entry.key, entry.value)
                    count += 1
            return count

    def prune(self, *, size: int | None = None, days: float | None = None, inapplicable: bool = False) -> int:
        """Remove entries from the file. Returns how many.

        Args:
            size: bytes that may stay; the least recently used entries go.
            days: entries that were not used for so long go.
            inapplicable: entries of this GPU go that can't apply to it any more: made by other versions, or with a
                newer driver.

        Raises:
            CacheError: the file can't be written.
        """

        def outdated(kind: str, made: DeviceKey) -> bool:
            found = obstacle(kind, made, self.device)
            return found is not None and found[0] < 3

        self.flush()
        before = None if days is None else time.time() - days * 86400
        try:
            with closing(RuntimeFile(self.path)) as file:
                return file.prune(size, before, outdated if inapplicable else None)
        except FileNotFoundError:
            return 0

    # ---- reading ----

    def _read(self, kind: str, key: str) -> tuple[bytes | None, str]:
        """The value in the file, or why there is none."""
        with self._reading:
            file = self._reader_now()
            if file is None:
                return None, UNUSABLE if self._problem else NEVER
            try:
                return self._look_up(file, kind, key)
            except CacheError as error:
                self._lost_reader(error)
                return None, UNUSABLE

    def _look_up(self, file: RuntimeFile, kind: str, key: str) -> tuple[bytes | None, str]:
        found = [(obstacle(kind, made, self.device), row, made) for row, made in file.find(kind, key)]
        fitting = [(made.driver, made.name == self.device.name, row) for why, row, made in found if why is None]
        reason = min((why for why, _, _ in found if why is not None), default=(0, NEVER))[1]
        for *_, row in sorted(fitting, reverse=True):
            read = file.read(row)
            if read is None:
                reason = GONE
                continue
            digest, entry = read
            if entry is not None and (entry.kind, entry.key) == (kind, key):
                with self._changed:
                    self._uses[row] = time.time()
                return entry.value, ""
            self._warn("has an entry that is damaged and of no use:", CacheError(f"{kind} {key}"))
            reason = DAMAGED
            with self._changed:
                self._bad.add((row, digest))
                self._wake()
        return None, reason

    def _reader_now(self) -> RuntimeFile | None:
        """The connection to read with; None if the file can't be read now. `_reading` is held."""
        if self._reader is None and time.monotonic() >= self._read_again:
            identity = identity_of(self.path)
            try:
                self._reader = RuntimeFile(self.path, timeout=READ_TIMEOUT)
                self._problem = None
            except FileNotFoundError:
                pass  # it comes with the first thing to write
            except CacheError as error:
                self._lost_reader(error, identity)
        return self._reader

    def _lost_reader(self, error: CacheError, identity: Identity | None = None) -> None:
        """After an error: read nothing for a while, and let the background thread see to a damaged file."""
        if self._reader is not None and isinstance(error, CacheDamaged):
            identity = self._reader.identity
        self._close_reader()
        self._read_again = time.monotonic() + RETRY
        self._problem = error.message
        if not isinstance(error, CacheDamaged):
            self._warn("can't be read:", error)
            return
        with self._changed:
            self._damaged = identity
            self._wake()

    # ---- writing ----

    def _wake(self) -> None:
        """Have the background thread look for work. `_changed` is held."""
        if self._thread is None and not self._closed:
            thread = threading.Thread(target=self._run, name="torch_rtx runtime cache", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter ends: `close` writes what is left
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
                self._changed.wait_for(lambda: self._closed, GATHER)
            if not self._closed:
                with self._writing:
                    self._write()

    def _due(self) -> bool:
        work = self._waiting or self._bad or self._damaged
        return bool(work) and time.monotonic() >= self._write_again

    def _write(self) -> bool:
        """Write what is waiting now. Whether the file has it; `_writing` is held."""
        with self._changed:
            entries, uses, bad = list(self._waiting.values()), dict(self._uses), set(self._bad)
            if not (entries or uses or bad or self._damaged):
                return True
        for _ in range(2):  # the second time to a new file
            try:
                file = self._writer_now()
                if entries or uses or bad:
                    file.write(self._kept(entries), self.size, uses=uses.items(), damaged=bad)
            except CacheDamaged as error:
                self._damaged = self._damaged or (self._writer.identity if self._writer else identity_of(self.path))
                uses, bad = {}, set()  # rows of the damaged file
                log.debug("%s", error)
            except CacheError as error:
                if not (entries or bad or self._damaged):  # times of use alone, of a file that can only be read
                    self._written(entries, uses, bad)
                    return True
                self._not_written(error)
                return False
            except Exception:  # of a caller's values or ours: to try again would keep all that follows from the file
                log.warning("%d entries of the runtime cache can't be kept:", len(entries), exc_info=True)
                self._written(entries, uses, bad)
                return False
            else:
                self._written(entries, uses, bad)
                return True
        self._not_written(CacheError(f"{self.path} is damaged"))
        return False

    def _kept(self, entries: list[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if len(entry.value) <= self.size:
                yield entry
            else:
                log.info("%s %s is larger than the whole runtime cache may be", entry.kind, entry.key)

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
        self._warn("can't be written, what is learnt stays in memory:", error)
        with self._changed:
            self._problem = error.message
            self._write_again = time.monotonic() + RETRY
            excess = sum(len(entry.value) for entry in self._waiting.values()) - MEMORY
            while excess > 0:
                excess -= len(self._waiting.pop(next(iter(self._waiting))).value)

    def _writer_now(self) -> RuntimeFile:
        """The connection to write with, to the file that has our name now; a damaged one is out of the way before."""
        if self._damaged is not None:
            self._set_aside(self._damaged)
        here = identity_of(self.path)
        if any(file is not None and file.identity != here for file in (self._writer, self._reader)):
            self._let_go()  # somebody removed the file, or set it aside
        if self._writer is None:
            self._writer = RuntimeFile(self.path, create=True, timeout=WRITE_TIMEOUT)
        return self._writer

    def _let_go(self) -> None:
        """Close both connections to a file that is not ours any more; its rows are others than those of the next."""
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

    def _set_aside(self, identity: Identity) -> None:
        self._let_go()
        try:
            kept = set_aside(self.path, identity)
        except OSError as error:
            raise CacheError(f"{self.path} is damaged and can't be renamed: {error}") from None
        self._damaged = None
        if kept is not None:
            log.warning("the runtime cache %s is damaged; it is kept as %s, and a new one begun", self.path, kept)

    def _warn(self, what: str, error: CacheError) -> None:
        if (what, error.message) not in _warned:
            _warned.add((what, error.message))
            # A reader that comes while a file is begun finds it later; a writer warns if the file stays locked.
            level = logging.INFO if is_busy(error) and what == "can't be read:" else logging.WARNING
            log.log(level, "the runtime cache %s %s %s", self.path, what, error)


class _Recent:
    """Values by key, at most `limit` bytes of them: the least recently used go first."""

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
    """The entries of a file but the damaged ones, which are a warning."""
    damaged = 0
    try:
        for entry in file.entries():
            if entry is None:
                damaged += 1
            else:
                yield entry
    except CacheDamaged as error:
        log.warning("the rest of a runtime cache is left out: %s", error)
    if damaged:
        log.warning("%d damaged entries of the runtime cache %s are left out", damaged, file.path)


def _check(kind: str, key: str) -> None:
    if kind not in KINDS:
        raise CacheError(f"{kind!r} is no kind of entry", hint=f"kinds are {', '.join(KINDS)}")
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:
            raise CacheError(f"the key {key!r} is no text", hint="keys are texts that UTF-8 can hold") from None


def _close_all() -> None:
    for cache in list(_caches):
        cache.close()


def _before_fork() -> None:
    """No thread is inside of SQLite while the process forks: its locks would be held for ever in the new one."""
    for cache in list(_caches):
        _held.extend(lock for lock in (cache._writing, cache._reading) if lock.acquire(timeout=READ_TIMEOUT))


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().release()


def _after_fork_in_child() -> None:
    """Begin anew: SQLite's connections must not be used, nor closed, on both sides of a fork. What is waiting is
    written by the process that it was put in."""
    _held.clear()
    for cache in _caches:
        _abandoned.extend((cache._reader, cache._writer))
        cache._start_over()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
