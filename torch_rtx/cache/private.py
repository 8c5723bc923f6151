"""Folders and files that nobody else may change: what a cache keeps decides what its readers compute.

Trusted are those who may change the program itself: root, the user of this process, and the owner of this package.
Windows has no such owners, and its folders of users are private by default: nothing is checked there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from torch_rtx.errors import CacheError

FOLDER_MODE, FILE_MODE = 0o700, 0o600


def make_folder(path: str) -> None:
    """Create a folder, and those above it that are missing, for this user alone."""
    if not os.path.isdir(path):
        if (parent := os.path.dirname(path)) not in ("", path):
            make_folder(parent)
        with suppress(FileExistsError):  # another process was first, or a file is in the way: its use says so
            os.mkdir(path, FOLDER_MODE)


def check_private(path: str, status: os.stat_result | None = None) -> None:
    """Check that only trusted users may change a folder or a file; `status` is what is known of it.

    Raises:
        CacheError: others may change it.
        OSError: there is none.
    """
    if not hasattr(os, "geteuid"):
        return
    status = os.stat(path) if status is None else status
    if status.st_uid not in _trusted(os.geteuid()):
        hint = "name another folder, with TORCH_RTX_CACHE_DIR for instance"
        raise CacheError(f"{path} belongs to another user ({status.st_uid}), who could put anything in it", hint=hint)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        hint = f"where you trust what is in it: chmod go-w '{path}'"
        raise CacheError(f"{path} can be written by other users, who could put anything in it", hint=hint)


def _trusted(user: int) -> set[int]:
    users = {0, user}
    with suppress(OSError):  # a package in an archive is no file
        users.add(os.stat(__file__).st_uid)
    return users


@contextmanager
def regular_file(path: str) -> Iterator[BinaryIO]:
    """Open a file to read it, without waiting, as opening a FIFO does.

    Raises:
        CacheError: it is no regular file.
        OSError: it can't be opened.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CacheError(f"{path} is not a regular file")
        yield file
