"""The process that compiles kernels: what it answers, and what happens when it can't, or is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("triton")

import torch_rtx
from tests.paths import ROOT
from tests.test_structure import FILES, imports, module_of
from torch_rtx import CompilationSettings
from torch_rtx.artefacts import NO_FILES
from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cache.runtime_file import DeviceKey
from torch_rtx.cli.app import app
from torch_rtx.errors import KernelError
from torch_rtx.ir import Graph, kernel_nodes
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels import aot
from torch_rtx.lowering.kernels.aot import Compilations
from torch_rtx.lowering.kernels.compile_worker import build, some
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.toolchain import Code, Job, lower
from torch_rtx.runtime import compile_client, tuning_db
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.compile_client import COMPILE_CLIENT, CompileClient
from torch_rtx.runtime.region_keys import region_key
from torch_rtx.runtime.tuning_context import generator_sources, versions
from torch_rtx.runtime.tuning_db import TuningDatabase
from torch_rtx.tactics import OWN, Candidate
from torch_rtx.targets import ARCHES, EXACT, Target, arch_of


def body(op: str = "exp", size: object = 100) -> Graph:
    dim = "  dim s = 1, 64, 1\n" if size == "s" else ""
    return parse(
        f"graph import {{\n{dim}  input in0: f32[{size}]\n"
        f"  a: f32[{size}] = op aten.{op}.default(self=in0)\n  return [a]\n}}\n"
    )


@pytest.fixture
def client() -> Iterator[CompileClient]:
    made = CompileClient()
    yield made
    made.close()


PRODUCT = parse(
    "graph import {\n  input in0: f16[128, 256]\n  input in1: f16[512, 256]\n"
    "  a: f16[128, 512] = op aten.linear.default(input=in0, weight=in1)\n"
    "  b: f16[128, 512] = op aten.relu.default(self=a)\n  return [b]\n}\n"
)


@pytest.mark.parametrize("sm", [*ARCHES, 88, 101, 150])
def test_every_gpu_has_kernels(sm: int) -> None:
    """Those that are not known have PTX, which their driver compiles; a later GPU's PTX names no one architecture."""
    found = build({"relu": (body("relu"), 0), "product": (PRODUCT, 0)}, sm)
    assert set(found) == {"relu", "product"}
    for candidate in found.values():
        assert candidate.tactic.kernels
        for launch in candidate.tactic.kernels.values():
            binary = candidate.binaries[launch.aligned.binary]
            if arch_of(sm).like is None:
                assert binary[:4] == b"\x7fELF"
            else:
                assert f".target sm_{arch_of(sm).portable}\n".encode() in binary


def test_what_is_ready_first_comes_first() -> None:
    """All others go on to compile, and are not begun again; what is built is what `build` builds."""
    release = threading.Event()

    def slow(job: Job) -> Code:
        assert "relu" not in job.source or release.wait(60)
        return lower(job)

    bodies = {"slow": (PRODUCT, 0), "exp": (body("exp"), 0), "no kernel": (body("bernoulli"), 0), "none": (PRODUCT, 99)}
    with Compilations(2, slow) as running:
        first = some(bodies, 80, NO_FILES, None, EXACT, [("sin", body("sin"), 0)], running=running)
        assert first == {"no kernel": None, "none": None}
        assert len(running._futures) == 3
        left = {name: bodies[name] for name in ("slow", "exp")}
        assert some(left, 80, running=running) == build({"exp": bodies["exp"]}, 80)
        running.forget()  # not what is done and will be asked for
        assert len(running._futures) == 3
        release.set()
        found = some({"slow": bodies["slow"]}, 80, running=running)
        assert len(running._futures) == 3
    assert found == build({"slow": bodies["slow"]}, 80)


def test_results_are_kept_as_long_as_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "KEPT", 1)
    kernels = [generate(body(op), op, arch_of(80), 0) for op in ("exp", "sin")]
    with Compilations(1) as running:
        for kernel in kernels:
            assert kernel is not None
            running.begin(kernel, Target(80))
            running.first({"it": [kernel]}, Target(80))
        assert (len(running._futures), running.waiting) == (2, 0)
        running.forget()
        assert [job.name for job in running._futures] == ["sin"]


def test_the_worker_says_what_is_ready(client: CompileClient) -> None:
    bodies = {"k0": (body(), 0), "none": (body(), 99)}
    found = client.some(bodies, 86)
    left = {name: entry for name, entry in bodies.items() if name not in found}
    assert {**found, **(client.some(left, 86) if left else {})} == {**build(bodies, 86), "none": None}
    with pytest.raises(KernelError):
        client.some({"k0": (body(), 0)}, -1)
    client.stop()
    with pytest.raises(KernelError, match="the program ends"):
        client.some(bodies, 86)


@pytest.mark.quick
def test_an_answer_is_what_is_built_here(client: CompileClient) -> None:
    bodies = {"k0": (body(), 0), "k1": (body("sin", "s"), 0), "none": (body(), 99)}
    found = client.build(bodies, 86)
    assert found == build(bodies, 86)
    assert set(found) == {"k0", "k1"}
    launch = found["k1"].tactic.kernels[OWN]
    assert all(found["k1"].binaries[variant.binary].startswith(b"\x7fELF") for variant in launch.variants)
    assert client.build({"k0": (body(), 1)}, 86)["k0"].rank == 1
    assert found["k0"].tactic.kind == "kernel"


def deep(rows: int, op: str = "") -> Graph:
    """A product of few rows, which fills no chip."""
    then = f"  b: f16[{rows}, 512] = op aten.relu.default(self=a)\n" if op else ""
    return parse(
        f"graph import {{\n  input in0: f16[{rows}, 8192]\n  input in1: f16[512, 8192]\n"
        f"  a: f16[{rows}, 512] = op aten.linear.default(input=in0, weight=in1)\n{then}"
        f"  return [{'b' if op else 'a'}]\n}}\n"
    )


def test_tactics_in_order(client: CompileClient, tmp_path: Path) -> None:
    """Each comes with all of its kernels, and back from a runtime cache as it was; the first of each kind come first,
    the one that is expected to be the fastest before the others."""
    few = deep(16, "relu")
    store = RuntimeCache(tmp_path / "runtime.sqlite", DeviceKey("a GPU", 80, 13000, "tests"))
    database = TuningDatabase(80, client, lambda: store)
    found = [database.candidates({"few": (few, rank)})["few"] for rank in range(6)]
    heads, rest = found[:3], found[3:]
    assert [one.tactic.kind for one in heads] == ["split", "kernel", "library"]
    assert {one.tactic.kind for one in rest} == {"kernel"}
    assert [one.rank for one in found] == list(range(6))
    assert [one.tactic.expected_us for one in heads] == sorted(one.tactic.expected_us for one in heads)
    split = next(one.tactic for one in found if one.tactic.kind == "split")
    assert split.body is not None
    assert list(split.kernels) == [node.op for node in split.body.nodes]
    assert len(split.kernels) == 2
    client.close()
    known = TuningDatabase(80, Broken(), lambda: store)
    assert [known.candidates({"few": (few, rank)})["few"] for rank in range(6)] == found
    with pytest.raises(KernelError):
        known.candidates({"more": (deep(17), 0)})
    store.put("kernel", "more 0", store.get("kernel", "few 0") or b"")
    with pytest.raises(KernelError):  # what is there is the split body of another region
        known.candidates({"more": (deep(17), 0)})


class Broken(CompileClient):
    """Compiles nothing."""

    def build(self, bodies: Mapping[str, tuple[Graph, int]], sm: int, *_: object) -> dict[str, Candidate]:
        raise KernelError("nothing is compiled here")


def test_one_process_answers_many_requests(client: CompileClient) -> None:
    client.build({"k": (body(), 0)}, 80)
    first = client._process
    client.build({"k": (body(), 0)}, 80)
    assert client._process is first
    assert first is not None
    first.kill()
    first.wait()
    assert client.build({"k": (body(), 0)}, 80)  # another one


def test_what_cannot_be_built_is_an_error_here(client: CompileClient) -> None:
    with pytest.raises(KernelError, match="sm_13"):
        client.build({"k": (body(), 0)}, 13)
    assert client.build({"k": (body(), 0)}, 80)  # the process goes on


def test_without_triton(client: CompileClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_client, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="the package triton is not installed"):
        client.build({"k": (body(), 0)}, 80)


def test_a_process_that_dies(client: CompileClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_client, "MAIN", "raise SystemExit(3)")
    with pytest.raises(KernelError, match="the process that compiles kernels ended"):
        client.build({"k": (body(), 0)}, 80)


def test_a_process_that_hangs(client: CompileClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_client, "MAIN", "import time; time.sleep(600)")
    monkeypatch.setattr(compile_client, "TIMEOUT_S", 0.2)
    with pytest.raises(KernelError, match=r"took more than 0\.2 s"):
        client.build({}, 90)


def test_an_interrupted_request_is_not_answered_later(client: CompileClient) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with patch.object(compile_client.pickle, "load", interrupt), pytest.raises(KeyboardInterrupt):
        client.build({"k0": (body(), 0)}, 80)
    assert set(client.build({"k1": (body("sin"), 0)}, 80)) == {"k1"}


def test_where_this_program_cannot_be_started_once_more(client: CompileClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen application is its own Python: it would start itself."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(KernelError, match="this program is frozen"):
        client.build({"k": (body(), 0)}, 80)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups with signals")
def test_an_interrupt_is_not_for_it(client: CompileClient) -> None:
    """Ctrl-C reaches all processes of a terminal or notebook."""
    client.build({"k": (body(), 0)}, 80)
    first = client._process
    assert first is not None
    first.send_signal(signal.SIGINT)
    assert client.build({"k": (body(), 0)}, 80)
    assert client._process is first


def test_what_lies_in_the_current_folder_is_not_run(
    client: CompileClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process imports what this one does, from where this one does."""
    for name in ("bisect", "pickle", "triton", "torch_rtx"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    assert client.build({"k": (body(), 0)}, 80)


def test_the_end_of_the_program_waits_for_nothing() -> None:
    """A program that ends in the middle of compiling does so at once, and leaves no process behind."""
    code = """\
import threading, time
from tests.runtime.test_compile_client import body
from torch_rtx.runtime.background import BACKGROUND
from torch_rtx.runtime.compile_client import COMPILE_CLIENT
BACKGROUND.on_stop(COMPILE_CLIENT.close)
started = threading.Event()
def job():
    COMPILE_CLIENT.build({"k": (body(), 0)}, 80)
    print(COMPILE_CLIENT._process.pid, flush=True)
    started.set()
    for number in range(10_000):
        COMPILE_CLIENT.build({f"k{number}_{at}": (body("exp", 100 + number), 0) for at in range(50)}, 80)
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
        os.kill(int(pid), 0)


ORPHANED = """\
import os, sys, threading, time
from tests.runtime.test_compile_client import body
from torch_rtx.runtime.compile_client import COMPILE_CLIENT
COMPILE_CLIENT.build({"k": (body(), 0)}, 80)
if os.fork() == 0:  # a child that lives on, with copies of all pipes
    os.close(1)
    time.sleep(30)
    os._exit(0)
busy = {f"k{at}": (body("exp", 100 + at), 0) for at in range(300)}
if sys.argv[1] == "busy":
    threading.Thread(target=COMPILE_CLIENT.build, args=(busy, 80)).start()
    time.sleep(0.5)
print(COMPILE_CLIENT._process.pid, flush=True)
time.sleep(30)
"""


def members(group: int) -> list[str]:
    """The commands of the processes in a group, zombies left out."""
    rows = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    found = (row.split(maxsplit=2) for row in rows.splitlines())
    return [args for pgid, state, *args in found if int(pgid) == group and "Z" not in state]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_it_ends_when_the_program_is_killed(state: str) -> None:
    """Within two seconds, in the middle of a request, too, with the assemblers that it has started."""
    command = [sys.executable, "-W", "ignore", "-c", ORPHANED, state]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as program:
        assert program.stdout is not None
        worker = int(program.stdout.readline())
        assert len(members(worker)) >= 1
        program.kill()
        end = time.monotonic() + 2
        while (left := members(worker)) and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(program.pid, signal.SIGKILL)  # its fork
    assert left == []


def test_kernels_for_another_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a build machine puts in a runtime cache is all that a machine without Triton needs."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32)).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    settings = CompilationSettings(device="cuda", targets="later", reuse_cached_engines=False)
    module = torch_rtx.compile(model, (torch.ones(4, 16),), dynamic_shapes=shapes, settings=settings)
    torch_rtx.save(module, tmp_path / "model.rtx")
    file, graph = str(tmp_path / "gpus.sqlite"), module.engine.graph
    (symbol,) = graph.syms
    given = ["--gpu", "NVIDIA GeForce RTX 4090", "--sm", "89", "--driver", "12080", "--file", file]
    for size in ([], ["--size", f"{symbol}=8"]):
        done = CliRunner().invoke(app, ["cache", "runtime", "generate", str(tmp_path / "model.rtx"), *given, *size])
        assert done.exit_code == 0, done.output
        assert "regions for NVIDIA GeForce RTX 4090" in done.output
    COMPILE_CLIENT.close()

    nothing = CompileClient()
    monkeypatch.setattr(compile_client, "find_spec", lambda name: None)
    store = RuntimeCache(file, DeviceKey("NVIDIA GeForce RTX 4090", 89, 13000, versions()))
    for sizes in ({}, {symbol: 8}):
        bodies = [node.body for node in kernel_nodes(bind(graph, sizes)) if node.body is not None]
        wanted = {region_key(body): (body, 0) for body in bodies}
        assert TuningDatabase(89, nothing, lambda: store).candidates(wanted).keys() == wanted.keys()
    other = {**wanted, "more": (body(), 0)}
    assert TuningDatabase(89, nothing, lambda: store).candidates(other).keys() == wanted.keys()
    assert f"1 of {len(other)} regions are not compiled: " in caplog.text
    with pytest.raises(KernelError, match="not installed"):
        TuningDatabase(89, nothing, lambda: store).candidates({"more": (body(), 0)})


def test_kernels_of_other_sources() -> None:
    """All sources that decide what is generated for a region and how it is stored: another one, other kernels."""
    paths = {module_of(path): path for path in FILES}
    read: set[str] = set()
    pending = {"torch_rtx.lowering.kernels.compile_worker"}
    while pending:
        read |= pending
        pending = {name for module in pending for name in imports(paths[module])} - read
    digested = {module_of(path) for path in generator_sources()}
    assert read - digested == {"torch_rtx.errors", "torch_rtx.artefacts"}
    assert {name for name in digested - read if not name.startswith("torch_rtx.lowering")} == set()


def test_kernels_of_another_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled again, unless there is nothing here to compile them with."""
    kept: dict[str, bytes] = {}
    store = SimpleNamespace(get=lambda kind, key: kept.get(key), put=lambda kind, key, value: kept.update({key: value}))
    built: list[int] = []

    class Counting(CompileClient):
        def build(self, bodies: Mapping[str, tuple[Graph, int]], sm: int, *_: object) -> dict[str, Candidate]:
            built.append(len(bodies))
            return build(bodies, sm)

    def ask() -> int:
        TuningDatabase(80, Counting(), lambda: store).candidates({"k": (body(), 0)})  # type: ignore[arg-type,return-value]
        return len(built)

    for version, builds in (("3.7.1", 1), ("3.7.1", 1), ("3.8.0", 2), ("3.8.0", 2), (None, 2)):
        monkeypatch.setattr(tuning_db, "triton_version", lambda version=version: version)
        assert ask() == builds


def test_regions_are_known_by_what_they_compute() -> None:
    plain = body()
    text = str(plain).replace("(self=in0)", "(self=in0)  # layers.3 @ model.py:7")
    assert region_key(parse(text)) == region_key(plain)
    assert region_key(body("sin")) != region_key(plain)
    assert region_key(body(size=101)) != region_key(plain)
