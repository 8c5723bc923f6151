"""What the ranks of a process group make sure of before their first collective, and what they say when one fails.

Ranks whose collectives differ would wait for each other, or add up what does not belong together. So before the first
graph of a group runs, each rank tells the others which collectives the graph has, through the store of
torch.distributed, and all compare. Later graphs are not compared: ranks may well compile another one at other calls.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from torch_rtx.collectives import groups_of
from torch_rtx.errors import RanksError, RtxError
from torch_rtx.ir import Graph, Node
from torch_rtx.runtime.groups import resolved
from torch_rtx.runtime.one_shot_choice import choose
from torch_rtx.runtime.pulse import Pulse, watch
from torch_rtx.runtime.ranks import FIRST_S, agreed, exchanged
from torch_rtx.runtime.watch import captures

log = logging.getLogger(__name__)


@dataclass
class Met:
    """A process group whose ranks have compared.

    Attributes:
        life: how many other groups had its name before.
        problem: how the ranks differ.
    """

    group: Any
    life: int
    problem: str | None = None


_MET: dict[str, Met] = {}  # by name
_LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by name
SUM = "all_reduce sum"


class Together:
    """The collectives of a graph, by their process groups: a context for each of its calls.

    Raises:
        RanksError: the other ranks have other collectives, or one of them has ended.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._device = device
        self._calls = {name: [_text(node) for node in nodes] for name, nodes in groups_of(graph).items()}
        self._pulses: dict[str, Pulse | None] | None = None  # by group; None: it has not met the others

    def __enter__(self) -> None:
        if self._pulses is None:
            self._pulses = {name: _meet(name, calls, self._device) for name, calls in self._calls.items()}
        for name, pulse in self._pulses.items():
            if pulse is not None and pulse.gone is not None:
                raise RanksError(f"{pulse.gone} of the group {name!r} is gone")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, RtxError) and _is_of_backend(error):
            names = " and ".join(map(repr, self._calls))
            hint = "look for the first error of the other ranks: one has ended, or did not come to the same call"
            raise RanksError(f"a collective of the group {names} failed: {error}", hint=hint) from error


def _text(node: Node) -> str:
    """A call as all ranks have it: some may sum in the memory of the operand, and others not."""
    name = node.op.removeprefix("_c10d_functional.").partition(".")[0].rstrip("_")
    return " ".join([name, *(str(node.arg(key)) for key in ("reduce_op", "src") if node.arg(key) is not None)])


def _meet(name: str, calls: list[str], device: torch.device, seconds: float = FIRST_S) -> Pulse | None:
    """Compare with the other ranks of the group, and choose how they add up, if none of its graphs has run here.
    Returns what sees them go."""
    group = resolved(name)
    pulse = watch(group, device)  # before the meeting: a rank that was there is missed from then on
    with _LOCKS[name]:
        met = _MET.get(name)
        if met is None or met.group is not group:
            met = _MET[name] = Met(group, 0 if met is None else met.life + 1)
            key = f"collectives of {name} {met.life}"
            said = exchanged(key, "\n".join(calls), group.rank(), group.size(), seconds)
            met.problem = _difference(calls, said, group.rank(), name)
            complete = agreed(f"{key} all", str(None not in said)) == "True"
            if met.problem is None and complete and SUM in calls and not captures(device):
                with torch.inference_mode(False), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                    choose(name, group, device, key)
    if met.problem is not None:
        raise RanksError(met.problem, hint="each rank has to make the same calls in the same order")
    return pulse


def _difference(calls: list[str], said: list[str | None], here: int, name: str) -> str | None:
    """How the collectives of another rank differ from those of this one, `here`; None: they do not."""
    for rank, other in enumerate(said):
        if other is None:
            log.warning("rank %d of the group %s did not say which collectives it calls", rank, name)
        elif other != "\n".join(calls):
            pairs = zip_longest(calls, other.split("\n"), fillvalue="none")
            at, (mine, theirs) = next((at, pair) for at, pair in enumerate(pairs, 1) if pair[0] != pair[1])
            problem = f"the ranks of the group {name!r} run different programs: "
            return f"{problem}collective {at} of rank {here} is {mine}, and that of rank {rank} is {theirs}"
    return None


def _is_of_backend(error: RuntimeError) -> bool:
    """Whether NCCL or gloo raised the error; gloo has no class of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
