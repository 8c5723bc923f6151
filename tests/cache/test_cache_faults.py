"""What can go wrong with a cache: a hit is right, or it is a miss. Killed writers, many writers, damage, full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caching import Traffic
from tests.helpers.compiled import compile_rtx
from tests.paths import ROOT
from torch_rtx.cache import entries, store
from torch_rtx.cache.entries import EngineCache, pack, unpack
from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.store import FileStore
from torch_rtx.errors import CacheError

X = torch.linspace(-1, 1, 12).view(3, 4)
KEY = Key({"kind": Part.of("engine"), "graph": Part.of("nodes: 1")})


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineCache, "_warned", set())


def model(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2 + torch.tensor([1.0, 2.0, 3.0, 4.0])


def run(**options: Any) -> None:
    """Compile as a new process would, and check the result."""
    torch._dynamo.reset()
    torch.testing.assert_close(compile_rtx(model, options=options)(X), model(X))


WRITER = """
import hashlib, os, sys
from torch_rtx.cache.entries import EngineCache
from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.store import FileStore
key = Key({"kind": Part.of("engine"), "graph": Part.of("nodes: 1")})
cache = EngineCache(FileStore(sys.argv[1], 10**9))
print("ready", flush=True)
for number in range(int(sys.argv[2])):
    body = os.urandom(1 << 20)
    cache.put(key, hashlib.sha256(body).digest() + body)
"""


def start_writer(folder: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(count)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def check_body(cache: EngineCache) -> bool:
    body = cache.get(KEY)
    if body is None:
        return False
    assert body[:32] == hashlib.sha256(body[32:]).digest()
    return True


def test_killed_writers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Killed at any moment, a writer leaves the last entry or none, and a file that is removed later."""
    cache = EngineCache(FileStore(tmp_path, 10**9))
    for pause in (0.0, 0.002, 0.011, 0.05):
        process = start_writer(tmp_path, 10**6)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        check_body(cache)
    assert check_body(cache)
    assert not caplog.records
    left = [tmp_path / name for name in os.listdir(tmp_path) if name.startswith(store.TEMPORARY)]
    for path in left:
        os.utime(path, (1, 1))
    cache.store.prune()  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == [KEY.digest + store.SUFFIX]


def test_eight_writers_of_one_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writers = [start_writer(tmp_path, 15) for _ in range(8)]
    cache, found = EngineCache(FileStore(tmp_path, 10**9)), 0
    while any(writer.poll() is None for writer in writers):
        found += check_body(cache)
    assert [writer.returncode for writer in writers] == [0] * 8
    assert found
    assert check_body(cache)
    assert os.listdir(tmp_path) == [KEY.digest + store.SUFFIX]
    assert not caplog.records


ENTRY = pack(KEY, bytes(range(64)))


@given(st.integers(0, len(ENTRY) - 1), st.integers(1, 255))
def test_a_damaged_byte(position: int, change: int) -> None:
    """Every byte is covered by a digest."""
    damaged = bytearray(ENTRY)
    damaged[position] ^= change
    with pytest.raises(CacheError):
        unpack(KEY.digest, bytes(damaged))


def test_every_byte_and_every_length() -> None:
    for position in range(len(ENTRY)):
        with pytest.raises(CacheError):
            unpack(KEY.digest, ENTRY[:position] + bytes([ENTRY[position] ^ 1]) + ENTRY[position + 1 :])
        with pytest.raises(CacheError):
            unpack(KEY.digest, ENTRY[:position])
    with pytest.raises(CacheError):
        unpack(KEY.digest, ENTRY + b"\0")
    assert unpack(KEY.digest, ENTRY)[1] == bytes(range(64))


@given(st.binary(max_size=300))
def test_bytes_that_are_no_entry(data: bytes) -> None:
    with pytest.raises(CacheError):
        unpack(KEY.digest, data)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "engines").iterdir())


def test_damaged_entries_are_built_anew(
    cache_folder: Path, fresh_dynamo: None, caplog: pytest.LogCaptureFixture
) -> None:
    traffic = Traffic(caplog)
    run()
    for path in files(cache_folder):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    run()
    assert len(traffic("damaged entry of the engine cache, the engine is rebuilt: entry")) == 2
    assert traffic.counts == (0, 2)
    run()
    assert traffic.counts == (1, 2)


BODIES = {
    "no length": b"",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "no graph": (2).to_bytes(8, "little") + b"{}",
    "a length beyond the end": (10**12).to_bytes(8, "little"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_program(
    name: str, cache_folder: Path, fresh_dynamo: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Digests that are right over a body that is wrong, as after an error in another release."""
    run()
    cache = EngineCache(FileStore(cache_folder / "engines", 10**9))
    for path in files(cache_folder):
        key = cache.head(path.stem).key
        if key.kind == "engine":
            cache.put(key, BODIES[name])
    run()
    assert "damaged entry of the engine cache" in caplog.text


@pytest.mark.parametrize("body", [b"", b"[]", b'{"engine": "x"}', b'{"engine": "", "parameters": 1, "locations": []}'])
def test_captures_that_are_none(
    body: bytes, cache_folder: Path, fresh_dynamo: None, caplog: pytest.LogCaptureFixture
) -> None:
    run()
    cache = EngineCache(FileStore(cache_folder / "engines", 10**9))
    for path in files(cache_folder):
        key = cache.head(path.stem).key
        if key.kind == "capture":
            cache.put(key, body)
    run()
    assert "damaged entry of the engine cache" in caplog.text


def test_a_full_disk(cache_folder: Path, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """The model runs, one warning says why nothing is kept, and no part of a file is left."""

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "open", lambda *args, **kwargs: Full(open(*args, **kwargs)), raising=False)  # noqa: SIM115
    run()
    run()
    assert caplog.text.count("can't be written, this engine is not cached: [Errno 28]") == 1
    assert files(cache_folder) == []


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """In `folder`, what the operating system says to anyone but root in a folder of another's."""
    for name in names:
        real = getattr(os, name)

        def refused(path: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if os.fspath(path).startswith(str(folder)):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, name, refused)


def test_a_folder_that_can_only_be_read(
    cache_folder: Path, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Hits are hits; what is new is not kept."""
    traffic = Traffic(caplog)
    run()
    refuse(monkeypatch, cache_folder, "utime", "replace", "unlink", "mkdir")
    run()
    assert traffic.counts == (1, 1)
    torch._dynamo.reset()
    compile_rtx(torch.sin)(X)
    compile_rtx(torch.cos)(X)
    assert len(traffic("the engine cache can't be written")) == 1


def test_a_folder_that_can_not_be_read(
    cache_folder: Path, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traffic = Traffic(caplog)
    (cache_folder / "engines").mkdir(parents=True)
    refuse(monkeypatch, cache_folder, "open", "scandir")
    run()
    run()
    assert traffic.counts == (0, 2)
    assert "the store can't be read" in traffic("miss")[0]
    assert len(traffic("the engine cache can't be read")) == 1


def test_a_folder_that_is_a_file(cache_folder: Path, fresh_dynamo: None, caplog: pytest.LogCaptureFixture) -> None:
    cache_folder.parent.mkdir(parents=True, exist_ok=True)
    cache_folder.write_text("in the way")
    run()
    assert "the engine cache can't be" in caplog.text
    assert cache_folder.read_text() == "in the way"


def test_evicted_while_it_is_read(tmp_path: Path) -> None:
    """A reader gets an entry whole or not at all, whatever is evicted meanwhile."""
    small = FileStore(tmp_path, 3 << 20)
    cache, stop, errors = EngineCache(small), threading.Event(), []

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            other = Key({"kind": Part.of("engine"), "graph": Part.of(f"nodes: {number % 5}")})
            body = os.urandom(1 << 20)
            cache.put(other, hashlib.sha256(body).digest() + body)

    writer = threading.Thread(target=write)
    writer.start()
    hits = misses = 0
    end = time.monotonic() + 1.5
    while time.monotonic() < end or not (hits and misses):
        found = check_body(cache)
        hits, misses = hits + found, misses + (not found)
        if time.monotonic() > end + 30:
            errors.append("no hit or no miss in half a minute")
            break
    stop.set()
    writer.join()
    assert not errors
    assert len(small.entries()) <= 3


def test_an_engine_that_was_evicted_without_its_capture(
    cache_folder: Path, fresh_dynamo: None, caplog: pytest.LogCaptureFixture
) -> None:
    traffic = Traffic(caplog)
    run()
    cache = EngineCache(FileStore(cache_folder / "engines", 10**9))
    for path in files(cache_folder):
        if cache.head(path.stem).key.kind == "engine":
            path.unlink()
    run()
    assert traffic.counts == (0, 2)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    run()
    assert traffic.counts == (1, 2)


def test_an_older_layout_is_a_miss(
    cache_folder: Path, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traffic = Traffic(caplog)
    with monkeypatch.context() as patch:
        patch.setattr(entries, "MAGIC", b"rtxcach0")
        run()
    run()
    assert traffic.counts == (0, 2)
