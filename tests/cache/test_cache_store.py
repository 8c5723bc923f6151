"""Stores: files in a folder with a limit, and a store of one's own over HTTP; entries and archives."""

from __future__ import annotations

import http.server
import io
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.caching import Traffic
from tests.helpers.compiled import compile_rtx
from tests.paths import ROOT
from torch_rtx import CompilationSettings, SettingsError
from torch_rtx.cache.archive import export_entries, import_entries
from torch_rtx.cache.entries import EngineCache, pack, unpack
from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.store import FileStore, Store
from torch_rtx.errors import CacheError

NAMES = [f"{i:040x}" for i in range(16)]


def key(text: str, **parts: str) -> Key:
    return Key({name: Part.of(t) for name, t in {"kind": "engine", "graph": text, **parts}.items()})


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "engines", 1000)


@pytest.mark.quick
def test_bytes_by_name(store: FileStore) -> None:
    assert store.get(NAMES[0]) is None
    assert store.entries() == []
    store.put(NAMES[0], b"one")
    store.put(NAMES[0], b"other")
    assert (store.get(NAMES[0]), store.get(NAMES[0], 2), store.get(NAMES[1])) == (b"other", b"ot", None)
    assert [(entry.name, entry.size) for entry in store.entries()] == [(NAMES[0], 5)]
    store.delete(NAMES[0])
    store.delete(NAMES[0])
    assert store.get(NAMES[0]) is None
    assert isinstance(store, Store)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "abc.rtxcache", "é", "a" * 200])
def test_names_can_not_leave_the_folder(name: str, store: FileStore) -> None:
    for call in (store.get, store.delete, lambda n: store.put(n, b"")):
        with pytest.raises(ValueError, match="is not a name of an entry"):
            call(name)


def test_the_least_recently_used_goes_first(store: FileStore) -> None:
    for index in range(10):
        store.put(NAMES[index], bytes(100))
        os.utime(Path(store.folder, NAMES[index] + ".rtxcache"), (index + 1, index + 1))
    assert store.get(NAMES[0]) is not None  # a use
    assert store.get(NAMES[1], 5) is not None  # none
    store.put(NAMES[10], bytes(250))
    left = {entry.name for entry in store.entries()}
    assert left == {NAMES[0], *NAMES[4:11]}
    assert sum(entry.size for entry in store.entries()) <= 1000


def test_what_is_larger_than_the_cache_is_not_kept(store: FileStore) -> None:
    store.put(NAMES[0], bytes(900))
    store.put(NAMES[1], bytes(1001))
    assert [entry.name for entry in store.entries()] == [NAMES[0]]


def test_prune(store: FileStore) -> None:
    for name in NAMES[:5]:
        store.put(name, bytes(100))
    assert len(store.prune(250)) == 3
    assert len(store.prune(0)) == 2
    assert store.entries() == []


@pytest.mark.parametrize("jump", [-1e9, -7200.0, 7200.0, 1e9])
def test_a_clock_that_jumps(jump: float, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries from the future are neither kept for ever nor do they push out what was just written."""
    for name in NAMES[:8]:
        store.put(name, bytes(100))
    now = time.time
    for index, name in enumerate(NAMES[:8]):
        os.utime(Path(store.folder, name + ".rtxcache"), (now() + jump + index, now() + jump + index))
    for name in NAMES[8:14]:
        store.put(name, bytes(100))
        assert store.get(name) == bytes(100)
    left = {entry.name for entry in store.entries()}
    assert set(NAMES[8:14]) <= left
    assert len(left) == 10


def test_what_killed_writers_left_is_removed(store: FileStore) -> None:
    store.put(NAMES[0], b"x")
    for name, age in ((".tmp-old", -9000), (".tmp-new", 0), (".tmp-future", 9000)):
        path = Path(store.folder, name)
        path.write_bytes(b"half")
        os.utime(path, (time.time() + age, time.time() + age))
    Path(store.folder, "notes.txt").write_text("not ours")
    Path(store.folder, "NOTES.rtxcache").write_text("not ours")
    store.prune()
    assert sorted(os.listdir(store.folder)) == sorted(
        [NAMES[0] + ".rtxcache", ".tmp-new", "notes.txt", "NOTES.rtxcache"]
    )
    assert [entry.name for entry in store.entries()] == [NAMES[0]]


# ---- entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_entries(store: FileStore) -> None:
    cache, first = EngineCache(store), key("nodes: 1")
    assert cache.get(first) is None
    cache.put(first, b"body")
    assert cache.get(first) == b"body"
    head = cache.head(first.digest)
    assert (head.key.why(first), head.body_bytes) == ([], 4)
    assert cache.get(key("nodes: 2")) is None
    with pytest.raises(CacheError, match="there is no entry"):
        cache.head(NAMES[0])


def test_a_long_head_is_read_whole(tmp_path: Path) -> None:
    cache, long = EngineCache(FileStore(tmp_path, 10**7)), key("\n".join(f"op{i}: {i}" for i in range(20000)))
    cache.put(long, b"body")
    assert cache.head(long.digest).key.differing(long) == []


def test_an_entry_under_another_name_is_none() -> None:
    data = pack(key("nodes: 1"), b"body")
    with pytest.raises(CacheError, match="has the key"):
        unpack(NAMES[0], data)


def test_explanations(tmp_path: Path) -> None:
    cache = EngineCache(FileStore(tmp_path, 10**6))
    wanted = key("nodes: 2", settings="a: 1", inputs="0: f32[2]")
    assert cache.explain(wanted) == "the cache has no entries"
    for other in (
        key("nodes: 3", settings="a: 1", inputs="0: f32[9]"),
        key("nodes: 2", settings="a: 1", inputs="0: f32[4]"),
        Key({**wanted.parts, "kind": Part.of("capture")}),
    ):
        cache.put(other, b"")
    nearest = key("nodes: 2", settings="a: 1", inputs="0: f32[4]").digest[:12]
    assert cache.explain(wanted) == f"the nearest entry is {nearest}; inputs: 0 f32[4] -> f32[2]"


def test_explaining_a_miss_stays_cheap_with_thousands_of_entries(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 10**9)
    os.makedirs(store.folder, exist_ok=True)
    for index in range(3000):
        other = key(f"nodes: {index}")
        Path(store.folder, other.digest + ".rtxcache").write_bytes(pack(other, b""))
    cache, reads, get = EngineCache(store), [], store.get
    store.get = lambda *a: reads.append(a) or get(*a)  # type: ignore[method-assign]
    assert "nodes" in cache.explain(key("nodes: -1"))
    assert len(reads) <= 64


# ---- archives --------------------------------------------------------------------------------------------------------


def test_archives(store: FileStore, tmp_path: Path) -> None:
    keys = [key(f"nodes: {i}") for i in range(3)]
    for item in keys:
        EngineCache(store).put(item, b"body")
    names = [entry.name for entry in store.entries()]
    assert export_entries(store, [*names, NAMES[0]], tmp_path / "all.tar") == 3
    other = FileStore(tmp_path / "other", 10**6)
    assert import_entries(other, tmp_path / "all.tar") == 3
    assert {entry.name for entry in other.entries()} == set(names)
    assert all(EngineCache(other).get(item) == b"body" for item in keys)


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


GOOD = key("nodes: 1")
BAD = {
    "path": member("../" + GOOD.digest + ".rtxcache", pack(GOOD, b"")),
    "absolute": member("/tmp/" + GOOD.digest + ".rtxcache", pack(GOOD, b"")),
    "name": member("x.rtxcache", pack(GOOD, b"")),
    "other key": member(NAMES[0] + ".rtxcache", pack(GOOD, b"")),
    "link": member(GOOD.digest + ".rtxcache", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member(GOOD.digest + ".rtxcache", type=tarfile.LNKTYPE, linkname="x"),
    "device": member(GOOD.digest + ".rtxcache", type=tarfile.CHRTYPE),
    "folder": member(GOOD.digest + ".rtxcache", type=tarfile.DIRTYPE),
    "damaged": member(GOOD.digest + ".rtxcache", pack(GOOD, b"body")[:-1]),
}


@pytest.mark.parametrize("bad", BAD)
def test_archives_that_are_none(bad: str, store: FileStore, tmp_path: Path) -> None:
    """One bad member, after a good one, and nothing is kept."""
    good = key("nodes: 0")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for info, data in (member(good.digest + ".rtxcache", pack(good, b"")), BAD[bad]):
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(CacheError):
        import_entries(store, tmp_path / "bad.tar")
    assert store.entries() == []


def test_files_that_are_no_archives(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello" * 1000)
    with pytest.raises(CacheError, match="is not an archive"):
        import_entries(store, tmp_path / "text")
    with pytest.raises(OSError, match="No such file"):
        import_entries(store, tmp_path / "absent")


# ---- a store of one's own --------------------------------------------------------------------------------------------


class Bucket(http.server.BaseHTTPRequestHandler):
    """An object store as a test double: GET (with Range), PUT, DELETE of /NAME, and GET / lists name, size and time."""

    objects: dict[str, tuple[bytes, float]]

    def do_GET(self) -> None:
        name = self.path[1:]
        if not name:
            rows = [f"{n} {len(data)} {used}" for n, (data, used) in self.objects.items()]
            self._answer(200, "\n".join(rows).encode())
        elif name in self.objects:
            data = self.objects[name][0]
            if "Range" in self.headers:
                data = data[: int(self.headers["Range"].rpartition("-")[2]) + 1]
            self._answer(200, data)
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        self.objects[self.path[1:]] = self.rfile.read(int(self.headers["Content-Length"])), time.time()
        self._answer(200)

    def do_DELETE(self) -> None:
        self.objects.pop(self.path[1:], None)
        self._answer(204)

    def _answer(self, status: int, data: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def documented_store() -> Any:
    """The class that docs/caching.md shows."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "caching.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if "class ObjectStore" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["ObjectStore"]


@pytest.fixture
def bucket() -> Iterator[str]:
    Bucket.objects = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_over_http(
    bucket: str, cache_folder: Path, fresh_dynamo: None, caplog: pytest.LogCaptureFixture
) -> None:
    objects = documented_store()(bucket)
    traffic, options = Traffic(caplog), {"engine_cache": objects}
    for expected in ((0, 1), (1, 1)):
        torch._dynamo.reset()
        assert torch.equal(compile_rtx(torch.relu, options=options)(torch.ones(3)), torch.ones(3))
        assert traffic.counts == expected
    assert {EngineCache(objects).head(name).key.kind for name in Bucket.objects} == {"capture", "engine"}
    assert not cache_folder.exists()
    torch._dynamo.reset()
    compile_rtx(torch.relu, options=options)(torch.ones(4))
    assert "inputs: 0 float32[3](1) main -> float32[4](1) main" in traffic("miss")[-1]


def test_a_store_that_fails_is_a_miss(fresh_dynamo: None, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def get(self, name: str, size: int | None = None) -> bytes | None:
            raise RuntimeError("no network")

        put = delete = entries = get

    compiled = compile_rtx(torch.relu, options={"engine_cache": Broken()})
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3))
    assert "can't be read, engines are rebuilt: no network" in caplog.text


def test_a_store_needs_its_methods() -> None:
    with pytest.raises(SettingsError, match="option engine_cache must be None or a store"):
        CompilationSettings(engine_cache={})
