"""What stays right under abuse, for a moment; `benchmarks.abuse` says how to try it for longer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks import abuse
from tests.paths import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the benchmark kills forked processes: os.fork is missing")
def test_killed_processes() -> None:
    command = [sys.executable, "-m", "benchmarks.abuse", "kill", "--kills", "30", "--pause", "0.05"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("30 kills of 8 processes")
    assert int(done.stdout.split()[5]) > 50, done.stdout


@pytest.mark.parametrize("name", ["reset", "session"])
def test_sixteen_threads(name: str, fresh_dynamo: None) -> None:
    assert abuse.threads(name, 16, 1.5) == []
