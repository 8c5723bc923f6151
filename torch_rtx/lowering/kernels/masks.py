"""Masks in PTX: makes one instruction of `(x & mask) | bits`, or `^ bits`, by which kernels unpack integers.

`lop3` is any function of three registers, of which one may be a constant. With two constants, ptxas writes two
instructions: those of both operations, or one that puts the mask into a register, again for each use. So the mask comes
from a register whose value ptxas does not know: it is added to a coordinate that is always 0.
"""

from __future__ import annotations

import re
from collections import Counter

LEAST = 8  # uses of a mask that are worth a register
_BODY = re.compile(r"\.entry\b[^{]*\{\n(?:\s*\.(?:reg|local|shared)\b.*\n)*")
_AND = re.compile(r"^[ \t]*and\.b32[ \t]+(%\w+), (%\w+), (\d+);\n", re.MULTILINE)
_OR = re.compile(r"\b(or|xor)\.b32([ \t]+%\w+), (%\w+), (\d+);")
_REGISTER = re.compile(r"%\w+")
_ZERO = "%ctaid.z"
_TABLES = {"or": 0xEA, "xor": 0x6A}  # of (a & b) | c and (a & b) ^ c


def fold_masks(ptx: str) -> str:
    """The PTX of a kernel, in which `and` and `or`, or `xor`, with constants are `lop3` where a mask has many uses."""
    body = _BODY.search(ptx)
    uses = Counter(_REGISTER.findall(ptx))
    masked = {found[1]: found for found in _AND.finditer(ptx) if uses[found[1]] == 2}
    pairs = [(masked[found[3]], found) for found in _OR.finditer(ptx) if found[3] in masked]
    pairs = [(first, last) for first, last in pairs if _is_one_value(ptx[first.end() : last.start()], first[2])]
    counts = Counter(first[3] for first, _ in pairs)
    registers = {mask: f"%mask{index}" for index, mask in enumerate(counts) if counts[mask] >= LEAST}
    if body is None or _ZERO in ptx or not registers:
        return ptx
    edits = {body.span()[1]: (body.span()[1], _begin(registers))}
    for first, last in pairs:
        if first[3] in registers:
            edits[first.start()] = first.end(), ""
            new = f"lop3.b32{last[2]}, {first[2]}, {registers[first[3]]}, {last[4]}, {_TABLES[last[1]]};"
            edits[last.start()] = last.end(), new
    parts, at = [], 0
    for start, (end, new) in sorted(edits.items()):
        parts += [ptx[at:start], new]
        at = end
    return "".join([*parts, ptx[at:]])


def _is_one_value(between: str, register: str) -> bool:
    """Whether a register has one value before and after these lines: none writes it, or is jumped to."""
    writes = re.compile(rf"^\s*(?:@!?%\w+)?[^%\n]*(?:\{{[^}}\n]*)?{register}\b", re.MULTILINE)
    return ":" not in between and writes.search(between) is None


def _begin(registers: dict[str, str]) -> str:
    lines = [f"\t.reg .b32 {name};\n" for name in registers.values()]
    lines += [f"\tmov.u32 {name}, {_ZERO};\n\tadd.u32 {name}, {name}, {mask};\n" for mask, name in registers.items()]
    return "".join(lines)
