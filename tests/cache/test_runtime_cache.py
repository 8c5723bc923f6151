"""The runtime cache: what applies to which device, many processes, and everything that can be wrong with a file."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.paths import ROOT
from torch_rtx.cache import runtime, runtime_file
from torch_rtx.cache.runtime import DeviceKey, RuntimeCache
from torch_rtx.cache.runtime_file import RuntimeFile
from torch_rtx.errors import CacheError, SettingsError
from torch_rtx.settings import CompilationSettings, RuntimeSettings, runtime_cache_path

ADA = DeviceKey("NVIDIA GeForce RTX 4090", 89, 13000, "torch_rtx 1, triton 3.7")
SMALL_ADA = replace(ADA, name="NVIDIA GeForce RTX 4060")
BLACKWELL = DeviceKey("NVIDIA GeForce RTX 5090", 120, 13000, ADA.versions)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Everything is said again; what a test leaves open is closed."""
    monkeypatch.setattr(runtime, "_warned", set())
    caplog.set_level(logging.INFO, logger="torch_rtx.cache")
    yield
    monkeypatch.undo()
    for cache in list(runtime._caches):
        cache.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "caches" / "runtime.sqlite"


def fill(path: Path, device: DeviceKey = ADA, **values: bytes) -> None:
    """Put kernels into a file."""
    with closing(RuntimeCache(path, device)) as cache:
        for key, value in values.items():
            cache.put("kernel", key, value)


def kernels(path: Path, *keys: str, device: DeviceKey = ADA) -> list[bytes | None]:
    """What a new process finds."""
    with closing(RuntimeCache(path, device)) as cache:
        return [cache.get("kernel", key) for key in keys]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_round_trip(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = RuntimeCache(path, ADA)
    assert cache.get("kernel", "a") is None
    assert not path.exists()  # there is nothing to keep yet
    cache.put("kernel", "a", b"binary")
    cache.put("tactic", "a", b"")
    assert (cache.get("kernel", "a"), cache.get("tactic", "a")) == (b"binary", b"")
    assert cache.flush()
    assert cache.stats.entries == 2
    assert 0 < cache.stats.bytes <= path.stat().st_size + Path(f"{path}-wal").stat().st_size
    assert (cache.stats.hits, cache.stats.misses, cache.stats.waiting) == (2, {"never met": 1}, 0)
    cache.put("kernel", "a", b"other")
    cache.close()
    assert os.listdir(path.parent) == [path.name]
    assert kernels(path, "a", "b") == [b"other", None]
    assert warnings(caplog) == []


def test_kinds(path: Path) -> None:
    cache = RuntimeCache(path, ADA)
    with pytest.raises(CacheError, match="unknown kind of entry 'engine'"):
        cache.put("engine", "a", b"")
    with pytest.raises(CacheError, match="kinds are kernel, tactic"):
        cache.get("", "a")


REASONS: dict[str, tuple[str, DeviceKey, str | None]] = {
    "the same": ("kernel", ADA, None),
    "kernels are for an SM version": ("kernel", SMALL_ADA, None),
    "tactics are for a model": ("tactic", SMALL_ADA, "another GPU: NVIDIA GeForce RTX 4090"),
    "another SM version": ("kernel", BLACKWELL, "another GPU: NVIDIA GeForce RTX 4090"),
    "a newer driver": ("kernel", replace(ADA, driver=13010), None),
    "a newer driver, tactic": ("tactic", replace(ADA, driver=13010), None),
    "an older driver": ("kernel", replace(ADA, driver=12080), "needs driver >= 13000"),
    "versions": ("tactic", replace(ADA, versions="2"), "made by other versions: torch_rtx 1, triton 3.7"),
    "the greatest obstacle": ("kernel", replace(BLACKWELL, driver=1, versions="2"), "another GPU: " + ADA.name),
    "figures, other versions": ("gpu", replace(ADA, versions="2"), None),
    "figures, another driver": ("gpu", replace(ADA, driver=13010), "measured with driver 13000"),
    "figures, another model": ("gpu", SMALL_ADA, "another GPU: NVIDIA GeForce RTX 4090"),
    "another kind": ("tactic of a kernel", ADA, "never met"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str, path: Path) -> None:
    """Found or not, and why not, by another device than the one that the entry was learnt on."""
    kind, device, reason = REASONS[name]
    with closing(RuntimeCache(path, ADA)) as cache:
        cache.put(kind.partition(" ")[0] if reason != "never met" else "kernel", "a", b"value")
    cache = RuntimeCache(path, device)
    assert cache.get(kind.partition(" ")[0], "a") == (b"value" if reason is None else None)
    assert cache.stats.misses == ({} if reason is None else {reason: 1})


def test_the_nearest_reason(path: Path) -> None:
    for device in (BLACKWELL, replace(ADA, driver=13020), replace(ADA, versions="0")):
        fill(path, device, a=b"")
    cache = RuntimeCache(path, ADA)
    assert cache.get("kernel", "a") is None
    assert cache.stats.misses == {"needs driver >= 13020": 1}


def test_many_devices_in_one_file(path: Path) -> None:
    """Each finds its own, and of several that apply the one of the nearest driver, then of its own model."""
    fill(path, ADA, a=b"ada")
    fill(path, BLACKWELL, a=b"blackwell")
    fill(path, replace(ADA, driver=12080), a=b"ada, older driver")
    fill(path, SMALL_ADA, a=b"small ada")
    expected = {
        ADA: b"ada",
        SMALL_ADA: b"small ada",
        BLACKWELL: b"blackwell",
        replace(ADA, driver=12090): b"ada, older driver",
        replace(ADA, driver=14000): b"ada",
    }
    assert {device: kernels(path, "a", device=device)[0] for device in expected} == expected
    with closing(RuntimeFile(path)) as file:
        assert {summary.device: summary.counts for summary in file.devices()} == {
            device: {"kernel": 1} for device in (ADA, BLACKWELL, SMALL_ADA, replace(ADA, driver=12080))
        }


# ---- the size --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, a=bytes(40_000), b=bytes(40_000), c=bytes(40_000))
    with closing(RuntimeCache(path, ADA)) as cache:
        for key in "acb":
            assert cache.get("kernel", key)
    with closing(RuntimeCache(path, ADA, size=150_000)) as cache:
        assert cache.get("kernel", "a")
        cache.put("kernel", "d", bytes(40_000))
    assert [value is not None for value in kernels(path, *"abcd")] == [True, True, False, True]
    assert path.stat().st_size < 180_000


def test_times_in_the_future_are_the_oldest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda now=time.time: now() + 1e6)
        fill(path, future=bytes(40_000))
    fill(path, now=bytes(40_000))
    with closing(RuntimeCache(path, ADA, size=100_000)) as cache:
        cache.put("kernel", "new", bytes(40_000))
    assert [value is not None for value in kernels(path, "future", "now", "new")] == [False, True, True]


def test_what_is_larger_than_the_cache(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = RuntimeCache(path, ADA, size=50_000)
    cache.put("kernel", "large", bytes(60_000))
    cache.put("kernel", "small", b"small")
    cache.close()
    assert kernels(path, "large", "small") == [None, b"small"]
    assert "kernel large exceeds the size limit of the runtime cache" in caplog.text


def test_memory_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are held in memory up to a limit, and what is beyond is read again."""
    monkeypatch.setattr(runtime, "MEMORY_BYTES", 100_000)
    cache = RuntimeCache(path, ADA)
    for number in range(10):
        cache.put("kernel", str(number), bytes([number]) * 30_000)
    assert cache.flush()
    assert list(cache._recent._values) == [("kernel", str(number)) for number in (7, 8, 9)]
    assert cache.get("kernel", "0") == bytes(30_000)
    assert len(cache._recent._values) == 3


def test_prune(path: Path) -> None:
    for device in (ADA, BLACKWELL, replace(ADA, versions="0"), replace(ADA, driver=14000)):
        fill(path, device, a=bytes(30_000), b=b"")
    cache = RuntimeCache(path, ADA)
    assert cache.prune() == 0
    assert cache.prune(days=1) == 0
    assert cache.prune(inapplicable=True) == 4
    assert cache.stats.entries == 4
    assert [cache.get("kernel", key) for key in "ab"] == [bytes(30_000), b""]
    assert cache.prune(size=50_000) == 1
    assert kernels(path, "a", "b", device=BLACKWELL) == [None, b""]
    assert cache.prune(days=0) == 3
    assert cache.stats.entries == 0
    assert RuntimeCache(path.with_name("absent"), ADA).prune(size=0) == 0


# ---- files for others ------------------------------------------------------------------------------------------------


def test_save_and_load(path: Path, tmp_path: Path) -> None:
    fill(path, BLACKWELL, a=b"blackwell")
    cache = RuntimeCache(path, ADA)
    cache.put("kernel", "a", b"ada")
    assert cache.save(tmp_path / "shipped") == 2
    assert sorted(os.listdir(tmp_path)) == ["caches", "shipped"]
    assert kernels(tmp_path / "shipped", "a") == [b"ada"]  # as a cache itself
    other = RuntimeCache(tmp_path / "other", BLACKWELL)
    other.put("kernel", "a", b"newer")
    assert other.load(tmp_path / "shipped") == 1
    assert other.load(tmp_path / "shipped") == 0
    assert kernels(tmp_path / "other", "a") == [b"ada"]
    assert kernels(tmp_path / "other", "a", device=BLACKWELL) == [b"newer"]
    assert cache.load(tmp_path / "other") == 1
    assert kernels(path, "a", device=BLACKWELL) == [b"newer"]


def test_load_of_what_is_no_cache(path: Path, tmp_path: Path) -> None:
    cache = RuntimeCache(path, ADA)
    with pytest.raises(FileNotFoundError, match="there is no runtime cache"):
        cache.load(tmp_path / "absent")
    (tmp_path / "text").write_text("hello" * 1000)
    with pytest.raises(CacheError, match="is damaged: file is not a database"):
        cache.load(tmp_path / "text")
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE users (name)").connection.close()
    with pytest.raises(CacheError, match="is another program's database"):
        cache.load(tmp_path / "other")
    with pytest.raises(CacheError, match="shipped"):
        cache.save(tmp_path / "text" / "shipped")
    fill(tmp_path / "used", a=b"")
    used = RuntimeCache(tmp_path / "used", ADA)
    used.put("kernel", "b", b"")
    used.flush()
    with pytest.raises(CacheError, match="is in use as a runtime cache"):
        cache.save(tmp_path / "used")
    assert (tmp_path / "text").read_text() == "hello" * 1000


def test_damaged_entries_are_not_loaded(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "shipped", a=b"good", b=b"bad")
    change(tmp_path / "shipped", "UPDATE entry SET value = x'00' WHERE key = 'b'")
    cache = RuntimeCache(path, ADA)
    assert cache.load(tmp_path / "shipped") == 1
    assert [cache.get("kernel", key) for key in "ab"] == [b"good", None]
    assert "1 damaged entries of the runtime cache" in caplog.text


def test_merge_while_another_process_writes(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "shipped", BLACKWELL, **{f"shipped {n}": bytes(1000) for n in range(1000)})
    writers = [start(path, f"writer {n}", 200) for n in range(2)]
    cache = RuntimeCache(path, ADA)
    assert cache.load(tmp_path / "shipped") == 1000
    assert [finish(writer) for writer in writers] == [""] * 2
    expected = {f"shipped {n}" for n in range(1000)} | {f"writer {w} {n}" for w in range(2) for n in range(200)}
    with closing(RuntimeFile(path)) as file:
        assert {entry.key for entry in file.entries() if entry} == expected
    assert warnings(caplog) == []


# ---- many processes --------------------------------------------------------------------------------------------------

WRITER = f"""
import sys
from torch_rtx.cache.runtime import DeviceKey, RuntimeCache
path, name, count, ending = sys.argv[1:]
cache = RuntimeCache(path, {ADA!r})
for number in range(int(count)):
    cache.put("kernel", f"{{name}} {{number}}", f"{{name}} {{number}}".encode() * 100)
    found = cache.get("kernel", f"shared {{number}}")
    assert found in (None, bytes(1000)), found
    if found is None:
        cache.put("kernel", f"shared {{number}}", bytes(1000))
if ending == "close":
    cache.close()
"""


def start(path: Path, name: str, count: int, ending: str = "close") -> subprocess.Popen[str]:
    """A process that puts entries of its own, and some that others put too."""
    code = WRITER if name.startswith("sharing") else WRITER.replace('f"shared {number}"', 'f"{name} {number}"')
    code = code if name.startswith("sharing") else code.replace("bytes(1000)", "found")
    command = [sys.executable, "-c", code, str(path), name, str(count), ending]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What the process complained about."""
    return process.communicate(timeout=60)[1] + ("" if process.returncode == 0 else f"{process.returncode}")


def test_eight_processes_share_one_file(path: Path) -> None:
    """From the moment where there is none."""
    path.parent.mkdir()
    assert [finish(process) for process in [start(path, f"sharing {n}", 100) for n in range(8)]] == [""] * 8
    with closing(RuntimeFile(path)) as file:
        found = [entry for entry in file.entries() if entry is not None]
    assert {entry.key for entry in found} == {
        f"{name} {n}" for name in ("shared", *(f"sharing {p}" for p in range(8))) for n in range(100)
    }
    assert os.listdir(path.parent) == [path.name]


def test_nothing_is_lost_at_exit(path: Path) -> None:
    """A program that ends without closing its cache, at once after the last entry."""
    assert finish(start(path, "writer", 100, "exit")) == ""
    assert None not in kernels(path, *(f"writer {n}" for n in range(100)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the benchmark kills forked processes: os.fork is missing")
def test_killed_writers() -> None:
    """`kill -9` of a writer at a random moment; the benchmark's own default is 500 times."""
    command = [sys.executable, "-m", "benchmarks.runtime_cache", "kill", "--times", "80"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, puts = done.stdout.split()[0], int(done.stdout.split()[2])
    assert kills == "80"
    assert puts > 80


FORKED = f"""
import os, sys
from torch_rtx.cache.runtime import DeviceKey, RuntimeCache
cache = RuntimeCache(sys.argv[1], {ADA!r})
for number in range(20):
    cache.put("kernel", f"parent {{number}}", bytes(100_000))  # so that threads are at work while the process forks
    child = os.fork()
    if child == 0:
        cache.put("kernel", f"child {{number}}", b"child")
        good = cache.get("kernel", f"parent {{number}}") == bytes(100_000) and cache.flush()
        os._exit(not good)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
def test_forked_processes(path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert None not in kernels(path, *(f"{who} {n}" for n in range(20) for who in ("parent", "child")))


def test_sixteen_threads(path: Path) -> None:
    cache, wrong = RuntimeCache(path, ADA), []

    def use(thread: int) -> None:
        for number in range(100):
            own, shared = f"{thread} {number}", f"{number}"
            cache.put("kernel", own, own.encode())
            cache.put("tactic", shared, shared.encode())
            if (cache.get("kernel", own), cache.get("tactic", shared)) != (own.encode(), shared.encode()):
                wrong.append(own)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.flush()
    assert cache.stats.entries == 1700


# ---- files that can't be used ----------------------------------------------------------------------------------------


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)


def works_in_memory(path: Path) -> None:
    cache = RuntimeCache(path, ADA)
    cache.put("kernel", "new", b"value")
    assert not cache.flush()
    assert cache.get("kernel", "new") == b"value"
    assert cache.stats.problem
    assert cache.stats.waiting == 1
    cache.close()


def test_a_locked_file(path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for whoever holds the file, and what was learnt is written when it is free."""
    monkeypatch.setattr(runtime, "WRITE_TIMEOUT", 0.1)
    monkeypatch.setattr(runtime, "RETRY_SECONDS", 0.1)
    fill(path, a=b"a")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        start = time.perf_counter()
        cache = RuntimeCache(path, ADA)
        assert cache.get("kernel", "a") is None
        cache.put("kernel", "b", b"b")
        assert time.perf_counter() - start < 1
        assert not cache.flush()
        assert cache.stats.misses == {"the file can't be used": 1}
        assert len([message for message in warnings(caplog) if "is locked" in message]) == 1
    end = time.monotonic() + 20
    while cache.stats.waiting and time.monotonic() < end:
        time.sleep(0.01)
    assert kernels(path, "a", "b") == [b"a", b"b"]
    assert cache.stats.problem is None


def test_a_writer_holds_nobody_up(path: Path) -> None:
    """Reading goes on while another process is in the middle of a transaction."""
    fill(path, a=b"a")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM entry")
        cache = RuntimeCache(path, ADA)
        start = time.perf_counter()
        assert cache.get("kernel", "a") == b"a"
        assert time.perf_counter() - start < 0.05


def test_a_full_disk(path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite refuses to make the file larger; once there is room, everything is written."""
    fill(path, a=b"a")
    monkeypatch.setattr(runtime, "MEMORY_BYTES", 300_000)
    monkeypatch.setattr(runtime, "RETRY_SECONDS", 1e9)
    connect = sqlite3.connect

    def full(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        database = connect(*args, **kwargs)
        database.execute("PRAGMA max_page_count = 8")
        return database

    monkeypatch.setattr(sqlite3, "connect", full)
    cache = RuntimeCache(path, ADA)
    for number in range(5):
        cache.put("kernel", f"{number}", bytes(100_000))
        assert not cache.flush()
    assert cache.get("kernel", "a") == b"a"
    assert cache.get("kernel", "4") == bytes(100_000)
    assert cache.stats.waiting == 3  # no more than memory may hold
    assert "full" in str(cache.stats.problem)
    assert len(warnings(caplog)) == 1
    assert "database or disk is full" in warnings(caplog)[0]
    monkeypatch.setattr(sqlite3, "connect", connect)
    cache._close_writer()  # the limit is one of its connection
    assert cache.flush()
    assert kernels(path, "a", "4") == [b"a", bytes(100_000)]


READER = f"""
import logging, os, sys
from torch_rtx.cache.runtime import DeviceKey, RuntimeCache
logging.basicConfig(level=logging.WARNING)
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write everywhere
cache = RuntimeCache(sys.argv[1], {ADA!r})
print(cache.get("kernel", "a"), cache.stats.misses)
if sys.argv[2:]:
    cache.put("kernel", "b", b"b")
    print(cache.flush(), cache.get("kernel", "b"), cache.stats.waiting)
"""


def as_a_reader(path: Path, *args: str) -> tuple[list[str], str]:
    """What a process prints, and says, that may read the file alone."""
    done = subprocess.run([sys.executable, "-c", READER, path, *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that everybody may read, up to the root of the file system."""
    folder = Path(tempfile.mkdtemp(prefix="torch_rtx_readable_"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="os.seteuid is missing")
@pytest.mark.parametrize("mode", ["as it was written", "as it was saved", "in use"])
def test_a_folder_that_can_only_be_read(mode: str, readable: Path) -> None:
    """Hits are hits; writing is one warning, and reading none."""
    path = readable / "runtime.sqlite"
    fill(path, a=b"a")
    if mode == "as it was saved":
        RuntimeCache(path, ADA).save(readable / "saved")
        path = readable / "saved"
    user = RuntimeCache(path, ADA)
    if mode == "in use":
        user.put("kernel", "other", b"")
        user.flush()
    path.chmod(0o444)
    readable.chmod(0o555)
    assert as_a_reader(path) == (["b'a' {}"], "")
    out, err = as_a_reader(path, "write")
    assert out == ["b'a' {}", "False b'b' 1"]
    assert err.count("WARNING") == 1
    assert "can't be written, new entries stay in memory" in err


def test_a_path_that_can_not_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    works_in_memory(tmp_path / "file" / "runtime.sqlite")
    (tmp_path / "folder").mkdir()
    works_in_memory(tmp_path / "folder")
    assert len(warnings(caplog)) == 3
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_newer_schema_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(path, a=b"a")
    change(path, "PRAGMA user_version = 2")
    before = path.read_bytes()
    assert kernels(path, "a") == [None]
    works_in_memory(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert "has schema 2, this release reads 1" in warnings(caplog)[0]


def test_another_database_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    change(path, "CREATE TABLE users (name)")
    before = path.read_bytes()
    works_in_memory(path)
    assert path.read_bytes() == before
    assert "is another program's database" in warnings(caplog)[0]


# ---- damage ----------------------------------------------------------------------------------------------------------

DAMAGES = {
    "value": "UPDATE entry SET value = x'00' WHERE key = 'a'",
    "digest": "UPDATE entry SET digest = NULL WHERE key = 'a'",
    "type": "UPDATE entry SET value = 'text' WHERE key = 'a'",
    "driver": "UPDATE entry SET driver = 1 WHERE key = 'a'",
    "no number": "UPDATE entry SET created = 'now' WHERE key = 'a'",
    "text": "UPDATE entry SET name = CAST(x'ff' AS TEXT) WHERE key = 'a'",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_rows(name: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A miss, one warning, and the row is gone; the others stay."""
    fill(path, a=b"a", b=b"b")
    change(path, DAMAGES[name])
    cache = RuntimeCache(path, ADA)
    assert cache.get("kernel", "a") is None
    assert cache.get("kernel", "a") is None
    assert cache.get("kernel", "b") == b"b"
    assert cache.stats.misses == {"damaged": 2}
    assert cache.flush()
    assert warnings(caplog) == [f"the runtime cache {path} has a damaged entry, which is ignored: kernel a"]
    assert cache.get("kernel", "a") is None
    assert cache.stats.misses == {"damaged": 2, "never met": 1}
    cache.put("kernel", "a", b"again")
    cache.close()
    assert kernels(path, "a", "b") == [b"again", b"b"]


def test_rows_of_a_device_that_is_none(path: Path) -> None:
    fill(path, a=b"a")
    change(path, "UPDATE entry SET driver = 'thirteen'")
    assert kernels(path, "a") == [None]
    with closing(RuntimeFile(path)) as file:
        assert list(file.entries()) == [None]
        assert file.devices() == []
        assert file.prune(which=lambda kind, device: False) == 1


def renamed_and_replaced(path: Path) -> None:
    """What damage leads to: the file is kept under another name, and the cache works."""
    cache = RuntimeCache(path, ADA)
    assert cache.get("kernel", "a") is None
    cache.put("kernel", "new", b"new")
    assert cache.flush()
    assert cache.get("kernel", "new") == b"new"
    assert cache.stats.problem is None
    cache.close()
    assert kernels(path, "a", "new") == [None, b"new"]
    assert f"{path.name}.damaged" in os.listdir(path.parent)


@pytest.mark.parametrize("size", [20, 100, 4095, 4096, 5000, 20_000])
def test_a_truncated_file(size: int, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(path, a=bytes(30_000))
    os.truncate(path, size)
    renamed_and_replaced(path)
    assert any("is damaged and was renamed to" in message for message in warnings(caplog))


def test_an_empty_file_is_a_new_one(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.touch()
    assert kernels(path, "a") == [None]
    fill(path, a=b"a")
    assert kernels(path, "a") == [b"a"]
    assert warnings(caplog) == []


def test_a_file_that_is_no_database(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("hello" * 1000)
    renamed_and_replaced(path)
    assert path.with_name("runtime.sqlite.damaged").read_text() == "hello" * 1000


@pytest.mark.parametrize("statement", ["DROP INDEX entry_key", "ALTER TABLE entry ADD COLUMN more", "DROP TABLE entry"])
def test_other_tables(statement: str, path: Path) -> None:
    fill(path, a=b"a")
    change(path, statement)
    renamed_and_replaced(path)


def damaged_while_open(path: Path) -> list[RuntimeCache]:
    """Two users of one file, which is damaged after they have opened it; the first one has found that out."""
    fill(path, **{f"{n}": bytes(3000) for n in range(100)})
    caches = [RuntimeCache(path, ADA) for _ in range(2)]
    script = "import os, sys; file = open(sys.argv[1], 'r+b'); file.seek(4096); file.write(os.urandom(300_000))"
    subprocess.run([sys.executable, "-c", script, path], check=True)  # to open it here would take SQLite's locks away
    assert caches[0].get("kernel", "50") is None
    return caches


@pytest.mark.usefixtures("as_on_posix")
def test_a_file_that_is_damaged_while_it_is_open(path: Path) -> None:
    """Both go on in the new file."""
    caches = damaged_while_open(path)
    for number, cache in enumerate(caches):
        cache.put("kernel", f"new {number}", b"new")
        assert cache.flush()
    for cache in caches:
        assert [cache.get("kernel", f"new {number}") for number in range(2)] == [b"new"] * 2
        cache.close()
    assert kernels(path, "new 0", "new 1", "50") == [b"new", b"new", None]


@pytest.mark.skipif(sys.platform != "linux", reason="the rules of Windows are enforced on Linux")
def test_a_damaged_file_that_others_have_open_on_windows(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It can't be renamed: entries stay in memory, and the next process makes a new file."""
    caches = damaged_while_open(path)
    caches[0].put("kernel", "new", b"new")
    assert not caches[0].flush()
    assert caches[0].get("kernel", "new") == b"new"
    assert "can't be renamed" in caplog.text
    for cache in caches:
        cache.close()
    fill(path, later=b"later")
    assert kernels(path, "later", "50") == [b"later", None]


@pytest.mark.usefixtures("as_on_posix")
def test_a_file_that_is_removed_while_it_is_open(path: Path) -> None:
    cache = RuntimeCache(path, ADA)
    cache.put("kernel", "a", b"a")
    assert cache.flush()
    shutil.rmtree(path.parent)
    cache.put("kernel", "b", b"b")
    assert cache.flush()
    assert kernels(path, "a", "b") == [None, b"b"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of a few pages of every sort."""
    path = tmp_path_factory.mktemp("whole") / "runtime.sqlite"
    fill(path, **{f"{n}": bytes([n]) * 10 * n * n for n in range(40)})
    return path.read_bytes()


@given(st.data())
def test_flipped_bytes(whole: bytes, data: st.DataObject) -> None:
    """Whatever is damaged, a value is right or it is a miss, and what is learnt now is kept or stays in memory."""
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 20), label="changes")):
        position = data.draw(st.integers(0, 200) | st.integers(0, len(whole) - 1), label="position")
        damaged[position] ^= data.draw(st.integers(1, 255), label="change")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runtime.sqlite")
        path.write_bytes(damaged)
        cache = RuntimeCache(path, ADA)
        for number in range(40):
            assert cache.get("kernel", f"{number}") in (None, bytes([number]) * 10 * number * number)
        cache.put("kernel", "new", b"new")
        cache.flush()
        assert cache.get("kernel", "new") == b"new"
        cache.close()


def test_bytes_of_the_header_and_the_schema(whole: bytes, tmp_path: Path) -> None:
    """Both are on the first page, at its ends. A schema that is no text is an error even in messages about it."""
    path = tmp_path / "runtime.sqlite"
    for position in (*range(0, 100, 6), *range(3599, 4096, 16)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 128]) + whole[position + 1 :])
        assert kernels(path, "3") in ([None], [bytes([3]) * 90])
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_database(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "runtime.sqlite").write_bytes(content)
        assert kernels(Path(folder, "runtime.sqlite"), "a") == [None]


def test_a_log_that_is_damaged(path: Path) -> None:
    """A killed process leaves a log, and the log is damaged: what was in it may be lost, and nothing else."""
    fill(path, a=b"a")
    script = WRITER + "assert cache.flush()\nimport os\nos._exit(0)"
    subprocess.run([sys.executable, "-c", script, path, "writer", "50", "killed"], check=True, cwd=ROOT)
    log = Path(f"{path}-wal")
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    cache = RuntimeCache(path, ADA)
    assert cache.get("kernel", "a") == b"a"
    for number in range(50):
        assert cache.get("kernel", f"writer {number}") in (None, f"writer {number}".encode() * 100)
    cache.put("kernel", "new", b"new")
    assert cache.flush()


# ---- time, settings --------------------------------------------------------------------------------------------------


def test_nobody_waits(path: Path) -> None:
    """Medians, with room for a busy machine: `python -m benchmarks.runtime_cache latency` measures."""
    cache, value = RuntimeCache(path, ADA), bytes(50_000)

    def median(call: Any) -> float:
        times = []
        for number in range(200):
            start = time.perf_counter()
            call(number)
            times.append(time.perf_counter() - start)
        return sorted(times)[100]

    assert median(lambda number: cache.put("kernel", f"{number}", value)) < 200e-6
    assert median(lambda number: cache.get("kernel", f"{number}")) < 100e-6
    cache.close()
    cache = RuntimeCache(path, ADA)
    assert median(lambda number: cache.get("kernel", f"{number}")) < 5e-3


def test_close_is_quick_and_final(path: Path) -> None:
    cache = RuntimeCache(path, ADA)
    cache.put("kernel", "a", b"a")
    start = time.perf_counter()
    cache.close()
    cache.close()
    assert time.perf_counter() - start < 5
    cache.put("kernel", "b", b"b")
    assert cache.get("kernel", "b") == b"b"
    assert cache.stats.waiting == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "torch_rtx runtime cache"]
    assert kernels(path, "a", "b") == [b"a", None]


def test_entries_that_are_none(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = RuntimeCache(path, ADA)
    with pytest.raises(CacheError, match="can't be encoded as UTF-8"):
        cache.put("kernel", "\ud800", b"")
    cache.put("kernel", "\0 é 中", b"text")
    cache.put("kernel", "b", "no bytes")  # type: ignore[arg-type]
    assert not cache.flush()
    assert "2 entries of the runtime cache can't be written" in caplog.text
    cache.put("kernel", "\0 é 中", b"text")
    cache.put("kernel", "a", b"a")
    assert cache.flush()
    cache.close()
    assert kernels(path, "a", "\0 é 中", "\0 é", "b") == [b"a", b"text", None, None]


def test_settings(cache_folder: Path) -> None:
    assert runtime_cache_path(RuntimeSettings()) == str(cache_folder / "runtime.sqlite")
    compilation = CompilationSettings(engine_cache_dir="caches")
    assert runtime_cache_path(RuntimeSettings(), compilation) == os.path.abspath("caches/runtime.sqlite")
    assert runtime_cache_path(RuntimeSettings(runtime_cache="file")) == "file"
    assert runtime_cache_path(RuntimeSettings(runtime_cache="off")) is None
    with pytest.raises(SettingsError, match='option runtime_cache must be None, "off" or a file'):
        RuntimeSettings(runtime_cache="")
    with pytest.raises(SettingsError, match="runtime_cache_size"):
        RuntimeSettings(runtime_cache_size=0)


def test_the_cache_needs_no_torch() -> None:
    code = "import torch_rtx.cache.runtime, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_tables_are_those_of_the_schema(path: Path) -> None:
    """Files outlive releases: a change of these texts needs another SCHEMA."""
    fill(path, a=b"a")
    with closing(sqlite3.connect(path)) as database:
        tables = database.execute("SELECT sql FROM sqlite_master ORDER BY rowid").fetchall()
        header = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    assert [sql for (sql,) in tables] == list(runtime_file.TABLES)
    assert header == [0x52545843, 1]
