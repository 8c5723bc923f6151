"""Export and import of entries as one file, an untrusted tar of `NAME.rtxcache` members."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence

from torch_rtx.cache.entries import unpack
from torch_rtx.cache.store import NAME, SUFFIX, Store
from torch_rtx.errors import CacheError
from torch_rtx.files import replacing

MEMBER = re.compile(f"({NAME.pattern}){re.escape(SUFFIX)}")


def export_entries(store: Store, names: Sequence[str], path: str | os.PathLike[str]) -> int:
    """Write the entries `names` to the file `path` atomically, without those evicted meanwhile. Returns their number.

    Raises:
        CacheError: an entry is damaged.
        OSError: the store can't be read, or the file can't be written.
    """
    count = 0
    with replacing(path) as temporary, tarfile.open(temporary, "w") as archive:
        for name in sorted(names):
            data = store.get(name)
            if data is None:
                continue
            unpack(name, data)
            member = tarfile.TarInfo(name + SUFFIX)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            count += 1
    return count


def import_entries(store: Store, path: str | os.PathLike[str]) -> int:
    """Check every entry of the file `path`, then put all of them into `store`. Returns their number.

    Raises:
        CacheError: the file is not such an archive, or a member is not an intact entry; nothing was imported.
        OSError: the file can't be read, or the store can't be written.
    """
    for _ in _entries(path):
        pass
    count = 0
    for name, data in _entries(path):
        store.put(name, data)
        count += 1
    return count


def _entries(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                match = MEMBER.fullmatch(member.name)
                file = archive.extractfile(member) if match and member.isreg() and not member.issparse() else None
                if match is None or file is None:
                    raise CacheError(f"{member.name!r} in the archive is not an entry")
                data = file.read()
                unpack(match[1], data)
                yield match[1], data
    except (tarfile.TarError, EOFError) as error:
        raise CacheError(f"{os.fspath(path)} is not an archive of entries: {error}") from None
