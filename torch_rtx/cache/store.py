"""Storage of entries: the `Store` protocol, and `FileStore`, files in a folder that processes share."""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch_rtx.cache.private import FILE_MODE, check_private, make_folder, regular_file
from torch_rtx.files import TEMPORARY, replacing

log = logging.getLogger(__name__)

NAME = re.compile(r"[0-9a-f]{1,128}")
SUFFIX = ".rtxcache"
STALE_SECONDS = 3600.0  # age at which a temporary file must be the remains of a killed process
CLOCK_SKEW_SECONDS = 60.0  # tolerated between machines that share a folder


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry of a store: its name, its size in bytes, and the time of its last use in seconds since 1970."""

    name: str
    size: int
    used: float


@runtime_checkable
class Store(Protocol):
    """The interface of the engine cache to its storage: bytes by name. Names consist of hexadecimal digits.

    A store may lose entries, return damaged ones (entries carry digests), and raise: the cache treats each as a miss.
    `put` must be atomic for concurrent readers. All methods must be thread-safe.
    """

    def get(self, name: str, size: int | None = None) -> bytes | None:
        """The bytes of an entry, or the first `size` of them; None if there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Store `data` as `name`, replacing an older entry."""

    def delete(self, name: str) -> None:
        """Remove an entry, if it exists."""

    def entries(self) -> Iterable[Stored]:
        """All entries, in any order."""


class FileStore:
    """Entries as files `NAME.rtxcache` in `folder`: an LRU cache of at most `limit` bytes.

    Files are written under a temporary name and renamed: a reader never sees a partial file, and a killed writer leaves
    none. A file's modification time is the time of its last use. There are no locks: of several writers of one name the
    last one wins, and a reader can finish reading a file that is evicted meanwhile.

    The folder is created for this user alone. One that others may change is refused with a CacheError, and so are such
    files in it: they decide what readers compute.

    Args:
        shared: the folder is meant for several users, each of whom is trusted: nothing is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int, shared: bool = False) -> None:
        self.folder, self.limit, self.shared = os.path.abspath(os.fspath(folder)), limit, shared

    def _path(self, name: str) -> str:
        if NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not a name of an entry")
        return os.path.join(self.folder, name + SUFFIX)

    def get(self, name: str, size: int | None = None) -> bytes | None:
        """The bytes of an entry, or its first `size` bytes, which does not count as a use; None if there is none."""
        path = self._path(name)
        try:
            self._check(self.folder)
            with regular_file(path) as file:
                status = os.fstat(file.fileno())
                self._check(path, status)
                if status.st_size > self.limit:  # no entry: `put` writes none of this size
                    return None
                data = file.read(status.st_size if size is None else size)
        except FileNotFoundError:
            return None
        if size is None:
            with suppress(OSError):  # a read-only folder records no uses
                os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> None:
        """Store `data` as `name` and evict entries beyond the limit; `data` larger than the limit is not stored."""
        path = self._path(name)
        if len(data) > self.limit:
            log.info("an entry of %d bytes exceeds the size limit of the cache", len(data))
            return
        self._make_folder()
        with replacing(path) as temporary, open(temporary, "wb", opener=self._create) as file:
            file.write(data)
        self.prune(keep=name)

    def _make_folder(self) -> None:
        if self.shared:
            os.makedirs(self.folder, exist_ok=True)
        else:
            make_folder(self.folder)
            self._check(self.folder)

    def _create(self, path: str, flags: int) -> int:
        return os.open(path, flags, 0o666 if self.shared else FILE_MODE)

    def _check(self, path: str, status: os.stat_result | None = None) -> None:
        if not self.shared:
            check_private(path, status)

    def delete(self, name: str) -> None:
        """Remove an entry, if it exists and can be removed."""
        _remove(self._path(name))

    def entries(self) -> list[Stored]:
        """All entries, most recently used first. A time in the future is invalid and counts as the oldest."""
        now = time.time() + CLOCK_SKEW_SECONDS
        found = [
            Stored(name.removesuffix(SUFFIX), size, used if used <= now else 0.0)
            for name, size, used in self._files()
            if name.endswith(SUFFIX) and NAME.fullmatch(name.removesuffix(SUFFIX))
        ]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def prune(self, limit: int | None = None, keep: str = "") -> list[Stored]:
        """Remove the least recently used entries until the others take at most `limit` bytes (None: the store's
        limit), and the temporary files of killed writers. Returns the removed entries.

        Args:
            keep: the name of the entry written last, to evict after all others even if the clock is wrong.
        """
        now = time.time()
        for name, _, used in self._files():
            if name.startswith(TEMPORARY) and abs(now - used) > STALE_SECONDS:
                _remove(os.path.join(self.folder, name))
        entries = self.entries()
        excess = sum(entry.size for entry in entries) - (self.limit if limit is None else limit)
        removed = []
        for entry in sorted(entries, key=lambda entry: (entry.name == keep, entry.used)):
            if excess <= 0:
                break
            if _remove(self._path(entry.name)):
                excess -= entry.size
                removed.append(entry)
        return removed

    def _files(self) -> Iterator[tuple[str, int, float]]:
        """Name, size and modification time of each file in the folder, skipping those deleted meanwhile."""
        try:
            self._check(self.folder)
            scan = os.scandir(self.folder)
        except FileNotFoundError:
            return
        with scan:
            for item in scan:
                with suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield item.name, status.st_size, status.st_mtime


def _remove(path: str) -> bool:
    """Delete a file; False if it still exists, as on Windows while another process reads it."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
