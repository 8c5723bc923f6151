"""The tuning database: compiled candidates of regions, and the tactic of each region that was measured fastest.

The key of a region is a digest of its operations and types, whatever model they come from. Entries are stored in the
runtime cache, if there is one. The compile worker builds only what the cache lacks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from typing import Any, Protocol

from torch_rtx.artefacts import NO_FILES, Artefacts
from torch_rtx.binaries import compress, decompress, digest
from torch_rtx.cache.runtime_file import FIGURES_KEY, GPU
from torch_rtx.chips import Chip, read_figures
from torch_rtx.errors import EngineFormatError, InvalidIR, KernelError
from torch_rtx.ir import Graph
from torch_rtx.runtime.launch import Store
from torch_rtx.runtime.ranks import agreed, said
from torch_rtx.tactics import Candidate, check_tactic, read_tactic, write_tactic
from torch_rtx.targets import EXACT, Float32, Target, arch_of

log = logging.getLogger(__name__)
Later = Sequence[tuple[str, Graph, int]]  # names, bodies and ranks
Bodies = Mapping[str, tuple[Graph, int]]  # by name; the body of a region and the rank of the first tactic to try
FAILURES = 2  # after so many failures with no success, assume that the toolchain is broken
NEGATIVE_ENTRY = b""  # stored where no tactic fits
KERNEL, TACTIC = "kernel", "tactic"  # kinds of entries


@dataclass(frozen=True)
class Choice:
    """The fastest tactic of a region, by measurement.

    Attributes:
        name: its key in `microseconds`.
        rank: see `Candidate`; None: the tactic comes with the engine.
        microseconds: time of each tactic, by name.
    """

    name: str
    rank: int | None
    microseconds: Mapping[str, float]


class Compiler(Protocol):
    """Compiles candidates: `CompileClient`."""

    def build(
        self, bodies: Bodies, sm: int, artefacts: Artefacts, chip: Chip | None = None, float32: Float32 = EXACT
    ) -> Mapping[str, Candidate]:
        """By name, the first tactic from the given rank on that fits the GPU, where ranks are by expected times on
        `chip`. `artefacts` gets the stages of its kernels, whose products of float32 are as exact as `float32` says."""

    def some(
        self, bodies: Bodies, sm: int, artefacts: Artefacts, chip: Chip | None, float32: Float32, later: Later
    ) -> Mapping[str, Candidate | None]:
        """The same of those that are ready first, at least one; None: no tactic fits. The others go on to compile, then
        those of `later`."""


class TuningDatabase:
    """Candidates and choices for one SM version.

    Args:
        compiler: compiles candidates.
        open_store: opens the runtime cache, or returns None; called when it is first needed.
        artefacts: where the stages of kernels are written, and read as overrides.
        chip: what is known of the GPU, unless the cache has figures of it; None: what stands for its SM version.
        float32: how exact products of float32 have to be.
    """

    def __init__(
        self,
        sm: int,
        compiler: Compiler,
        open_store: Callable[[], Store | None] = lambda: None,
        artefacts: Artefacts = NO_FILES,
        chip: Chip | None = None,
        float32: Float32 = EXACT,
    ) -> None:
        self.float32 = float32
        self.sm, self._compiler, self._open_store, self._artefacts = sm, compiler, open_store, artefacts
        self._works = False  # something was compiled here
        self._writes: list[Future[None]] = []
        self._sheet = arch_of(sm).chip if chip is None else chip

    @cached_property
    def _store(self) -> Store | None:
        return self._open_store()

    @cached_property
    def figures(self) -> Mapping[str, float] | None:
        """What was measured of the GPU; None: nothing was."""
        return None if self._store is None else read_figures(self._store.get(GPU, FIGURES_KEY))

    @property
    def chip(self) -> Chip:
        """The GPU as expected times are computed for it."""
        return self._sheet if self.figures is None else self._sheet.measured(self.figures)

    def _key(self, region: str) -> str:
        """The key of what depends on the order of tactics, which figures change."""
        return region if self.figures is None else f"{region} {_digest(self.figures)}"

    @property
    def opened(self) -> Store | None:
        """The store, if it was opened already."""
        found: Store | None = self.__dict__.get("_store")
        return found

    def candidates(self, wanted: Bodies) -> dict[str, Candidate]:
        """By region, the first tactic from the given rank on that fits the GPU; regions without one are left out.

        Args:
            wanted: bodies and ranks, by the keys of the regions.

        Raises:
            KernelError: nothing can be compiled here, and no candidate was stored.
        """
        stored = self.stored(wanted)
        found = {key: candidate for key, candidate in stored.items() if candidate is not None}
        missing = {key: entry for key, entry in wanted.items() if key not in stored}
        if not missing:
            return found
        try:
            built = self.compiled(missing)
            self.flush()
        except KernelError as error:
            if not found:
                raise
            log.warning("%d of %d regions are not compiled: %s", len(missing), len(wanted), error)
            return found
        return found | {key: candidate for key, candidate in built.items() if candidate is not None}

    def stored(self, wanted: Bodies) -> dict[str, Candidate | None]:
        """What the cache has of `wanted`, see `candidates`; None: no tactic fits."""
        found: dict[str, Candidate | None] = {}
        for key, (body, first) in wanted.items():
            value = None if self._store is None else self._store.get(KERNEL, self._key(f"{key} {first}"))
            known = None if value is None else _read(value, body)
            if known is not None or value == NEGATIVE_ENTRY:
                found[key] = known
        return found

    def compiled(self, missing: Bodies, later: Later | None = None) -> dict[str, Candidate | None]:
        """What the compiler makes of regions that the cache lacks, which gets it; None: no tactic fits.

        Args:
            later: what is wanted soon. Only those that are ready first are returned, at least one; the others go on to
                compile, then these. None: all are returned.

        Raises:
            KernelError: nothing can be compiled here.
        """
        then = None if later is None else [(name_of(key), body, rank) for key, body, rank in later]
        try:
            built, refused = self._each({name_of(key): entry for key, entry in missing.items()}, then)
        except KernelError as error:
            shipped = self._shipped(missing)
            if not shipped:
                raise
            log.warning("%d regions are not compiled for this GPU's figures: %s", len(missing), error)
            return {**dict.fromkeys(missing), **shipped}
        found: dict[str, Candidate | None] = {}
        for key, (_, first) in missing.items():
            name = name_of(key)
            if name in built or name in refused:
                found[key] = built.get(name)
                if self._store is not None and name not in refused:
                    self._writes.append(_writer().submit(self._keep, self._store, f"{key} {first}", found[key]))
        return found

    def _keep(self, store: Store, name: str, made: Candidate | None) -> None:
        """Store a candidate. Compressing takes longer than to measure it, and holds no lock."""
        value = NEGATIVE_ENTRY if made is None else write_candidate(made, arch_of(self.sm).target)
        store.put(KERNEL, self._key(name), value)

    def flush(self) -> None:
        """Wait until the cache has all that was compiled."""
        while self._writes:
            self._writes.pop().result()

    def _shipped(self, wanted: Bodies) -> dict[str, Candidate]:
        """Candidates of any GPU of the SM version, where nothing can be compiled for the figures of this one."""
        if self._store is None or self.figures is None:
            return {}
        stored = {key: self._store.get(KERNEL, f"{key} {first}") for key, (_, first) in wanted.items()}
        read = {key: _read(value, wanted[key][0]) for key, value in stored.items() if value is not None}
        return {key: candidate for key, candidate in read.items() if candidate is not None}

    def _each(
        self, wanted: Bodies, later: Later | None
    ) -> tuple[Mapping[str, Candidate | None], Mapping[str, KernelError]]:
        """Build all or some regions in one request, or if that fails one by one: one region that the compiler refuses,
        or that crashes it, does not affect the others.

        Returns:
            the candidates, None where no tactic fits, and the errors of other regions; both by name.

        Raises:
            KernelError: nothing can be compiled here, after FAILURES attempts.
        """
        try:
            return self._build(wanted, later), {}
        except KernelError:
            if len(wanted) == 1 and not self._goes_on:
                raise
        built: dict[str, Candidate | None] = {}
        refused: dict[str, KernelError] = {}
        for name, entry in wanted.items():
            try:
                built.update(self._build({name: entry}))
            except KernelError as error:
                refused[name] = error
                if len(refused) == FAILURES and not built and not self._goes_on:
                    raise
        for name, problem in refused.items():
            log.warning("%s is not compiled: %s", name, problem)
        return built, refused

    @property
    def _goes_on(self) -> bool:
        """Others were compiled before, so that a failure is one of a region; and the program does not end."""
        return self._works and not getattr(self._compiler, "stopped", False)

    def _build(self, wanted: Bodies, later: Later | None = None) -> Mapping[str, Candidate | None]:
        request = wanted, self.sm, self._artefacts, self.chip, self.float32
        found: Mapping[str, Candidate | None]
        if later is None:
            found = {**dict.fromkeys(wanted), **self._compiler.build(*request)}
        else:
            found = self._compiler.some(*request, later)
        self._works |= any(candidate is not None for candidate in found.values())
        return found

    def choice(self, key: str) -> Choice | None:
        """The choice of a region that is stored here, or that another rank made; None: it was not measured yet."""
        stored = None if self._store is None else self._store.get(TACTIC, self._key(key))
        if stored is None:
            heard = said(self.named(key))
            return None if heard is None else _choice(heard)
        found = _choice(stored)
        return None if found is None else self.agreed(key, found)

    def agreed(self, key: str, choice: Choice) -> Choice:
        """The choice of the first rank for a region, which may be this one: all run the same kernels, so that what they
        all compute stays the same, bit for bit."""
        return _choice(agreed(self.named(key), _written(choice))) or choice

    def named(self, key: str) -> str:
        """The name of a region among ranks, which may have different GPUs: these order tactics differently."""
        gpu = hashlib.sha256(repr(self._sheet).encode()).hexdigest()[:8]
        return f"tactic {self.sm} {gpu} {self._key(key)}"

    def remember(self, key: str, choice: Choice) -> None:
        """Store the choice of a region, and append the measurements to its dumped ranking."""
        files = self._artefacts.of(name_of(key), arch_of(self.sm).target)
        files.write(
            "ranking", "".join(f"measured {t:.2f} us: {n}\n" for n, t in choice.microseconds.items()), append=True
        )
        if self._store is not None:
            self._store.put(TACTIC, self._key(key), _written(choice).encode())


@cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "torch_rtx kernels")


if hasattr(os, "register_at_fork"):  # a fork has no such thread
    os.register_at_fork(after_in_child=_writer.cache_clear)


def _written(choice: Choice) -> str:
    return json.dumps(vars(choice))


def _choice(stored: str | bytes) -> Choice | None:
    """Inverse of `_written`; None for other text."""
    try:
        given = json.loads(stored)
        times = {str(name): float(time) for name, time in given["microseconds"].items()}
        return Choice(str(given["name"]), None if given["rank"] is None else int(given["rank"]), times)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("the runtime cache has an unreadable tactic, the region is measured again: %s", error)
        return None


def _digest(figures: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:8]


def name_of(key: str) -> str:
    """The name of a region's kernel in generated code."""
    return f"region_{key[:16]}"


@cache
def triton_version() -> str | None:
    """The installed version of Triton, or None."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def write_candidate(candidate: Candidate, target: Target) -> bytes:
    """A candidate as JSON."""
    binaries = {name: b64encode(compress(binary)).decode() for name, binary in candidate.binaries.items()}
    tactic = write_tactic(candidate.tactic, target)
    return json.dumps(
        {"tactic": tactic, "rank": candidate.rank, "binaries": binaries, "triton": triton_version()}
    ).encode()


def _read(stored: bytes, body: Graph) -> Candidate | None:
    """A stored candidate; None: a negative entry, an unreadable one, or one of another version of Triton."""
    if stored == NEGATIVE_ENTRY:
        return None
    try:
        given = json.loads(stored)
        if triton_version() not in (None, given["triton"]):
            log.info("a region is compiled again: the runtime cache has it from triton %s", given["triton"])
            return None
        return read_candidate(given, body)
    except (ValueError, TypeError, KeyError, AttributeError, InvalidIR, EngineFormatError) as error:
        log.warning("the runtime cache has an unreadable kernel, it is compiled again: %s", error)
        return None


def read_candidate(given: Any, body: Graph) -> Candidate:
    """Inverse of `write_candidate`, for a region of this body.

    Raises:
        TypeError, ValueError, KeyError, InvalidIR: other JSON, or a tactic that does not fit `body`.
        EngineFormatError: a damaged binary.
    """
    stored = {str(name): b64decode(text, validate=True) for name, text in given["binaries"].items()}
    binaries = {name: decompress(data) for name, data in stored.items()}
    (tactic,) = read_tactic(given["tactic"], body.syms).values()
    check_tactic(tactic, "a region", body)
    wanted = {variant.binary for launch in tactic.kernels.values() for variant in launch.variants}
    if wanted != binaries.keys() or any(digest(data) != name for name, data in binaries.items()):
        raise ValueError("the binaries are not those of the launches")
    return Candidate(tactic, int(given["rank"]), binaries)
