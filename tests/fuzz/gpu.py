"""Trials on a GPU, below compute-sanitizer where it is installed: `python -m tests.fuzz gpu`.

The sanitizer does not follow forks, and after a wrong access or a failed assertion a process can't use the GPU any
more. So a process runs trials one after the other and says where it is; another one goes on behind the trial that ended
it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

from tests.fuzz.pool import Found, Pool
from tests.fuzz.trial import Bug, Lost, trial

BATCH, WALL_SECONDS = 500, 120.0  # trials of one process; limit of a trial, with the start of the process
SAYS = "trial: "  # begins each line of a process that is not the sanitizer's
FLAGS = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86")


def run(pool: Pool, count: int, seconds: float, device: str = "cuda") -> Found:
    """Run the trials of a pool in processes of this kind, until there were `count` or the time is over."""
    tool = shutil.which("compute-sanitizer")
    print("compute-sanitizer: " + (tool or "not installed, only what ends a process is found"), flush=True)
    start, number = time.monotonic(), pool.first
    while number < pool.first + count and time.monotonic() - start < seconds:
        last = min(number + BATCH, pool.first + count)
        arguments = [pool.name, str(pool.seed), str(number), str(last), device]
        command = [*((tool, *FLAGS) if tool else ()), sys.executable, "-m", "tests.fuzz.gpu", *arguments]
        number = _batch(pool, command, number, start + seconds)
    pool.found.seconds = pool.found.cpu_seconds = time.monotonic() - start
    return pool.found


def _batch(pool: Pool, command: list[str], number: int, end: float) -> int:
    """Follow one process. Returns the number of the next trial."""
    said: dict[str, str] = {}
    others: list[str] = []  # lines of the sanitizer since the trial began
    content = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        watch = _Watch(process)
        for line in process.stdout:
            watch.again()
            if not line.startswith(SAYS):
                others.append(line.rstrip())
                continue
            said = json.loads(line.removeprefix(SAYS))
            if "file" in said:
                others.clear()
                number, content = int(said["number"]), bytes.fromhex(said["file"])
                continue
            wrong = next((text for text in others if "Invalid" in text or "Misaligned" in text), None)
            if wrong is not None:
                pool.report(f"{wrong.strip('= ')} in {said['label']}", "\n".join(others)[:2000], number, content)
            elif "bug" in said:
                pool.report(f"{said['bug']} in {said['label']}", said["detail"], number, content)
            else:
                pool.found.ends[said["end"]] += 1
            number += 1
            if time.monotonic() > end:
                process.kill()
        watch.stop()
    if "file" in said and time.monotonic() <= end:
        text = "\n".join(others[-30:])
        pool.report(f"the process ended with status {process.returncode} in {said['label']}", text, number, content)
        number += 1
    return number


class _Watch:
    """Kills a process that has said nothing for too long."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.timer = self._started()

    def _started(self) -> threading.Timer:
        timer = threading.Timer(WALL_SECONDS, self.process.kill)
        timer.daemon = True
        timer.start()
        return timer

    def again(self) -> None:
        self.stop()
        self.timer = self._started()

    def stop(self) -> None:
        self.timer.cancel()


def main(name: str, seed: str, first: str, last: str, device: str) -> None:
    """The process: run trials, and say what they are and how they ended."""
    from tests.fuzz.__main__ import makers

    make, path = makers()[name], Path(tempfile.mkdtemp(), "engine.rtx")
    for number in range(int(first), int(last)):
        rng = Random(f"{seed} {name} {number}")
        label, content = make(rng, True)
        path.write_bytes(content)
        _say(number=number, label=label, file=content.hex())
        try:
            _say(label=label, end=trial(str(path), rng, lambda phase: None, device, binaries=name == "kernels"))
        except Bug as bug:
            _say(label=label, bug=str(bug), detail=bug.detail)
        except Lost:
            _say(label=label, end="the context is lost")
            os._exit(0)


def _say(**said: object) -> None:
    print(f"{SAYS}{json.dumps(said)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
