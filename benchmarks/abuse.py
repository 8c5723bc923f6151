"""What stays right when processes are killed and threads get in each other's way?

    python -m benchmarks.abuse kill [--kills 500] [--processes 8] [--pause 0.4]
    python -m benchmarks.abuse threads [--seconds 40] [--threads 16] [--only NAME]

`kill`: processes read and write both caches at once, and one after the other is killed (SIGKILL). What a process was
told to be in a cache must be there in the end, and nothing else may ever be found under its key. It needs POSIX.

`threads` call one model at changing sizes: `compile` what torch.compile returns; `reset` the same, where Dynamo is
reset every few calls, so that all threads compile at once; `session` an engine; `refit` an engine while one thread
changes its weights, where each result must be that of one set of weights. Dynamo is reset between calls: PyTorch does
not survive a reset during a call, whatever the backend.

Both print what they did, and exit with 1 if anything was lost or wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch_rtx.cache.entries import EngineCache
from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cache.runtime_file import DeviceKey
from torch_rtx.cache.store import FileStore

DEVICE = DeviceKey("NVIDIA GeForce RTX 4090", 89, 13000, "made by the benchmark")
LIMIT = 1 << 30  # bytes of each cache: nothing is evicted
KEYS = 2000
PAUSE = 0.4  # seconds between two kills, on average

# ---- processes -------------------------------------------------------------------------------------------------------


def key(number: int) -> Key:
    """The key of an engine."""
    return Key({"kind": Part.of("engine"), "graph": Part.of(f"nodes: {number}")})


def value(number: int) -> bytes:
    """What is stored under a key, 6 to 32 KiB."""
    return hashlib.sha256(str(number).encode()).digest() * (200 + number % 800)


def use(folder: Path, seed: int) -> None:
    """Read and write both caches without end. A line in the journal confirms an entry, or tells of a wrong one."""
    rng = random.Random(seed)
    journal = os.open(folder / "journal", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    engines = EngineCache(FileStore(folder / "engines", LIMIT))
    runtime = RuntimeCache(folder / "runtime.sqlite", DEVICE, size=LIMIT)
    while True:
        number, choice = rng.randrange(KEYS), rng.random()
        if choice < 0.3:
            engines.put(key(number), value(number))
            os.write(journal, b"engine %d\n" % number)
        elif choice < 0.6:
            if engines.get(key(number)) not in (None, value(number)):
                os.write(journal, b"wrong %d\n" % number)
        elif choice < 0.75:
            runtime.put("kernel", str(number), value(number))
            if rng.random() < 0.1 and runtime.flush():
                os.write(journal, b"kernel %d\n" % number)
        elif runtime.get("kernel", str(number)) not in (None, value(number)):
            os.write(journal, b"wrong %d\n" % number)


def start(folder: Path, seed: int) -> int:
    """A process that uses the caches."""
    process = os.fork()
    if process == 0:
        try:
            use(folder, seed)
        finally:
            os._exit(1)
    return process


def kill(kills: int, processes: int, pause: float) -> list[str]:
    """Kill processes so many times, with a pause of so many seconds on average. Returns what was lost or wrong."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder, problems = Path(name), []
        alive = [start(folder, seed) for seed in range(processes)]
        for count in range(kills):
            time.sleep(rng.uniform(0, 2 * pause))
            process = alive.pop(rng.randrange(len(alive)))
            os.kill(process, signal.SIGKILL)
            if os.waitpid(process, 0)[1] != signal.SIGKILL:
                problems.append(f"process {process} had ended by itself")
            alive.append(start(folder, processes + count))
        for process in alive:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        lines = set((folder / "journal").read_text().split("\n"))
        problems += check(folder, lines)
        problems += [f"{file} is left" for file in os.listdir(folder) if "damaged" in file]
    print(f"{kills} kills of {processes} processes, {len(lines)} entries confirmed, {len(problems)} lost or wrong")
    return problems


def check(folder: Path, lines: set[str]) -> list[str]:
    """What the journal confirms and the caches do not have."""
    engines = EngineCache(FileStore(folder / "engines", LIMIT))
    runtime = RuntimeCache(folder / "runtime.sqlite", DEVICE, size=LIMIT)
    problems = []
    for kind, _, text in (line.partition(" ") for line in lines if line):
        number = int(text)
        found = engines.get(key(number)) if kind == "engine" else runtime.get("kernel", text)
        if kind == "wrong" or found != value(number):
            problems.append(f"{kind} {number}{'' if found else ' is lost'}")
    runtime.close()
    return problems


# ---- threads ---------------------------------------------------------------------------------------------------------


def run(count: int, seconds: float, step: Callable[[int, random.Random], None], over: Callable[[], None]) -> list[str]:
    """Run `step(thread, rng)` in so many threads for so long; a thread that ends calls `over`. Returns errors, and
    threads that do not end."""
    import torch

    end, problems, steps = time.monotonic() + seconds, [], [0] * count

    def work(thread: int) -> None:
        rng = random.Random(thread)
        try:
            with torch.no_grad():
                while time.monotonic() < end:
                    step(thread, rng)
                    steps[thread] += 1
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        finally:
            over()

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0) + 120)
    problems += ["a thread does not end" for thread in threads if thread.is_alive()]
    problems += ["a thread has done nothing" for done in steps if not done]
    print(f"{count} threads, {sum(steps)} steps, {len(problems)} problems", flush=True)
    return problems


def threads(name: str, count: int, seconds: float) -> list[str]:
    """One of the scenarios above. Returns what went wrong."""
    import torch
    from torch import nn

    import torch_rtx

    models = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.LayerNorm(8)).eval() for _ in range(3)]
    model, fixed = models[0], torch.randn(4, 16)
    if name in ("compile", "reset"):
        compiled = torch.compile(model, backend="rtx", dynamic=True)
    else:
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        compiled = torch_rtx.compile(model, (fixed,), dynamic_shapes=shapes)
    with torch.no_grad():
        expected = [one(fixed) for one in models]

    together = threading.Barrier(count, torch._dynamo.reset)

    def step(thread: int, rng: random.Random) -> None:
        if thread == 0 and name == "refit":
            compiled.refit(rng.choice(models).state_dict())
        elif name == "refit":
            result = compiled(fixed)
            if not any(torch.allclose(result, one, atol=1e-5) for one in expected):
                raise AssertionError("a result of no set of weights")
        else:
            for _ in range(5):
                x = torch.randn(rng.randrange(1, 64), 16)
                torch.testing.assert_close(compiled(x), model(x))
            if name == "reset":
                with suppress(threading.BrokenBarrierError):  # the first thread whose time is over breaks it
                    together.wait()

    return [f"{name}: {problem}" for problem in run(count, seconds, step, together.abort)]


SCENARIOS = ("compile", "reset", "session", "refit")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser("kill")
    killing.add_argument("--kills", type=int, default=500)
    killing.add_argument("--processes", type=int, default=8)
    killing.add_argument("--pause", type=float, default=PAUSE)
    threading_ = commands.add_parser("threads")
    threading_.add_argument("--only", choices=SCENARIOS, action="append")
    threading_.add_argument("--threads", type=int, default=16)
    threading_.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    if options.command == "kill":
        problems = kill(options.kills, options.processes, options.pause)
    else:
        problems = [p for name in options.only or SCENARIOS for p in threads(name, options.threads, options.seconds)]
    print("\n".join(dict.fromkeys(problems)))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
