"""Makes the caches of torch_rtx a part of PyTorch's cache artifacts, which one process saves and another loads.

Import this module in both, before anything is compiled or loaded:

    import torch_rtx.integrations.cache_artifacts

    torch.compile(model, backend="rtx")(x)
    data, info = torch.compiler.save_cache_artifacts()    # in one process, and in another
    torch.compiler.load_cache_artifacts(data)

It is no part of the backend by itself: PyTorch keeps all artifacts in memory, and a process that lacks the library of
one can load none of them.

An artifact is what this process has used since the import: an entry of the engine cache, or one of the runtime cache.
They are loaded into the caches of the default folder. Whoever makes them decides what their readers compute: load only
those of people whose code you would run.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import closing
from dataclasses import astuple

from torch_rtx.cache import entries, runtime
from torch_rtx.cache.runtime_file import DeviceKey, Entry, RuntimeFile
from torch_rtx.cache.store import FileStore
from torch_rtx.errors import CacheError, IntegrationError
from torch_rtx.settings import CompilationSettings, RuntimeSettings, cache_dir, runtime_cache_path

try:
    from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager
except ImportError as error:
    hint = "`torch-rtx cache export` and `torch-rtx cache runtime export` do the same without PyTorch"
    raise IntegrationError(f"this release of PyTorch takes no further cache artifacts: {error}", hint=hint) from error

log = logging.getLogger("torch_rtx.cache")
_RECORDING = threading.Lock()  # kernels are compiled in background threads, too


class EngineArtifact(CacheArtifact):
    """An entry of the engine cache: `key` is its name, `content` what a store holds."""

    @staticmethod
    def type() -> str:
        """The name of this kind."""
        return "torch_rtx_engine"

    def populate_cache(self) -> None:
        """Store the entry; one that is damaged, or can't be stored, is a warning."""
        settings = CompilationSettings()
        try:
            entries.unpack(self.key, self.content)
            FileStore(os.path.join(cache_dir(settings), "engines"), settings.engine_cache_size).put(
                self.key, self.content
            )
        except (CacheError, OSError) as problem:
            log.warning("a cache artifact is not loaded: %s", problem)


class RuntimeArtifact(CacheArtifact):
    """An entry of the runtime cache: `content` is a line of JSON, and the value. It has no time, so that PyTorch sees
    that two uses are of one entry."""

    @staticmethod
    def type() -> str:
        """The name of this kind."""
        return "torch_rtx_runtime"

    def populate_cache(self) -> None:
        """Store the entry; one that is damaged, or can't be stored, is a warning."""
        settings = RuntimeSettings()
        path = runtime_cache_path(settings)
        if path is None:
            return
        try:
            entry = _unpack(self.content)
            with closing(RuntimeFile(path, create=True, private=True)) as file:
                file.merge([entry], settings.runtime_cache_size)
        except (CacheError, OSError) as problem:
            log.warning("a cache artifact is not loaded: %s", problem)


def _pack(entry: Entry) -> bytes:
    head = entry.kind, entry.key, astuple(entry.device), entry.digest.hex()
    return json.dumps(head).encode() + b"\n" + entry.value


def _unpack(content: bytes) -> Entry:
    """The entry; raises CacheError if it is damaged."""
    head, _, value = content.partition(b"\n")
    try:
        kind, key, (name, sm, driver, versions), digest = json.loads(head)
        entry = Entry(kind, key, DeviceKey(name, sm, driver, versions), value, 0.0)  # older than what is there
        if kind in runtime.KINDS and entry.digest.hex() == digest:
            return entry
    except (ValueError, TypeError, RecursionError):
        pass
    raise CacheError("an entry of a runtime cache is damaged")


def _record(kind: type[CacheArtifact], key: str, content: bytes) -> None:
    with _RECORDING:
        CacheArtifactManager.record_artifact(kind.type(), key, content)


def _record_entry(entry: Entry) -> None:
    _record(RuntimeArtifact, f"{entry.kind} {entry.key}", _pack(entry))


def _register() -> None:
    for kind in (EngineArtifact, RuntimeArtifact):
        CacheArtifactFactory.register(kind)
    entries.USES.append(lambda name, data: _record(EngineArtifact, name, data))
    runtime.USES.append(_record_entry)


_register()
