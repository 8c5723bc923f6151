"""PyTorch's cache artifacts carry the entries of both caches from one process to another."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.compiler._cache import CacheArtifactManager

import torch_rtx
from tests.helpers.ahead import Function
from tests.helpers.caching import Traffic
from torch_rtx.cache import entries, runtime
from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cache.runtime_file import DeviceKey
from torch_rtx.integrations import cache_artifacts
from torch_rtx.integrations.cache_artifacts import EngineArtifact, RuntimeArtifact

ADA = DeviceKey("NVIDIA GeForce RTX 4090", 89, 13000, "1")
X = torch.ones(3)


LISTENERS = entries.USES.copy(), runtime.USES.copy()
entries.USES.clear()  # until a test of this file
runtime.USES.clear()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of both caches; nothing else has been recorded."""
    monkeypatch.setattr(entries, "USES", LISTENERS[0])
    monkeypatch.setattr(runtime, "USES", LISTENERS[1])
    monkeypatch.setenv("TORCH_RTX_CACHE_DIR", str(tmp_path / "caches"))
    with CacheArtifactManager.with_fresh_cache():
        yield tmp_path / "caches"


def build() -> torch_rtx.CompiledModule:
    return torch_rtx.compile(Function(lambda x: x.sin() * 3), (X,))


def saved() -> tuple[bytes, Any]:
    found = torch.compiler.save_cache_artifacts()
    assert found is not None
    return found


@pytest.mark.parametrize("first", ["built", "found"])
def test_an_engine_is_not_built_again(first: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = build()(X)
    if first == "found":  # by a process that has not built it
        CacheArtifactManager.clear()
        build()
    build()
    data, info = saved()
    assert len(info.artifacts["torch_rtx_engine"]) == 1
    shutil.rmtree(folder / "engines")
    torch.compiler.load_cache_artifacts(data)
    traffic = Traffic(caplog)
    assert torch.equal(build()(X), expected)
    assert traffic.counts == (1, 0)


def test_entries_of_the_runtime_cache(folder: Path) -> None:
    cache = RuntimeCache(folder / "runtime.sqlite", ADA)
    cache.put("kernel", "a", b"one\ntwo")
    for _ in range(3):
        assert cache.get("kernel", "a") == b"one\ntwo"
    assert cache.get("tactic", "b") is None
    cache.close()
    CacheArtifactManager.clear()
    with_file = RuntimeCache(folder / "runtime.sqlite", ADA)
    assert with_file.get("kernel", "a") == b"one\ntwo"  # as a process that only reads it
    with_file.close()
    data, info = saved()
    assert info.artifacts == {"torch_rtx_runtime": ["kernel a"]}
    for path in folder.glob("runtime.sqlite*"):
        path.unlink()
    torch.compiler.load_cache_artifacts(data)
    loaded = RuntimeCache(folder / "runtime.sqlite", ADA)
    assert loaded.get("kernel", "a") == b"one\ntwo"
    loaded.put("kernel", "a", b"newer")
    loaded.flush()
    torch.compiler.load_cache_artifacts(data)
    loaded.close()
    again = RuntimeCache(folder / "runtime.sqlite", ADA)
    assert again.get("kernel", "a") == b"newer"  # what is there stays
    again.close()


def test_nothing_is_recorded_without_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "USES", [])
    build()
    assert torch.compiler.save_cache_artifacts() is None


DAMAGES: list[Callable[[bytes], bytes]] = [lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"[1]\n", bytes.upper]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_loaded(
    damage: Callable[[bytes], bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build()
    RuntimeCache(folder / "runtime.sqlite", ADA).put("kernel", "a", b"one")
    found = CacheArtifactManager._new_cache_artifacts
    (engine,), (kernel,) = found["torch_rtx_engine"], found["torch_rtx_runtime"]
    entry = cache_artifacts._unpack(kernel.content)
    assert (entry.device, entry.value) == (ADA, b"one")
    for kind, one in ((EngineArtifact, engine), (RuntimeArtifact, kernel)):
        caplog.clear()
        kind("0" * 64 if damage is bytes.upper else one.key, damage(one.content)).populate_cache()
        assert "a cache artifact is not loaded" in caplog.text
