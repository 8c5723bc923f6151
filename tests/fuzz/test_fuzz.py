"""The fuzzer finds what it is to find; and for a moment it finds nothing in this reader."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import torch_rtx
from tests.fuzz import calls
from tests.fuzz.calls import hostile_call
from tests.fuzz.files import Parts, resealed
from tests.fuzz.launches import hostile_table
from tests.fuzz.mutants import mutant, originals
from tests.fuzz.pool import Pool
from tests.fuzz.trial import Bug, trial, typed
from tests.paths import ROOT
from torch_rtx import engine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials run in forked processes: os.fork is missing")
Say = Callable[[str], None]


def test_intact_files_stay_intact(tmp_path: Path) -> None:
    """What is put together again is read as it was; another byte in the header gets a right digest."""
    path = tmp_path / "engine.rtx"
    for content in originals().values():
        path.write_bytes(Parts.of(content).join())
        assert str(engine.load(path).graph) == Parts.of(content).program["graph"]
        assert resealed(content) == content
        changed = content.replace(b"producer", b"producir")
        path.write_bytes(resealed(changed))
        with pytest.raises(torch_rtx.RtxError, match="producer"):
            engine.load(path)


@pytest.mark.parametrize("make", [mutant, hostile_call, hostile_table])
def test_a_seed_is_a_file(make: Callable[[Random], tuple[str, bytes]]) -> None:
    assert [make(Random(seed)) for seed in range(30)] == [make(Random(seed)) for seed in range(30)]


def test_calls_run(tmp_path: Path) -> None:
    """Enough of the calls get through to their operators."""
    path, ended = tmp_path / "engine.rtx", []
    for seed in range(60):
        path.write_bytes(hostile_call(Random(seed))[1])
        try:
            ended.append(trial(str(path), Random(seed), lambda phase: None))
        except Bug as bug:
            ended.append(str(bug))
    assert ended.count("ran") > 15, ended


def test_every_operator_has_a_sample() -> None:
    assert calls.known().keys() == calls.OPS


# ---- what is found ---------------------------------------------------------------------------------------------------


def dies(*_: Any) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def spins(*_: Any) -> str:
    while True:
        pass


def wastes(*_: Any) -> str:
    return typed(lambda: str(bytes(1 << 40)), "load")


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies or does not end, and an error, of which the trials before and after are none."""
    monkeypatch.setattr("tests.fuzz.pool.CPU_SECONDS", 0.1)
    acts = {b"4": dies, b"7": spins, b"9": wastes}

    def make(rng: Random, infer: bool) -> tuple[str, bytes]:
        return "some", str(rng.randrange(10)).encode()

    def run(path: str, rng: Random, say: Say) -> str:
        say("load")
        return acts.get(Path(path).read_bytes(), lambda: "ran")()

    found = Pool("pool", make, run, 3, tmp_path)(40, 60.0)
    assert [" ".join(bug.split()[:3]) for bug in sorted(found.bugs)] == [
        "load: MemoryError at",
        "load: SIGSEGV in",
        "load: no end",
    ]
    assert found.ends["ran"] > 10
    assert {path.read_bytes() for path in tmp_path.iterdir()} == set(acts)
    (again,) = {line for line in found.examples["load: SIGSEGV in some"].splitlines() if "--first" in line}
    first = int(again.split()[again.split().index("--first") + 1])
    assert set(Pool("pool", make, run, 3, tmp_path, first)(1, 60.0).bugs) == {"load: SIGSEGV in some"}


def test_making_a_file_is_no_fault_of_its_reader(tmp_path: Path) -> None:
    """Where PyTorch's inference ends the process, the file is made without it."""

    def make(rng: Random, infer: bool) -> tuple[str, bytes]:
        return ("some", b"x") if not infer or rng.random() < 0.9 else (dies(), b"")

    found = Pool("pool", make, lambda path, rng, say: "ran", 0, tmp_path)(40, 60.0)
    assert not found.bugs
    assert found.ends.keys() == {"ran"}


GUARDED = """\
import ctypes, os, resource, sys
from random import Random
from tests.fuzz import guard
guard.restart(["-c", *sys.argv[1:2], *sys.argv[1:]])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import torch
from tests.fuzz import trial
from tests.fuzz.calls import hostile_call
guard.fill(0x7F)
x = torch.empty(5)
assert bytes(x.view(torch.uint8).tolist()) == b"\\x7f" * 20
torch.linalg.svd(torch.randn(5, 5))
torch.nn.functional.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)).sort()
for access in sys.argv[2:]:
    if not os.fork():
        exec(access)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
UNINITIALISED = """\
trial._call = lambda *args: torch.empty(5).tolist()
for seed in range(50):
    with open("/dev/shm/torch_rtx_test_" + str(os.getpid()), "wb") as file:
        file.write(hostile_call(Random(seed))[1])
    try:
        trial.trial(file.name, Random(seed), lambda phase: None)
    except trial.Bug as bug:
        os.unlink(file.name)
        os._exit(7 if "uninitialised" in str(bug) else 8)
"""
ACCESSES = {
    "the next page": ("ctypes.string_at(x.data_ptr() + 64, 1)", -signal.SIGSEGV),
    "the page before": ("ctypes.string_at(x.data_ptr() - 4096, 1)", -signal.SIGSEGV),
    "far away": ("ctypes.memset(x.data_ptr() + (1 << 36), 0, 1)", -signal.SIGSEGV),
    "freed memory": ("at = x.data_ptr(); del x; ctypes.string_at(at, 1)", -signal.SIGSEGV),
    "the bytes behind": ("ctypes.memset(x.data_ptr() + 20, 0, 1); del x", -signal.SIGBUS),
    "the bytes before": ("ctypes.memset(x.data_ptr() - 1, 0, 1); del x", -signal.SIGBUS),
    "its own": ("ctypes.memset(x.data_ptr(), 0, 20); del x", 0),
    "uninitialised": (UNINITIALISED, 7),
}


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler: cc")
def test_accesses_outside_of_a_tensor_end_the_process() -> None:
    command = [sys.executable, "-c", GUARDED, GUARDED, *(access for access, _ in ACCESSES.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    ended = dict(zip(ACCESSES, map(int, done.stdout.split()), strict=False))
    assert ended == {name: status for name, (_, status) in ACCESSES.items()}, done.stderr


# ---- this reader -----------------------------------------------------------------------------------------------------


def test_nothing_is_found(tmp_path: Path) -> None:
    """`make fuzz` for a moment: the same trials each time, so that a failure is a change of this package."""
    command = [sys.executable, "-m", "tests.fuzz", "--trials", "100", "--seed", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 faults\n")
