"""Waits in PTX for Hopper's wgmma: nothing writes a register that a product in flight still reads.

`wgmma.mma_async` may take its first factor from registers, and reads these until `wgmma.wait_group` has waited for its
group (PTX ISA, "Asynchronous warpgroup level matrix instructions"). Triton divides such a product in a loop into two
groups and waits for the second one in the next iteration, which by then has unpacked its own factor into the same
registers: some elements are products of the wrong numbers, now and then. So a wait stands before the first such write.

ptxas takes a register as free once such a product has started, and makes one register of those that are copies. So what
a product reads is a register with all its copies, whatever their order.
"""

from __future__ import annotations

import re

Groups = tuple[frozenset[str], ...]  # of products in flight, the oldest first: the registers that they read
_FROM_REGISTERS = re.compile(r"\bwgmma\.mma_async\.\S+\s*\{[^}]*\}\s*,\s*\{([^}]*)\}")
_WAIT = re.compile(r"\bwgmma\.wait_group\.sync\.aligned\s+(\d+)\s*;")
_COPY = re.compile(r"^\s*mov\.b32\s+(%\w+), (%\w+);", re.MULTILINE)
_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)\s*;")
_RESULTS = re.compile(r"^\s*(?:@!?%\w+\s+)?(?!st\b|red\b)[a-z][\w.:]*\s+(?:\{([^}]*)\}|(%\w+(?:\|%\w+)?))\s*,")


def wait_for_registers(ptx: str) -> str:
    """The PTX of a kernel, with a wait before each write to registers that a product in flight may read."""
    if not _FROM_REGISTERS.search(ptx):
        return ptx
    scan = _Scan(ptx)
    inserted = {at: f"\twgmma.wait_group.sync.aligned {pending};\n" for at, pending in scan.waits.items()}
    return "".join(inserted.get(at, "") + line for at, line in enumerate(scan.lines))


class _Scan:
    """Follows a kernel from line to line, and each loop twice.

    Attributes:
        lines: of the kernel.
        waits: by the line that a wait has to stand before: how many groups may stay in flight.
    """

    def __init__(self, ptx: str) -> None:
        self.lines = ptx.splitlines(keepends=True)
        self._copies = _copies(ptx)
        self._labels = {found[1]: at for at, line in enumerate(self.lines) if (found := _LABEL.match(line))}
        self._jumped: dict[int, Groups] = {}  # by the line of a label: in flight at the branches to it
        self._open: frozenset[str] = frozenset()  # of products that no group has yet
        self.waits: dict[int, int] = {}
        self._follow(0, len(self.lines), ())

    def _follow(self, start: int, end: int, groups: Groups) -> Groups:
        """What is in flight after these lines, if `groups` are before them."""
        for at in range(start, end):
            line = self.lines[at]
            if at in self._jumped:
                groups = _either(groups, self._jumped[at])
            if found := _FROM_REGISTERS.search(line):
                self._open |= self._registers(found[1])
            elif "wgmma.commit_group" in line:
                groups, self._open = (*groups, self._open), frozenset()
            elif found := _WAIT.search(line):
                groups = _newest(groups, int(found[1]))
            elif found := _BRANCH.search(line):
                target = self._labels[found[1]]
                if target > at:
                    self._jumped[target] = _either(groups, self._jumped.get(target, ()))
                elif start <= target and (start, end) != (target, at):
                    groups = _either(groups, self._follow(target, at, groups))
            else:
                groups = self._written(at, groups)
        return groups

    def _written(self, at: int, groups: Groups) -> Groups:
        """What is in flight after an instruction that writes registers."""
        found = _RESULTS.match(self.lines[at])
        if found is None or not groups:
            return groups
        written = self._registers(found[1] or found[2])
        late = [index for index, read in enumerate(groups) if read & written]
        if not late:
            return groups
        pending = len(groups) - 1 - late[-1]
        self.waits[at] = min(pending, self.waits.get(at, pending))
        return _newest(groups, pending)

    def _registers(self, text: str) -> frozenset[str]:
        """The registers that are named, each by the first of its copies."""
        return frozenset(self._copies.get(name, name) for name in re.findall(r"%\w+", text))


def _copies(ptx: str) -> dict[str, str]:
    """By register that is copied, or is a copy: one that stands for all of these."""
    found: dict[str, set[str]] = {}
    for one, other in _COPY.findall(ptx):
        joined = found.get(one, {one}) | found.get(other, {other})
        found |= dict.fromkeys(joined, joined)
    return {name: min(joined) for name, joined in found.items()}


def _newest(groups: Groups, count: int) -> Groups:
    return groups[max(0, len(groups) - count) :]


def _either(one: Groups, other: Groups) -> Groups:
    """In flight where two paths meet: the newest groups of both are one, and so on."""
    size = max(len(one), len(other))
    one, other = ((frozenset(),) * (size - len(groups)) + groups for groups in (one, other))
    return tuple(first | second for first, second in zip(one, other, strict=True))
