"""Fuzzes the reader of engine files, and what it lets run. Exit status 1 if anything fails that must not.

    make fuzz SECONDS=60 [SEED=1]                       all kinds of trials, for this long together
    python -m tests.fuzz --trials 200000 --only files   so many trials of one kind
    python -m tests.fuzz replay FILE                    one file once more, in this process
    python -m tests.fuzz gpu --seconds 300              on the GPU, below compute-sanitizer
    python -m tests.fuzz samples                        write `samples.txt` anew

`files` are damaged: bytes, JSON, the graph's text, tactics, tables, data; most have right digests. `calls` are files of
one call with hostile arguments, of every operator that a file may name. `launches` are tables of tactics, whose
kernels a stand-in for the driver launches; `kernels` are intact files, whose kernels a GPU launches for hostile
arguments. Each trial is one of: an error of ours, or results that are the file's own.
Faults are: a process that dies, two seconds of processor time, other errors, memory without end, and accesses outside
of a tensor's memory, which `guard.c` finds. The smallest file that shows a fault is kept.
"""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tests.fuzz import guard

if TYPE_CHECKING:
    from tests.fuzz.pool import Make


def main() -> None:
    """Parse the arguments, and do what they say."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__, formatter_class=_Raw)
    parser.add_argument("command", nargs="?", choices=("run", "replay", "gpu", "samples"), default="run")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="limit on the time of all kinds together")
    parser.add_argument("--trials", type=int, default=sys.maxsize, help="of each kind")
    parser.add_argument("--only", choices=sorted({*KINDS["run"], *KINDS["gpu"]}), action="append")
    parser.add_argument("--op", action="append", default=[], help="an operator to call; may be repeated")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="folder of files that show faults")
    options = parser.parse_args()
    if options.command != "gpu":
        guard.restart(["-m", "tests.fuzz", *sys.argv[1:]])
    warnings.simplefilter("ignore")
    logging.disable()
    sys.exit({"run": run, "gpu": run, "replay": replay, "samples": samples}[options.command](options))


KINDS = {"run": ("files", "calls", "launches"), "gpu": ("calls", "files", "kernels")}  # of trials, by command
_Raw = argparse.RawDescriptionHelpFormatter


def makers(ops: Sequence[str] = ()) -> dict[str, Make]:
    """What makes the files of each kind of trials."""
    from tests.fuzz.calls import hostile_call
    from tests.fuzz.launches import hostile_table, with_kernels
    from tests.fuzz.mutants import mutant

    return {
        "files": lambda rng, infer: mutant(rng),
        "calls": partial(hostile_call, ops=ops),
        "launches": lambda rng, infer: hostile_table(rng),
        "kernels": lambda rng, infer: with_kernels(rng),
    }


def run(options: argparse.Namespace) -> int:
    """Fuzz, and say what was found. Returns the exit status."""
    import torch
    import torch.fx.experimental.symbolic_shapes  # inference imports it: once, not in each process

    from tests.fuzz import gpu
    from tests.fuzz.launches import launches
    from tests.fuzz.pool import Pool
    from tests.fuzz.trial import trial

    torch.set_num_threads(1)
    guard.fill(0)  # before processes have limits
    wanted = options.only or KINDS[options.command]
    faults = 0
    for name in wanted:
        act = launches if name == "launches" else trial
        pool = Pool(name, makers(options.op)[name], act, options.seed, options.out, options.first)
        seconds = options.seconds / len(wanted)
        if options.command == "gpu":
            found = gpu.run(pool, options.trials, seconds)
        else:
            found = pool(options.trials, seconds, options.workers)
        ends = ", ".join(f"{count} {end}" for end, count in found.ends.most_common())
        rate = found.trials / max(found.cpu_seconds, 1e-3)
        print(
            f"{name}: {found.trials} trials in {found.seconds:.0f} s, {rate:.0f} per second of a core: {ends}",
            flush=True,
        )
        for bug, count in found.bugs.most_common():
            print(f"  {count:>6} x {bug}", flush=True)
            print(textwrap.indent(found.examples.get(bug, ""), " " * 11), flush=True)
        faults += found.bugs.total()
    print(f"{faults} faults")
    return int(faults > 0)


def replay(options: argparse.Namespace) -> int:
    """Load and call one file in this process, and say how it ended."""
    from tests.fuzz.trial import Bug, trial

    for number in range(8):
        try:
            print(trial(str(options.file), Random(number), lambda phase: print(phase, end=" ", flush=True)))
        except Bug as bug:
            print(f"\n{bug}")
            return 1
    return 0


def samples(options: argparse.Namespace) -> int:
    """Record samples of the operators that a file may name."""
    from tests.fuzz import calls
    from tests.fuzz import samples as recorded

    recorded.write(calls.OPS)
    return 0


if __name__ == "__main__":
    main()
