"""Programmatic dependent launch (PDL), device side: inserts `griddepcontrol` into the PTX of a kernel, from sm_90 on.

A kernel node of a CUDA graph normally starts when its predecessor has ended and its writes are visible. With PDL, its
blocks are scheduled as soon as every block of the predecessor has triggered (`launch_dependents`) or ended, and `wait`
blocks until the predecessor's writes are visible: launch latency and address computation overlap with its tail (PTX
ISA, "griddepcontrol").

`wait` stands before the first instruction that may access memory. Where the trigger stands affects speed only, since
the next kernel waits as well. After an early trigger, blocks of the next kernel take slots while blocks of this one
still run, and end up unevenly spread over the SMs, which slows GEMM tiles down. So the trigger stands before the first
store to global memory, except in GEMVs: their many short programs stream weights, and trigger at their start.
"""

from __future__ import annotations

import re

WAIT, TRIGGER = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
_BODY = re.compile(r"\.entry\b[^{]*\{\n(?:\s*\.(?:reg|local|shared)\b.*\n)*")
# Lines with one instruction that accesses registers and parameters only. `wait` stands before any other line.
_BEGIN = re.compile(
    r"(?:[ \t]*(?:(?:ld\.param|mov|cvta?|prmt|selp|setp?|add|sub|mul|mad|div|rem|neg|abs|min|max|shl|shr|shf|and|or|xor"
    r"|not|lop3|bfe|bfi)\b[^;\n]*;[ \t]*)?(?://.*)?\n)*"
)
_STORE = re.compile(r"^.*\bst\.(?:\w+\.)*global\b", re.MULTILINE)


def insert_pdl(ptx: str, trigger_early: bool) -> str:
    """The PTX of a kernel with `wait` and `launch_dependents`.

    Args:
        trigger_early: trigger at the start of the kernel, not before its first store.
    """
    body = _BODY.search(ptx)
    assert body is not None
    begin = _BEGIN.match(ptx, body.end())
    assert begin is not None  # the expression matches the empty string
    head, rest = ptx[: body.end()], ptx[begin.end() :]
    if trigger_early:
        return f"{head}\t{TRIGGER}\n{begin[0]}\t{WAIT}\n{rest}"
    store = _STORE.search(rest)
    if store is not None:
        rest = f"{rest[: store.start()]}\t{TRIGGER}\n{rest[store.start() :]}"
    return f"{head}{begin[0]}\t{WAIT}\n{rest}"
