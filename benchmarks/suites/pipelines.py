"""Suite `pipelines`: a result by the programs that people run, from the start of a process on.

    python -m benchmarks.suites.pipelines JOB.json FOLDER PHASE START      one such process, which began at START

A process prints its metrics as it finds them, a JSON object on a line: one that is stopped has said what it had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Job
from benchmarks.pipelines import EARLY_S, MORE_S, SETTLE_S, TEXT
from benchmarks.suites.cold import CACHES

if TYPE_CHECKING:
    from benchmarks.pipelines import Pipeline
    from benchmarks.worker import Reporter

AGAIN = 3  # how often it may begin anew: kernels for a size, then those that were measured, then a CUDA graph


class TimeIsUp(BaseException):
    """A stage has had its time. No `Exception`, since a compiler that is at work takes those for failures."""


class WrongResult(Exception):
    """A pipeline makes something else than in eager mode. (That of `common` would import torch.)"""


def measure(job: Job, out: Reporter) -> None:
    """`result_s` of later results, when nothing is left to do in the background, which took `settle_s`. Under `cold`
    and `warm`, in seconds from the start of the process: `import_s` until libraries are imported, `ready_s` until the
    model is on the device, `first_s` until the first result; and `next_s`, of the result after it. Pipelines have more
    of their own; `early_stopped_s` and `more_stopped_s` are there if these took more than so many seconds."""
    (name,) = job.peers
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, out.attempt(name, "cold"):
        for phase in ("cold", "warm") if job.warm else ("cold",):
            out.begin(name, phase)
            for news in _process(job, Path(folder), phase):
                if "wrong" in news:
                    out.partial(name, {})  # no time of what is wrong
                    raise WrongResult(news["wrong"])
                if "stage" in news:
                    out.begin(name, f"{phase}: {news['stage']}")
                else:
                    found = {**found, **news, phase: {**found.get(phase, {}), **news.get(phase, {})}}
                    out.partial(name, found)
        out.ok(name, found)


def _process(job: Job, folder: Path, phase: str) -> Iterator[dict[str, Any]]:
    """What a process says."""
    environment = {**os.environ, **{variable: str(folder / variable.lower()) for variable in CACHES}}
    path, files, log = folder / "job.json", folder / "files", folder / "log"
    files.mkdir(exist_ok=True)
    path.write_text(json.dumps(job.to_json()))
    with log.open("w") as errors:
        command = [sys.executable, "-m", "benchmarks.suites.pipelines", str(path), str(files), phase, str(time.time())]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):  # libraries may print
                    yield json.loads(line)
    if process.returncode:
        text = log.read_text(errors="replace").strip()
        print(text, file=sys.stderr)
        raise RuntimeError(f"the {phase} process failed: {(text.splitlines() or ['?'])[-1]}")


def in_new_process(job: Job, folder: Path, phase: str, started: float) -> Iterator[dict[str, Any]]:
    """What `measure` says, for one process: metrics, and the stages between them."""
    from benchmarks.timing import summary, synchronize

    made = import_module("benchmarks.text_pipelines" if job.workload.model in TEXT else "benchmarks.image_pipelines")
    yield {phase: {"import_s": time.time() - started}}
    yield {"stage": "model"}
    pipeline: Pipeline = made.build(job.workload, job.peers[0], job.device, folder, phase == "warm")
    synchronize(job.device)
    yield {phase: {"ready_s": time.time() - started}}

    def seconds() -> float:
        start = time.perf_counter()
        pipeline.result()
        synchronize(job.device)
        return time.perf_counter() - start

    yield {"stage": "first result"}
    seconds()
    yield {phase: {"first_s": time.time() - started}}
    yield {phase: {"next_s": seconds()}}
    if phase == "warm":
        return
    if pipeline.early is not None:
        yield {"stage": "early"}
        yield from within(EARLY_S, "early", pipeline.early())
    yield {"stage": "background"}
    start = time.perf_counter()
    settled = settle(pipeline, job.peers[0], min(SETTLE_S, job.settle_s))
    yield {"settle_s": time.perf_counter() - start, "settled": settled}
    yield {"stage": "results"}
    times: list[float] = []
    for _ in range(job.rounds):
        times.append(seconds())
        yield {"result_s": summary(times)}
    try:
        if pipeline.more is not None:
            yield {"stage": "more"}
            yield from within(MORE_S, "more", pipeline.more())
        pipeline.keep()
        yield {"stage": "check"}
        pipeline.check()
    except AssertionError as error:
        yield {"wrong": str(error)}


def within(seconds: float, stage: str, news: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`news`, as far as they come within so many seconds: a stage that takes longer ends there, and keeps no later one
    from being measured. To be used by the main thread."""
    end = time.perf_counter() + seconds
    while True:
        try:
            with _alarm(end - time.perf_counter()):  # not while the caller has its turn
                one = next(news, None)
        except TimeIsUp:
            yield {f"{stage}_stopped_s": seconds}
            return
        if one is None:
            return
        yield one


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp in the block if it takes longer."""

    def ring(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # zero would be no alarm
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def settle(pipeline: Pipeline, peer: str, seconds: float) -> bool:
    """Make results until nothing is left to do in the background; whether that was within so many seconds."""
    if not peer.startswith("rtx"):
        pipeline.brief()
        return True
    import torch_rtx

    end, done = time.perf_counter() + seconds, False
    for _ in range(AGAIN):
        done = torch_rtx.wait(max(0.0, end - time.perf_counter()))
        pipeline.brief()
    return done and torch_rtx.wait(0)


def main(job_path: str, folder: str, phase: str, started: str) -> None:
    """Print what one process finds."""
    import torch

    job = Job.from_json(json.loads(Path(job_path).read_text()))
    for plugin in job.plugins:
        import_module(plugin)
    with torch.no_grad():
        for news in in_new_process(job, Path(folder), phase, float(started)):
            print(json.dumps(news), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
