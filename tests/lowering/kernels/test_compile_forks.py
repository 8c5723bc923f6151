"""The forks of the compile worker: what they build, what they raise, and that they end with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.runtime.test_compile_client import members

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
PROGRAM = """\
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
os.setpgid(0, 0)
from torch_rtx.errors import KernelError
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels import compile_worker, toolchain
from torch_rtx.lowering.kernels.aot import Compilations, _jobs
from torch_rtx.lowering.kernels.compile_worker import build
from torch_rtx.artefacts import NO_FILES

compile_worker.cores = lambda: range(2)
assert compile_worker._compilations(())._lower is toolchain.lower  # few cores: threads

ended = []
def end():
    ended.append(True)
    raise RuntimeError("a fork has ended")
compile_worker._end, compile_worker.cores = end, lambda: range(5)
running = compile_worker._compilations(())
forks = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
assert len(forks) == 5 and "torch" not in sys.modules

text = "graph import {\\n  input in0: f16[128, 256]\\n" \\
    "  a: f16[128, 256] = op aten.%s.default(self=in0)\\n  return [a]\\n}\\n"
bodies = {op: (parse(text % op), 0) for op in ("relu", "exp", "sin", "cos", "tanh", "neg")}
found = build(bodies, 80, running=running)
assert toolchain.lower.cache_info().currsize == 0  # nothing was compiled here
assert found == build(bodies, 80)
job = toolchain.Job("k", "no program", (), (), False, 4, 1, 80)
try:
    running._lower(job)
except KernelError as error:
    assert "k" in str(error), error
else:
    raise AssertionError
for fork in forks:
    os.kill(int(fork), signal.SIGKILL)
try:
    running._lower(replace(job, name="other"))
except RuntimeError as error:
    assert ended == [True] and "a fork has ended" in str(error)

second = compile_worker._compilations(())
print(os.getpid(), flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_forks_compile() -> None:
    """The same as threads do, with the same errors; one that crashes is told of, and all end with a killed worker."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as program:  # type: ignore[call-overload]
        group = program.stdout.readline()
        assert group, program.stderr.read()
        assert len(members(int(group))) == 6
        program.stdin.close()
        program.wait(10)
        program.stderr.read()  # ends when the last fork has
    assert members(int(group)) == []
