"""The tactics that code generation offers for a region, and the kernels in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from math import inf
from typing import Any

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, TensorType
from torch_rtx.lowering.kernels.families import (
    attention,
    attention_backward,
    attention_flex,
    conv,
    foreign,
    gemm,
    grouped,
    horizontal,
    loop,
)
from torch_rtx.lowering.kernels.families.family import Family, Offer
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.memory_model import bytes_of
from torch_rtx.lowering.kernels.region import Exact, Region, region
from torch_rtx.tactics import OWN, Tactic
from torch_rtx.targets import EMULATED, Arch, lacks

FAMILIES = (
    *(gemm.FAMILY, conv.FAMILY, attention.FAMILY, attention_backward.FAMILY, attention_flex.FAMILY, grouped.FAMILY),
    loop.FAMILY,
)
MINOR = 8  # times fewer bytes than another kernel of a tactic: a kernel has its best configuration
Form = tuple[Tactic[Kernel], Iterator[Tactic[Kernel]]]  # a tactic, and its fallbacks


def generate(body: Graph, name: str, arch: Arch, which: int) -> Kernel | None:
    """The kernel that computes `body` in configuration `which`, by rank; None if there are fewer.

    Raises:
        Unsupported: no kernel computes this.
    """
    configs = _configs(body, arch)
    return _kernel(body, name, configs[which], arch) if which < len(configs) else None


def _as_bytes(body: Graph, arch: Arch) -> frozenset[str]:
    """See `region`: of the dtypes in `body`, so that SM versions share what has none of these."""
    missing = {dtype for dtype in EMULATED if lacks(arch, dtype)}
    return frozenset(missing.intersection(_dtypes(body))) if missing else frozenset()


def _dtypes(body: Graph) -> Iterator[str]:
    yield from (value.type.dtype for value in body.values() if isinstance(value.type, TensorType))
    for node in body.nodes:
        if node.body is not None:
            yield from _dtypes(node.body)


def _configs(body: Graph, arch: Arch) -> Sequence[Any]:
    return _cached_configs(Exact(body), arch)


@lru_cache(maxsize=1024)
def _cached_configs(key: Exact, arch: Arch) -> Sequence[Any]:
    found = region(key.graph, _as_bytes(key.graph, arch))
    return family_of(found).configs(found, arch)


def _kernel(body: Graph, name: str, config: Any, arch: Arch) -> Kernel:
    return _cached_kernel(Exact(body), name, config, _as_bytes(body, arch))


@lru_cache(maxsize=1024)
def _cached_kernel(key: Exact, name: str, config: Any, as_bytes: frozenset[str]) -> Kernel:
    found = region(key.graph, as_bytes)
    return family_of(found).kernel(found, name, config)


def family_of(found: Region) -> Family:
    """The family of a region's anchor; of loops if there is none, or of several loops."""
    if found.parts:
        return horizontal.FAMILY
    op = None if found.anchor is None else found.anchor.op
    return next(family for family in FAMILIES if op in family.ops or not family.ops)


def forms(body: Graph, name: str, arch: Arch) -> list[Form]:
    """The forms of the kernel nodes `name`, the fastest first by expected time. Each has further tactics of its kind,
    in case its kernels do not fit or are measured to be slow.

    Raises:
        Unsupported: no kernel computes this.
    """
    return [(head, rest) for rest in _ordered(body, name, arch) if (head := next(rest, None)) is not None]


def fastest(body: Graph, name: str, arch: Arch) -> Tactic[Kernel] | None:
    """The first of `forms`, None if there is none; no code of the others is generated.

    Raises:
        Unsupported: no kernel computes this.
    """
    return next((head for rest in _ordered(body, name, arch) if (head := next(rest, None)) is not None), None)


def _ordered(body: Graph, name: str, arch: Arch) -> list[Iterator[Tactic[Kernel]]]:
    """The tactics of each form, those of the fastest first."""
    others = foreign.offers(body, arch)
    if others is not None:
        return others
    found, configs = region(body, _as_bytes(body, arch)), _configs(body, arch)
    family = family_of(found)
    own_us = family.expected_us(found, arch, configs[0]) if configs else inf
    made = [(own_us, _own(found, name, arch))]
    made += [(offer.expected_us, _offered(offer, arch)) for offer in family.others(found, name, arch, own_us)]
    return [rest for _, rest in sorted(made, key=lambda form: form[0])]


def _own(found: Region, name: str, arch: Arch) -> Iterator[Tactic[Kernel]]:
    """The region's own kernel in all configurations."""
    for config in _configs(found.body, arch):
        us = family_of(found).expected_us(found, arch, config)
        yield Tactic("kernel", us, {OWN: _kernel(found.body, name, config, arch)})


def _moved(body: Graph, arch: Arch) -> int:
    """Bytes that a kernel reads and writes."""
    return sum(map(bytes_of, region(body, _as_bytes(body, arch)).moved_types))


def _offered(offer: Offer, arch: Arch) -> Iterator[Tactic[Kernel]]:
    """An offered tactic, in each configuration of its first kernel; once if it has no kernels, and not at all if one of
    its kernels can't be generated. A kernel that moves much less than another one has its best configuration in all:
    what suits large kernels says nothing of it."""
    nodes = offer.body.nodes if offer.body is not None else ()
    try:
        inside = [(node.op, node.body, _configs(node.body, arch)) for node in nodes if node.body is not None]
        moved = [_moved(body, arch) for _, body, _ in inside]
        for which in range(len(inside[0][2]) if inside else 1):
            kernels = {
                op: _kernel(body, op, configs[min(which, len(configs) - 1) if MINOR * size > max(moved) else 0], arch)
                for (op, body, configs), size in zip(inside, moved, strict=True)
            }
            yield Tactic(offer.kind, offer.expected_us, kernels, offer.body)
    except Unsupported:
        return


def tactics(body: Graph, name: str, arch: Arch) -> Iterator[Tactic[Kernel]]:
    """The tactics of the kernel nodes `name` in the order of trial: first each form's best, by expected time; then the
    further configurations of the region's own kernel, and those of the other forms.

    Raises:
        Unsupported: no kernel computes this.
    """
    found = forms(body, name, arch)
    yield from (head for head, _ in found)
    own_first = sorted(found, key=lambda form: form[0].body is not None)
    yield from chain.from_iterable(rest for _, rest in own_first)
