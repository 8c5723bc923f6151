"""Suite `first_step`: the first training step of a process, with empty caches and again with those it has filled."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import training
from benchmarks.cases import Job
from benchmarks.suites import common
from benchmarks.suites.cold import measure as measure
from benchmarks.timing import synchronize

LATER = 3  # steps after the first


def in_new_process(job: Job, folder: Path, started: float) -> dict[str, float]:
    """In seconds: `import_s` from the start until PyTorch and the model's code are imported; `first_s` from
    `torch.compile`, with the model on the device, to the end of the first step, with what a peer imports for it."""
    imported = time.time()
    with training.set_up(job) as lesson:
        lesson.setup.subject.folder = folder
        synchronize(job.device)
        begin = time.perf_counter()
        prepared, own = lesson.pupil(job.peers[0])
        step = lesson.step(prepared, own)
        step()
        synchronize(job.device)
        first_s = time.perf_counter() - begin
        for _ in range(LATER):
            step()
        common.settle(job.peers[0])  # what it still compiles goes to the caches
        lesson.model.load_state_dict(own.state_dict())
        lesson.check(lesson.gradients(prepared, own))
    return {"import_s": imported - started, "first_s": first_s}
