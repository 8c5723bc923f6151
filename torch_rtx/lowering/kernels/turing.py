"""Tensor cores on Turing (sm_75), for which Triton itself emits scalar FMAs only.

TTGIR, and so the layouts, are those of sm_80. Each fp16 `mma.m16n8k16` of sm_80 in the PTX is then replaced by two
`mma.m16n8k8` of sm_75, and each int8 `mma.m16n8k32` by four `mma.m8n8k16`: the register fragments agree ("Matrix
fragments for mma.m16n8k16", "mma.m16n8k8" and so on in the PTX ISA). No other mma of sm_80 can be replaced so. There is
no software pipelining, since sm_75 lacks `cp.async`.
"""

from __future__ import annotations

import re

_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.(f32|f16)\.f16\.f16\.(f32|f16)\s*"
    r"\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*;"
)
_INT_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32\s*"
    r"\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*;"
)
_LEFT = re.compile(r"(?:wg)?mma\.\S+")
_TURING = re.compile(r"mma\.sync\.aligned\.(m16n8k8\.row\.col\.\S*\.f16\.f16\.|m8n8k16\.row\.col\.\S*s32\.s8\.s8\.)")
_HALF = "mma.sync.aligned.m16n8k8.row.col.{d}.f16.f16.{c}"
_INT = "mma.sync.aligned.m8n8k16.row.col{saturated}.s32.s8.s8.s32"


class NoTensorCores(Exception):
    """The kernel has an mma instruction that sm_75 has no counterpart of."""


def rewrite(ptx: str) -> str:
    """Replace the mma instructions of sm_80 in `ptx` by those of sm_75.

    Raises:
        NoTensorCores: an mma has other operands than fp16 or int8; the message is the instruction.
    """
    text = _INT_MMA.sub(_four_quarters, _MMA.sub(_two_halves, ptx))
    for found in _LEFT.findall(text):
        if not _TURING.match(found):
            raise NoTensorCores(found)
    return text


def _two_halves(match: re.Match[str]) -> str:
    d_type, c_type, d, a, b, c = match.groups()
    a_regs, b_regs = _registers(a), _registers(b)
    count = len(d.split(","))
    # The first mma accumulates into scratch registers: the destination may alias operands of the second one.
    between = ", ".join(f"%half{index}" for index in range(count))
    first, second = _HALF.format(d=d_type, c=c_type), _HALF.format(d=d_type, c=d_type)
    return (
        f"{{ .reg .b32 %half<{count}>;\n"
        f"\t{first} {{{between}}}, {{{a_regs[0]}, {a_regs[1]}}}, {{{b_regs[0]}}}, {{{c}}};\n"
        f"\t{second} {{{d}}}, {{{a_regs[2]}, {a_regs[3]}}}, {{{b_regs[1]}}}, {{{between}}}; }}"
    )


def _four_quarters(match: re.Match[str]) -> str:
    saturated, *regs = match.groups(default="")
    d, a, b, c = map(_registers, regs)
    mma = _INT.format(saturated=saturated)
    lines = ["{ .reg .b32 %quarter<4>;"]
    for row in (0, 1):  # the upper and the lower 8 rows, each in two halves of K
        low, high = 2 * row, 2 * row + 1
        between = f"{{%quarter{low}, %quarter{high}}}"
        lines.append(f"\t{mma} {between}, {{{a[row]}}}, {{{b[0]}}}, {{{c[low]}, {c[high]}}};")
    for row in (0, 1):  # after both: the destination may alias operands
        low, high = 2 * row, 2 * row + 1
        between = f"{{%quarter{low}, %quarter{high}}}"
        lines.append(f"\t{mma} {between}, {{{a[2 + row]}}}, {{{b[1]}}}, {between};")
    lines += [f"\tmov.b32 {to}, %quarter{index};" for index, to in enumerate(d)]
    return "\n".join([*lines, "}"])


def _registers(regs: str) -> list[str]:
    return [reg.strip() for reg in regs.split(",")]
