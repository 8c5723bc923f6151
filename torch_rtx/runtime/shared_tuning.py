"""Ranks measure the regions of a program together: each measures a part, and hears of the others what is fastest.

Each begins with a part of its own. Who is through takes of what nobody has begun, so that a rank that comes late, or
runs another program, leaves its part to the others, and nobody waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from torch_rtx.runtime import ranks

POLL_S = 0.2  # between questions whether another rank is through


class SharedTuning:
    """What this rank measures of some regions, and what others do. Without other ranks it measures all.

    Args:
        names: of the regions, the same on all ranks; equal names are measured once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        rank, size = ranks.place()
        start = rank * len(names) // size
        self._left = deque([*names[start:], *names[:start]])
        self._rank, self._size = str(rank), max(-(-len(names) // size), 1)
        self._others: list[str] = []

    def take(self) -> list[str]:
        """The names of what this rank measures next, each time twice as many; none: all is measured or begun. `give`
        has to follow."""
        taken = list[str]()
        while self._left and len(taken) < self._size:
            name = self._left.popleft()
            ours = ranks.agreed(f"{name} is measured by", self._rank) == self._rank
            (taken if ours else self._others).append(name)
        self._size *= 2
        return taken

    def give(self, names: Sequence[str]) -> None:
        """Tell the other ranks that these are measured, as far as they will be."""
        for name in names:
            ranks.say(_done(name), "yes")

    def heard(self, seconds: float, step: Callable[[], object]) -> list[str]:
        """The names of what the others have measured. Waits for so many seconds at most, or until the store fails, and
        calls `step` meanwhile."""
        end, found = time.monotonic() + seconds, list[str]()
        for name in self._others:
            while ranks.said(_done(name)) is None:
                step()
                if time.monotonic() >= end or ranks.shared_store() is None:
                    return found
                time.sleep(POLL_S)
            found.append(name)
        return found


def _done(name: str) -> str:
    return f"{name} is measured"
