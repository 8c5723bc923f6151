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
_BODY = re.compile(r"^\{\n(?:\s*\.(?:reg|local|shared)\b.*\n)*", re.MULTILINE)
# Accesses of memory that others see, and all where the flow of control may divide.
_FIRST = re.compile(
    r"^.*(?:\.global\b|\bcp\.|\btensormap\b|\bmbarrier\b|\bld\.(?!param)|\bst\.|\batom\.|\bred\.|@|\bbra\b|\bcall\b|\bret;)"
    r"|^\s*[\w$]+:",
    re.MULTILINE,
)
_STORE = re.compile(r"^.*\bst\.(?:\w+\.)*global\b", re.MULTILINE)


def dependent(ptx: str, early: bool) -> str:
    """PTX of a kernel that waits before it touches memory.

    Args:
        early: it lets the next one start at once, not where it stores its first result.
    """
    body = _BODY.search(ptx)
    assert body is not None
    first = _FIRST.search(ptx, body.end())
    assert first is not None  # at least the end of the kernel
    head, begin, rest = ptx[: body.end()], ptx[body.end() : first.start()], ptx[first.start() :]
    if early:
        return f"{head}\t{LAUNCH}\n{begin}\t{WAIT}\n{rest}"
    store = _STORE.search(rest)
    if store is not None:
        rest = f"{rest[: store.start()]}\t{LAUNCH}\n{rest[store.start() :]}"
    return f"{head}{begin}\t{WAIT}\n{rest}"
