"""Computed weights that several graphs of one process have in common, in memory that they share.

`torch.compile` makes a graph for the first sizes of a model's inputs and another one for all others, or one for the
prompt and one for each further token, and each of them computes the same weights from the same parameters. Their stores
do not know each other, unlike those of a `Loan`: a store that computes a weight looks for one that another store has
computed by the same recipe from the same memory, compares the bits, and then uses its memory. As long as all of them
are attached to the same parameters, any of them may overwrite the weight, since all of them would write the same.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor

from torch_rtx.runtime.watch import same_bits


class Lease:
    """The memory of a weight, and all that use it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.holders: WeakSet[Leases] = WeakSet()


_LOCK = threading.Lock()
_KNOWN: WeakValueDictionary[Hashable, Lease] = WeakValueDictionary()  # a lease lives as long as a store holds it


class Leases:
    """The weights of one store whose memory others may use, by index."""

    def __init__(self) -> None:
        self._held: dict[int, Lease] = {}

    def __contains__(self, index: object) -> bool:
        return index in self._held

    def find(self, index: int, key: Hashable, fresh: Tensor) -> Tensor | None:
        """Memory with the values of `fresh` that another store has, which is held from now on.

        Args:
            key: equal for weights that are made in the same way of the same memory.
        """
        with _LOCK:
            lease = _KNOWN.get(key)
            if lease is not None:
                self._hold(index, lease)  # before the comparison, so that nobody gives the memory other values
        if lease is None:
            return None
        known = lease.tensor
        alike = (known.shape, known.stride(), known.dtype) == (fresh.shape, fresh.stride(), fresh.dtype)
        if alike and same_bits(known, fresh):
            return known
        self.end(index)
        return None

    def offer(self, index: int, key: Hashable, tensor: Tensor) -> None:
        """Let other stores use a weight of this one."""
        with _LOCK:
            self._hold(index, _KNOWN.setdefault(key, Lease(tensor)))
            if self._held[index].tensor is not tensor:  # another store was faster
                self._end(index)

    def alone(self, index: int) -> bool:
        """No other store uses the weight's memory."""
        if index not in self._held:
            return True
        with _LOCK:
            return len(self._held[index].holders) == 1

    def end(self, index: int) -> None:
        """The store uses other memory for the weight, or makes it in another way."""
        if index in self._held:
            with _LOCK:
                self._end(index)

    def _hold(self, index: int, lease: Lease) -> None:
        self._held[index] = lease
        lease.holders.add(self)

    def _end(self, index: int) -> None:
        lease = self._held.pop(index, None)
        if lease is not None:
            lease.holders.discard(self)
