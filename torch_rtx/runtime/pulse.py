"""Ends a process whose GPU waits for a rank that is gone.

The collectives of a CUDA graph wait for the other ranks without a timeout: the watchdog of NCCL knows only calls that
are not captured, and kernels over symmetric memory have none. So each rank counts up a number of its own in the store
of torch.distributed, and watches those of the ranks after it. When one has not moved for the `timeout` of the group,
calls raise a RanksError from then on; a process whose GPU does not come to an end is ended, as NCCL's watchdog does.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from torch_rtx.runtime.ranks import shared_store

log = logging.getLogger(__name__)
WATCHED = 8  # ranks after this one, in a ring: who ends itself is missed by others in turn
BEATS = 10  # in a timeout
LONGEST_S = 30.0  # between two beats
STUCK_S = 20.0  # for which the GPU works on what it has
DEFAULT_S = 600.0  # the timeout of a group whose backend does not tell it


class Pulse(threading.Thread):
    """The thread of a rank.

    Args:
        ranks: to watch. One that has never counted is not missed.
        timeout_s: after which a rank is gone.
        is_stuck: whether the GPU waits for good.
        end: ends the process.

    Attributes:
        gone: what is gone; None: nothing.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: list[int],
        timeout_s: float,
        is_stuck: Callable[[], bool],
        end: Callable[[], None],
    ) -> None:
        super().__init__(name="torch_rtx ranks", daemon=True)
        self._store, self._rank, self._timeout_s = store, rank, timeout_s
        self._seen = dict.fromkeys(ranks, (0, 0.0))  # by rank: its number, and when that moved
        self._is_stuck, self._end = is_stuck, end
        self.gone: str | None = None
        self.stopped = threading.Event()

    def start(self) -> None:
        """Count once before anything else: whoever meets this rank after it sees the rank go."""
        with contextlib.suppress(RuntimeError):  # the thread finds out what the store has
            self._store.add(f"pulse {self._rank}", 1)
        super().start()

    def run(self) -> None:
        """Beat and watch, until something is gone."""
        while not self.stopped.wait(min(self._timeout_s / BEATS, LONGEST_S)):
            self.gone = self._missing(time.monotonic())
            if self.gone is None:
                continue
            if self._is_stuck():
                log.critical("a collective waits for %s, which is gone: this process ends", self.gone)
                self._end()
            log.info("%s is gone, and nothing waits for it", self.gone)
            return

    def _missing(self, now: float) -> str | None:
        """Count, and see who does not."""
        try:
            self._store.add(f"pulse {self._rank}", 1)
            for rank, (number, moved) in self._seen.items():
                found = self._store.add(f"pulse {rank}", 0)
                if found != number:
                    self._seen[rank] = found, now
                elif number and now - moved > self._timeout_s:
                    return f"rank {rank}"
        except RuntimeError as error:
            log.info("the store of the ranks has ended: %s", error)
            return "the rank with the store"
        return None


_PULSES: dict[Any, Pulse] = {}  # by process group
_LOCK = threading.Lock()


def watch(group: Any, device: torch.device) -> Pulse | None:
    """The pulse of this rank in a process group on GPUs; None where collectives have timeouts: on the CPU."""
    store = shared_store()
    if store is None or device.type != "cuda":
        return None
    with _LOCK:
        if group not in _PULSES:
            ranks, rank = torch.distributed.get_process_group_ranks(group), torch.distributed.get_rank()
            after = ranks.index(rank) + 1
            watched = [one for one in (*ranks[after:], *ranks[:after]) if one != rank][:WATCHED]
            given = rank, watched, _timeout_of(group, device), lambda: is_stuck(device), lambda: os._exit(1)
            _PULSES[group] = Pulse(torch.distributed.PrefixStore(group.group_name, store), *given)
            _PULSES[group].start()
        return _PULSES[group]


@atexit.register
def _stop() -> None:
    """Let no thread be within a call of the store when Python ends."""
    for pulse in _PULSES.values():
        pulse.stopped.set()
        pulse.join(1.0)


def _timeout_of(group: Any, device: torch.device) -> float:
    try:
        return float(group._get_backend(device).options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return DEFAULT_S


def is_stuck(device: torch.device, seconds: float = STUCK_S) -> bool:
    """Whether the GPU is not done, after so many seconds, with what was queued before."""
    done = threading.Event()

    def wait() -> None:
        torch.cuda.synchronize(device)
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    return not done.wait(seconds)
