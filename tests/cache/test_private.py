"""Cache folders: where they are, who may change them, and what lies in them that is no file."""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from torch_rtx.cache import private, runtime
from torch_rtx.cache.entries import EngineCache
from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.runtime import DeviceKey, RuntimeCache
from torch_rtx.cache.store import SUFFIX, FileStore
from torch_rtx.errors import CacheError
from torch_rtx.settings import CompilationSettings, cache_dir

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner and no mode here: os.geteuid")
KEY = Key({"kind": Part.of("engine"), "graph": Part.of("nodes: 1")})
DEVICE = DeviceKey("GPU", 89, 13000, "v")


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineCache, "_warned", set())
    monkeypatch.setattr(runtime, "_warned", set())


@pytest.fixture
def umask() -> Iterator[None]:
    """Files are created for everybody to write."""
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.fixture
def impatient() -> Iterator[None]:
    """A test that waits for a file is interrupted."""

    def interrupt(*_: object) -> None:
        raise TimeoutError("ten seconds are over")

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def used(folder: Path, shared: bool = False) -> tuple[bytes | None, bytes | None]:
    """What another process would find in both caches, after this one put something into them."""
    store = FileStore(folder / "engines", 10**6, shared)
    EngineCache(store).put(KEY, b"engine")
    cache = RuntimeCache(folder / "runtime.sqlite", DEVICE)
    cache.put("kernel", "a", b"kernel")
    cache.close()
    other = RuntimeCache(folder / "runtime.sqlite", DEVICE)
    found = EngineCache(store).get(KEY), other.get("kernel", "a")
    other.close()
    return found


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_folders_are_private(tmp_path: Path, umask: None) -> None:
    folder = tmp_path / "missing" / "caches"
    assert used(folder) == (b"engine", b"kernel")
    assert {mode(path) for path in (folder.parent, folder, folder / "engines")} == {0o700}
    assert mode(folder / "engines" / (KEY.digest + SUFFIX)) == 0o600
    assert not mode(folder / "runtime.sqlite") & 0o022


@pytest.mark.parametrize("who", ["group", "world", "owner"])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_may_change_is_not_used(
    what: str, who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert used(tmp_path) == (b"engine", b"kernel")
    entry = tmp_path / "engines" / (KEY.digest + SUFFIX)
    paths = (tmp_path, entry.parent) if what == "folder" else (tmp_path / "runtime.sqlite", entry)
    for path in paths:
        path.chmod(mode(path) | {"group": 0o020, "world": 0o002, "owner": 0}[who])
    store, cache = FileStore(entry.parent, 10**6), RuntimeCache(tmp_path / "runtime.sqlite", DEVICE)
    if who == "owner":  # only root can give a file away, so that the others become the trusted ones
        cache.close()
        monkeypatch.setattr(private, "_trusted", lambda user: {user + 1})
        cache = RuntimeCache(tmp_path / "runtime.sqlite", DEVICE)
    assert EngineCache(store).get(KEY) is None
    assert cache.get("kernel", "a") is None
    cache.put("kernel", "b", b"b")
    assert not cache.flush()
    assert cache.get("kernel", "b") == b"b"  # in memory
    cache.close()
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert ["belongs to another user" in text or "written by other users" in text for text in said] == [True] * 3
    if what == "folder":
        with pytest.raises(CacheError):
            store.put(KEY.digest, b"")
        with pytest.raises(CacheError):
            store.entries()
        assert len(os.listdir(entry.parent)) == 1
    if who != "owner":  # as the warning says
        for path in paths:
            path.chmod(mode(path) & ~0o022)
        assert used(tmp_path) == (b"engine", b"kernel")


def test_a_shared_folder(tmp_path: Path, umask: None) -> None:
    """An application may say that several users share a store, and that it trusts them."""
    store = FileStore(tmp_path / "engines", 10**6, shared=True)
    store.put("ab", b"data")
    assert mode(tmp_path / "engines") == 0o777
    assert mode(tmp_path / "engines" / f"ab{SUFFIX}") == 0o666
    assert store.get("ab") == b"data"


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling"])
def test_what_is_no_regular_file(kind: str, tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    """It is not waited for, and not read."""
    (tmp_path / "engines").mkdir()
    for path in (tmp_path / "runtime.sqlite", tmp_path / "engines" / (KEY.digest + SUFFIX)):
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "engines" / "target")
    store, cache = FileStore(tmp_path / "engines", 10**6), RuntimeCache(tmp_path / "runtime.sqlite", DEVICE)
    assert EngineCache(store).get(KEY) is None
    assert cache.get("kernel", "a") is None
    cache.put("kernel", "a", b"a")
    assert cache.flush() == (kind == "dangling")
    assert cache.get("kernel", "a") == b"a"
    cache.close()
    assert (len(caplog.records) == 0) == (kind == "dangling")


def test_an_entry_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    FileStore(tmp_path, 1000).put("ab", bytes(500))
    assert FileStore(tmp_path, 400).get("ab") is None
    assert FileStore(tmp_path, 500).get("ab") == bytes(500)


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are those of Linux")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/torch_rtx"),
        ({"HOME": "/"}, "/.cache/torch_rtx"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/caches"}, "/caches/torch_rtx"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "caches"}, "/home/me/.cache/torch_rtx"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": ""}, "/home/me/.cache/torch_rtx"),
        ({}, "{known}/.cache/torch_rtx"),
        ({"HOME": ""}, "{known}/.cache/torch_rtx"),
        ({"HOME": "me"}, "{known}/.cache/torch_rtx"),
        ({"HOME": "/home/me", "TORCH_RTX_CACHE_DIR": "caches"}, "{current}/caches"),
        ({"HOME": "/home/me", "TORCH_RTX_CACHE_DIR": "~/caches"}, "/home/me/caches"),
    ],
)
def test_where_it_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    known = pwd.getpwuid(os.getuid()).pw_dir
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_RTX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir(CompilationSettings()) == expected.format(known=known, current=os.getcwd())


@pytest.mark.skipif(sys.platform == "win32", reason="stands for other systems by the paths of POSIX")
@pytest.mark.parametrize(
    ("system", "environment", "expected"),
    [
        ("darwin", {"HOME": "/Users/me"}, "/Users/me/Library/Caches/torch_rtx"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/torch_rtx"),
        ("win32", {"HOME": "/Users/me"}, "/Users/me/AppData/Local/torch_rtx"),
        ("win32", {"HOME": "/Users/me", "LOCALAPPDATA": ""}, "/Users/me/AppData/Local/torch_rtx"),
        ("win32", {"HOME": "me"}, "{temporary}/AppData/Local/torch_rtx"),
    ],
)
def test_where_it_is_elsewhere(
    system: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the libraries for this put it, such as platformdirs, which would be one more package to install."""
    for name in ("HOME", "LOCALAPPDATA", "XDG_CACHE_HOME", "TORCH_RTX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert cache_dir(CompilationSettings()) == expected.format(temporary=tempfile.gettempdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are those of Linux")
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_RTX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    folder = Path(cache_dir(CompilationSettings()))
    assert folder == Path(tempfile.gettempdir(), f"torch_rtx-{os.getuid()}", ".cache", "torch_rtx")
