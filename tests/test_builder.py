"""The process that compiles kernels: what it answers, and what happens when it can't, or is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from torch_rtx.errors import KernelError
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse
from torch_rtx.kerneltable import Request, unpack
from torch_rtx.lowering.kernels.worker import build
from torch_rtx.runtime import builder as builder_module
from torch_rtx.runtime.builder import Builder
from torch_rtx.runtime.knowledge import region_key


def body(op: str = "exp", size: object = 100) -> Graph:
    dim = "  dim s = 1, 64, 1\n" if size == "s" else ""
    return parse(
        f"graph import {{\n{dim}  input in0: f32[{size}]\n"
        f"  a: f32[{size}] = op aten.{op}.default(self=in0)\n  return [a]\n}}\n"
    )


@pytest.fixture
def builder() -> Iterator[Builder]:
    made = Builder()
    yield made
    made.close()


def test_an_answer_is_what_is_built_here(builder: Builder) -> None:
    bodies = {"k0": (body(), 0), "k1": (body("sin", "s"), 0), "none": (body(), 99)}
    found = builder.build(bodies, 86)
    assert found == build(Request(bodies, 86))
    assert set(found) == {"k0", "k1"}
    launch = found["k1"].launch
    assert [str(target) for target in launch.targets] == ["sm_86"]
    assert all(unpack(found["k1"].binaries[variant.binary]).startswith(b"\x7fELF") for variant in launch.variants)
    assert builder.build({"k0": (body(), 1)}, 86)["k0"].config == 1
    assert found["k0"].launch.library == "none"


def test_one_process_answers_many_requests(builder: Builder) -> None:
    builder.build({"k": (body(), 0)}, 80)
    first = builder._process
    builder.build({"k": (body(), 0)}, 80)
    assert builder._process is first
    assert first is not None
    first.kill()
    first.wait()
    assert builder.build({"k": (body(), 0)}, 80)  # another one


def test_what_cannot_be_built_is_an_error_here(builder: Builder) -> None:
    with pytest.raises(KernelError, match="sm_13"):
        builder.build({"k": (body(), 0)}, 13)
    assert builder.build({"k": (body(), 0)}, 80)  # the process goes on


def test_without_triton(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_module, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="the package triton is not installed"):
        builder.build({"k": (body(), 0)}, 80)


def test_a_process_that_dies(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_module, "MAIN", "raise SystemExit(3)")
    with pytest.raises(KernelError, match="the process that compiles kernels ended"):
        builder.build({"k": (body(), 0)}, 80)


def test_the_end_of_the_program_waits_for_nothing() -> None:
    """A program that ends in the middle of compiling does so at once, and leaves no process behind."""
    code = """\
import threading, time
from tests.test_builder import body
from torch_rtx.runtime.background import BACKGROUND
from torch_rtx.runtime.builder import BUILDER
BACKGROUND.on_stop(BUILDER.close)
started = threading.Event()
def job():
    BUILDER.build({"k": (body(), 0)}, 80)
    print(BUILDER._process.pid, flush=True)
    started.set()
    for number in range(10_000):
        BUILDER.build({f"k{number}_{at}": (body("exp", 100 + number), 0) for at in range(50)}, 80)
BACKGROUND.submit(job, threading.Event())
started.wait(60)
time.sleep(0.2)
print(time.time(), flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    pid, finished = ended.stdout.split()
    assert time.time() - float(finished) < 10
    with pytest.raises(ProcessLookupError):
        __import__("os").kill(int(pid), 0)


def test_regions_are_known_by_what_they_compute() -> None:
    plain = body()
    text = str(plain).replace("(self=in0)", "(self=in0)  # layers.3 @ model.py:7")
    assert region_key(parse(text)) == region_key(plain)
    assert region_key(body("sin")) != region_key(plain)
    assert region_key(body(size=101)) != region_key(plain)
