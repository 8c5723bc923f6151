"""Programmatic dependent launch: kernels that wait by themselves for those before them, in PTX.

A kernel of a CUDA graph otherwise starts when the one before it has ended and its memory is visible. Where both agree,
its blocks are placed as soon as all of those before have said so, or ended, and wait there for the memory: the launch
and the computation of addresses then take no time of their own (PTX ISA, "griddepcontrol"; from sm_90 on).

What a kernel does before it waits touches no memory. When it lets the next one start is a matter of speed alone, since
that waits as well. Early, its blocks fill processors while others are still busy, and are spread unevenly: tiles of
products then took up to 4 % longer on an H200. So this is where its first result is stored, and where a kernel begins
only for products of few rows, whose many short programs read weights.
"""

from __future__ import annotations

import re

WAIT, LAUNCH = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
_BODY = re.compile(r"\.entry\b[^{]*\{\n(?:\s*\.(?:reg|local|shared)\b.*\n)*")
# Lines of one instruction that has to do with registers and parameters alone. Whatever else there is waits.
_BEGIN = re.compile(
    r"(?:[ \t]*(?:(?:ld\.param|mov|cvta?|prmt|selp|setp?|add|sub|mul|mad|div|rem|neg|abs|min|max|shl|shr|shf|and|or|xor"
    r"|not|lop3|bfe|bfi)\b[^;\n]*;[ \t]*)?(?://.*)?\n)*"
)
_STORE = re.compile(r"^.*\bst\.(?:\w+\.)*global\b", re.MULTILINE)


def dependent(ptx: str, early: bool) -> str:
    """PTX of a kernel that waits before it touches memory.

    Args:
        early: it lets the next one start at once, not where it stores its first result.
    """
    body = _BODY.search(ptx)
    assert body is not None
    begin = _BEGIN.match(ptx, body.end())
    assert begin is not None  # it may be empty
    head, rest = ptx[: body.end()], ptx[begin.end() :]
    if early:
        return f"{head}\t{LAUNCH}\n{begin[0]}\t{WAIT}\n{rest}"
    store = _STORE.search(rest)
    if store is not None:
        rest = f"{rest[: store.start()]}\t{LAUNCH}\n{rest[store.start() :]}"
    return f"{head}{begin[0]}\t{WAIT}\n{rest}"
