"""Suite `cold`: from the start of a process to full speed, with empty caches and again with those it has filled.

    python -m benchmarks.suites.cold JOB.json FOLDER START      one such process; START is the time of its start

Files that a peer makes (an engine, a package) stay for the second process, as an application would ship them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Job

if TYPE_CHECKING:
    from benchmarks.worker import Reporter

# Where compilers keep what they have made.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_RTX_CACHE_DIR", "CUDA_CACHE_PATH")
# A process is watched after its first result for as many seconds, by size, and for as many calls.
WATCHED_S, MIN_CALLS = {"small": 0.2, "full": 3.0}, 20
FULL_SPEED = 1.25  # within this factor of the speed that it has in the end


def measure(job: Job, out: Reporter) -> None:
    """Under `cold` and `warm`, in seconds: `import_s` from the start until PyTorch and the model's code are imported,
    `first_s` from there, with the model and its inputs on the device, to the first result, and `full_speed_s` until
    calls have reached their final speed, which is `call_ms`."""
    (name,) = job.peers
    with tempfile.TemporaryDirectory() as folder, out.attempt(name, "cold"):
        environment = {**os.environ, **{variable: f"{folder}/caches/{variable.lower()}" for variable in CACHES}}
        files = Path(folder) / "files"
        files.mkdir()
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job.to_json()))
        metrics = {}
        for phase in ("cold", "warm"):
            out.begin(name, phase)
            command = [sys.executable, "-m", "benchmarks.suites.cold", str(path), str(files), str(time.time())]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                raise RuntimeError(f"the {phase} process failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            metrics[phase] = json.loads(done.stdout.splitlines()[-1])
        out.ok(name, metrics)


def in_new_process(job: Job, folder: Path, started: float) -> dict[str, float]:
    """What `measure` says, for one process."""
    from benchmarks.peers import PEERS
    from benchmarks.suites import common
    from benchmarks.timing import synchronize

    imported = time.time()
    with common.set_up(job) as setup:
        setup.subject.folder = folder
        synchronize(job.device)
        begin = time.perf_counter()
        prepared = PEERS[job.peers[0]].prepare(setup.subject)
        call = setup.rotating(prepared)
        ends: list[float] = []
        settled = PEERS[job.peers[0]].settled
        end: float | None = None  # of watching: so long after nothing more goes on in the background
        while len(ends) < MIN_CALLS or end is None or ends[-1] < end:
            call()
            synchronize(job.device)
            ends.append(time.perf_counter() - begin)
            if end is None and settled(0.0):
                end = ends[-1] + WATCHED_S[job.workload.size]
        setup.check(prepared, checks=1)
    full, speed = full_speed(ends)
    return {"import_s": imported - started, "first_s": ends[0], "full_speed_s": full, "call_ms": 1e3 * speed}


def full_speed(ends: list[float]) -> tuple[float, float]:
    """When calls that ended at these times had reached their final speed, and the seconds of a call from then on."""
    from statistics import median

    lengths = [after - before for before, after in zip([0.0, *ends], ends, strict=False)]
    final = median(lengths[-len(lengths) // 3 :])
    reached = next(
        index
        for index, length in enumerate(lengths)
        if length <= FULL_SPEED * final and median(lengths[index : index + 5]) <= FULL_SPEED * final
    )
    return ends[reached], final


def main(job_path: str, folder: str, started: str) -> None:
    """Print the result of one process, which the job's suite takes, as the last line."""
    from importlib import import_module

    data: dict[str, Any] = json.loads(Path(job_path).read_text())
    job = Job.from_json(data)
    for plugin in job.plugins:
        import_module(plugin)
    suite = import_module(f"benchmarks.suites.{job.suite}")
    print(json.dumps(suite.in_new_process(job, Path(folder), float(started))))


if __name__ == "__main__":
    main(*sys.argv[1:])
