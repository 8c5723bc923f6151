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
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import metadata
from typing import Any, Protocol, TypeVar

from torch_rtx.errors import InvalidIR, KernelError
from torch_rtx.ir import Graph, Type, Value, kernel_nodes, verify
from torch_rtx.irparse import parse
from torch_rtx.kerneltable import Candidate, SplitCandidate, digest, read_launch, write_launch
from torch_rtx.manifest import Json
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.bind import without_locations
from torch_rtx.runtime.launch import Store

log = logging.getLogger(__name__)
T = TypeVar("T")
Bodies = Mapping[str, tuple[Graph, int]]  # by name, with the first configuration to try
FAILURES = 2  # kernels that fail before any other is built: it is not about these
NO_MORE = b""  # the value of a kernel that there is none of
KERNEL, TACTIC = "kernel", "tactic"  # kinds of entries
CALLS, ENGINE, GENERATED, SPLIT = TACTICS = ("calls", "engine", "generated", "split")


@dataclass(frozen=True)
class Tactic:
    """The way to run a region that was found to be the fastest.

    Attributes:
        kind: CALLS, ENGINE (the kernel that the engine brought), GENERATED or SPLIT.
        config: of the kernel that is launched.
        microseconds: what each way took, by name.
    """

    kind: str
    config: int
    microseconds: Mapping[str, float]


class Compiler(Protocol):
    """Compiles kernels: `Builder`."""

    def build(self, bodies: Bodies, sm: int) -> Mapping[str, Candidate]:
        """Per name the first kernel that fits, from a configuration on."""

    def build_split(self, bodies: Bodies, sm: int) -> Mapping[str, SplitCandidate]:
        """Per name the split body, if there is one."""


class Knowledge:
    """Kernels and tactics for one SM version.

    Args:
        compiler: compiles kernels.
        open_store: opens what outlives the process, if anything does; called when it is first needed.
    """

    def __init__(self, sm: int, compiler: Compiler, open_store: Callable[[], Store | None] = lambda: None) -> None:
        self.sm, self._compiler, self._open_store = sm, compiler, open_store

    @cached_property
    def _store(self) -> Store | None:
        return self._open_store()

    @property
    def opened(self) -> Store | None:
        """What outlives the process, if it was needed already."""
        found: Store | None = self.__dict__.get("_store")
        return found

    def kernels(self, wanted: Bodies) -> dict[str, Candidate]:
        """Per region the first kernel that fits from a configuration on; those that have none are left out.

        Args:
            wanted: bodies and configurations, by the keys of the regions.

        Raises:
            KernelError: see `Builder.build`; not where some were known.
        """
        names = {key: f"{key} {first}" for key, (_, first) in wanted.items()}
        return self._obtain(wanted, names, self._compiler.build, write_candidate, read_candidate)

    def splits(self, wanted: Mapping[str, Graph]) -> dict[str, SplitCandidate]:
        """Per region its split body with its kernels, where that is expected to be faster.

        Args:
            wanted: bodies, by the keys of the regions.

        Raises:
            KernelError: as `kernels`.
        """
        bodies = {key: (body, 0) for key, body in wanted.items()}
        names = {key: f"{key} split" for key in wanted}
        return self._obtain(bodies, names, self._compiler.build_split, write_split, read_split)

    def _obtain(
        self,
        wanted: Bodies,
        names: Mapping[str, str],
        build: Callable[[Bodies, int], Mapping[str, T]],
        write: Callable[[T], dict[str, Json]],
        read: Callable[[Any, Graph], T],
    ) -> dict[str, T]:
        """What the store knows under these names, and else what can be built, which the store then gets."""
        found: dict[str, T] = {}
        missing: dict[str, tuple[Graph, int]] = {}
        for key, (body, first) in wanted.items():
            stored = None if self._store is None else self._store.get(KERNEL, names[key])
            known = None if stored is None else _read(stored, body, read)
            if known is not None:
                found[key] = known
            elif stored != NO_MORE:
                missing[key] = body, first
        if not missing:
            return found
        try:
            built, refused = _each(build, {name_of(key): entry for key, entry in missing.items()}, self.sm)
        except KernelError as error:
            if not found:
                raise
            log.warning("%d of %d kernels are not compiled: %s", len(missing), len(wanted), error)
            return found
        for key in missing:
            made = built.get(name_of(key))
            if made is not None:
                found[key] = made
            if self._store is not None and name_of(key) not in refused:
                self._store.put(KERNEL, names[key], NO_MORE if made is None else _written(write(made)))
        return found

    def tactic(self, key: str) -> Tactic | None:
        """What is known to be the fastest way to run a region."""
        stored = None if self._store is None else self._store.get(TACTIC, key)
        if stored is None:
            return None
        try:
            given = json.loads(stored)
            times = {str(name): float(time) for name, time in given["microseconds"].items()}
            if given["kind"] not in TACTICS:
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
    return hashlib.sha256(str(_unnamed(without_locations(body))).encode()).hexdigest()[:32]


def _unnamed(body: Graph) -> Graph:
    """`body` without the names of the kernels in it, which are those of the sizes of the capture."""
    nodes = (
        node if node.body is None else replace(node, op=node.kind, body=_unnamed(node.body)) for node in body.nodes
    )
    return replace(body, nodes=tuple(nodes))


def name_of(key: str) -> str:
    """The name of a region's kernel in its code."""
    return f"region_{key[:16]}"


def _each(
    build: Callable[[Bodies, int], Mapping[str, T]], wanted: Bodies, sm: int
) -> tuple[Mapping[str, T], Mapping[str, KernelError]]:
    """What can be built, together or else one by one, and by name what is wrong with the others: a kernel that the
    compiler refuses, or that ends it, costs nobody but itself.

    Raises:
        KernelError: nothing can be compiled here, as it seems.
    """
    try:
        return build(wanted, sm), {}
    except KernelError:
        if len(wanted) == 1:
            raise
    built: dict[str, T] = {}
    refused: dict[str, KernelError] = {}
    for name, entry in wanted.items():
        try:
            built.update(build({name: entry}, sm))
        except KernelError as error:
            refused[name] = error
            if len(refused) == FAILURES and not built:
                raise
    for name, problem in refused.items():
        log.warning("%s is not compiled: %s", name, problem)
    return built, refused


@cache
def triton_version() -> str | None:
    """The version of Triton that is installed here; None: none is."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _written(value: dict[str, Json]) -> bytes:
    return json.dumps({**value, "triton": triton_version()}).encode()


def _read(stored: bytes, body: Graph, read: Callable[[Any, Graph], T]) -> T | None:
    """What was stored; None if that is nothing, it can't be read, or another Triton than the one here made it."""
    if stored == NO_MORE:
        return None
    try:
        given = json.loads(stored)
        if triton_version() not in (None, given["triton"]):
            log.info("a kernel is compiled again: the one in the runtime cache is of triton %s", given["triton"])
            return None
        return read(given, body)
    except (ValueError, TypeError, KeyError, AttributeError, InvalidIR) as error:
        log.warning("a kernel in the runtime cache can't be read, it is compiled again: %s", error)
        return None


def write_candidate(candidate: Candidate) -> dict[str, Json]:
    """A candidate as JSON."""
    binaries: dict[str, Json] = {name: b64encode(stored).decode() for name, stored in candidate.binaries.items()}
    return {"launch": write_launch(candidate.launch), "binaries": binaries, "config": candidate.config}


def read_candidate(given: Any, body: Graph) -> Candidate:
    """Inverse of `write_candidate`, for a region of this body.

    Raises:
        TypeError, ValueError, KeyError, InvalidIR: not such JSON.
    """
    binaries = {str(name): b64decode(text, validate=True) for name, text in given["binaries"].items()}
    launch = read_launch(given["launch"], body.syms)
    wanted = {variant.binary for variant in launch.variants}
    if wanted != binaries.keys() or any(digest(data) != name for name, data in binaries.items()):
        raise ValueError("the binaries are not those of the launch")
    return Candidate(launch, binaries, int(given["config"]))


def write_split(candidate: SplitCandidate) -> dict[str, Json]:
    """A split body with its kernels as JSON; the graph in its text form."""
    kernels: dict[str, Json] = {op: write_candidate(kernel) for op, kernel in candidate.kernels.items()}
    return {"body": str(candidate.body), "kernels": kernels}


def read_split(given: Any, body: Graph) -> SplitCandidate:
    """Inverse of `write_split`, for a region of this body.

    Raises:
        TypeError, ValueError, KeyError, InvalidIR: not such JSON, or the split body does not take and return what
            `body` does.
    """
    divided = parse(str(given["body"]))
    verify(divided, ALLOWED)
    inside = {node.op: node.body for node in kernel_nodes(divided)}
    if _signature(divided) != _signature(body) or inside.keys() != given["kernels"].keys():
        raise ValueError("the split body is not one of this region")
    kernels = {op: read_candidate(given["kernels"][op], inner) for op, inner in inside.items() if inner is not None}
    return SplitCandidate(divided, kernels)


def _signature(body: Graph) -> tuple[list[Type], list[Type]]:
    outputs = [attr.type for attr in body.outputs if isinstance(attr, Value)]
    return [value.type for value in body.inputs], outputs
