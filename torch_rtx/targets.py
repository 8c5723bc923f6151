"""SM targets: what code can be compiled for, what each GPU generation can hold, and the user's option `targets`.

A target is a kind of GPU (`sm_89`: a binary for it), or the PTX of one (`compute_80`), which the driver of any GPU that
is as new compiles when it loads it. Limits are those of the CUDA C++ Programming Guide, table "Technical Specifications
per Compute Capability". Neither torch nor triton is needed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch_rtx.errors import SettingsError

# Shared memory that one block can have at most, where the kernel opts in; bytes, by SM version.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
BLOCK_REGISTERS = 64 << 10  # 32-bit registers that the threads of one block have together
GRID = (2**31 - 1, 65535, 65535)  # most blocks along x, y and z
ALIGNMENT = 16  # bytes: of every address that a kernel gets; vector loads and asynchronous copies are as wide
# The first SM version that has it.
FEATURES = {"mma": 75, "cp_async": 80, "bf16": 80, "tf32": 80, "int4": 80, "fp8": 89, "tma": 90, "wgmma": 90}
FEATURES |= {"griddepcontrol": 90, "fp4": 120}
HOPPER, BLACKWELL = 90, 120  # SM versions
# The feature that a dtype needs. The names that the IR does not have yet are PyTorch's, shortened in the same way.
DTYPE_FEATURES = {
    "bf16": "bf16",
    "i4": "int4",
    "u4": "int4",
    "f8e4m3fn": "fp8",
    "f8e5m2": "fp8",
    "f4e2m1fn_x2": "fp4",
}


@dataclass(frozen=True, slots=True)
class Target:
    """`sm` is the compute capability without its dot; `ptx`: PTX instead of a binary."""

    sm: int
    ptx: bool = False

    def __str__(self) -> str:
        return f"{'compute' if self.ptx else 'sm'}_{self.sm}"

    @property
    def shared(self) -> int:
        """Shared memory of a block, in bytes. PTX has to fit every later GPU."""
        return min(size for sm, size in SHARED.items() if sm >= self.sm) if self.ptx else SHARED[self.sm]

    def has(self, feature: str) -> bool:
        """Whether it has one of `FEATURES`."""
        return self.sm >= FEATURES[feature]

    @property
    def exact(self) -> bool:
        """Whether a binary runs on this SM version alone: from sm_90 on they use features of one architecture
        (`sm_90a`). Others run on later versions of the same generation as well (sm_80 on sm_86 and sm_89)."""
        return self.sm >= 90


PTX = Target(80, ptx=True)
PORTABLE = (*(Target(sm) for sm in (80, 86, 89, 90, 120)), PTX)
CURRENT, LATER, NAMED = "current", "later", {"portable": PORTABLE, "ptx": (PTX,)}
Option = str | int | Iterable[str | int]


def parse_targets(option: Option, capability: tuple[int, int] | None = None) -> tuple[Target, ...]:
    """The targets that a user's option names, without repeats, in order of SM version, PTX last.

    Args:
        option: "portable", "current", or such as "sm_86", "sm_120", 89, "ptx", "compute_80"; one or several. "later":
            none, kernels are compiled where the engine runs.
        capability: compute capability of the GPU that "current" stands for.

    Raises:
        SettingsError: a target that does not exist, "current" without a GPU, or no target at all.
    """
    if option == LATER:
        return ()
    entries = [option] if isinstance(option, str | int) else list(option)
    found = {target for entry in entries for target in _targets(entry, capability)}
    if not found:
        raise SettingsError("targets: none is named", hint=_known())
    return tuple(by_age(found))


def _targets(entry: object, capability: tuple[int, int] | None) -> tuple[Target, ...]:
    if entry == CURRENT:
        if capability is None:
            raise SettingsError('targets: "current" needs a CUDA GPU in this process', hint=_known())
        entry = capability[0] * 10 + capability[1]
    if isinstance(entry, str) and entry in NAMED:
        return NAMED[entry]
    match = re.fullmatch(r"(?:(sm|compute)_?)?(\d{2,3})", str(entry), re.ASCII)
    if match is None or isinstance(entry, bool) or int(match[2]) not in SHARED:
        raise SettingsError(f"targets: unknown target {entry!r}", hint=_known())
    return (Target(int(match[2]), match[1] == "compute"),)


def _known() -> str:
    names = ", ".join(str(Target(sm)) for sm in SHARED)
    return f'known are {names}, "ptx" (also compute_80, ...), "portable", "current" and "later"'


def by_age(targets: Iterable[Target]) -> list[Target]:
    """Targets by SM version, PTX last."""
    return sorted(targets, key=lambda target: (target.ptx, target.sm))


def is_explicit(option: Option) -> bool:
    """Whether the user named targets one by one: what one of them lacks is then an error."""
    return option != "portable"


def lacks(target: Target, dtype: str) -> bool:
    """Whether `target` can't compute in `dtype`, as the IR names it."""
    feature = DTYPE_FEATURES.get(dtype)
    return feature is not None and not target.has(feature)


def usable(targets: Iterable[Target], dtypes: Iterable[tuple[str, str]], explicit: bool) -> tuple[Target, ...]:
    """Those of `targets` that have all dtypes.

    Args:
        dtypes: pairs (op, dtype) of the program.
        explicit: see `is_explicit`.

    Raises:
        SettingsError: an explicit target, or every target, lacks a dtype; names the op, the dtype and the target.
    """
    pairs = list(dict.fromkeys(dtypes))
    kept = []
    problem = ""
    for target in targets:
        found = next(((op, dtype) for op, dtype in pairs if lacks(target, dtype)), None)
        if found is None:
            kept.append(target)
            continue
        problem = f"targets: {found[0]} computes in {found[1]}, which {target} lacks"
        if explicit:
            raise SettingsError(problem, hint=f"leave {target} out, or change the model's dtype")
    if not kept:
        raise SettingsError(problem or "targets: none is named", hint=_known())
    return tuple(kept)
