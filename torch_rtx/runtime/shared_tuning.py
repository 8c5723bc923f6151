"""Ranks measure the regions of a program together: each measures a part, and hears of the others what is fastest.

Each begins with a part of its own. Who is through takes of what nobody has begun, so that a rank that comes late, or
runs another program, leaves its part to the others, and nobody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil

from torch_rtx.runtime import ranks

POLL_S = 0.05  # between questions whether another rank is through


class SharedTuning:
    """What this rank measures of some regions, and what others do. Without other ranks it measures all.

    Args:
        names: of the regions, the same on all ranks; equal names are measured once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._left = list(names)
        self._others: list[str] = []
        self._rank, self._ranks = ranks.place()
        count = len(names)
        self._own = names[self._rank * count // self._ranks : (self._rank + 1) * count // self._ranks]

    def take(self) -> list[str]:
        """The names of what this rank measures next; none: all is measured or begun. `give` has to follow."""
        while self._left:
            begun = {name: owner for name in self._left if (owner := ranks.said(_owner(name))) is not None}
            free = [name for name in self._left if name not in begun]
            own = [name for name in free if name in self._own]
            self._own = ()
            wanted = own or free[: ceil(len(free) / len({*begun.values(), str(self._rank)}))]
            owners = begun | {name: ranks.agreed(_owner(name), str(self._rank)) for name in wanted}
            self._left = [name for name in self._left if name not in owners]
            taken = [name for name in wanted if owners[name] == str(self._rank)]
            self._others += [name for name in owners if name not in taken]
            if taken:
                return taken
        return []

    def give(self, names: Sequence[str]) -> None:
        """Tell the other ranks that these are measured, as far as they will be."""
        for name in names:
            ranks.say(_done(name), "yes")

    def heard(self, seconds: float, step: Callable[[], object]) -> list[str]:
        """The names of what the others have measured; waits for so many seconds at most, and calls `step` meanwhile."""
        end, found = time.monotonic() + seconds, list[str]()
        for name in self._others:
            while ranks.said(_done(name)) is None:
                step()
                if time.monotonic() >= end:
                    return found
                time.sleep(POLL_S)
            found.append(name)
        return found


def _owner(name: str) -> str:
    return f"{name} is measured by"


def _done(name: str) -> str:
    return f"{name} is measured"
