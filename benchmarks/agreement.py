"""`torch-rtx bench` beside the benchmarks: both measure one engine file, in turns, and should say the same.

    python -m benchmarks.agreement bert_base-b1-l128 resnet50-b1 [--rounds 8] [--size small] [--device cpu]

A line per workload: the median milliseconds of a single call by each, and the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

import torch_rtx
from benchmarks import timing
from benchmarks.cases import Job, Workload, workloads
from benchmarks.suites import common
from torch_rtx.cli import bench, calls

SETTLE_S = 40.0
DURATION_S = 0.3  # of both phases of a turn of `torch-rtx bench`


def in_turns(workload: Workload, device: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of single calls by the benchmarks and by `torch-rtx bench`, the median of each round."""
    with common.set_up(Job("latency", workload, (), device, rounds)) as setup:
        subject = setup.subject
        path = subject.folder / "model.rtx"
        torch_rtx.save(torch_rtx.compile(subject.model, subject.args, subject.kwargs), path)
        theirs = setup.rotating(torch_rtx.load(path, weights=subject.model, trust_binaries=True))
        module = calls.opened(path, None, None, True, None)
        module.attach(subject.model)
        ours = bench._call(module, module, calls.inputs_given(module, None, None, None, 0), False)
        for call in (theirs, ours):
            _settle(call, device)

        def by_benchmarks() -> float:
            found = timing.interleaved({"engine": theirs}, device, 1, lambda name: None)["engine"]
            return statistics.median(found["wall_ms"][0])

        def by_command() -> float:
            return bench.measure(module.device, [ours], 30, DURATION_S, 0.0, (90,)).latency.median

        times: dict[str, list[float]] = {"benchmarks": [], "command": []}
        take = {"benchmarks": by_benchmarks, "command": by_command}
        for _, name in timing.turns(list(take), rounds):
            times[name].append(take[name]())
    return times["benchmarks"], times["command"]


def _settle(call: Callable[[], Any], device: str) -> None:
    for _ in range(2):
        for _ in range(4):
            call()
        torch_rtx.wait(SETTLE_S)
    timing.warm_up(call, device)


def main() -> None:
    """Measure the workloads that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    for workload in workloads(given.workloads, given.size, given.device):
        theirs, ours = in_turns(workload, given.device, given.rounds)
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        first, second = statistics.median(theirs), statistics.median(ours)
        print(f"{workload.name}: benchmarks {first:.4f} ms, torch-rtx bench {second:.4f} ms, {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
