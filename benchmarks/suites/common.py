"""What the suites share: a model with several sets of inputs, the check of results, the comparison of peers."""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from benchmarks import models, timing
from benchmarks.cases import Job
from benchmarks.numerics import assert_right, in_float64, tensors
from benchmarks.peers import PEERS, Prepared, Subject
from torch_rtx.runtime.call_times import SETS

if TYPE_CHECKING:
    from benchmarks.worker import Reporter

log = logging.getLogger(__name__)
SETTLE_S = 120.0  # seconds that a peer has to reach its full speed
CHECKED = 2  # sets whose results are compared
# A compiled module runs other code in its first calls than later: each set is checked in several of them.
CHECKS = 3


class WrongResult(Exception):
    """A peer computes something else than eager."""


class Setup:
    """A workload on a device: the model, sets of inputs, and what is right for them.

    Attributes:
        subject: for the peers, with files in a folder of its own.
        sets: inputs as (args, kwargs).
    """

    def __init__(self, job: Job, folder: Path, shapes: Sequence[tuple[int, int | None]] = ()) -> None:
        self.workload, self.device = job.workload, job.device
        w = job.workload
        self.dtype = getattr(torch, w.dtype)
        model, *_ = models.build(w.model, w.size, batch=w.batch, length=w.length, dtype=self.dtype, device=job.device)
        if w.channels_last:
            model = model.to(memory_format=torch.channels_last)
        shapes = shapes or [(w.batch, w.length)] * SETS
        self.sets = [self.inputs(*shape, seed) for seed, shape in enumerate(shapes)]
        self.subject = Subject(model, *self.sets[0], folder, job.device)
        self._expected: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def inputs(self, batch: int, length: int | None, seed: int) -> models.Inputs:
        """One set of inputs, laid out like the model."""
        w = self.workload
        made = models.inputs(
            w.model, w.size, batch=batch, length=length, dtype=self.dtype, device=self.device, seed=seed
        )

        def lay_out(tensor: torch.Tensor) -> torch.Tensor:
            last = w.channels_last and tensor.dim() == 4
            return tensor.contiguous(memory_format=torch.channels_last) if last else tensor

        return pytree.tree_map_only(torch.Tensor, lay_out, made)

    def expected(self, index: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What eager and a run in float64 (float32, where that is not possible) return for a set."""
        if index not in self._expected:
            args, kwargs = self.sets[index]
            with torch.no_grad():
                eager = [tensor.clone() for tensor in tensors(self.subject.model(*args, **kwargs))]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in eager):
                raise WrongResult("eager's own result is not finite")
            if not any(bool(tensor.any()) for tensor in eager):
                raise WrongResult("eager's own result is zero, so that nothing would be checked")
            try:
                exact = in_float64(self.subject.model, args, kwargs)
            except RuntimeError as error:  # it does not fit, or has calls for narrower floats alone, such as grouped_mm
                log.info("the reference is in float32: %s", error)
                torch.cuda.empty_cache()
                exact = in_float64(self.subject.model, args, kwargs, torch.float32)
            self._expected[index] = eager, exact
        return self._expected[index]

    def check(self, prepared: Prepared, checks: int = CHECKS, sets: Sequence[int] = range(CHECKED)) -> None:
        """Compare results with eager's, set by set.

        Raises:
            WrongResult: an error is more than twice eager's, or a result has another form.
        """
        for index in [*sets] * checks:
            eager, exact = self.expected(index)
            args, kwargs = self.sets[index]
            with torch.no_grad():
                got = prepared(*args, **kwargs)
            try:
                assert_right(got, eager, exact)
            except AssertionError as error:
                raise WrongResult(f"wrong result: {error}") from None

    def rotating(self, prepared: Prepared) -> timing.Call:
        """A call without arguments, which takes the next set of inputs each time."""
        sets = itertools.cycle(self.sets)

        def call() -> Any:
            args, kwargs = next(sets)
            return prepared(*args, **kwargs)

        return call


@contextmanager
def set_up(job: Job, shapes: Sequence[tuple[int, int | None]] = ()) -> Iterator[Setup]:
    """A `Setup`, and its folder until the end; without gradients."""
    # Each peer compiles the same code of the model: that must not count as one model that is compiled too often.
    torch._dynamo.config.recompile_limit = 256
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        yield Setup(job, Path(folder), shapes)


def compare(rounds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """The ratio of each peer's times to those of the fastest that is not torch_rtx, round by round, and its name."""
    others = {name: times for name, times in rounds.items() if name not in PEERS or not PEERS[name].ours}
    if not others:
        return {}
    best = min(others, key=lambda name: statistics.median(itertools.chain(*others[name])))
    return {name: {"against": best, **timing.ratio(times, rounds[best])} for name, times in rounds.items()}


def of_best(values: Mapping[str, float]) -> dict[str, float]:
    """The ratio of each peer's value to the smallest of those that are not torch_rtx."""
    others = [value for name, value in values.items() if name not in PEERS or not PEERS[name].ours]
    return {name: value / min(others) for name, value in values.items()} if others else {}


def flat(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median and percentiles over all calls."""
    return timing.summary([value for times in rounds for value in times])


def prepare(
    job: Job,
    setup: Setup,
    out: Reporter,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Prepared]:
    """The peers that can be prepared and are right, by name; the others are failed rows.

    Args:
        around: makes a context for a peer, from its preparation until it is at full speed.
    """
    out.begin(None, "reference")
    for index in range(CHECKED):
        setup.expected(index)
    found = {}
    for name in job.peers:
        with out.attempt(name, "prepare"):
            with around(name):
                call = PEERS[name].prepare(setup.subject)
                setup.check(call)
                settle(name, min(SETTLE_S, job.settle_s))
            setup.check(call)  # and makes CUDA graphs of what it runs now
            found[name] = call
    return found


def settle(peer: str, seconds: float = SETTLE_S) -> None:
    """Wait until calls of a peer get no faster by themselves.

    Raises:
        TimeoutError: that takes too long.
    """
    if not PEERS[peer].settled(seconds):
        raise TimeoutError(f"still not at its full speed after {seconds:g} s")
