"""Where entries are kept: the `Store` protocol, and `FileStore`, files in a folder that processes share."""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

log = logging.getLogger(__name__)

NAME = re.compile(r"[0-9a-f]{1,128}")
SUFFIX = ".rtxcache"
TEMPORARY = ".tmp-"
STALE = 3600.0  # seconds after which a temporary file is one that a killed process left
AHEAD = 60.0  # seconds that the clocks of machines which share a folder may differ


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry of a store: its name, its size in bytes, and when it was last used, in seconds since 1970."""

    name: str
    size: int
    used: float


@runtime_checkable
class Store(Protocol):
    """What the engine cache needs of a store: bytes by name. Names are of hexadecimal digits.

    A store may lose entries, return damaged ones, and raise: entries carry digests, and each of these is a miss.
    `put` must be all or nothing for whoever reads at the same time. All methods may be called from many threads.
    """

    def get(self, name: str, size: int | None = None) -> bytes | None:
        """The bytes of an entry, or the first `size` of them; None if there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Keep `data` as `name`, in place of what had that name."""

    def delete(self, name: str) -> None:
        """Remove an entry, if it is there."""

    def entries(self) -> Iterable[Stored]:
        """What there is, in any order."""


class FileStore:
    """Entries as files `NAME.rtxcache` in `folder`, at most `limit` bytes of them: the least recently used goes first.

    Files are written under a temporary name and renamed, so that a reader or a killed writer never leaves half of one
    in place. A file's modification time is that of its last use. Nothing is locked: of several writers of one name the
    last one wins, and a reader that has a file open keeps it when it is evicted.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder, self.limit = os.fspath(folder), limit

    def _path(self, name: str) -> str:
        if NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of an entry")
        return os.path.join(self.folder, name + SUFFIX)

    def get(self, name: str, size: int | None = None) -> bytes | None:
        """The bytes of an entry, or the first `size` of them, which is not counted as a use; None if there is none."""
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                data = file.read(-1 if size is None else size)
        except FileNotFoundError:
            return None
        if size is None:
            with suppress(OSError):  # a folder that can only be read has no order of use
                os.utime(path)
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep `data` as `name` and evict what is beyond the limit; data that is beyond it alone is not kept."""
        path = self._path(name)
        if len(data) > self.limit:
            log.info("an entry of %d bytes is larger than the whole cache may be", len(data))
            return
        os.makedirs(self.folder, exist_ok=True)
        temporary = os.path.join(self.folder, f"{TEMPORARY}{secrets.token_hex(8)}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self.prune(keep=name)

    def delete(self, name: str) -> None:
        """Remove an entry, if it is there and may be removed."""
        _remove(self._path(name))

    def entries(self) -> list[Stored]:
        """What there is, most recently used first. A time in the future says nothing and counts as the oldest."""
        now = time.time() + AHEAD
        found = [
            Stored(name.removesuffix(SUFFIX), size, used if used <= now else 0.0)
            for name, size, used in self._files()
            if name.endswith(SUFFIX) and NAME.fullmatch(name.removesuffix(SUFFIX))
        ]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def prune(self, limit: int | None = None, keep: str = "") -> list[Stored]:
        """Remove the least recently used entries until the rest takes at most `limit` bytes (None: the store's own),
        and what killed writers have left. Returns the entries that were removed.

        Args:
            keep: the entry that was just written, which goes last whatever the clock says.
        """
        now = time.time()
        for name, _, used in self._files():
            if name.startswith(TEMPORARY) and not now - STALE <= used <= now + STALE:
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
        """Name, size and modification time of the files in the folder; others may vanish meanwhile."""
        try:
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
    """Whether the file is gone. On Windows nobody can remove what another process reads; it goes next time."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
