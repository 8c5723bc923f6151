"""Suite `train`: a training step (forward, backward and AdamW), in bfloat16 autocast on a GPU, the peers in turns."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.cases import Job
from benchmarks.numerics import assert_right, tensors, widened
from benchmarks.peers import PEERS, Prepared
from benchmarks.suites import common
from benchmarks.worker import Reporter


def measure(job: Job, out: Reporter) -> None:
    """`device_ms` (on a GPU) and `wall_ms` of a step, the `ratio` to the best other peer; on a GPU `peak_bytes`."""
    out.begin(None, "model")
    with common.set_up(job) as setup, torch.enable_grad():
        model = learner(setup.subject.model)
        eager, exact = _gradients(model, model, setup), _gradients_in_float64(model, setup)
        steps: dict[str, timing.Call] = {}
        peaks: dict[str, dict[str, int]] = {}
        for name in job.peers:
            with out.attempt(name, "prepare"):
                before = torch.cuda.memory_allocated() if job.device == "cuda" else 0
                own = copy.deepcopy(model)
                prepared = PEERS[name].prepare(replace(setup.subject, model=own))
                _check(_gradients(prepared, own, setup), eager, exact)
                common.settle(name)
                _check(_gradients(prepared, own, setup), eager, exact)
                step = _step(prepared, own, setup)
                timing.warm_up(step, job.device)
                peaks[name] = _peak(step, before, job.device)
                steps[name] = step
        times = timing.interleaved(steps, job.device, job.rounds, lambda name: out.begin(name, "measure"))
        clock = "device_ms" if job.device == "cuda" else "wall_ms"
        ratios = common.compare({name: found[clock] for name, found in times.items()})
        for name in steps:
            metrics = {clock: common.flat(rounds) for clock, rounds in times[name].items()}
            out.ok(name, {**metrics, **peaks[name], "ratio": ratios.get(name)})


def learner(model: nn.Module) -> nn.Module:
    """The model in training mode, but without dropout: its gradients can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@contextmanager
def _autocast(device: str) -> Iterator[None]:
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        yield


def _loss(result: Any) -> Tensor:
    return sum(t.float().square().mean() for t in tensors(result) if t.requires_grad)  # type: ignore[return-value]


def _joined(model: nn.Module) -> Tensor:
    """All gradients as one tensor, and none left in the model."""
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def _gradients(prepared: Prepared, model: nn.Module, setup: common.Setup) -> Tensor:
    """The gradients of one step; running statistics end as they began."""
    state = [buffer.clone() for buffer in model.buffers()]
    args, kwargs = setup.sets[0]
    with _autocast(setup.device):
        loss = _loss(prepared(*args, **kwargs))
    loss.backward()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), state, strict=True):
            buffer.copy_(value)
    return _joined(model)


def _gradients_in_float64(model: nn.Module, setup: common.Setup) -> Tensor:
    wide = copy.deepcopy(model).double()
    args, kwargs = widened(setup.sets[0])
    result = wide(*args, **kwargs)
    sum(t.square().mean() for t in tensors(result) if t.requires_grad).backward()
    return _joined(wide)


def _check(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    try:
        assert_right(got, eager, [exact])
    except AssertionError as error:
        raise common.WrongResult(f"wrong gradients: {error}") from None


def _step(prepared: Prepared, model: nn.Module, setup: common.Setup) -> timing.Call:
    # So small a rate that the numbers stay in their range however many steps are measured.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=setup.device == "cuda")
    sets = itertools.cycle(setup.sets)

    def step() -> None:
        args, kwargs = next(sets)
        with _autocast(setup.device):
            loss = _loss(prepared(*args, **kwargs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peak(step: timing.Call, before: int, device: str) -> dict[str, int]:
    """What a peer holds at most in a step: weights, optimizer, activations and what it keeps of its own."""
    if device != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}
