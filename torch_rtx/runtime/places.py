"""Who has one of a few places, of all that comes again: the sizes that have kernels of their own, and CUDA graphs.

Who comes last can't simply take the place of whoever was not there for longest: of keys that come in turn, one more
than there are places, none would ever find its place again, and each call would compile or capture. A place is
therefore taken only from a key that has not come once while another came PATIENCE times. For two that come equally
often, in an order that is left to chance, that has a probability of 1 in 2^PATIENCE; for keys in turn it never happens.
And where a capture takes as long as PATIENCE calls, no order of calls takes more than twice as long as without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

RECURS = 2  # times that a key is met before it gets a free place
PATIENCE = 8  # times that it is met before it gets another's
MET_PER_PLACE = 64  # keys that are counted
K = TypeVar("K")


class Used(Protocol):
    """What has a place. `used` grows with every use of any of them: it is the time of its last use."""

    used: int


class Places(Generic[K]):
    """Decides which keys get the `count` places of `holders`, which its owner fills as this says. Not for several
    threads at once.

    Args:
        holders: what has a place, by its key.
        doubling: it takes twice as many meetings each time that all places have changed hands: whatever the order of
            calls, the work for new holders grows with the logarithm of their number.
    """

    def __init__(self, holders: Mapping[K, Used], count: int, doubling: bool = False) -> None:
        self._holders, self._count, self._doubling = holders, count, doubling
        self._met: dict[K, tuple[int, int]] = {}  # how often, since when; who was met last comes last
        self._taken = 0  # places, each from another

    @property
    def full(self) -> bool:
        """Whether every place is taken."""
        return len(self._holders) >= self._count

    def meet(self, key: K) -> bool:
        """Count a call of `key`, which has no place; whether it should get one."""
        since = min(holder.used for holder in self._holders.values()) if self.full else -1
        times, before = self._met.pop(key, (0, since))
        times = times + 1 if before == since else 1
        self._met[key] = times, since
        if len(self._met) > MET_PER_PLACE * self._count:
            del self._met[next(iter(self._met))]
        patience = PATIENCE << (self._taken // self._count if self._doubling else 0)
        return times >= (patience if self.full else RECURS)

    def take(self, key: K) -> K | None:
        """Give `key` a place: whose it is, who has to leave `holders`; None where there is a free one."""
        self._met.pop(key, None)
        if not self.full:
            return None
        self._taken += 1
        return min(self._holders, key=lambda holder: self._holders[holder].used)
