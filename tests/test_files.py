"""Files appear whole or not at all, and one helper sees to it."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from tests.helpers.sources import nodes
from tests.paths import ROOT
from torch_rtx.files import replacing, write_file


@pytest.mark.quick
def test_a_new_file_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    with replacing(path) as temporary:
        Path(temporary).write_bytes(b"new")
        assert path.read_bytes() == "ä\n".encode()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, call=call, name=name: (done.append(name), call(*args)))
    write_file(tmp_path / "a", b"x")
    assert done == ["fsync", "replace"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError()])
def test_a_failure_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            Path(temporary).write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / "no" / "a", b"x")
    assert caught.value.filename == str(tmp_path / "no" / "a")
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, b"x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX has named pipes")
def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"x")
    assert os.read(reading, 9) == b"x"
    os.close(reading)
    assert (tmp_path / "pipe").is_fifo()


def test_nothing_else_replaces_files() -> None:
    """But for a damaged runtime cache, which gets another name."""
    found = set()
    for path in (ROOT / "torch_rtx").rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename"):
                found.add(path.name)
    assert found == {"files.py", "runtime_file.py"}
