"""Matrix products for Turing (sm_75), which Triton compiles to scalar code only.

The kernel is lowered as for sm_80 up to its layouts. sm_80's product of fp16 fragments that are 16 deep is then written
as two of sm_75's, which are 8 deep; the fragments' registers agree ("Matrix fragments for mma.m16n8k16" and
"mma.m16n8k8" in the PTX ISA). No other product of sm_80 has such a form, and sm_75 has no asynchronous copies, so that
there is no pipelining.
"""

from __future__ import annotations

import re

_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.(f32|f16)\.f16\.f16\.(f32|f16)\s*"
    r"\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*,\s*\{([^}]*)\}\s*;"
)
_LEFT = re.compile(r"(?:wg)?mma\.\S+")
_HALF = "mma.sync.aligned.m16n8k8.row.col.{d}.f16.f16.{c}"


class NoTensorCores(Exception):
    """The kernel has a product that sm_75's tensor cores do not do."""


def rewrite(ptx: str) -> str:
    """`ptx`, of a kernel that was lowered as for sm_80, with products of sm_75.

    Raises:
        NoTensorCores: a product of other operands than fp16; names its instruction.
    """
    text = _MMA.sub(_two_halves, ptx)
    for found in _LEFT.findall(text):
        if not found.startswith("mma.sync.aligned.m16n8k8.row.col.") or ".f16.f16." not in found:
            raise NoTensorCores(found)
    return text


def _two_halves(match: re.Match[str]) -> str:
    d_type, c_type, d, a, b, c = match.groups()
    a_regs, b_regs = ([reg.strip() for reg in regs.split(",")] for regs in (a, b))
    count = len(d.split(","))
    # The first half's sum goes to registers of its own: those of the result may be operands of the second half.
    between = ", ".join(f"%half{index}" for index in range(count))
    first, second = _HALF.format(d=d_type, c=c_type), _HALF.format(d=d_type, c=d_type)
    return (
        f"{{ .reg .b32 %half<{count}>;\n"
        f"\t{first} {{{between}}}, {{{a_regs[0]}, {a_regs[1]}}}, {{{b_regs[0]}}}, {{{c}}};\n"
        f"\t{second} {{{d}}}, {{{a_regs[2]}, {a_regs[3]}}}, {{{b_regs[1]}}}, {{{between}}}; }}"
    )
