"""What is known about regions: the kernels that were compiled for them, and which tactic was the fastest.

A region is known by the text of its operations and types, not by its place in a model. What is learnt goes to the
runtime cache, if there is one; the process that compiles kernels is asked only for what is not in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata

from torch_rtx.errors import InvalidIR, KernelError
from torch_rtx.ir import Graph
from torch_rtx.kerneltable import Candidate, digest, read_launch, write_launch
from torch_rtx.runtime.bind import without_locations
from torch_rtx.runtime.launch import Store

log = logging.getLogger(__name__)
Build = Callable[[Mapping[str, tuple[Graph, int]], int], Mapping[str, Candidate]]
NO_MORE = b""  # the value of a kernel that there is none of
KERNEL, TACTIC = "kernel", "tactic"  # kinds of entries
CALLS, ENGINE, GENERATED = "calls", "engine", "generated"  # kinds of tactics


@dataclass(frozen=True)
class Tactic:
    """The way to run a region that was found to be the fastest.

    Attributes:
        kind: CALLS, ENGINE (the kernel that the engine brought) or GENERATED.
        config: of the kernel that is launched.
        microseconds: what each way took, by name.
    """

    kind: str
    config: int
    microseconds: Mapping[str, float]


class Knowledge:
    """Kernels and tactics for one SM version.

    Args:
        build: compiles kernels, see `Builder.build`.
        open_store: opens what outlives the process, if anything does; called when it is first needed.
    """

    def __init__(self, sm: int, build: Build, open_store: Callable[[], Store | None] = lambda: None) -> None:
        self.sm, self._build, self._open_store = sm, build, open_store

    @cached_property
    def _store(self) -> Store | None:
        return self._open_store()

    @property
    def opened(self) -> Store | None:
        """What outlives the process, if it was needed already."""
        found: Store | None = self.__dict__.get("_store")
        return found

    def kernels(self, wanted: Mapping[str, tuple[Graph, int]]) -> dict[str, Candidate]:
        """Per region the first kernel that fits from a configuration on; those that have none are left out.

        Args:
            wanted: bodies and configurations, by the keys of the regions.

        Raises:
            KernelError: see `Builder.build`.
        """
        found: dict[str, Candidate] = {}
        missing: dict[str, tuple[Graph, int]] = {}
        for key, (body, first) in wanted.items():
            stored = None if self._store is None else self._store.get(KERNEL, f"{key} {first}")
            candidate = None if stored is None else _read(stored, body)
            if candidate is not None:
                found[key] = candidate
            elif stored != NO_MORE:
                missing[key] = body, first
        if missing:
            try:
                found |= self._built(missing)
            except KernelError as error:
                if not found:
                    raise
                log.warning("%d of %d kernels are not compiled: %s", len(missing), len(wanted), error)
        return found

    def _built(self, missing: Mapping[str, tuple[Graph, int]]) -> dict[str, Candidate]:
        """Compile kernels, and keep them."""
        names = {name_of(key): key for key in missing}
        built = self._build({name: missing[key] for name, key in names.items()}, self.sm)
        found = {names[name]: candidate for name, candidate in built.items()}
        if self._store is not None:
            for key, (_, first) in missing.items():
                self._store.put(KERNEL, f"{key} {first}", _written(found[key]) if key in found else NO_MORE)
        return found

    def tactic(self, key: str) -> Tactic | None:
        """What is known to be the fastest way to run a region."""
        stored = None if self._store is None else self._store.get(TACTIC, key)
        if stored is None:
            return None
        try:
            given = json.loads(stored)
            times = {str(name): float(time) for name, time in given["microseconds"].items()}
            if given["kind"] not in (CALLS, ENGINE, GENERATED):
                raise ValueError(given["kind"])
            return Tactic(given["kind"], int(given["config"]), times)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("a tactic in the runtime cache can't be read, the region is measured again: %s", error)
            return None

    def remember(self, key: str, tactic: Tactic) -> None:
        """Keep the fastest way to run a region."""
        if self._store is not None:
            self._store.put(TACTIC, key, json.dumps(vars(tactic)).encode())


def region_key(body: Graph) -> str:
    """The name of a region: equal for equal operations and types, wherever they come from."""
    return hashlib.sha256(str(without_locations(body)).encode()).hexdigest()[:32]


def name_of(key: str) -> str:
    """The name of a region's kernel in its code."""
    return f"region_{key[:16]}"


@cache
def triton_version() -> str | None:
    """The version of Triton that is installed here; None: none is."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _written(candidate: Candidate) -> bytes:
    binaries = {name: b64encode(stored).decode() for name, stored in candidate.binaries.items()}
    value = {
        "launch": write_launch(candidate.launch),
        "binaries": binaries,
        "config": candidate.config,
        "triton": triton_version(),
    }
    return json.dumps(value).encode()


def _read(stored: bytes, body: Graph) -> Candidate | None:
    """The candidate; None if there is none, it can't be read, or another Triton than the one that is here made it."""
    if stored == NO_MORE:
        return None
    try:
        given = json.loads(stored)
        if triton_version() not in (None, given["triton"]):
            log.info("a kernel is compiled again: the one in the runtime cache is of triton %s", given["triton"])
            return None
        binaries = {str(name): b64decode(text, validate=True) for name, text in given["binaries"].items()}
        launch = read_launch(given["launch"], body.syms)
        wanted = {variant.binary for variant in launch.variants}
        if wanted != binaries.keys() or any(digest(data) != name for name, data in binaries.items()):
            raise ValueError("the binaries are not those of the launch")
        return Candidate(launch, binaries, int(given["config"]))
    except (ValueError, TypeError, KeyError, AttributeError, InvalidIR) as error:
        log.warning("a kernel in the runtime cache can't be read, it is compiled again: %s", error)
        return None
