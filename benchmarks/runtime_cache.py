"""The runtime cache under fire: writers that are killed at random moments; microseconds of its calls.

    python -m benchmarks.runtime_cache kill [--times 500] [--writers 2]
    python -m benchmarks.runtime_cache latency [--entries 1000] [--bytes 50000]

`kill`: processes write to one file at once, and one after the other is killed (SIGKILL). After each kill, what a writer
was told to be in the file must be there, every value must be whole, and no file may have been found damaged. One kill
in eight meets writers that have just begun a new file. Exit status 1 if anything is lost. It needs POSIX.

`latency`: medians and 99th percentiles of put, and of get from memory, from the file, and of what is not there.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch_rtx.cache.runtime import DeviceKey, RuntimeCache

DEVICE = DeviceKey("NVIDIA GeForce RTX 4090", 89, 13000, "made by the benchmark")
KEYS, BYTES = 16, 128 << 10  # of each writer; large enough that every few batches SQLite moves its log to the file
PAUSE = 0.03  # seconds that a writer lives at most


class Warnings(logging.Handler):
    """The warnings of the cache."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.messages.append(record.getMessage())


class Writer:
    """A process that writes without end, and says through a pipe how far the file has what it wrote."""

    def __init__(self, path: str, name: str, start: int) -> None:
        self.name, self.confirmed = name, start - 1
        self._pipe, other = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._write(path, start, other)
            finally:
                os._exit(1)
        os.close(other)
        os.set_blocking(self._pipe, False)

    def _write(self, path: str, start: int, pipe: int) -> None:
        cache = RuntimeCache(path, DEVICE)
        for number in itertools.count(start):
            body = number.to_bytes(8, "little") + os.urandom(BYTES)
            cache.put("kernel", f"{self.name} {number % KEYS}", hashlib.sha256(body).digest() + body)
            if number % 4 == 0 and cache.flush():
                os.write(pipe, number.to_bytes(8, "little"))

    def kill(self) -> None:
        """End it now, and see how far it had come."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        try:
            said = os.read(self._pipe, 1 << 20)
        except BlockingIOError:
            said = b""
        os.close(self._pipe)
        if said:
            self.confirmed = int.from_bytes(said[-8:], "little")


def check(path: str, confirmed: dict[str, int]) -> list[str]:
    """What is wrong with the file, when everything up to the confirmed number of each writer is to be in it."""
    cache, problems = RuntimeCache(path, DEVICE), []
    for name, last in confirmed.items():
        for key in range(KEYS):
            value = cache.get("kernel", f"{name} {key}")
            expected = max((n for n in range(last - KEYS + 1, last + 1) if n >= 0 and n % KEYS == key), default=-1)
            if value is None:
                problems += [f"{name} {key} is lost"] if expected >= 0 else []
            elif hashlib.sha256(value[32:]).digest() != value[:32]:
                problems.append(f"{name} {key} is damaged")
            elif int.from_bytes(value[32:40], "little") < expected:
                problems.append(f"{name} {key} is older than what was confirmed")
    cache.close()
    return problems


def kill(times: int, writers: int, seed: int = 0) -> list[str]:
    """Kill writers so many times. Returns what went wrong."""
    warnings, problems, rng = Warnings(), [], random.Random(seed)
    logging.getLogger("torch_rtx.cache").addHandler(warnings)
    confirmed_puts = 0
    with tempfile.TemporaryDirectory() as folder:
        path, confirmed, alive = "", {}, []
        for count in range(times):
            if count % 8 == 0:
                for writer in alive:
                    writer.kill()
                path = os.path.join(folder, f"{count}.sqlite")
                confirmed = {f"writer {index}": -1 for index in range(writers)}
                alive = [Writer(path, name, 0) for name in confirmed]
            time.sleep(rng.uniform(0, PAUSE))
            writer = alive.pop(rng.randrange(len(alive)))
            writer.kill()
            confirmed_puts += writer.confirmed - confirmed[writer.name]
            confirmed[writer.name] = writer.confirmed
            problems += [f"kill {count}: {problem}" for problem in check(path, confirmed)]
            alive.append(Writer(path, writer.name, writer.confirmed + 1))
            if count % 8 == 7 and os.path.exists(path):
                (found,) = sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone()
                problems += [] if found == "ok" else [f"kill {count}: {found}"]
        for writer in alive:
            writer.kill()
        problems += [name for name in os.listdir(folder) if "damaged" in name]
    print(f"{times} kills, {confirmed_puts} puts confirmed, {len(problems)} lost, {len(warnings.messages)} warnings")
    return problems + warnings.messages


def microseconds(call: Callable[[int], object], count: int) -> str:
    """Median and 99th percentile of a call, in microseconds."""
    times = []
    for number in range(count):
        start = time.perf_counter()
        call(number)
        times.append(1e6 * (time.perf_counter() - start))
    times.sort()
    return f"{times[count // 2]:10.1f}{times[count * 99 // 100]:10.1f}"


def latency(entries: int, size: int) -> None:
    """Print the table."""
    value = os.urandom(size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runtime.sqlite")
        cache = RuntimeCache(path, DEVICE)
        print(f"{entries} entries of {size} bytes\n{'us':24}{'median':>10}{'p99':>10}")
        print(f"{'put':24}{microseconds(lambda n: cache.put('kernel', f'k{n}', value), entries)}")
        start = time.perf_counter()
        cache.close()
        print(f"{'all of them in the file':24}{1e6 * (time.perf_counter() - start):10.1f}")
        start = time.perf_counter()
        cache = RuntimeCache(path, DEVICE)
        print(f"{'open':24}{1e6 * (time.perf_counter() - start):10.1f}")
        for name, key in (("get from the file", "k"), ("get from memory", "k"), ("get, never met", "x")):
            print(f"{name:24}{microseconds(lambda n, key=key: cache.get('kernel', f'{key}{n}'), entries)}")
        cache.close()


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser("kill")
    killing.add_argument("--times", type=int, default=500)
    killing.add_argument("--writers", type=int, default=2)
    timing = commands.add_parser("latency")
    timing.add_argument("--entries", type=int, default=1000)
    timing.add_argument("--bytes", type=int, default=50_000)
    options = parser.parse_args()
    if options.command == "latency":
        latency(options.entries, options.bytes)
    elif problems := kill(options.times, options.writers):
        print("\n".join(problems))
        sys.exit(1)


if __name__ == "__main__":
    main()
