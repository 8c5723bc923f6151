"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

TEMPORARY = ".tmp-"  # the start of a temporary file's name
Path = str | os.PathLike[str]


@contextmanager
def replacing(path: Path) -> Iterator[str]:
    """The path of a new file, to be made in the block, which takes the place of `path` after it.

    Who opens `path` meanwhile finds the old file; so does everybody if the block, this process or the system ends
    before. The new file is on the disk before it gets the name. A link at `path` stays one, to the new file. What is no
    file, such as a pipe, is written to itself.

    Raises:
        OSError: the file can't be written, or is in use on Windows.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        yield target
        return
    temporary = os.path.join(os.path.dirname(target), TEMPORARY + secrets.token_hex(8))
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes what may be written to
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename == temporary:
            error.filename = os.fspath(path)
        raise
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a text in UTF-8, or bytes, as `replacing`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
