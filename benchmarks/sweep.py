"""`python -m benchmarks sweep`: models from outside, one per GPU at a time, and what is to be said of them in short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

from benchmarks import report, results, runner
from benchmarks.suites import SUITES


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs that work is spread over, as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(filter(None, (name.strip() for name in named.split(","))))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(index) for index, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU")))


def spread(plan: runner.Plan, per_gpu: int) -> runner.Plan:
    """`plan` on all visible GPUs, with so many cases at a time on each."""
    preload = ("benchmarks.preload",) if hasattr(os, "fork") else ()
    return replace(plan, gpus=visible_gpus(), per_gpu=per_gpu, preload=preload)


def main(plan: runner.Plan, counts: bool, per_gpu: int) -> int:
    """Measure, or with `counts` only look at what is built, and print the summary; the exit status, see `runner.main`.

    Args:
        plan: its suites, and with `counts` its device and size, are decided here.
    """
    if counts:
        # For a GPU that need not be there; few layers have the same kinds of graphs as many.
        plan = replace(plan, suites=("counts",), device="cuda", size="small", gpus=())
    else:
        plan = spread(replace(plan, suites=("sweep",)), per_gpu)
    status = runner.main(plan, sys.stderr)
    (suite,) = plan.suites
    for section in report.sections(results.load(plan.out) if plan.out.exists() else results.Results()):
        if section.suite is SUITES[suite]:
            print(report.columns(section, {}) if counts else "", report.sweep_summary(section), sep="", end="")
    return status
