"""The file of the runtime cache: an SQLite database of entries by kind, key and device, shared by many processes.

    application_id, user_version | entry (id, kind, key, name, sm, driver, versions, created, used, digest, value)

One row is one entry; its digest covers the kind, key, device and value. The file is in WAL mode: readers never wait for
the writer, and a killed process leaves only committed transactions. Reading executes nothing in the file: a file with
another schema than this one counts as damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_rtx.cache.private import check_private, make_folder
from torch_rtx.errors import CacheDamaged, CacheError
from torch_rtx.files import replacing

APPLICATION = 0x52545843  # "RTXC", in the file's header
SCHEMA = 1  # raise it with every change of the tables: a release does not touch files of a newer schema
TABLES = (
    "CREATE TABLE entry (id INTEGER PRIMARY KEY, kind TEXT, key TEXT, name TEXT, sm INTEGER, driver INTEGER,"
    " versions TEXT, created REAL, used REAL, digest BLOB, value BLOB)",
    "CREATE UNIQUE INDEX entry_key ON entry (kind, key, name, sm, driver, versions)",
)
COLUMNS = "kind, key, name, sm, driver, versions, created, used, digest, value"
PUT = f"""INSERT INTO entry ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (kind, key, name, sm, driver, versions) DO UPDATE
    SET created = excluded.created, used = excluded.used, digest = excluded.digest, value = excluded.value"""
MERGE = f"{PUT} WHERE excluded.created > entry.created"
# A file on whose tables these statements fail is damaged, like a file that SQLite itself finds malformed.
DAMAGE = (
    *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR),
    *(sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH),
)
REFUSED = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
SUFFIXES = ("", "-wal", "-shm", "-journal")  # of SQLite's files
CHUNK = 64  # rows to read or merge at once
CLOCK_SKEW_SECONDS = 60.0  # tolerated between machines that share a file; later times are invalid
GPU, FIGURES_KEY = "gpu", "figures"  # a kind of entries: what was measured of a GPU; and their only key
KINDS = ("kernel", "tactic", GPU)

Identity = tuple[int, int]


@dataclass(frozen=True)
class DeviceKey:
    """The device and software versions of an entry or of a lookup.

    Args:
        name: the device's name, `NVIDIA GeForce RTX 4090`.
        sm: its SM version, 89.
        driver: the version of its driver as CUDA reports it, 13000.
        versions: of the software that created the entry, as text: a digest of the code generator's sources, Triton's
            version, ...
    """

    name: str
    sm: int
    driver: int
    versions: str


@dataclass(frozen=True)
class Entry:
    """A value and its device; `created` in seconds since 1970."""

    kind: str
    key: str
    device: DeviceKey
    value: bytes
    created: float

    @property
    def digest(self) -> bytes:
        """20 bytes over everything except the time."""
        device = self.device
        head = json.dumps([self.kind, self.key, device.name, device.sm, device.driver, device.versions])
        hashed = hashlib.blake2b(head.encode() + b"\0", digest_size=20)  # JSON contains no zero byte
        hashed.update(self.value)
        return hashed.digest()


@dataclass(frozen=True)
class DeviceSummary:
    """The entries of one device in a file: their numbers by kind, bytes of values, time of last use."""

    device: DeviceKey
    counts: dict[str, int]
    bytes: int
    used: float


class RuntimeFile:
    """A connection to the file `path`, for one thread at a time.

    Args:
        create: create the file if it does not exist.
        timeout: seconds to wait for locks of other processes.
        shared: False: for this process alone, without WAL mode, so that the file is complete without `-wal`.
        private: refuse a file that other users may change, or whose folder they may change.

    Raises:
        FileNotFoundError: the file does not exist or is empty, and `create` is False.
        CacheDamaged: the file is damaged.
        CacheError: it is of a newer release or not a runtime cache, or it can't be opened, read or written.

    All methods raise CacheDamaged and CacheError, too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        timeout: float = 30.0,
        shared: bool = True,
        private: bool = False,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        if create:
            try:
                make_folder(os.path.dirname(self.path))
            except OSError as error:
                raise CacheError(f"{self.path} can't be created: {error}") from None
        elif not os.path.exists(self.path):
            raise FileNotFoundError(f"there is no runtime cache {self.path}")
        self._check(private)
        self.identity = identity_of(self.path)
        # WAL mode creates files in the folder. In a read-only folder SQLite can still read the file as immutable.
        for query in ("mode=rwc",) if create else ("mode=rw", "immutable=1"):
            try:
                self._open(query, create, timeout, shared)
            except CacheError as error:
                if query == "mode=rw" and _caused_by(error, REFUSED):
                    continue
                raise
            break
        self.identity = self.identity or identity_of(self.path)

    def _check(self, private: bool) -> None:
        """Check the file, and what SQLite keeps beside it, before SQLite opens them."""
        for suffix in SUFFIXES:
            with suppress(OSError):  # none, or SQLite says what is wrong
                status = os.stat(self.path + suffix)
                if not stat.S_ISREG(status.st_mode):
                    raise CacheError(f"{self.path}{suffix} is not a regular file")
                if private:
                    check_private(self.path + suffix, status)
        if private:
            with suppress(OSError):
                check_private(os.path.dirname(self.path))

    def _open(self, query: str, create: bool, timeout: float, shared: bool) -> None:
        address = f"{Path(self.path).as_uri()}?{query}"
        with self._translated():
            self._db = sqlite3.connect(
                address, timeout, uri=True, isolation_level=None, check_same_thread=False, cached_statements=32
            )
        try:
            with self._translated():
                self._prepare(create, shared, time.monotonic() + timeout)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, create: bool, shared: bool, end: float) -> None:
        """Set up the connection and check the schema; create the tables of a new file."""
        self._db.text_factory = lambda data: data.decode("utf-8", "replace")  # the digest detects damaged texts
        # No mmap: reading a truncated file through it would kill the process by SIGBUS.
        for pragma in ("mmap_size = 0", "trusted_schema = OFF", "cell_size_check = ON", "synchronous = NORMAL"):
            self._db.execute(f"PRAGMA {pragma}")
        while True:
            try:
                with self._transaction("DEFERRED"):
                    ours = self._is_ours()
                if not ours and not create:
                    raise FileNotFoundError(f"{self.path} is empty")
                if not ours:
                    self._create_tables()
                if create and shared:
                    self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:  # SQLite's timeout does not cover the change to WAL mode
                if _code(error) not in BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.005)

    def _is_ours(self) -> bool:
        """True if the file has our tables, False if it is empty. Requires a transaction."""
        application, version = self._number("application_id"), self._number("user_version")
        tables = [sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_master ORDER BY rowid")]
        if not tables and not application:
            return False
        if application == APPLICATION and version > SCHEMA:
            hint = "a newer release of torch_rtx created it; it is not changed"
            raise CacheError(f"{self.path} has schema {version}, this release reads {SCHEMA}", hint=hint)
        if application != APPLICATION and tables != list(TABLES):
            raise CacheError(f"{self.path} is another program's database", hint="name another file")
        if (application, version, tables) != (APPLICATION, SCHEMA, list(TABLES)):
            raise CacheDamaged(f"{self.path} is damaged: its tables are not those of a runtime cache")
        return True

    def _create_tables(self) -> None:
        with self._transaction():
            if not self._is_ours():  # another process may have been first
                for table in TABLES:
                    self._db.execute(table)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _number(self, pragma: str) -> int:
        return int(self._db.execute(f"PRAGMA {pragma}").fetchone()[0])

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        self._db.execute(f"BEGIN {kind}")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise SQLite's errors as CacheError or CacheDamaged."""
        try:
            yield
        except sqlite3.Error as error:
            if _code(error) in DAMAGE:
                raise CacheDamaged(f"{self.path} is damaged: {error}") from error
            raise CacheError(f"{self.path}: {error}") from error
        except UnicodeDecodeError:  # in SQLite's message about a schema; `text_factory` decodes texts in rows
            raise CacheDamaged(f"{self.path} is damaged: its schema is not text") from None

    def close(self) -> None:
        """Close the connection; the last one of all processes checkpoints the WAL into the file."""
        with suppress(sqlite3.Error):
            self._db.close()

    # ---- reading ----

    def find(self, kind: str, key: str) -> list[tuple[int, DeviceKey]]:
        """The row numbers and devices of all entries under a key."""
        with self._translated():
            rows = self._db.execute(
                "SELECT id, name, sm, driver, versions FROM entry WHERE kind = ? AND key = ?", (kind, key)
            ).fetchall()
        found = [(row, _device(*fields)) for row, *fields in rows]
        return [(row, device) for row, device in found if device is not None]

    def read(self, row: int) -> tuple[bytes, Entry | None] | None:
        """The digest of a row and its entry (None if damaged); None if the row no longer exists."""
        with self._translated():
            fields = self._db.execute(f"SELECT {COLUMNS} FROM entry WHERE id = ?", (row,)).fetchone()
        return None if fields is None else (fields[-2], _entry(*fields))

    def entries(self) -> Iterator[Entry | None]:
        """Every entry by row number, None for a damaged one. Other processes may write meanwhile."""
        last = -(2**63)
        while True:
            with self._translated():
                rows = self._db.execute(
                    f"SELECT id, {COLUMNS} FROM entry WHERE id > ? ORDER BY id LIMIT {CHUNK}", (last,)
                ).fetchall()
            for row, *fields in rows:
                yield _entry(*fields)
                last = row
            if not rows:
                return

    def devices(self) -> list[DeviceSummary]:
        """A summary for each device, the most recently used first."""
        with self._translated():
            rows = self._db.execute(
                "SELECT name, sm, driver, versions, kind, COUNT(*), SUM(length(value)), MAX(used) FROM entry"
                " GROUP BY name, sm, driver, versions, kind"
            ).fetchall()
        found: dict[DeviceKey, DeviceSummary] = {}
        for *fields, kind, count, size, used in rows:
            device = _device(*fields)
            if device is not None:
                old = found.get(device, DeviceSummary(device, {}, 0, 0.0))
                counts, last = {**old.counts, str(kind): int(count)}, max(old.used, float(used or 0))
                found[device] = DeviceSummary(device, counts, old.bytes + int(size or 0), last)
        return sorted(found.values(), key=lambda summary: summary.used, reverse=True)

    def size(self) -> tuple[int, int]:
        """The number of entries, and the bytes of the file's used pages."""
        with self._translated():
            return int(self._db.execute("SELECT COUNT(*) FROM entry").fetchone()[0]), self._bytes()

    def _bytes(self) -> int:
        return (self._number("page_count") - self._number("freelist_count")) * self._number("page_size")

    # ---- writing ----

    def write(
        self,
        entries: Iterable[Entry],
        limit: int,
        *,
        uses: Iterable[tuple[int, float]] = (),
        damaged: Iterable[tuple[int, bytes]] = (),
        merge: bool = False,
    ) -> int:
        """Insert or replace entries in one transaction, and evict entries beyond `limit` bytes. Returns the number of
        entries written.

        Args:
            uses: (row, time of use) to update.
            damaged: (row, digest) to remove if the row still has this digest.
            merge: do not replace newer entries.
        """
        now = time.time()
        with self._translated(), self._transaction():
            self._db.executemany("UPDATE entry SET used = ? WHERE id = ?", [(used, row) for row, used in uses])
            self._db.executemany("DELETE FROM entry WHERE id = ? AND digest IS ?", damaged)
            before = self._db.total_changes
            self._db.executemany(MERGE if merge else PUT, (_fields(entry, now) for entry in entries))
            put = self._db.total_changes - before
            self._evict(limit)
        return put

    def merge(self, entries: Iterable[Entry], limit: int) -> int:
        """Write the entries that are new or newer. Returns their number. Other processes may write meanwhile."""
        count = 0
        for chunk in _chunks(entries):
            count += self.write(chunk, limit, merge=True)
        return count

    def prune(
        self,
        limit: int | None = None,
        before: float | None = None,
        which: Callable[[str, DeviceKey], bool] | None = None,
    ) -> int:
        """Remove entries and shrink the file. Returns the number of removed entries.

        Args:
            limit: in bytes; removes the least recently used entries beyond it.
            before: a time; removes entries unused since then.
            which: a predicate of kind and device; removes entries for which it is true. With `before`, those for which
                both hold.
        """
        with self._translated():
            with self._transaction():
                start = self._db.total_changes
                if before is not None or which is not None:
                    self._remove(before, which or (lambda kind, device: True))
                if limit is not None:
                    self._evict(limit)
                removed = self._db.total_changes - start
            with suppress(sqlite3.OperationalError):  # in use by other processes: later writes reuse the free pages
                self._db.execute("VACUUM")
        return removed

    def _remove(self, before: float | None, which: Callable[[str, DeviceKey], bool]) -> None:
        matching = "kind IS ? AND name IS ? AND sm IS ? AND driver IS ? AND versions IS ?"
        times: tuple[float, ...] = ()
        if before is not None:
            matching += " AND (used < ? OR used > ?)"
            times = before, time.time() + CLOCK_SKEW_SECONDS
        groups = "SELECT DISTINCT kind, name, sm, driver, versions FROM entry"
        for kind, *fields in self._db.execute(groups).fetchall():
            device = _device(*fields)
            if device is None or which(kind, device):
                self._db.execute(f"DELETE FROM entry WHERE {matching}", (kind, *fields, *times))

    def _evict(self, limit: int) -> None:
        while (excess := self._bytes() - limit) > 0:
            oldest = self._db.execute(
                "SELECT id, length(value) FROM entry"
                f" ORDER BY CASE WHEN used <= ? THEN used ELSE 0 END, id LIMIT {CHUNK}",
                (time.time() + CLOCK_SKEW_SECONDS,),
            ).fetchall()
            if not oldest:
                return
            for row, size in oldest:
                self._db.execute("DELETE FROM entry WHERE id = ?", (row,))
                excess -= int(size or 0)
                if excess <= 0:
                    break


def export_file(entries: Iterable[Entry], path: str | os.PathLike[str]) -> int:
    """Write the entries to a new file and rename it to `path`. Returns their number.

    Raises:
        CacheError: the file can't be written, or a process has `path` open as its cache.
    """
    path = os.path.abspath(os.fspath(path))
    if os.path.exists(f"{path}-wal"):
        raise CacheError(f"{path} is in use as a runtime cache", hint="name another file")
    temporary = path
    try:
        with replacing(path) as temporary, closing(RuntimeFile(temporary, create=True, shared=False)) as file:
            file.merge(entries, 2**63)
            return file.size()[0]
    except OSError as error:
        raise CacheError(f"{path} can't be written: {error}") from None
    except CacheError as error:
        raise CacheError(error.message.replace(temporary, path), hint=error.hint) from error.__cause__


def identity_of(path: str) -> Identity | None:
    """Device and inode, which tell a file from its replacement at the same path; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def rename_damaged(path: str, identity: Identity | None) -> str | None:
    """Rename a damaged file to `path.damaged`, replacing an older one, unless another process has already done so.
    Returns the new name; None if `path` is no longer this file.

    Raises:
        OSError: the file can't be renamed.
    """
    if identity is None or identity_of(path) != identity:
        return None
    renamed = f"{path}.damaged"
    # The log first: SQLite must never apply it to a new file at `path`.
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(path + suffix, renamed + suffix)
    return renamed


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for errors of Python's module."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _caused_by(error: CacheError, codes: Sequence[int]) -> bool:
    return isinstance(error.__cause__, sqlite3.Error) and _code(error.__cause__) in codes


def is_busy(error: CacheError) -> bool:
    """The timeout expired while another process held a lock."""
    return _caused_by(error, BUSY)


def _device(name: Any, sm: Any, driver: Any, versions: Any) -> DeviceKey | None:
    good = isinstance(name, str) and type(sm) is type(driver) is int and isinstance(versions, str)
    return DeviceKey(name, sm, driver, versions) if good else None


def _entry(kind: Any, key: Any, *fields: Any) -> Entry | None:
    """The entry of a row; None if the row is damaged."""
    *device_fields, created, _, digest, value = fields
    device = _device(*device_fields)
    if device is None or kind not in KINDS or not isinstance(key, str):
        return None
    if not isinstance(value, bytes) or not isinstance(created, float):
        return None
    entry = Entry(kind, key, device, value, created)
    return entry if entry.digest == digest else None


def _fields(entry: Entry, used: float) -> tuple[Any, ...]:
    device = entry.device
    head = entry.kind, entry.key, device.name, device.sm, device.driver, device.versions
    return *head, entry.created, used, entry.digest, entry.value


def _chunks(entries: Iterable[Entry]) -> Iterator[Sequence[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk
