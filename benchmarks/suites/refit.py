"""Suite `refit`: other weights for the same program, for each peer in a process of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import models, timing
from benchmarks.cases import Job
from benchmarks.peers import PEERS, Prepared
from benchmarks.suites import common
from benchmarks.worker import Reporter


def measure(job: Job, out: Reporter) -> None:
    """`refit_ms` until all weights are replaced, `next_ms` of the call after it, which may do what was put off, and
    `call_ms` of those that follow. The weights come from the same device."""
    (name,) = job.peers
    out.begin(None, "model")
    with common.set_up(job) as setup, out.attempt(name, "measure"):
        prepared = PEERS[name].prepare(setup.subject)
        call = setup.rotating(prepared)
        timing.warm_up(call, job.device)
        w, model = job.workload, setup.subject.model
        other, _, _ = models.build(
            w.model, w.size, batch=w.batch, length=w.length, dtype=setup.dtype, device=job.device, seed=1
        )
        replace = _way(name, prepared, model)
        states = itertools.cycle([other.state_dict(), {n: t.clone() for n, t in model.state_dict().items()}])
        times: dict[str, list[float]] = {"refit_ms": [], "next_ms": [], "call_ms": []}
        for _ in range(2 * job.rounds):  # even: the first state comes next
            state = next(states)
            times["refit_ms"] += timing.wall_ms(lambda state=state: replace(state), 1, job.device)
            times["next_ms"] += timing.wall_ms(call, 1, job.device)
            times["call_ms"] += timing.wall_ms(call, 2, job.device)
        changed = next(states)
        replace(changed)
        model.load_state_dict(changed)  # what is right from now on
        setup.check(prepared)
        metrics: dict[str, Any] = {clock: timing.summary(values) for clock, values in times.items()}
        metrics["weight_bytes"] = sum(p.nbytes for p in model.parameters())
        out.ok(name, metrics)


def _way(name: str, prepared: Prepared, model: nn.Module) -> Callable[[dict[str, torch.Tensor]], Any]:
    """How this peer's user replaces weights."""
    if name.startswith("rtx-"):
        return prepared.refit
    if name == "aoti":
        names = set(prepared.get_constant_fqns())

        def load(state: dict[str, torch.Tensor]) -> None:
            prepared.load_constants({n: t for n, t in state.items() if n in names}, check_full_update=False)

        return load
    return model.load_state_dict
