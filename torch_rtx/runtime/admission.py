"""Cache admission: which keys get one of a few slots, for kernels of their own sizes and for CUDA graphs.

Plain LRU thrashes when n+1 keys cycle through n slots: every call would compile or capture. A key is therefore admitted
to a full cache only after PATIENCE misses since the last use of the key that it evicts. Keys in a cycle never reach
that; two keys that come equally often in random order do with probability 2^-PATIENCE. If a capture costs as much as
PATIENCE calls, no order of calls takes more than twice the time that it takes without captures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

MISSES_FOR_FREE_SLOT = 2
PATIENCE = 8  # misses for the slot of another key
TRACKED_PER_SLOT = 64  # keys whose misses are counted
K = TypeVar("K")


class Used(Protocol):
    """The value of a slot. `used` is the time of its last use: a count that grows with every use of any slot."""

    used: int


class AdmissionPolicy(Generic[K]):
    """Decides which keys are in `slots`, which the owner fills and empties accordingly. Not thread-safe.

    Args:
        slots: the admitted keys and their values.
        capacity: how many keys `slots` may have.
        doubling: double PATIENCE after every `capacity` evictions, so that the number of admissions grows with the
            logarithm of the number of calls, in whatever order these come.
    """

    def __init__(self, slots: Mapping[K, Used], capacity: int, doubling: bool = False) -> None:
        self._slots, self._capacity, self._doubling = slots, capacity, doubling
        self._misses: dict[K, tuple[int, int]] = {}  # count, and last use of the victim then; the latest miss is last
        self._evictions = 0

    @property
    def full(self) -> bool:
        """No slot is free."""
        return len(self._slots) >= self._capacity

    def record_miss(self, key: K) -> bool:
        """Count a call of `key`, which is not admitted; True if it should be now."""
        since = min(value.used for value in self._slots.values()) if self.full else -1
        count, before = self._misses.pop(key, (0, since))
        count = count + 1 if before == since else 1
        self._misses[key] = count, since
        if len(self._misses) > TRACKED_PER_SLOT * self._capacity:
            del self._misses[next(iter(self._misses))]
        patience = PATIENCE << (self._evictions // self._capacity if self._doubling else 0)
        return count >= (patience if self.full else MISSES_FOR_FREE_SLOT)

    def evict_for(self, key: K) -> K | None:
        """Admit `key`. Returns the least recently used key, which the owner has to evict, or None if a slot is free."""
        self._misses.pop(key, None)
        if not self.full:
            return None
        self._evictions += 1
        return min(self._slots, key=lambda other: self._slots[other].used)
