"""The file of the runtime cache: an SQLite database of entries that were learnt on devices, for many processes at once.

    application_id, user_version | entry (id, kind, key, name, sm, driver, versions, created, used, digest, value)

One row is one entry, and its digest covers all that says what it is and what it applies to. The file is in WAL mode,
so that readers never wait for the writer, and a killed process leaves what it committed and nothing else. Nothing in
the file is executed by reading it: a file with any other schema than this one is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_rtx.errors import CacheDamaged, CacheError

APPLICATION = 0x52545843  # "RTXC", in the file's header
SCHEMA = 1  # raise it with every change of the tables: a release leaves files of a newer schema alone
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
# A file whose tables do not answer to these statements is as damaged as one that SQLite itself finds malformed.
DAMAGE = (
    *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR),
    *(sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH),
)
REFUSED = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
CHUNK = 64  # rows that are read or merged at once
AHEAD = 60.0  # seconds that the clocks of machines which share a file may differ; later times are not believed
KINDS = ("kernel", "tactic")

Identity = tuple[int, int]


@dataclass(frozen=True)
class DeviceKey:
    """What entries are learnt on, and what they are looked up for.

    Args:
        name: the device's name, `NVIDIA GeForce RTX 4090`.
        sm: its SM version, 89.
        driver: the version of its driver as CUDA counts it, 13000.
        versions: what made the entries, as text: a digest of the sources that generate them, Triton's version, ...
    """

    name: str
    sm: int
    driver: int
    versions: str


@dataclass(frozen=True)
class Entry:
    """A value and what it was learnt on; `created` in seconds since 1970."""

    kind: str
    key: str
    device: DeviceKey
    value: bytes
    created: float

    @property
    def digest(self) -> bytes:
        """20 bytes that cover everything but the time."""
        made = self.device
        head = json.dumps([self.kind, self.key, made.name, made.sm, made.driver, made.versions])
        covered = hashlib.blake2b(head.encode() + b"\0", digest_size=20)  # JSON holds no zero byte
        covered.update(self.value)
        return covered.digest()


@dataclass(frozen=True)
class Held:
    """What a file holds of one device: numbers of entries by kind, bytes of values, time of last use."""

    device: DeviceKey
    counts: dict[str, int]
    bytes: int
    used: float


class RuntimeFile:
    """A connection to the file `path`, to be used by one thread at a time.

    Args:
        create: begin the file if there is none.
        timeout: seconds to wait for other processes that hold the file.
        shared: False: a file for this process alone, which is then complete without files beside it.

    Raises:
        FileNotFoundError: there is no file, or an empty one, and `create` is False.
        CacheDamaged: the file is no intact database.
        CacheError: it is of a newer release or not a runtime cache, or it can't be opened, read or written.

    The methods raise the last two of these.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, create: bool = False, timeout: float = 30.0, shared: bool = True
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        if create:
            try:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
            except OSError as error:
                raise CacheError(f"{self.path} can't be made: {error}") from None
        elif not os.path.exists(self.path):
            raise FileNotFoundError(f"there is no runtime cache {self.path}")
        self.identity = identity_of(self.path)
        # A folder that can't be written has no place for the files of WAL mode: SQLite then reads the file as it is.
        for query in ("mode=rwc",) if create else ("mode=rw", "immutable=1"):
            try:
                self._open(query, create, timeout, shared)
            except CacheError as error:
                if query == "mode=rw" and _caused_by(error, REFUSED):
                    continue
                raise
            break
        self.identity = self.identity or identity_of(self.path)

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
        """Set the connection up and see that the file is one of ours."""
        self._db.text_factory = lambda data: data.decode("utf-8", "replace")  # a wrong text has a wrong digest
        # A file that was cut short must not end the process, as reading it through memory would.
        for pragma in ("mmap_size = 0", "trusted_schema = OFF", "cell_size_check = ON", "synchronous = NORMAL"):
            self._db.execute(f"PRAGMA {pragma}")
        while True:
            try:
                with self._transaction("DEFERRED"):
                    ours = self._is_ours()
                if not ours and not create:
                    raise FileNotFoundError(f"{self.path} is empty")
                if not ours:
                    self._begin()
                if create and shared:
                    self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:  # the change to WAL mode does not wait by itself
                if _code(error) not in BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.005)

    def _is_ours(self) -> bool:
        """Whether the file has our tables; it has none at all if not. To be asked within a transaction."""
        application, version = self._number("application_id"), self._number("user_version")
        tables = [sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_master ORDER BY rowid")]
        if not tables and not application:
            return False
        if application == APPLICATION and version > SCHEMA:
            hint = "a newer release of torch_rtx made it; it is left alone"
            raise CacheError(f"{self.path} has schema {version}, this release reads {SCHEMA}", hint=hint)
        if application != APPLICATION and tables != list(TABLES):
            raise CacheError(f"{self.path} is no runtime cache but another database", hint="name another file")
        if (application, version, tables) != (APPLICATION, SCHEMA, list(TABLES)):
            raise CacheDamaged(f"{self.path} is damaged: its tables are not those of a runtime cache")
        return True

    def _begin(self) -> None:
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
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            if _code(error) in DAMAGE:
                raise CacheDamaged(f"{self.path} is damaged: {error}") from error
            raise CacheError(f"{self.path}: {error}") from error
        except UnicodeDecodeError:  # of SQLite's message about a schema: texts in rows are decoded whatever they are
            raise CacheDamaged(f"{self.path} is damaged: its schema is no text") from None

    def close(self) -> None:
        """Close the connection; the last one of all processes folds the files of WAL mode into the file."""
        with suppress(sqlite3.Error):
            self._db.close()

    # ---- reading ----

    def find(self, kind: str, key: str) -> list[tuple[int, DeviceKey]]:
        """The rows of all entries under a key, and what each of them was learnt on."""
        with self._translated():
            rows = self._db.execute(
                "SELECT id, name, sm, driver, versions FROM entry WHERE kind = ? AND key = ?", (kind, key)
            ).fetchall()
        found = [(row, _device(*fields)) for row, *fields in rows]
        return [(row, device) for row, device in found if device is not None]

    def read(self, row: int) -> tuple[bytes, Entry | None] | None:
        """The digest of a row and its entry, None if it is damaged; None if there is no such row any more."""
        with self._translated():
            fields = self._db.execute(f"SELECT {COLUMNS} FROM entry WHERE id = ?", (row,)).fetchone()
        return None if fields is None else (fields[-2], _entry(*fields))

    def entries(self) -> Iterator[Entry | None]:
        """Every entry, in the order of rows; None in the place of a damaged one. Others may write meanwhile."""
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

    def held(self) -> list[Held]:
        """What there is of each device, the most recently used first."""
        with self._translated():
            rows = self._db.execute(
                "SELECT name, sm, driver, versions, kind, COUNT(*), SUM(length(value)), MAX(used) FROM entry"
                " GROUP BY name, sm, driver, versions, kind"
            ).fetchall()
        found: dict[DeviceKey, Held] = {}
        for *fields, kind, count, size, used in rows:
            device = _device(*fields)
            if device is not None:
                before = found.get(device, Held(device, {}, 0, 0.0))
                counts = {**before.counts, str(kind): int(count)}
                found[device] = Held(device, counts, before.bytes + int(size or 0), max(before.used, float(used or 0)))
        return sorted(found.values(), key=lambda held: held.used, reverse=True)

    def size(self) -> tuple[int, int]:
        """Entries, and bytes that they and their index take in the file."""
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
        """Put entries in place of their like, all or none, and evict what is beyond `limit` bytes. Returns how many
        were put.

        Args:
            uses: rows and the times when they were used.
            damaged: rows to remove if they still have this digest.
            merge: leave newer entries in place.
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
        """Put those entries that are not there or older. Returns how many; others may write meanwhile."""
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
        """Remove entries and give their space back. Returns how many.

        Args:
            limit: bytes that may stay; the least recently used entries go.
            before: a time; entries that were not used since go.
            which: entries of these kinds and devices go.
        """
        with self._translated():
            with self._transaction():
                start = self._db.total_changes
                if before is not None:
                    self._db.execute("DELETE FROM entry WHERE used < ? OR used > ?", (before, time.time() + AHEAD))
                if which is not None:
                    groups = "SELECT DISTINCT kind, name, sm, driver, versions FROM entry"
                    for kind, *fields in self._db.execute(groups).fetchall():
                        device = _device(*fields)
                        if device is None or which(kind, device):
                            named = "kind IS ? AND name IS ? AND sm IS ? AND driver IS ? AND versions IS ?"
                            self._db.execute(f"DELETE FROM entry WHERE {named}", (kind, *fields))
                if limit is not None:
                    self._evict(limit)
                removed = self._db.total_changes - start
            with suppress(sqlite3.OperationalError):  # others use the file now: its free pages serve what comes next
                self._db.execute("VACUUM")
        return removed

    def _evict(self, limit: int) -> None:
        while (excess := self._bytes() - limit) > 0:
            oldest = self._db.execute(
                "SELECT id, length(value) FROM entry"
                f" ORDER BY CASE WHEN used <= ? THEN used ELSE 0 END, id LIMIT {CHUNK}",
                (time.time() + AHEAD,),
            ).fetchall()
            if not oldest:
                return
            for row, size in oldest:
                self._db.execute("DELETE FROM entry WHERE id = ?", (row,))
                excess -= int(size or 0)
                if excess <= 0:
                    break


def export_file(entries: Iterable[Entry], path: str | os.PathLike[str]) -> int:
    """Write a file of these entries, all or nothing, in place of the file `path`. Returns how many they are.

    Raises:
        CacheError: the file can't be written, or others have it open as their cache.
    """
    path = os.path.abspath(os.fspath(path))
    if os.path.exists(f"{path}-wal"):
        raise CacheError(f"{path} is in use as a runtime cache", hint="name another file")
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with closing(RuntimeFile(temporary, create=True, shared=False)) as file:
            file.merge(entries, 2**63)
            count = file.size()[0]
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise CacheError(f"{path} can't be written: {error}") from None
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    return count


def identity_of(path: str) -> Identity | None:
    """What tells this file from another of the same name; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def set_aside(path: str, identity: Identity | None) -> str | None:
    """Rename a damaged file to `path.damaged`, in place of an older one, unless another process has already done so.
    Returns its new name; None: it is not there any more.

    Raises:
        OSError: it can't be renamed.
    """
    if identity is None or identity_of(path) != identity:
        return None
    kept = f"{path}.damaged"
    # The log goes first: a new file must never meet the log of an old one.
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(path + suffix, kept + suffix)
    return kept


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for errors of Python's module."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _caused_by(error: CacheError, codes: Sequence[int]) -> bool:
    return isinstance(error.__cause__, sqlite3.Error) and _code(error.__cause__) in codes


def is_busy(error: CacheError) -> bool:
    """Whether other processes held the file for longer than was to be waited."""
    return _caused_by(error, BUSY)


def _device(name: Any, sm: Any, driver: Any, versions: Any) -> DeviceKey | None:
    good = isinstance(name, str) and type(sm) is type(driver) is int and isinstance(versions, str)
    return DeviceKey(name, sm, driver, versions) if good else None


def _entry(kind: Any, key: Any, *fields: Any) -> Entry | None:
    """The entry of a row; None if the row is damaged."""
    *made, created, _, digest, value = fields
    device = _device(*made)
    if device is None or kind not in KINDS or not isinstance(key, str):
        return None
    if not isinstance(value, bytes) or not isinstance(created, float):
        return None
    entry = Entry(kind, key, device, value, created)
    return entry if entry.digest == digest else None


def _fields(entry: Entry, used: float) -> tuple[Any, ...]:
    made = entry.device
    about = entry.kind, entry.key, made.name, made.sm, made.driver, made.versions
    return *about, entry.created, used, entry.digest, entry.value


def _chunks(entries: Iterable[Entry]) -> Iterator[Sequence[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk
