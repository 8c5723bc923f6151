"""SM targets: one record per kind of GPU of everything that depends on it, and the user's option `targets`.

A target is a kind of GPU (`sm_89`: a binary for it), or the PTX of one (`compute_80`), which the driver of any GPU that
is as new compiles when it loads it. Neither torch nor triton is needed here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from torch_rtx.chips import Chip, chip_named, typical_chip
from torch_rtx.errors import SettingsError, Unsupported

GRID = (2**31 - 1, 65535, 65535)  # most blocks along x, y and z
ALIGNMENT = 16  # bytes: of every address that a kernel gets; vector loads and asynchronous copies are as wide
# The feature that a dtype needs. The names that the IR does not have yet are PyTorch's, shortened in the same way.
DTYPE_FEATURES = {
    "bf16": "bf16",
    "i4": "int4",
    "u4": "int4",
    "f8e4m3fn": "fp8",
    "f8e5m2": "fp8",
    "f4e2m1fn_x2": "fp4",
}

# Where a target lacks these, kernels compute with their bytes.
EMULATED = frozenset(("f8e4m3fn", "f8e5m2", "f4e2m1fn_x2"))


HIGHEST, HIGH = "highest", "high"  # in PyTorch's words: as exact as float32, or as TF32


@dataclass(frozen=True, slots=True)
class Float32:
    """How exact products of float32 are: each HIGHEST or HIGH. Attention counts as matrix products."""

    products: str = HIGHEST
    convolutions: str = HIGHEST

    def of(self, kind: str | None) -> str:
        """That of an anchor, by its kind in `op_work.ANCHORS`; HIGHEST for None."""
        return HIGHEST if kind is None else self.convolutions if kind == "conv" else self.products


EXACT = Float32()


@dataclass(frozen=True, slots=True)
class Arch:
    """An SM version.

    Attributes:
        sm: compute capability without its dot.
        shared: bytes of shared memory that one block can have at most, where the kernel opts in.
        features: what its code can use. `mma_k16`: matrix products of fragments that are 16 deep, which Triton's
            layouts need. `cp_async`: copies from memory right to shared memory. `wgmma`: products by warpgroups, from
            shared memory. `griddepcontrol`: kernels that wait for those before them. `fp8_in_f32`: products of float8
            that are summed in f32, not in 14 bits as on Ada and Hopper. `block_scale`: products of block-scaled
            formats, which Triton's layouts make for sm_120 alone; elsewhere values are multiplied with their scales
            before. Others: see `DTYPE_FEATURES`.
        chip: the GPU that the cost model takes it for.
        exact: a binary runs on this SM version alone, since it may use features of one architecture (`sm_90a`). Others
            run on later versions of the same generation as well (sm_80 on sm_86 and sm_89).
        portable: the SM version whose code, as PTX without features of one architecture, is for this and all later
            GPUs. Triton has no such code for sm_90 to sm_110.
        ptx_version: the version in which PTX is written; None: the newest that the ptxas knows.
        oldest_ptxas: where Triton's ptxas for this SM version is older, its latest one is taken.
        registers: 32-bit registers that the threads of one block have together.
        like: the known SM version that this one is taken for; None: Triton's ptxas makes binaries for this one.
        float32: how exact its products of float32 have to be.
    """

    sm: int
    shared: int
    features: frozenset[str]
    chip: Chip
    exact: bool
    portable: int
    ptx_version: int | None = None
    oldest_ptxas: tuple[int, int] = (0, 0)
    registers: int = 64 << 10
    like: int | None = None
    float32: Float32 = EXACT

    @property
    def target(self) -> Target:
        """What kernels for a GPU of this SM version are built as: a binary, or where no ptxas is known to make one,
        PTX that its driver compiles."""
        return Target(self.sm) if self.like is None else Target(self.portable, ptx=True)


_TURING: frozenset[str] = frozenset()
_AMPERE = frozenset({"mma_k16", "cp_async", "bf16", "tf32", "int4"})
_ADA = _AMPERE | {"fp8"}
_HOPPER = _ADA | {"wgmma", "griddepcontrol"}
_BLACKWELL = _ADA | {"griddepcontrol", "fp4", "fp8_in_f32"}
_EXACT = frozenset({"block_scale"})  # features of one architecture, which no PTX for several has
# PTX of version 8.0 is taken by drivers of CUDA 12.0 and later. Shared memory: CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability".
_KNOWN = (
    Arch(75, 64 << 10, _TURING, typical_chip(75), False, 75, 80),
    Arch(80, 163 << 10, _AMPERE, typical_chip(80), False, 80, 80),
    Arch(86, 99 << 10, _AMPERE, typical_chip(86), False, 86, 80),
    Arch(87, 163 << 10, _AMPERE, typical_chip(87), False, 87, 80),
    Arch(89, 99 << 10, _ADA, typical_chip(89), False, 89),
    # ptxas 12.8 is wrong for Hopper: where tiles of several widths follow each other at one address, it computes a
    # descriptor from a register that nothing writes, in attention with values narrower than keys.
    Arch(90, 227 << 10, _HOPPER, typical_chip(90), True, 89, oldest_ptxas=(12, 9)),
    Arch(100, 227 << 10, _BLACKWELL, typical_chip(100), True, 89),
    Arch(103, 227 << 10, _BLACKWELL, typical_chip(103), True, 89),
    Arch(110, 227 << 10, _BLACKWELL, typical_chip(110), True, 89),
    Arch(120, 99 << 10, _BLACKWELL | _EXACT, typical_chip(120), True, 120),
    Arch(121, 99 << 10, _BLACKWELL, typical_chip(121), True, 120),
)
ARCHES: Mapping[int, Arch] = {arch.sm: arch for arch in _KNOWN}
NEWEST = max(ARCHES)


@cache
def arch_of(sm: int) -> Arch:
    """The record of an SM version; an unknown one is taken for the nearest older one that is known.

    Raises:
        Unsupported: it is older than all that are known.
    """
    if sm in ARCHES:
        return ARCHES[sm]
    older = [known for known in ARCHES if known < sm]
    if not older:
        raise Unsupported(f"kernels for sm_{sm}: GPUs older than sm_{min(ARCHES)} are not supported")
    return replace(ARCHES[max(older)], sm=sm, like=max(older))


@cache
def _as_ptx(arch: Arch) -> Arch:
    """`arch` without what its PTX for later GPUs lacks."""
    return replace(arch, features=arch.features - _EXACT)


@dataclass(frozen=True, slots=True)
class Target:
    """`sm` is the compute capability without its dot; `ptx`: PTX instead of a binary; `chip`: the GPU that kernels are
    chosen for, None: what stands for the SM version; `float32`: see `Arch`. The last two make no other target."""

    sm: int
    ptx: bool = False
    chip: Chip | None = field(default=None, compare=False, repr=False)
    float32: Float32 = field(default=EXACT, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{'compute' if self.ptx else 'sm'}_{self.sm}"

    @property
    def arch(self) -> Arch:
        """The SM version whose code it is."""
        own = arch_of(self.sm)
        own = _as_ptx(arch_of(own.portable)) if self.ptx else own if self.chip is None else replace(own, chip=self.chip)
        return own if self.float32 == own.float32 else replace(own, float32=self.float32)

    @property
    def shared(self) -> int:
        """Shared memory of a block, in bytes. PTX has to fit every later GPU."""
        return min(a.shared for a in _KNOWN if a.sm >= self.arch.sm) if self.ptx else self.arch.shared


PORTABLE_PTX = 87  # version of PTX of `Target(120, ptx=True)`, which leaves out features of one architecture
_CUDA_OF_PTX = {80: (12, 0), PORTABLE_PTX: (12, 8)}


def oldest_driver(target: Target, ptxas: tuple[int, int]) -> tuple[int, int]:
    """The CUDA version of the oldest driver that takes code for `target`, which was made with `ptxas` of this version:
    a binary runs on all drivers of one major version, PTX on those that know its version."""
    if not target.ptx:
        return ptxas[0], 0
    version = PORTABLE_PTX if target.arch.exact else target.arch.ptx_version
    return ptxas if version is None else _CUDA_OF_PTX[version]


PTX = Target(80, ptx=True)
PORTABLE = (*(Target(sm) for sm in (80, 86, 89, 90, 120)), PTX)
CURRENT, LATER, NAMED = "current", "later", {"portable": PORTABLE, "ptx": (PTX,)}
Option = str | int | Iterable[str | int]
# SM version: names of series, GPUs and architectures, without makers, spaces and hyphens.
_GPUS = {
    75: "rtx20 rtx2060 rtx2070 rtx2080 gtx16 gtx1630 gtx1650 gtx1660 titanrtx t4 t4g t400 t600 t1000 t1200 turing "
    "quadrortx3000 quadrortx4000 quadrortx5000 quadrortx6000 quadrortx8000",
    80: "a100 a800 a30 ampere",
    86: "rtx30 rtx3050 rtx3060 rtx3070 rtx3080 rtx3090 rtx2050 mx570 a2 a10 a10g a10m a16 a40 rtxa400 rtxa500 rtxa1000 "
    "rtxa2000 rtxa3000 rtxa4000 rtxa4500 rtxa5000 rtxa5500 rtxa6000 ampere",
    87: "orin",
    89: "rtx40 rtx4050 rtx4060 rtx4070 rtx4080 rtx4090 l2 l4 l20 l40 l40s l40g rtx500ada rtx1000ada rtx2000ada "
    "rtx3000ada rtx3500ada rtx4000ada rtx4500ada rtx5000ada rtx5880ada rtx6000ada rtx4000sffada ada adalovelace",
    90: "h20 h100 h200 h800 gh200 hopper",
    100: "b100 b200 gb200 blackwell",
    103: "b300 gb300 blackwell",
    110: "thor blackwell",
    120: "rtx50 rtx5050 rtx5060 rtx5070 rtx5080 rtx5090 rtxpro500 rtxpro1000 rtxpro2000 rtxpro3000 rtxpro4000 "
    "rtxpro4500 rtxpro5000 rtxpro6000 blackwell",
    121: "gb10 dgxspark blackwell",
}
_TOO_OLD = ("volta", "v100", "titanv", "pascal", "p100", "p40", "p4", "gtx10", "titanx", "maxwell", "m60", "k80")
_NAMES = {
    name: tuple(sm for sm, names in _GPUS.items() if name in names.split())
    for every in _GPUS.values()
    for name in every.split()
}
_MAKERS = re.compile(r"nvidia|geforce|tesla|jetson|agx|[\s_-]")
# What PyTorch and shops add to a name, and leaves the SM version as it is.
_VARIANT = re.compile(
    r"(?:ti|super|d|v2|\d+gb|laptop|gpu|maxq|mobile|sxm\d?|pcie|nvl|hbm\d?e?|mig.*|generation|blackwell|sff|workstation|"
    r"server|edition|nx|nano|series)*"
)


def parse_targets(
    option: Option, capability: tuple[int, int] | None = None, chip: Callable[[], Chip | None] = lambda: None
) -> tuple[Target, ...]:
    """The targets that a user's option names, without repeats, in order of SM version, PTX last. One that is named by
    one GPU alone has its chip.

    Args:
        option: "portable", "current", or such as "sm_86", "12.0", 89, "ptx", "compute_80", and names of GPUs, series
            and architectures: "RTX 4090", "rtx30", "hopper"; one or several. Case, spaces, hyphens and underscores
            make no difference. An SM version that no ptxas knows is PTX (`Arch.target`). "later": none, kernels are
            compiled where the engine runs.
        capability: compute capability of the GPU that "current" stands for.
        chip: says what that GPU is.

    Raises:
        SettingsError: a target that does not exist, "current" without a GPU, or no target at all.
    """
    if option == LATER:
        return ()
    entries = [option] if isinstance(option, str | int) else list(option)
    found: dict[Target, Target] = {}
    for target in (target for entry in entries for target in _targets(entry, capability, chip)):
        other = found.setdefault(target, target)
        if other.chip != target.chip:
            found[target] = replace(target, chip=None)
    if not found:
        raise SettingsError("targets: none is named", hint=_known())
    return tuple(by_age(found.values()))


def _targets(entry: object, capability: tuple[int, int] | None, chip: Callable[[], Chip | None]) -> tuple[Target, ...]:
    name = _MAKERS.sub("", str(entry).lower())
    if name == CURRENT:
        if capability is None:
            hint = 'name the GPU that the engine is for, such as "RTX 4090" or "sm_89", or "portable"'
            raise SettingsError('targets: "current" needs a CUDA GPU in this process', hint=hint)
        sm = capability[0] * 10 + capability[1]
        return (_of_chip(arch_of(sm), chip()),) if sm >= min(ARCHES) else _targets(sm, None, chip)
    if name in NAMED:
        return NAMED[name]
    match = re.fullmatch(r"compute(\d{1,2})\.?(\d)", name, re.ASCII)
    if match is not None and int(match[1] + match[2]) in ARCHES:
        return (Target(int(match[1] + match[2]), ptx=True),)
    return tuple(_of_chip(ARCHES[sm], chip_named(str(entry), sm)) for sm in sm_versions(entry))


def _of_chip(arch: Arch, chip: Chip | None) -> Target:
    """The target for a GPU; that which stands for the SM version is none of its own."""
    return arch.target if arch.target.ptx or chip == arch.chip else replace(arch.target, chip=chip)


def sm_versions(entry: object) -> tuple[int, ...]:
    """The SM versions that an entry of the option `targets` means: one, or those of an architecture.

    Raises:
        SettingsError: it is neither an SM version nor the name of a GPU, a series or an architecture.
    """
    name = _MAKERS.sub("", str(entry).lower())
    match = re.fullmatch(r"(?:sm)?(\d{1,2})\.?(\d)", name, re.ASCII)
    if match is not None and isinstance(entry, str | int) and int(match[1] + match[2]) in ARCHES:
        return (int(match[1] + match[2]),)
    if name.startswith(_TOO_OLD) or (match is not None and int(match[1] + match[2]) < min(ARCHES)):
        hint = f"sm_{min(ARCHES)}, Turing, is the oldest: RTX 20, GTX 16, T4"
        raise SettingsError(f"targets: {entry!r} is older than the GPUs that kernels are built for", hint=hint)
    for known in sorted(_NAMES, key=len, reverse=True):
        if name.startswith(known) and _VARIANT.fullmatch(name, len(known)):
            return _NAMES[known]
    names = [*_NAMES, *NAMED, CURRENT, LATER, *(f"sm{sm}" for sm in ARCHES)]
    near = difflib.get_close_matches(name, names, cutoff=0.7)
    asked = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise SettingsError(f"targets: unknown target {entry!r}", hint=asked + _known())


def _known() -> str:
    names = ", ".join(f"sm_{sm}" + " (as PTX)" * (arch.like is not None) for sm, arch in ARCHES.items())
    named = '"portable", "current", "later" and such as "RTX 4090"'
    return f'known are {names}, "ptx" (also compute_80, ...; newer GPUs run it), {named}'


def gpus_of(sm: int) -> tuple[str, ...]:
    """The names of series, GPUs and architectures that mean an SM version, as `parse_targets` compares them."""
    return tuple(_GPUS.get(sm, "").split())


def by_age(targets: Iterable[Target]) -> list[Target]:
    """Targets by SM version, PTX last."""
    return sorted(targets, key=lambda target: (target.ptx, target.sm))


def is_explicit(option: Option) -> bool:
    """Whether the user named targets one by one: what one of them lacks is then an error."""
    return not (isinstance(option, str) and option.lower() == "portable")


def lacks(arch: Arch, dtype: str) -> bool:
    """Whether an SM version has no instructions for `dtype`, as the IR names it."""
    feature = DTYPE_FEATURES.get(dtype)
    return feature is not None and feature not in arch.features


def usable(targets: Iterable[Target], dtypes: Iterable[tuple[str, str]], explicit: bool) -> tuple[Target, ...]:
    """Those of `targets` that can compute in all dtypes.

    Args:
        dtypes: pairs (op, dtype) of the program.
        explicit: see `is_explicit`.

    Raises:
        SettingsError: an explicit target, or every target, lacks a dtype; names the op, the dtype and the target.
    """
    pairs = [pair for pair in dict.fromkeys(dtypes) if pair[1] not in EMULATED]
    kept = []
    problem = ""
    for target in targets:
        found = next(((op, dtype) for op, dtype in pairs if lacks(target.arch, dtype)), None)
        if found is None:
            kept.append(target)
            continue
        problem = f"targets: {found[0]} computes in {found[1]}, which {target} lacks"
        if explicit:
            raise SettingsError(problem, hint=f"leave {target} out, or change the model's dtype")
    if not kept:
        raise SettingsError(problem or "targets: none is named", hint=_known())
    return tuple(kept)
