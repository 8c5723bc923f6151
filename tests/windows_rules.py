"""The rules that Windows has for files and processes, enforced on Linux for all that torch_rtx does in the tests.

Windows neither renames nor removes a file that is open or mapped, unless whoever opened it allowed that, which Python
and SQLite do not; it has reserved names and short paths; it can't fork. An audit hook raises the error of Windows in
the code of the package, which has to work all the same. What tests do themselves is not looked at.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch_rtx

PACKAGE = str(Path(torch_rtx.__file__).parent) + os.sep
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
UNUSABLE = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')
LONGEST = 120  # below the folder of the caches, which users have deep below their own: 260 are allowed in all
_POSIX = {"os.fork", "os.forkpty", "os.link", "os.symlink", "os.chown", "fcntl.flock", "fcntl.lockf"}
_LOOKED_AT = frozenset({"open", "os.rename", "os.remove", "os.rmdir"} | _POSIX)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class NotOnWindows(Exception):
    """The package did what Windows has no form of; no code catches this."""


_suspended = False


@contextmanager
def suspended() -> Iterator[None]:
    """The rules of POSIX, for a test of what only these allow."""
    global _suspended
    _suspended = True
    try:
        yield
    finally:
        _suspended = False


def install() -> None:
    """Enforce the rules from now on in this process, which has no way back."""
    sys.addaudithook(_check)


def _check(event: str, args: tuple[Any, ...]) -> None:
    if event not in _LOOKED_AT or _suspended:  # millions of events are of attributes and frames
        return
    if event == "os.rename":
        if _in_package():
            _check_name(os.fsdecode(args[1]))
            _check_unused(args[0], args[1])
    elif event in ("os.remove", "os.rmdir"):
        if _in_package():
            _check_unused(args[0])
    elif event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & _WRITING and not isinstance(path, int)
        if writes and _in_package():
            _check_name(os.fsdecode(path))
    elif _in_package():
        raise NotOnWindows(event)


def _in_package() -> bool:
    """The nearest frame that is none of Python's own library is of the package."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return True
        if "site-packages" in name or "/tests/" in name or "/benchmarks/" in name:
            return False
        frame = frame.f_back
    return False


def _check_unused(*paths: Any) -> None:
    """Raises PermissionError, as Windows does, where a file is open or mapped, or a folder has such a file in it."""
    wanted = [os.path.realpath(os.fsdecode(path)) for path in paths]
    mappings = _mappings()  # hundreds of lines: split only where one of the names is among them
    named = any(os.fsencode(path) in mappings for path in wanted)
    for used in (*_opened(), *(_mapped(mappings) if named else ())):
        for path in wanted:
            if used == path or used.startswith(path + os.sep):
                raise PermissionError(errno.EACCES, "Windows: another process is using the file", path)


def _opened() -> Iterator[str]:
    """The files that this process has open, and that have a name."""
    for number in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # closed meanwhile
            continue


def _mappings() -> bytes:
    with open("/proc/self/maps", "rb") as file:
        return file.read()


def _mapped(mappings: bytes) -> Iterator[str]:
    """The files among the mappings of this process."""
    yield from (os.fsdecode(line[line.index(b"/") :]) for line in mappings.splitlines() if b"/" in line)


def _check_name(path: str) -> None:
    """Raises OSError, as Windows does, for a name that it does not take."""
    name = os.path.basename(path)
    if RESERVED.fullmatch(name) or UNUSABLE.search(name):
        raise OSError(errno.EINVAL, "Windows: the file name is incorrect", path)
    folder = os.environ.get("TORCH_RTX_CACHE_DIR", "")
    if folder and path.startswith(folder + os.sep) and len(path) - len(folder) > LONGEST:
        raise OSError(errno.ENAMETOOLONG, "Windows: the path is too long", path)
